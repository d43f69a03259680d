"""Folders of every family as ModelOpt exports them by itself, against its own models; their joined scales."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from random_models import logits_of, random_model
from safetensors.torch import load_file, save_file
from selection import partly_slow
from test_model import relative_error, stateless_logits

from engine import config_of, load_model
from quantization import QuantizationConfig
from quantizing.calibration import modelopt_config
from quantizing.quiet import quiet
from weight_loader import CheckpointError, open_checkpoint

IDX = np.random.default_rng(0).integers(0, 97, (2, 21)).astype(np.int32)
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 256},
    "starcoder2": {"hidden_size": 128, "intermediate_size": 256, "sliding_window": 9},
    "gpt_bigcode": {"n_embd": 128, "n_inner": 256},
    "gpt_bigcode, multi-head": {"n_embd": 128, "n_inner": 256, "multi_query": False},
}
MODES = {
    "int8-weight-only": {},
    "int4-weight-only": {},
    "fp8": {},
    "int8-smoothquant": {},
    "int8-smoothquant, rows": {"per_channel": True},
}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def exported(family: str, mode: str, folder: Path, shares_scales: bool = True) -> Any:
    """ModelOpt's model, and its folder. In fp8, what shares an input gets one scale."""
    model = random_model(family.partition(",")[0], **SIZES[family])
    model.config.architectures = [type(model).__name__]
    settings = QuantizationConfig(mode=mode.partition(",")[0], **MODES[mode])  # type: ignore[arg-type]
    ids = torch.from_numpy(IDX).long()
    with quiet(), torch.no_grad(), warnings.catch_warnings():
        mtq.quantize(
            model,
            modelopt_config(settings, blocks="h" if family.startswith("gpt") else "layers"),
            lambda each: each(ids),
        )
        if mode == "fp8" and shares_scales:
            share_scales(model)
        expected = logits_of(model, IDX)
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder)
    return expected


def share_scales(model: Any) -> None:
    for block in model.modules():
        for group in GROUPS:
            found = [getattr(block, name).weight_quantizer for name in group if hasattr(block, name)]
            for quantizer in found:
                quantizer.amax = torch.stack([each.amax for each in found]).max()


def folder_logits(family: str, folder: Path) -> np.ndarray:
    """Of transformers' model with the values that a folder's integers stand for, its inputs scaled and rounded."""
    tensors, state = load_file(folder / "model.safetensors"), {}
    model = random_model(family.partition(",")[0], **SIZES[family])
    for name, stored in tensors.items():
        if name.endswith("_scale"):
            continue
        state[name] = stored
        scale = tensors.get(f"{name}_scale")
        if scale is not None:
            numbers = stored
            if stored.dtype == torch.uint8:
                halves = torch.stack([stored & 15, stored >> 4], dim=1).reshape(-1, stored.shape[1]).char()
                numbers = torch.where(halves > 7, halves - 16, halves)
            by_scale = numbers.float().reshape(*scale.shape, -1) if scale.ndim else numbers.float()
            state[name] = (by_scale * (scale[..., None] if scale.ndim else scale)).reshape(numbers.shape)
        module = name.removesuffix(".weight")
        pre, rounding = tensors.get(f"{module}.pre_quant_scale"), tensors.get(f"{module}.input_scale")

        def change(module: Any, inputs: Any, pre: Any = pre, rounding: Any = rounding) -> Any:
            x = inputs[0] if pre is None else inputs[0] * pre
            return (x if rounding is None else (x / rounding).round().clamp(-128, 127) * rounding,)

        if scale is not None:
            model.get_submodule(module).register_forward_pre_hook(change)
    model.load_state_dict(state, strict=False)
    return logits_of(model, IDX)


def our_logits(folder: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    gpt = load_model(checkpoint, config_of(checkpoint, "float32"))
    return stateless_logits(gpt, IDX)


@pytest.mark.parametrize(
    ("family", "mode"),
    partly_slow([(family, mode) for family in SIZES for mode in MODES], [("llama", mode) for mode in MODES]),
)
def test_equal_to_modelopts_own(tmp_path: Path, family: str, mode: str) -> None:
    """Scales of layers that share an input become one when they are exported: there what the folder means counts.

    Where inputs are rounded, another order of sums makes some of them go the other way.
    """
    expected = exported(family, mode, tmp_path)
    if mode not in ("int8-weight-only", "fp8"):
        expected = folder_logits(family, tmp_path)
    tolerance = {"int8-weight-only": 1e-5, "int4-weight-only": 1e-5, "fp8": 2e-2}.get(mode, 1e-2)
    assert relative_error(our_logits(tmp_path), expected) <= tolerance


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


PROJECTIONS = [f"model.layers.0.self_attn.{which}_proj" for which in "qkv"]


def test_fp8_scales_that_differ(tmp_path: Path) -> None:
    """As ModelOpt exports them: the model has one scale for q, k and v, and TensorRT knows none of rows in fp8."""
    exported("llama", "fp8", tmp_path, shares_scales=False)
    with pytest.raises(CheckpointError, match=r"expected the weight_scale of layers.0.self_attn.q_proj, .* to be one"):
        list(open_checkpoint(tmp_path).parameters("float32"))


def test_fp8_scales_that_differ_by_powers_of_two(tmp_path: Path) -> None:
    """Numbers of 16 at a scale are numbers of 4 at four times that scale."""
    exported("llama", "fp8", tmp_path)
    expected = dict(open_checkpoint(tmp_path).parameters("float32"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{PROJECTIONS[1]}.weight"
        values = tensors[name].float()
        tensors[name] = torch.where(values.abs() <= 100, values * 4, 0).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"] / 4

    edit(tmp_path, change)
    found = dict(open_checkpoint(tmp_path).parameters("float32"))
    rows = np.s_[128:192]
    wanted = expected["h.0.attn.c_attn.weight"][rows]
    scale = expected["h.0.attn.c_attn.weight_scale"]
    wanted = np.where(np.abs(wanted) <= 100.5 * scale, wanted, 0)
    np.testing.assert_array_equal(found["h.0.attn.c_attn.weight"][rows], wanted)
    np.testing.assert_array_equal(found["h.0.attn.c_attn.weight_scale"], scale)


@pytest.mark.parametrize("suffix", ["input_scale", "pre_quant_scale"])
def test_scales_of_one_input_that_differ(tmp_path: Path, suffix: str) -> None:
    exported("llama", "int8-smoothquant", tmp_path)
    edit(tmp_path, lambda tensors: tensors[f"{PROJECTIONS[1]}.{suffix}"].mul_(2))
    with pytest.raises(CheckpointError, match=rf"k_proj.{suffix} to be equal to layers.0.self_attn.q_proj.{suffix}"):
        list(open_checkpoint(tmp_path).parameters("float32"))


def test_pre_quant_scale_of_some(tmp_path: Path) -> None:
    """Layers that share an input have all of them or none."""
    exported("llama", "int4-weight-only", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({f"{PROJECTIONS[1]}.pre_quant_scale": torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj.pre_quant_scale, .*v_proj.pre_quant_scale$"):
        open_checkpoint(tmp_path)
    for other in PROJECTIONS:
        edit(tmp_path, lambda tensors, n=other: tensors.update({f"{n}.pre_quant_scale": torch.full((128,), 2.0)}))
    found = dict(open_checkpoint(tmp_path).parameters("float32"))
    assert (found["h.0.attn.c_attn.pre_quant_scale"] == 2).all() and (
        found["h.1.attn.c_attn.pre_quant_scale"] == 1
    ).all()


@pytest.mark.parametrize("cache", ["INT8", "FP8"])
def test_cache_scales(tmp_path: Path, cache: str) -> None:
    """By the exporter's names of the family."""
    exported("llama", "int8-weight-only", tmp_path)
    path = tmp_path / "hf_quant_config.json"
    description = json.loads(path.read_text())
    description["quantization"]["kv_cache_quant_algo"] = cache
    path.write_text(json.dumps(description))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            for which in "kv":
                tensors[f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale"] = torch.tensor(0.25 + layer)

    edit(tmp_path, change)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.kv_cache_dtype == cache.lower()
    assert dict(checkpoint.parameters("float32"))["h.1.attn.v_scale"] == 1.25
    assert checkpoint.stored_bytes()["h.1.attn.k_scale"] == 4
