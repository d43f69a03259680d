"""Quantized folders whose scales are zero, or too small for float16: the numbers are those of float32 all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from quantized_folders import quantized_folder
from safetensors.numpy import save_file
from selection import partly_slow
from test_model import relative_error, stateless_logits
from tiny_checkpoints import edit_config

from engine import Engine, compile_model, config_of, load_model
from weight_loader import CheckpointError, open_checkpoint

IDX = np.random.default_rng(1).integers(0, 250, (1, 20)).astype(np.int32)
TINY = np.float32(2.0**-17)  # brings scales of 0.01 to 1e-7, of which float16 has two bits left
MODES = ("int8-weight-only", "int4-weight-only", "fp8")
Tensors = dict[str, np.ndarray]


def stored(folder: Path) -> Tensors:
    """Also of float8, of which the library's NumPy side knows the name alone."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint._tensors.read(name) for name in checkpoint._tensors.tensors}


def edit(folder: Path, change: Callable[[Tensors], None], kv_cache: str | None = None) -> Path:
    tensors = {name: np.array(tensor) for name, tensor in stored(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "hf_quant_config.json"
    description = json.loads(path.read_text())
    description["quantization"]["kv_cache_quant_algo"] = kv_cache
    path.write_text(json.dumps(description))
    return folder


def multiply(tensors: Tensors, ending: str, by: float) -> None:
    for name in tensors:
        if name.endswith(ending):
            tensors[name] = np.asarray(tensors[name] * np.float32(by))


def logits(folder: Path, dtype: str, is_stateless: bool = False) -> np.ndarray:
    """Of the last token, by the cached or the stateless model."""
    checkpoint = open_checkpoint(folder)
    config = config_of(checkpoint, dtype)
    gpt = load_model(checkpoint, config)
    if is_stateless:
        return stateless_logits(gpt, IDX)[:, -1]
    engine = Engine(compile_model(gpt, 1), config, 1)
    zero = np.zeros(1, np.int32)
    engine.step(IDX[:, :12], zero, zero + 11)
    cached = engine.step(IDX[:, 12:], zero + 12, zero + 7)
    assert np.isfinite(cached).all()
    return cached


def check(folder: Path, tolerance: float = 2e-3) -> None:
    assert config_of(open_checkpoint(folder), "float16").float32_scales
    assert not config_of(open_checkpoint(folder), "bfloat16").float32_scales  # which has float32's range
    expected = logits(folder, "float32")
    assert relative_error(logits(folder, "float16"), expected) <= tolerance
    assert relative_error(logits(folder, "float16", is_stateless=True), expected) <= tolerance


@pytest.mark.parametrize("mode", MODES)
def test_of_layers(tmp_path: Path, mode: str) -> None:
    """The inner layer of an MLP is small, and the outer one large, so that both matter."""

    def change(tensors: Tensors) -> None:
        multiply(tensors, "mlp.c_fc.weight_scale", TINY)
        multiply(tensors, "mlp.c_fc.bias", 0)  # which float16 would round coarsely
        multiply(tensors, "mlp.c_proj.weight_scale", 2.0**18)
        multiply(tensors, "mlp.c_proj.input_scale", TINY)

    check(edit(quantized_folder(tmp_path / "folder", mode), change), 2e-2 if mode == "fp8" else 2e-3)


@pytest.mark.parametrize("which", ["a head of its own", "a tied head", "both embeddings"])
@pytest.mark.slow
def test_of_heads_and_embeddings(tmp_path: Path, which: str) -> None:
    folder = quantized_folder(tmp_path / "folder", "int8-weight-only")
    random = np.random.default_rng(5)

    def change(tensors: Tensors) -> None:
        tables = {"a head of its own": ["lm_head"], "a tied head": ["transformer.wte"]}
        for table in tables.get(which, ["transformer.wte", "transformer.wpe"]):
            rows, width = (257 if "wpe" not in table else 64), 128
            tensors[f"{table}.weight"] = random.integers(-127, 128, (rows, width), dtype=np.int8)
            tensors[f"{table}.weight_scale"] = random.uniform(0.01, 0.02, rows).astype(np.float32) * TINY

    edit(folder, change)
    edit_config(folder, tie_word_embeddings=which != "a head of its own")
    check(folder)


@pytest.mark.parametrize("kv_cache", ["INT8", "FP8"])
def test_of_a_cache(tmp_path: Path, kv_cache: str) -> None:
    """Values are small, and the layer that reads them is large; so is what multiplies keys."""

    def change(tensors: Tensors) -> None:
        multiply(tensors, "attn.c_attn.weight_scale", TINY)
        multiply(tensors, "attn.c_attn.bias", 0)
        multiply(tensors, "attn.c_proj.weight_scale", 2.0**18)
        top = 127 if kv_cache == "INT8" else 448
        for which in "kv":
            tensors[f"transformer.h.0.attn.{which}_proj.{which}_scale"] = np.array(4 * TINY / top, np.float32)

    check(edit(quantized_folder(tmp_path / "folder", "int8-weight-only"), change, kv_cache), 5e-3)


@pytest.mark.parametrize("mode", partly_slow(MODES, MODES[:2]))
@pytest.mark.slow
def test_of_zeros_do_not_count(tmp_path: Path, mode: str) -> None:
    """Rows and blocks of zeros have scales of zero, or nearly so; they change nothing for the others."""

    def change(tensors: Tensors) -> None:
        weight, scale = (tensors[f"transformer.h.0.mlp.c_fc.{name}"] for name in ("weight", "weight_scale"))
        weight[:4] = 0
        if scale.ndim:
            scale[:8] = 0
            scale[2:4] = 1e-12
        else:
            weight[:] = 0
            scale[...] = 1e-12

    folder = edit(quantized_folder(tmp_path / "folder", mode), change)
    assert not config_of(open_checkpoint(folder), "float16").float32_scales
    assert relative_error(logits(folder, "float16"), logits(folder, "float32")) <= 2e-2


@pytest.mark.parametrize("kv_cache", ["INT8", "FP8"])
@pytest.mark.parametrize(
    ("zero", "dtype"),
    partly_slow([("k", "float16"), ("v", "float32"), ("kv", "float16"), ("kv", "bfloat16")], [("k", "float16")]),
)
def test_of_zero_for_keys_and_values(tmp_path: Path, kv_cache: str, zero: str, dtype: str) -> None:
    """As calibration leaves them where all keys or values are zero; nothing is lost by rounding those."""

    def change(tensors: Tensors) -> None:
        for place, which in enumerate("kv", 1):
            part = np.s_[place * 128 : (place + 1) * 128]
            is_zero = which in zero
            if is_zero:
                tensors["transformer.h.0.attn.c_attn.weight"][part] = 0
                tensors["transformer.h.0.attn.c_attn.bias"][part] = 0
            scale = np.array(0 if is_zero else 0.05, np.float32)
            tensors[f"transformer.h.0.attn.{which}_proj.{which}_scale"] = scale

    folder = edit(quantized_folder(tmp_path / "folder", "int8-weight-only"), change, kv_cache)
    found = logits(folder, dtype)

    def give_scales(tensors: Tensors) -> None:
        for which in zero:
            tensors[f"transformer.h.0.attn.{which}_proj.{which}_scale"] = np.array(1, np.float32)

    np.testing.assert_array_equal(found, logits(edit(folder, give_scales, kv_cache), dtype))


def test_of_zero_for_inputs(tmp_path: Path) -> None:
    """fp8: an input that was zero throughout calibration."""

    def change(tensors: Tensors) -> None:
        tensors["transformer.h.0.mlp.c_fc.weight"][:] = 0
        tensors["transformer.h.0.mlp.c_fc.bias"][:] = 0
        tensors["transformer.h.0.mlp.c_proj.input_scale"] = np.zeros((), np.float32)

    folder = edit(quantized_folder(tmp_path / "folder", "fp8"), change)
    assert relative_error(logits(folder, "float16"), logits(folder, "float32")) <= 2e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", partly_slow([np.nan, np.inf], [np.inf]))
def test_that_are_not_finite_are_named(tmp_path: Path, mode: str, value: float) -> None:
    good = quantized_folder(tmp_path / "folder", mode)
    scales = [name for name in stored(good) if name.endswith("_scale")]
    whole = (good / "model.safetensors").read_bytes()
    for name in (*scales[:3], scales[-1], "transformer.h.0.mlp.c_fc.bias", "transformer.h.0.ln_1.weight"):
        (good / "model.safetensors").write_bytes(whole)
        edit(good, lambda tensors, n=name: tensors[n].reshape(-1).__setitem__(-1, value))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=rf"{name.removeprefix('transformer.')} .*{value}"):
            list(open_checkpoint(good).parameters("float16"))


def test_a_weight_of_fp8_that_is_nan_is_named(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["transformer.h.0.mlp.c_fc.weight"][7, 7] = ml_dtypes.float8_e4m3fn(np.nan)

    folder = edit(quantized_folder(tmp_path / "folder", "fp8"), change)
    for dtype in ("float16", "float32"):
        with pytest.raises(CheckpointError, match=r"h.0.mlp.c_fc.weight holds nan"):
            list(open_checkpoint(folder).parameters(dtype))
