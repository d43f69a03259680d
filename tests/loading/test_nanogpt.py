"""nanoGPT's ckpt.pt, made here: the numbers and the text that the same weights give as a HuggingFace folder."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nanogpt_files import LETTERS, nano_model, write_ckpt, write_meta
from opened import our_logits, refusal
from random_models import logits_of, random_model
from test_model import relative_error
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tokenizing.sources import MetaPickle
from weight_loader import CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
IDX = np.random.default_rng(0).integers(0, 65, (2, 21)).astype(np.int32)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_logits(tmp_path: Path, prefix: str, has_bias: bool) -> None:
    """As a file, and by the folder that it is in."""
    model = nano_model(has_bias)
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", model, has_bias, prefix)
    for each in (path, path.parent):
        assert relative_error(our_logits(each, IDX), logits_of(model, IDX)) <= 1e-5
    assert open_checkpoint(path).config.has_pre_quant_scale is False
    assert "h.0.attn.c_attn.bias" in dict(open_checkpoint(path).parameters("float32")) or not has_bias


@pytest.mark.parametrize("place", ["out", "data/letters"])
def test_the_alphabet_is_found(tmp_path: Path, place: str) -> None:
    """Beside the checkpoint, or where nanoGPT keeps its data."""
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", nano_model())
    write_meta(tmp_path / place)
    assert open_checkpoint(path).tokenizer_source == MetaPickle(tmp_path / place / "meta.pkl")


@pytest.mark.parametrize("dataset", ["../letters", "/letters", "", "..", 5, None])
def test_names_of_data_that_are_no_names(tmp_path: Path, dataset: Any) -> None:
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", nano_model(), changes={"config": {"dataset": dataset}})
    write_meta(tmp_path / "letters")
    assert open_checkpoint(path).tokenizer_source == path.parent


def text_of(model_type: Path, tmp_path: Path) -> str:
    command = [sys.executable, str(ROOT / "example.py"), "--model-type", str(model_type), "--input-text", "What is"]
    command += ["--seed=1", "--max-new-tokens=30", "--top-k=0", "--dtype=float32", "--no-engine-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_text_equals_that_of_the_folder(tmp_path: Path, prefix: str) -> None:
    model = nano_model()
    path = write_ckpt(tmp_path / "out" / "ckpt.pt", model, prefix=prefix)
    write_meta(tmp_path / "out")
    model.save_pretrained(tmp_path / "folder")
    tokenizer = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "folder" / "tokenizer.json"))
    (tmp_path / "folder" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "folder" / "generation_config.json").write_text("{}")
    text = text_of(path, tmp_path)
    assert text == text_of(tmp_path / "folder", tmp_path) and len(text) == len("What is") + 30 + 1


def test_gpt2s_vocabulary_is_padded(tmp_path: Path) -> None:
    """To a multiple of 64: the rows beyond are of the model, and its tokenizer is GPT-2's."""
    model = random_model("gpt2", vocab_size=50304, n_embd=8, activation_function="gelu")
    checkpoint = open_checkpoint(write_ckpt(tmp_path / "ckpt.pt", model))
    assert checkpoint.config.vocab_size == 50304 and checkpoint.config.eos_token_ids == (50256,)
    assert checkpoint.tokenizer_source == tmp_path
    assert dict(checkpoint.parameters("float16"))["wte.weight"].shape == (50304, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": [1]}, "expected a dict of tensors in"),
        ({"model": {"a": 3}}, 'expected only named tensors in .*ckpt.pt, got "a": int'),
        ({"model": {}}, "missing: wte.weight, wpe.weight"),
        ({"model_args": [1]}, r"expected model_args to be a dict by name, got \[1\]"),
        ({"model_args": {}}, "ckpt.pt: model_args: expected n_embd to be an integer from 1 to 131072, got null"),
        ({"model_args": {"n_embd": 32, "n_head": 5}}, "is not a multiple of n_head"),
    ],
)
def test_bad_content(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_ckpt(tmp_path / "ckpt.pt", nano_model(), changes=changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(2)])
def test_files_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    assert "expected a nanoGPT checkpoint, a dict with model and model_args, got " in refusal(tmp_path / "ckpt.pt")


class Malicious:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.touched}",)


def test_pickles_that_want_to_execute_something(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "ckpt.pt", nano_model(), changes={"config": Malicious(tmp_path / "touched")})
    assert "is not a readable PyTorch file of tensors and nothing else" in refusal(path)
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "touched")))
    assert "is not a readable PyTorch file of tensors and nothing else" in refusal(path)
    assert not (tmp_path / "touched").exists()


def test_damage(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / "ckpt.pt", nano_model())
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "is not a readable PyTorch file" in refusal(path)
    for seed in range(3):
        path.write_bytes(np.random.default_rng(seed).bytes(10**6))
        assert "is not a readable PyTorch file" in refusal(path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
def test_a_million_random_bytes_in_a_folder(tmp_path: Path, name: str) -> None:
    random_model("llama").save_pretrained(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(10**6))
    assert name in refusal(tmp_path)
