"""Damaged settings and headers of every kind of checkpoint: read to the last weight, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from mutations import fuzz_json
from nemo_archives import config_of as nemo_config_of
from nemo_archives import write_nemo
from random_models import random_model

from engine import config_of
from weight_loader import CheckpointError, open_checkpoint

pytestmark = pytest.mark.slow

_WORDS = """
model_type llama mistral granite starcoder2 gpt_bigcode architectures LlamaForCausalLM hidden_size num_attention_heads
num_key_value_heads head_dim intermediate_size rope_parameters rope_scaling rope_theta rope_type linear yarn factor
sliding_window layer_types full_attention hidden_act silu gelu attention_bias mlp_bias tie_word_embeddings multi_query
attention_head_type multiquery attention_multiplier num_layers normalization rmsnorm activation swiglu squared-relu
rotary_percentage num_query_groups position_embedding_type rope seq_len_interpolation_factor kv_channels tokenizer
"""
WORDS = _WORDS.split()


def is_read(path: Path) -> bool:
    """Whether a checkpoint is read to its last weight, and is one that the model takes; else it is refused."""
    try:
        checkpoint = open_checkpoint(path)
        for _ in checkpoint.parameters("float32"):
            pass
    except CheckpointError as error:
        assert str(error) and "\n" not in str(error)
        return False
    config_of(checkpoint, "float32")
    return True


@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "starcoder2", "gpt_bigcode"])
def test_config_json(tmp_path: Path, family: str) -> None:
    model = (
        random_model(family, num_hidden_layers=1) if not family.startswith("gpt") else random_model(family, n_layer=1)
    )
    model.save_pretrained(tmp_path)
    fuzz_json(tmp_path / "config.json", model.config.to_dict(), WORDS, 1000, lambda: is_read(tmp_path), at_least=50)


def test_model_config_yaml(tmp_path: Path) -> None:
    """In an unpacked archive; JSON is YAML."""
    import tarfile

    model = random_model("llama", num_hidden_layers=1)
    sound = nemo_config_of(model)
    with tarfile.open(write_nemo(tmp_path / "model.nemo", model)) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    path = tmp_path / "folder" / "model_config.yaml"
    assert yaml.safe_load(path.read_bytes())["hidden_size"] == 32
    fuzz_json(path, sound, WORDS, 400, lambda: is_read(tmp_path / "folder"), at_least=5)


def spoiled(content: bytes, random: np.random.Generator, reach: int) -> bytes:
    """A few bytes among the first, changed, or a piece cut out or put in."""
    array = bytearray(content)
    at = int(random.integers(0, min(reach, len(array))))
    kind = random.integers(0, 4)
    if kind == 0:
        array[at : at + 4] = random.bytes(4)
    elif kind == 1:
        array[at] ^= 1 << int(random.integers(0, 8))
    elif kind == 2:
        del array[at : at + int(random.integers(1, 40))]
    else:
        array[at:at] = random.bytes(int(random.integers(1, 40)))
    return bytes(array)


def fuzz_bytes(path: Path, reach: int, times: int, check: Callable[[], bool]) -> int:
    """How often a file with changed bytes was read all the same."""
    sound, random, read = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(times):
        path.write_bytes(spoiled(sound, random, reach))
        read += check()
    return read


def test_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
    from gguf_files import write_gguf

    path = write_gguf(tmp_path / "model.gguf", random_model("llama", num_hidden_layers=1, intermediate_size=64), "Q8_0")
    assert 0 < fuzz_bytes(path, 6000, 2000, lambda: is_read(path)) < 2000


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_nemo(tmp_path: Path, mode: str) -> None:
    path = write_nemo(tmp_path / "model.nemo", random_model("llama", num_hidden_layers=1), mode=mode)
    assert fuzz_bytes(path, 10_000, 300, lambda: is_read(path)) < 300
