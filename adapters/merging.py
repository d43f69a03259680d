"""A checkpoint and an adapter → HuggingFace's folder of the sum: weights of W + scale * B @ A, in float32.

What plain LoRA is, our own reader says, of any base that transformers has a model for. What it refuses because it is
more than that (DoRA, whole modules, biases, embeddings) peft merges, which has to compute the same before and after.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import AdapterError, NotPlainError
from adapters.lora import CONFIG_FILE, Lora, read_lora, weights_file
from adapters.places import LINEARS
from loading import numbers
from loading.checkpoint import Checkpoint
from loading.containers.folder import open_weights
from loading.disk import read_json
from loading.errors import listed, reason
from loading.hub import GENERATION_FILE
from loading.table import parameters
from quantizing.counterpart import counterpart_of
from quantizing.folders import check_target, kept_files, written_beside
from quantizing.quiet import no_progress_bars, quiet
from quantizing.torch_model import build_torch_model, is_of_transformers, load_torch_model

REQUIREMENTS = "requirements/train.txt"
_TOLERANCE = 1e-4  # of logits in float32, relative to the largest: what the order of sums changes is far below


def merge(checkpoint: Checkpoint, adapter: Path, folder: Path, dtype: str) -> None:
    """Writes the checkpoint with the adapter in its weights, all of it or nothing.

    Args:
        adapter: PEFT's folder, or NeMo's archive.
        folder: Must not exist, or be empty.
        dtype: Of the weights in it, "float32", "float16" or "bfloat16".

    Memory: that of the model in float32.

    Raises:
        AdapterError: the adapter is not for this checkpoint, or cannot be merged; told before any long work where that
            is possible.
        QuantizationError: transformers has no such model, or `folder` cannot be written.
        CheckpointError: the checkpoint, its tokenizer or a file of the adapter cannot be used.
    """
    if checkpoint.config.quant_mode is not None or checkpoint.config.kv_cache_dtype is not None:
        raise AdapterError(f"expected a float checkpoint to merge into but {checkpoint.path} is quantized")
    check_target(folder)
    if not is_of_transformers(checkpoint.path):
        counterpart_of(checkpoint)
    more: NotPlainError | None = None
    try:
        lora = read_lora(adapter, checkpoint)
    except NotPlainError as error:
        more = error
    _require(*(("torch", "transformers") if more is None else ("torch", "transformers", "peft")))
    kept = kept_files(checkpoint)
    opens = is_of_transformers(checkpoint.path)
    model = load_torch_model(checkpoint.path) if opens else build_torch_model(checkpoint)
    if more is None:
        _add(model, checkpoint, lora)
    else:
        model = _merged_by_peft(model, adapter, more)
    with written_beside(folder) as partial:
        _write(model, partial, dtype)
        (partial / GENERATION_FILE).unlink(missing_ok=True)  # transformers' idea of it: the checkpoint's own counts
        for name, content in kept.items():
            (partial / name).write_bytes(content)


def _require(*packages: str) -> None:
    try:
        with quiet():
            for name in packages:
                importlib.import_module(name)
    except ImportError as error:
        raise AdapterError(
            f"merging this adapter needs the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
        ) from None


def _add(model: Any, checkpoint: Checkpoint, lora: Lora) -> None:
    """Adds an adapter's products to the weights of transformers' model."""
    import torch
    from tqdm import tqdm

    config, layout = checkpoint.config, checkpoint.layout
    if not is_of_transformers(checkpoint.path):
        counterpart = counterpart_of(checkpoint)
        config, layout = counterpart.config, counterpart.layout
    pairs = {f"{linear}.weight": pair for linear, pair in zip(LINEARS, lora.matrices, strict=True) if pair is not None}
    changed = [each for each in parameters(config, layout) if each.name.split(".", 2)[-1] in pairs]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in tqdm(changed, "merging", unit="layer", leave=False, file=sys.stderr, disable=None):
            _, layer, name = parameter.name.split(".", 2)
            downs, ups = pairs[name]
            delta = ups[int(layer)].T @ downs[int(layer)]  # (out_features, in_features)
            for piece, values in numbers.taken_apart(parameter, delta):
                weights[f"{layout.prefix}{piece.name}"].add_(torch.from_numpy(np.ascontiguousarray(values)))


def _merged_by_peft(model: Any, folder: Path, more: NotPlainError) -> Any:
    """transformers' model with an adapter that is more than plain LoRA.

    Args:
        more: What our own reader refuses it for.

    Raises:
        AdapterError: peft does not load all of it, or what it merges computes something else.
    """
    import peft
    import torch

    known = {field.name for field in fields(peft.LoraConfig)}
    unknown = sorted(name for name, value in read_json(folder / CONFIG_FILE).items() if value and name not in known)
    if unknown:
        raise AdapterError(f"{folder / CONFIG_FILE}: peft {peft.__version__} does not know {listed(unknown)}")
    random = np.random.default_rng(0)
    rows, length = model.get_input_embeddings().weight.shape[0], min(16, model.config.max_position_embeddings)
    probe = torch.from_numpy(random.integers(0, rows, (1, length)))
    try:
        with quiet(), no_progress_bars(), torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
            taken = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            before = adapted(input_ids=probe, use_cache=False).logits
            merged = adapted.merge_and_unload()
            after = merged(input_ids=probe, use_cache=False).logits
    except Exception as error:  # peft, torch and safetensors each raise their own
        raise AdapterError(f"peft cannot merge {folder}: {reason(error)}; ours does not, since {more}") from None
    odd = sorted(taken.keys() ^ open_weights(weights_file(folder)).tensors.keys())
    if odd:
        raise AdapterError(f"peft takes {folder} for something else: it does not agree with it on {listed(odd)}")
    deviation = float((after - before).abs().max() / before.abs().max())
    if not deviation < _TOLERANCE:
        raise AdapterError(
            f"{folder} cannot be merged: what peft makes of it computes something else (by {deviation:.1e}); {more}"
        )
    merged.config.tie_word_embeddings = merged.lm_head.weight is merged.get_input_embeddings().weight
    return merged


def _write(model: Any, folder: Path, dtype: str) -> None:
    """Writes transformers' model.

    Raises:
        AdapterError: a number is not finite in this type.
        OSError: the files cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    model.to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AdapterError(f"expected finite numbers in {dtype} but {name} has others when merged")
    try:
        with quiet(), no_progress_bars():
            model.save_pretrained(folder)
    except SafetensorError as error:  # for a full disk, too
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
