"""Quantization-aware training to *full int8*: a GPT-2 that computes with rounded weights while it learns.

    qat.prepare(model)           # transformers' GPT2LMHeadModel, from scratch or trained; changed in place
    ...                          # train it as any other; evaluate it as it is
    qat.export(model, folder)    # int8 embeddings, attention, MLP and head, which example.py --model-type FOLDER runs
    qat.load(folder)             # what the folder holds, in float32 again

Every matrix goes through one of NVIDIA ModelOpt's fake quantizers in every forward pass: int8, one scale for each
output feature or for each row of an embedding. The gradient passes straight through the rounding to the float32 weights
behind it (the straight-through estimator: Bengio et al. 2013, arXiv:1308.3432; in training, Jacob et al. 2017,
arXiv:1712.05877), which is what the optimizer moves.

Scales follow the weights. ModelOpt's own recipe calibrates a trained model once and then keeps each scale; a weight
that grows beyond it is cut off. Here models are trained from nothing, and weights grow many times over: the quantizers
are ModelOpt's dynamic ones, which take the largest magnitude of each row anew in every forward pass. Nothing is ever
cut off, there is no state beside the weights, and a tied head and embedding stay tied, with the same scales.

Of the two well-kept libraries, ModelOpt it is because its exporter writes the layout that this project reads, it knows
transformers' Conv1D, and quantization.py needs it anyway. torchao would be one more dependency, and has neither.
"""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from transformers import GPT2Config, GPT2LMHeadModel

import quantizing.export
import quantizing.quiet
from quantization import QuantizationConfig, QuantizationError
from weight_loader import open_checkpoint

FULL_INT8 = QuantizationConfig("int8-weight-only", quant_lm_head=True, quant_embeddings=True)

_ROWS = {"num_bits": 8, "axis": 0, "type": "dynamic", "pass_through_bwd": True}
_QUANTIZERS = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": _ROWS},
        {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
    ],
    "algorithm": None,
}


def prepare(model: GPT2LMHeadModel) -> None:
    """Makes a model compute with its weights rounded to int8, and learn through that.

    Its linear layers, transformers' Conv1D, become Linear: their weights are (out, in) from here on, in `state_dict`
    too. Optimizers and copies have to be made afterwards. Parameters keep their names; none is added.

    Args:
        model: In float32, changed in place.

    Raises:
        QuantizationError: it is quantized already.
    """
    if is_prepared(model) or getattr(model.config, "quantization_config", None):
        raise QuantizationError("expected a model that is not quantized yet but it is")
    with quantizing.quiet.quiet():
        mtq.quantize(model, copy.deepcopy(_QUANTIZERS))


def is_prepared(model: torch.nn.Module) -> bool:
    return any(isinstance(module, TensorQuantizer) for module in model.modules())


@torch.no_grad()
def export(model: GPT2LMHeadModel, folder: Path) -> None:
    """Writes what a prepared model computes with, in ModelOpt's unified HuggingFace layout, without a tokenizer.

    The integers in the folder are those of the model's next forward pass. The model stays as it is, and can be trained
    further.

    Args:
        folder: Is made if need be. It is complete only when this returns.

    Raises:
        QuantizationError: the model has not been prepared, or its weights are not finite.
        OSError: the folder cannot be written.
    """
    if not is_prepared(model):
        raise QuantizationError("expected a model that qat.prepare has prepared but got one without quantizers")
    spent = copy.deepcopy(model).cpu().eval()  # the exporter replaces the weights of what it is given
    spent.config.architectures = ["GPT2LMHeadModel"]
    if spent.config.tie_word_embeddings:
        # Of the same values still, but packed each for itself. The exporter stores them once.
        spent.lm_head.weight = torch.nn.Parameter(spent.lm_head.weight.detach().clone())
    for name, module in spent.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            _settle(name, module.weight, quantizer)
    quantizing.export.export(spent, folder, FULL_INT8)


@torch.no_grad()
def load(folder: str | Path) -> GPT2LMHeadModel:
    """A float32 model with the numbers that an exported folder's integers stand for, as transformers has them.

    Raises:
        CheckpointError: the folder does not hold a model.
    """
    checkpoint = open_checkpoint(Path(folder))
    config = GPT2Config.from_pretrained(folder)
    config.quantization_config = None
    model = GPT2LMHeadModel(config)
    parameters = dict(model.transformer.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    for name, values in checkpoint.parameters("float32"):
        if name in parameters:  # the others are scales
            is_conv1d = values.ndim == 2 and name.startswith("h.")
            parameters[name].copy_(torch.from_numpy(values.T if is_conv1d else values))
    return model.eval()


def _settle(name: str, weight: torch.nn.Parameter, quantizer: TensorQuantizer) -> None:
    """Puts the rounded values in the place of a weight (rows, width), and keeps the scales that they were rounded by.

    The exporter divides by a scale where the quantizer multiplies by its reciprocal, which for one weight in a million
    makes another integer. Of values that are rounded already both make the same.
    """
    largest = weight.abs().amax(dim=1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise QuantizationError(f"expected finite weights but {name}.weight holds infinities or NaNs")
    weight.copy_(quantizer(weight))
    quantizer.set_from_attribute_config({"type": "static"})
    quantizer.amax = largest
