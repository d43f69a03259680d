"""compression.py, against the tensors that safetensors itself reads; and `--show-stats`, which prints it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quantized_folders import INNER, WIDTH, quantized_folder
from safetensors.numpy import load_file
from tiny_checkpoints import CONTEXT, VOCABULARY, random_checkpoint

import compression
import quantization
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def test_components_of_a_float_checkpoint(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")  # one layer, 32 wide, with a head of its own
    found = {part.name: part for part in compression.components(open_checkpoint(folder))}
    parameters = {
        "token embedding": VOCABULARY * 32,
        "position embedding": CONTEXT * 32,
        "attention": 32 * 96 + 96 + 32 * 32 + 32,
        "MLP": 32 * 128 + 128 + 128 * 32 + 32,
        "head": VOCABULARY * 32,
        "LayerNorm": 3 * 2 * 32,
    }
    assert {name: part.parameters for name, part in found.items() if name != "total"} == parameters
    assert found["total"].parameters == sum(parameters.values())
    assert all(part.stored == part.in_float32 and part.ratio == 1 for part in found.values())
    tensors = load_file(folder / "model.safetensors")
    assert found["total"].stored == sum(tensor.nbytes for tensor in tensors.values())


def test_components_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_folder(tmp_path / "int8", "int8-weight-only"))
    found = {part.name: part for part in compression.components(checkpoint)}
    weights, rows = 2 * WIDTH * INNER, INNER + WIDTH
    assert found["MLP"].parameters == weights + rows
    assert found["MLP"].stored == weights + 4 * rows + 4 * rows  # integers, scales and biases
    assert found["MLP"].ratio == pytest.approx(4 * (weights + rows) / (weights + 8 * rows))
    assert found["head"].parameters == found["head"].stored == 0 and found["head"].ratio is None
    tensors = load_file(checkpoint.path / "model.safetensors")
    assert found["total"].stored == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("mode", ["int4-weight-only", "fp8"])
def test_every_tensor_is_of_some_component(mode: str, tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "folder", mode)
    total = compression.components(open_checkpoint(folder))[-1]
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert total.stored == (folder / "model.safetensors").stat().st_size - 8 - header


def test_show_stats_prints_without_torch(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "int8", "int8-weight-only")
    program = f"""
import sys
import quantization
assert quantization.main(["--model-type", {str(folder)!r}, "--show-stats"]) == 0
heavy = {{"torch", "transformers", "modelopt", "nvtripy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line[:20].strip() for line in lines] == ["component", *compression.COMPONENTS.values(), "total", "files"]
    assert lines[5] == "head                shared with the token embedding"
    size = (folder / "model.safetensors").stat().st_size
    parameters = compression.components(open_checkpoint(folder))[-1].parameters
    assert lines[-1].split() == [
        "files",
        f"{parameters:,}",
        f"{4 * parameters:,}",
        f"{size:,}",
        f"{4 * parameters / size:.2f}",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["--show-stats", "--quant-mode", "fp8"]])
def test_an_output_is_needed_to_quantize(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert quantization.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "quantization.py: error: expected --output DIR, the folder to write, but got none\n")
