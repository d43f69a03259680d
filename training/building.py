"""The model that a run trains: a new GPT-2, a checkpoint's, or that of a run that goes on."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import machine
import quantizing.folders
import quantizing.quiet
from command_line import UsageError
from loading.modelopt_layout import DESCRIPTION_FILE
from tokenizer import describe
from tokenizing.files import has_files
from training.batches import Dataset
from training.config import TrainConfig
from training.log import REQUIREMENTS
from training.resume import began_with, check_weights, trained_tensors
from training.state import STATE_FILE
from weight_loader import open_checkpoint


def build_model(config: TrainConfig, data: Dataset, state: dict[str, Any] | None = None) -> GPT2LMHeadModel:
    """Return a GPT-2: freshly initialised, its head tied to its token embedding; a checkpoint's; or a resumed run's.

    With qat, it computes with weights rounded to int8; with lora_rank, it is peft's model of a checkpoint's.
    """
    dropout = {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "attn_pdrop": config.attn_dropout}
    path = Path(config.out_dir) / STATE_FILE
    begun_from = config.init_from if state is None else began_with(state, "init_from")
    if state is None and begun_from == "scratch":
        check_memory(config, data)
    if state is not None and not config.lora_rank:
        model = rebuild(state["architecture"], dropout, path)
    elif begun_from == "scratch":
        shape = {"n_positions": config.block_size, **{k: getattr(config, k) for k in ("n_embd", "n_layer", "n_head")}}
        ends = {"bos_token_id": data.eos_token_id, "eos_token_id": data.eos_token_id}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=data.vocab_size, **shape, **ends, **dropout))
    else:
        model = open_pretrained(begun_from, config.block_size, data, dropout)
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")  # the same function, in one fused kernel
    if config.qat:
        quantization_aware().prepare(model)
    if config.lora_rank:
        model = low_rank(config).add_adapter(model, config, begun_from)
    if state is not None:
        check_weights(state, trained_tensors(model, config), path)
        model.load_state_dict(state["model"], strict=not config.lora_rank)
    if not config.bias:
        freeze_biases(model)
    return model


def check_memory(config: TrainConfig, data: Dataset) -> None:
    """Refuse a model or a batch that cannot be in this machine's memory, before anything tries.

    Raises:
        UsageError: its weights, their gradients and AdamW's moments, or a batch's logits, take more.
    """
    width = config.n_embd
    parameters = config.n_layer * 12 * width**2 + (data.vocab_size + config.block_size) * width
    for what, size in (
        (f"{parameters:,} parameters", 16 * parameters),
        (f"batch_size={config.batch_size}", 4 * config.batch_size * config.block_size * data.vocab_size),
    ):
        if size > machine.memory_bytes():
            has = machine.memory_bytes() >> 30
            raise UsageError(f"{what} take at least {size >> 30:,} GiB of memory, but this machine has {has:,}")


def rebuild(architecture: dict[str, Any], dropout: dict[str, float], path: Path) -> GPT2LMHeadModel:
    """Return a model of a saved architecture, proven to compute; its weights are still to be loaded.

    Raises:
        UsageError: transformers can make no such model.
    """
    try:
        model = GPT2LMHeadModel(GPT2Config(**{**architecture, **dropout}))
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
        fits = logits.shape == (1, 1, architecture["vocab_size"])
        model.generation_config.validate(strict=True)  # as they are when they are saved
        getattr(model.config, "validate", bool)()
    except Exception:  # whatever a value makes of transformers' code
        fits = False
    if not fits:
        raise UsageError(f"cannot resume: {path} is damaged (architecture)")
    return model.train()


def quantization_aware() -> ModuleType:
    """Return qat.py, which needs ModelOpt; training in float does not.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with quantizing.quiet.quiet():  # ModelOpt warns of every transformers that is newer than itself
            return importlib.import_module("training.qat")
    except ImportError as error:
        file = quantizing.folders.REQUIREMENTS
        raise UsageError(f"qat=True needs the packages of {file} ({error}): pip install -r {file}") from None


def low_rank(config: TrainConfig) -> ModuleType:
    """Return training/lora.py, which needs peft; other training does not.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with quantizing.quiet.quiet():
            return importlib.import_module("training.lora")
    except ImportError as error:
        raise UsageError(
            f"lora_rank={config.lora_rank} needs the packages of {REQUIREMENTS} ({error}): pip install -r "
            f"{REQUIREMENTS}"
        ) from None


def open_pretrained(name: str, block_size: int, data: Dataset, dropout: dict[str, float]) -> GPT2LMHeadModel:
    """Return the model of a HuggingFace folder or hub name, its context cut to `block_size`.

    Raises:
        UsageError: it has another tokenizer than the data, or a shorter context.
        CheckpointError: it is absent or not a GPT-2, or its tokenizer cannot be used.
    """
    if (Path(name) / DESCRIPTION_FILE).is_file():
        raise UsageError(f"expected a float checkpoint to begin with, but {name} is quantized")
    folder = open_checkpoint(name).path
    try:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **dropout)
    except Exception as error:  # transformers and safetensors each raise their own
        raise UsageError(f"cannot open {name}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    same = data.vocab_size <= model.config.vocab_size
    if has_files(folder):
        same = describe(folder, model.config.vocab_size) == data.description
    if not same:
        raise UsageError(f"the dataset's tokenizer is not that of {name}; prepare the text with --tokenizer {name}")
    context = model.config.n_positions
    if block_size > context:
        raise UsageError(f"{name} has a context of {context}, but block_size={block_size}; give a smaller block_size")
    if block_size < context:
        model.transformer.wpe = nn.Embedding.from_pretrained(model.transformer.wpe.weight[:block_size], freeze=False)
        model.config.n_positions = block_size
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = data.eos_token_id
    return model


def freeze_biases(model: GPT2LMHeadModel) -> None:
    """Take the biases out of the training. HuggingFace's format has no GPT-2 without: they are there, and are zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            if parameter.any():
                raise UsageError("bias=False, but the checkpoint has biases that are not zero; leave out bias=False")
            parameter.requires_grad_(False)
