"""Names of variants, and the checkpoints that they are."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import pytest
from quantized_folders import quantized_folder

import quantization
from command_line import EMBEDDED_CHECKPOINT
from evaluation import variants
from evaluation.variants import Variant, parse_variant
from weight_loader import open_checkpoint

NAMES = ("float32", "float16", *quantization.MODES)


def test_every_word_of_a_variant_has_its_effect() -> None:
    calibration = {"calib_size": 5, "calib_length": 64}
    variant = parse_variant("int8-smoothquant+float32+lm-head+per-channel+per-token+kv-int8", calibration)
    assert variant.dtype == "float32"
    assert variant.quantization == quantization.QuantizationConfig(
        mode="int8-smoothquant",
        kv_cache_dtype="int8",
        quant_lm_head=True,
        per_channel=True,
        per_token=True,
        calib_size=5,
        calib_length=64,
    )
    assert parse_variant("bfloat16", calibration) == Variant("bfloat16", "bfloat16")
    cache_only = parse_variant("kv-fp8", calibration)
    assert cache_only.dtype == "float16" and cache_only.quantization is not None
    assert (cache_only.quantization.mode, cache_only.quantization.kv_cache_dtype) == (None, "fp8")


def test_words_may_follow_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_variant("./x+y+float32") == Variant("./x+y+float32", "float32", None, Path("x+y"))
    quantized = parse_variant("../out+float32+int8-weight-only")
    assert (quantized.folder, quantized.dtype) == (Path("../out"), "float32")
    assert quantized.quantization == quantization.QuantizationConfig(mode="int8-weight-only")
    monkeypatch.chdir(tmp_path)
    for name in ("out", "out+int8-weight-only", "float16"):  # a folder's name may look like anything
        (tmp_path / name).mkdir()
        assert parse_variant(name) == Variant(name, folder=Path(name))
        assert parse_variant(f"{name}+kv-int8").folder == Path(name)


def test_without_modelopt_the_default_is_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    found = variants.open_available(NAMES, open_checkpoint(EMBEDDED_CHECKPOINT), {})
    assert [variant.name for variant, _ in found] == ["float32", "float16"]
    told = capsys.readouterr().err.splitlines()
    for mode in quantization.MODES:
        assert any(line.startswith(f"left out {mode}: quantizing needs the packages of") for line in told)


def test_a_quantized_checkpoint_is_evaluated_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_folder(tmp_path / "quantized", "int8-weight-only"))
    assert [variant.name for variant, _ in variants.open_available(NAMES, checkpoint, {})] == ["float32", "float16"]


def test_docstrings() -> None:
    results = doctest.testmod(variants)
    assert results.attempted >= 2 and results.failed == 0
