"""ModelOpt or gptq.py quantizes a transformers model, in place: from there on it computes as if it were quantized."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from quantizing.network import inner_width, network_of, query_width, rows_of
from quantizing.quiet import quiet
from quantizing.settings import BLOCK, CALIB_BATCH_TOKENS, SMOOTHQUANT_ALPHA, QuantizationConfig, QuantizationError

if TYPE_CHECKING:
    from quantizing import gptq

_INT8 = {"num_bits": 8, "axis": None}  # one scale a tensor
_INT8_ROWS = {"num_bits": 8, "axis": 0}  # one a row: an output feature of a linear layer, a token of an embedding
_INT8_TOKENS = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}  # one a token, computed as it comes
_FP8 = {"num_bits": (4, 3), "axis": None}

_PRESETS = {
    "int8-weight-only": "INT8_WEIGHT_ONLY_CFG",
    "int4-weight-only": "INT4_AWQ_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8-smoothquant": "INT8_SMOOTHQUANT_CFG",
}


def _head_weight(mode: str, block: int) -> dict[str, Any]:
    """ModelOpt's description of how the head's weight is quantized in each mode."""
    return {
        "int8-weight-only": _INT8_ROWS,
        "int4-weight-only": _int4_blocks(block),
        "fp8": _FP8,
        "int8-smoothquant": _INT8_ROWS,
    }[mode]


def _int4_blocks(block: int) -> dict[str, Any]:
    return {"num_bits": 4, "block_sizes": {-1: block, "type": "static"}}


def modelopt_config(config: QuantizationConfig, block: int = BLOCK, blocks: str = "h") -> dict[str, Any]:
    """What `modelopt.torch.quantization.quantize` is given: ModelOpt's preset of the mode and our changes to it.

    Args:
        block: Input features that share a scale in int4.
        blocks: The name of the list of the network's blocks.
    """
    import modelopt.torch.quantization as mtq

    if config.mode is None:
        preset: dict[str, Any] = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    else:
        preset = copy.deepcopy(dict(getattr(mtq, _PRESETS[config.mode])))
    entries = [
        *preset["quant_cfg"],
        # ModelOpt 0.47's W8A8 presets also quantize what enters a LayerNorm. No engine does, and the export drops it.
        {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
    ]
    if config.mode == "int4-weight-only":
        if config.method != "modelopt":
            preset["algorithm"] = "max"  # not AWQ: the weights are on their grids already
        entries.append({"quantizer_name": f"*.{blocks}.*weight_quantizer", "cfg": _int4_blocks(block)})
    if config.mode == "fp8":
        entries += [{"quantizer_name": f"*lm_head.{which}_quantizer", "cfg": _FP8} for which in ("weight", "input")]
    if config.mode == "int8-smoothquant":
        preset["algorithm"] = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA}
        if not config.per_channel:
            entries.append({"quantizer_name": f"*.{blocks}.*weight_quantizer", "cfg": _INT8})
    if config.kv_cache_dtype != "float16":
        cache = _INT8 if config.kv_cache_dtype == "int8" else _FP8
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cache})
    return {**preset, "quant_cfg": entries}


def quantize_model(model: Any, config: QuantizationConfig, samples: np.ndarray | None) -> None:
    """Calibrates one of transformers' models (network.py): from here on it computes as if it were quantized.

    It is the reference for every other implementation: weights, inputs and the KV cache are rounded to what the
    quantized types can hold and computed with in float32. Linear layers that are transformers' Conv1D become Linear
    with the transposed weight. Those that have one input scale it alike, as the export has it.

    Args:
        model: Changed in place.
        samples: Token ids, (samples, tokens). May be None where `config.needs_calibration` is false.

    Raises:
        QuantizationError: the weights or the activations are not numbers that can be quantized.
    """
    import modelopt.torch.quantization as mtq
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise QuantizationError(f"expected finite weights but {name} holds infinities or NaNs")
    block, network = block_of(model, config), network_of(model)
    if config.quant_lm_head and model.config.tie_word_embeddings:
        # Of the same values still, but each with its own quantizer.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    smooths = config.mode == "int8-smoothquant"
    try:
        with quiet(), torch.no_grad():
            observe = _forward_loop(config, samples) if config.needs_calibration and samples is not None else None
            layers = [] if config.method == "modelopt" else _round_layers(model, config, samples)
            with _without_zero_features(model) if smooths else contextlib.nullcontext():
                mtq.quantize(model, modelopt_config(config, block, network.blocks), observe)
            for layer in layers:
                _set_scales(network.body_of(model).get_submodule(layer.name), layer.scales, block)
            _share_inputs(model)
            if config.per_token:
                _make_inputs_dynamic(model)
            if config.quant_lm_head and config.mode is not None:
                _quantize_head(model, config, block)
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:  # infinities and NaNs; no memory; …
        # ModelOpt and torch each raise their own.
        reason = str(error).strip() or type(error).__name__
        raise QuantizationError(f"ModelOpt cannot calibrate this checkpoint: {reason.splitlines()[0]}") from error


@contextlib.contextmanager
def _without_zero_features(model: Any) -> Iterator[None]:
    """While ModelOpt smooths, no input feature's weights are all zero, as a pruned model's are: it ends there.

    Any scale will do. One weight of theirs is made just large enough to have one, and put back (smoothed) in the end.
    """
    kept = []
    for number, block in enumerate(network_of(model).blocks_of(model)):
        for name in (name for group in network_of(model).linears for name in group):
            weight = rows_of(block.get_submodule(name))
            largest = weight.abs().amax(dim=0)
            least = (float(largest.max()) or 1.0) * 1e-9
            features = (largest < least).nonzero()[:, 0]
            kept.append((number, name, features, weight[:, features].clone()))
            weight[0, features] = least
    yield
    for number, name, features, columns in kept:
        module = network_of(model).blocks_of(model)[number].get_submodule(name)  # a Linear by now
        if len(features):
            module.weight[:, features] = columns / module.input_quantizer.pre_quant_scale.reshape(-1)[features]


def _share_inputs(model: Any) -> None:
    """One scale for the inputs that several layers share, and one weight scale where each has one for its whole weight.

    ModelOpt's export does that to layers with a common input (all but those in fp8), so that engines can join them.
    """
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for _, modules in network_of(model).groups_of(model):
        if len(modules) > 1:
            preprocess_linear_fusion(modules)


def block_of(model: Any, config: QuantizationConfig) -> int:
    return config.block(model.config.hidden_size, query_width(model), inner_width(model))


def _grid(config: QuantizationConfig) -> gptq.Grid:
    from quantizing import gptq

    assert config.bits is not None
    return gptq.Grid(config.bits, config.group_size, config.clipping)


def _round_layers(model: Any, config: QuantizationConfig, samples: np.ndarray | None) -> list[gptq.QuantizedLayer]:
    """Rounds the weights of the linear layers in place, by rtn or gptq."""
    import torch

    from quantizing import gptq

    batches = None
    if config.method == "gptq":
        assert samples is not None
        count = max(1, CALIB_BATCH_TOKENS // samples.shape[1])
        batches = [torch.from_numpy(samples[begin : begin + count]) for begin in range(0, len(samples), count)]
    try:
        return gptq.quantize_layers(model, _grid(config), batches, act_order=config.act_order, damping=config.damping)
    except gptq.GPTQError as error:
        raise QuantizationError(str(error)) from None


def _set_scales(module: Any, scales: Any, block: int) -> None:
    """Gives ModelOpt's quantizer of a weight that is on its grid the grid's scales, (out, groups).

    Its scale is `amax` over the largest integer of its type: 127 in int8, 7 in int4, of three bits too.
    """
    quantizer = module.weight_quantizer
    if quantizer.num_bits == 4:
        scales = scales.repeat_interleave(module.weight.shape[1] // block // scales.shape[1], dim=1)
    quantizer.amax = (scales * quantizer.maxbound).reshape(quantizer.amax.shape)


def _forward_loop(config: QuantizationConfig, samples: np.ndarray) -> Callable[[Any], None]:
    """What ModelOpt calls to see activations: once to observe, and for AWQ once more to search."""
    import torch
    from tqdm import tqdm

    # ModelOpt looks at every weight again in every call, and AWQ quantizes it eleven times: that has to be shared.
    batch = max(1, CALIB_BATCH_TOKENS // samples.shape[1])
    passes = 0

    def run(model: Any) -> None:
        nonlocal passes
        passes += 1
        # Of the other modes, none looks at the head's input.
        network = model if config.mode == "fp8" else network_of(model).body_of(model)
        with tqdm(desc=f"calibration, pass {passes}", total=len(samples), unit="sample", file=sys.stderr) as progress:
            for begin in range(0, len(samples), batch):
                part = samples[begin : begin + batch]
                network(torch.from_numpy(part), use_cache=False)
                progress.update(len(part))

    return run


def _make_inputs_dynamic(model: Any) -> None:
    """Replaces the calibrated input scales by one a token. Smoothing has to be over: it needs the calibrated ones."""
    import modelopt.torch.quantization as mtq

    for name, module in model.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module.reset_amax()
            mtq.set_quantizer_by_cfg(model, [{"quantizer_name": name, "cfg": _INT8_TOKENS}])


def _quantize_head(model: Any, config: QuantizationConfig, block: int) -> None:
    """Quantizes the head's weight and, in the same way, those of the embeddings: of the tied one, or of both.

    By rounding to nearest also in gptq: an embedding gives single rows, which nothing can make up for.
    """
    import modelopt.torch.quantization as mtq

    assert config.mode is not None
    modules, network = {"lm_head": model.lm_head}, network_of(model)
    if model.config.tie_word_embeddings or config.quant_embeddings:
        name = f"{network.body}.{network.tokens}"
        modules[name] = model.get_submodule(name)
    if config.quant_embeddings and network.positions is not None:
        name = f"{network.body}.{network.positions}"
        modules[name] = model.get_submodule(name)
    for name, module in modules.items():
        entry = {"quantizer_name": f"{name}.weight_quantizer", "cfg": _head_weight(config.mode, block)}
        mtq.set_quantizer_by_cfg(model, [entry])
        mtq.calibrate(module, "max")
        if config.method != "modelopt":
            from quantizing import gptq

            layer = gptq.quantize(module.weight, None, _grid(config), name=name)
            module.weight.copy_(layer.weight)
            _set_scales(module, layer.scales, block)
