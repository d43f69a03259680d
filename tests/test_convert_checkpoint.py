"""convert_checkpoint.py: what it says, what it writes, what it refuses. tests/loading/test_ranks.py has the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized_folders import quantized_folder
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import random_checkpoint

import convert_checkpoint
from weight_loader import open_checkpoint


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = convert_checkpoint.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err.replace("\r", "\n").splitlines()[-1]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = random_checkpoint(tmp_path / "source"), tmp_path / "a" / "made"
    code, line = run(capsys, "--model-dir", source, "--tp-size=2", "--use-parallel-embedding", "--output-dir", folder)
    size = sum(path.stat().st_size for path in folder.glob("rank*"))
    assert (code, line) == (0, f"{folder}: 2 ranks (2 x 1) in float32, {size / 1e3:.1f} kB")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "rank0.safetensors",
        "rank1.safetensors",
        "tokenizer.json",
    ]
    said = json.loads((folder / "config.json").read_text())
    assert said["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert (said["use_parallel_embedding"], said["embedding_sharding_dim"]) == (True, 0)
    assert open_checkpoint(folder).config == open_checkpoint(source).config
    assert list(folder.parent.iterdir()) == [folder]
    code, line = run(capsys, "--model-dir", source, "--output-dir", folder)
    assert code == 2 and line.endswith(f"expected --output-dir to be a folder that is not there yet, but {folder} is")


WRONG: list[tuple[list[str], str]] = [
    (["--tp-size=0"], "expected --tp-size to be at least 1 but got 0"),
    (["--tp-size=3"], "expected tp_size to divide the 2 heads but got 3: 1 or 2 would do"),
    (["--pp-size=2"], "expected pp_size to be at most 1, the number of layers, but got 2"),
    (["--tp-size=64", "--pp-size=64"], "expected at most 1024 ranks but got 64 x 64"),
    (["--embedding-sharding-dim=1"], "expected --embedding-sharding-dim with --use-parallel-embedding only"),
    (["--quant-mode=fp8"], "argument --quant-mode: invalid choice: 'fp8'"),
    (["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--model-dir=./nowhere"], "expected a checkpoint folder or file at './nowhere', but nothing is there"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    source = random_checkpoint(tmp_path / "source")
    code, line = run(capsys, f"--model-dir={source}", *arguments, f"--output-dir={tmp_path / 'made'}")
    assert code == 2 and line.startswith(f"convert_checkpoint.py: error: {message}")
    assert list(tmp_path.iterdir()) == [source]


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = random_checkpoint(tmp_path / "source"), f"--output-dir={tmp_path / 'new' / 'made'}"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1e6}, source / "model.safetensors")
    code, line = run(capsys, f"--model-dir={source}", "--dtype=float16", out)
    assert code == 2 and "lm_head.weight holds" in line and "bfloat16 would hold it" in line
    quantized = quantized_folder(tmp_path / "quantized", "int8-weight-only")
    code, line = run(capsys, f"--model-dir={quantized}", "--quant-mode=int4-weight-only", out)
    assert code == 2 and "expected a checkpoint that is not quantized yet" in line
    assert not (tmp_path / "new").exists()
