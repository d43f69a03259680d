"""Bytes of weights, against files whose sizes are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_folders import WIDTH, quantized_folder
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import VOCABULARY, random_checkpoint

from engine import compile_model, config_of, load_model
from evaluation import weights as measured
from weight_loader import open_checkpoint

WEIGHTS = 3 * 128 * 128 + 128 * 128 + 2 * 512 * 128  # 196608
HEAD = VOCABULARY * WIDTH

# (bytes of the layers on disk, bytes in memory at least, weights): weights, then float32 scales, then pre_quant_scales.
EXPECTED = {
    "int8-weight-only": (WEIGHTS + 4 * (384 + 128 + 512 + 128), WEIGHTS + 4 * (384 + 128 + 512 + 128), WEIGHTS),
    "int4-weight-only": (
        WEIGHTS // 2 + 4 * (384 + 128 + 512 + 4 * 128) + 4 * (128 + 128 + 128 + 512),
        WEIGHTS // 2 + 4 * (384 + 128 + 512 + 4 * 128),
        WEIGHTS,
    ),
    "fp8": (WEIGHTS + HEAD + 5 * 8, WEIGHTS + HEAD + 5 * 4, WEIGHTS + HEAD),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, whose tokens are bytes."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.mark.parametrize("mode", EXPECTED)
def test_bytes_of_quantized_weights(mode: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized_folder(tmp_path / "quantized", mode))
    on_disk, at_least, weights = EXPECTED[mode]
    stored = measured.stored_weight_bytes(checkpoint)
    tensors = load_file(checkpoint.path / "model.safetensors") if mode != "fp8" else None
    assert (stored.layers, stored.num_weights) == (on_disk, weights)
    assert tensors is None or stored.total == sum(tensor.nbytes for tensor in tensors.values())
    compiled = measured.compiled_weight_bytes(
        compile_model(load_model(checkpoint, config_of(checkpoint, "float16")), 1), checkpoint.config
    )
    assert compiled.num_weights == weights
    # The input's scales are counted where the runtime keeps them with the layer.
    assert compiled.layers is not None and at_least <= compiled.layers <= on_disk
    assert compiled.total is not None and compiled.total >= compiled.layers
    limit = 0.28 if mode == "int4-weight-only" else 0.52
    assert stored.to_float16 is not None and stored.to_float16 <= limit
    assert compiled.to_float16 is not None and compiled.to_float16 <= limit


def test_bytes_of_shards(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
    index = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    whole, shards = (measured.stored_weight_bytes(open_checkpoint(folder)) for folder in (tiny, tmp_path))
    assert shards == whole and whole.layers == 4 * 12 * 32 * 32


def test_pytorch_files_have_a_total_only(tiny: Path, tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in load_file(tiny / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    stored = measured.stored_weight_bytes(open_checkpoint(tmp_path))
    assert stored.total == (tmp_path / "pytorch_model.bin").stat().st_size
    assert stored.layers is None and stored.to_float16 is None
