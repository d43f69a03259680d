"""example.py with its options for quantization: what is made once, what is found again, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import edit_config, random_checkpoint

import example
import quantization
import weight_loader

needs_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
FEW = ("--calib-size=2", "--calib-length=16")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """main() in this process, with a cache of its own: exit code, standard output, standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        given = ["--input-text=To be", "--seed=1", "--max-new-tokens=4"]
        monkeypatch.setattr(sys, "argv", ["example.py", *given, *map(str, arguments)])
        code = example.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def complaint(outcome: tuple[int, str, str]) -> str:
    """The one line that bad input gets."""
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert err.startswith("example.py: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def int8_folder(tmp_path: Path) -> Path:
    """A checkpoint in int8-weight-only, as ModelOpt's exporter lays it out, rounded by hand."""
    folder = random_checkpoint(tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if re.search(r"h\.\d+\.(attn|mlp)\..*weight", name):
            rows = tensor.T
            scale = np.abs(rows).max(axis=1) / 127
            tensors[name] = np.ascontiguousarray(np.rint(rows / scale[:, None]).astype(np.int8))
            tensors[f"{name}_scale"] = scale.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    description = {"quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(description))
    edit_config(folder, quantization_config={"quant_method": "modelopt"})
    return folder


# --- quantized folders ------------------------------------------------------------------------------------------------


def test_the_mode_of_a_folder_is_recognised(run: Run, int8_folder: Path) -> None:
    """With the mode named, too: nothing is left to be done, and neither way needs ModelOpt."""
    assert weight_loader.open_checkpoint(int8_folder).config.quant_mode == "int8-weight-only"
    code, text, err = run("--model-type", int8_folder)
    assert code == 0 and text.startswith("To be"), err
    assert run("--model-type", int8_folder, "--quant-mode=int8-weight-only") == (0, text, err)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--quant-mode=fp8"], "fp8 layers"),
        (["--kv-cache-dtype=int8"], "an int8 KV cache"),
        (["--quant-mode=int8-weight-only", "--kv-cache-dtype=fp8"], "int8-weight-only layers and an fp8 KV cache"),
    ],
)
def test_a_folder_in_another_mode(run: Run, int8_folder: Path, options: list[str], asked: str) -> None:
    line = complaint(run("--model-type", int8_folder, *options))
    assert f"or one with {asked}, but {int8_folder} has int8-weight-only layers\n" in line


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "missing: h.0.attn.c_attn.weight_scale"),
        (np.ones(95, np.float32), r"h.0.attn.c_attn.weight_scale.*\(96,\).*\(95,\)"),
        (np.full(96, -1, np.float32), "h.0.attn.c_attn.weight_scale .*not negative but got -1"),
        (np.full(96, np.nan, np.float32), "h.0.attn.c_attn.weight_scale .*finite numbers .*got nan"),
    ],
    ids=["missing", "misshapen", "negative", "not a number"],
)
def test_bad_scales(run: Run, int8_folder: Path, tensor: np.ndarray | None, message: str) -> None:
    path = int8_folder / "model.safetensors"
    tensors = load_file(path)
    name = "transformer.h.0.attn.c_attn.weight_scale"
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path)
    assert re.search(message, complaint(run("--model-type", int8_folder)))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant-mode=int3"], f"expected a quantization mode of {', '.join(quantization.MODES)} but got 'int3'"),
        (["--kv-cache-dtype=int4"], "expected a KV cache dtype of float16, int8, fp8 but got 'int4'"),
        (["--quant-lm-head"], "expected a quantization mode"),
        (["--quant-mode=fp8", "--per-channel"], "expected --per-channel with int8-smoothquant only"),
        (["--quant-mode=fp8", "--calib-size=0"], "expected --calib-size to be at least 1 but got 0"),
    ],
)
def test_bad_options(run: Run, options: list[str], message: str) -> None:
    assert message in complaint(run(*options))


@needs_modelopt
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant-mode=int4-weight-only"], "128"),
        (["--quant-mode=fp8", "--calib-length=65"], "expected --calib-length to be at most the context of 64"),
        (["--quant-mode=fp8", "--calib-data=nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
    ],
    ids=["width that the block does not divide", "long samples", "no file"],
)
def test_what_cannot_be_quantized(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    outcome = run("--model-type", random_checkpoint(tmp_path / "tiny"), *FEW, *options)
    assert outcome[0] == 2 and message in outcome[2].splitlines()[-1]


@needs_modelopt
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"short", "expected at least 16 tokens"), (b"\x89PNG\r\n", "expected UTF-8 text")],
    ids=["empty", "too short", "no text"],
)
def test_bad_calibration_text(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    checkpoint = random_checkpoint(tmp_path / "tiny")
    code, out, err = run("--model-type", checkpoint, "--quant-mode=fp8", *FEW, "--calib-data", text)
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and "Traceback" not in err


@needs_modelopt
def test_quantized_once_and_found_again(run: Run, tmp_path: Path) -> None:
    given = ["--model-type", random_checkpoint(tmp_path / "tiny"), "--quant-mode=fp8", "--kv-cache-dtype=int8", *FEW]
    code, text, err = run(*given)
    assert code == 0 and "calibration" in err, err
    assert run(*given) == (0, text, "")
    code, _, err = run(*given, "--calib-size=3")
    assert code == 0 and "calibration" in err, "another calibration is another checkpoint"
