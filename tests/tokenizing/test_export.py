"""A tokenizer written as a folder's files has the ids that it had, for this program and for transformers."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import made, write_folder
from tokenizer_texts import CORPUS, FRAGMENTS
from tokenizers import pre_tokenizers

from tokenizer import load_tokenizer
from tokenizing.export import files_of
from tokenizing.sources import BytePairFiles, GgufTokenizer, MetaPickle, SentencePieceModel, TokenizerSource
from weight_loader import CheckpointError

VOCABULARY = 1000
KEY = "tokenizer.ggml."
TEXTS = ["", " ", "  x", *FRAGMENTS, *CORPUS, "a  1", "<|begin_of_text|>", "<s>x</s> y", "<|eot_id|> x", "<fim_prefix>"]


def gguf(kind: str, pre: str) -> GgufTokenizer:
    raw = json.loads(made(kind).to_str())
    vocabulary = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in raw["added_tokens"]}
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "eos_token_id": vocabulary.get("<|endoftext|>", vocabulary.get("<|end_of_text|>")),
        "bos_token_id": vocabulary.get("<|begin_of_text|>"),
    }
    return GgufTokenizer(Path("a.gguf"), {f"{KEY}{key}": value for key, value in metadata.items()})


def pieces() -> GgufTokenizer:
    words = json.loads(made("llama2").to_str())["model"]["vocab"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)]
    metadata = {"model": "llama", "tokens": list(words), "scores": [-float(id) for id in words.values()]}
    metadata["token_type"] = types
    return GgufTokenizer(Path("a.gguf"), {f"{KEY}{key}": value for key, value in metadata.items()})


def byte_pairs() -> BytePairFiles:
    model = json.loads(made("starcoder").to_str())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return BytePairFiles(Path("a.nemo"), json.dumps(model["vocab"]).encode(), merges.encode())


def meta(folder: Path) -> MetaPickle:
    letters = sorted(set("".join(TEXTS)))
    value = {"stoi": {letter: n for n, letter in enumerate(letters)}, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(value))
    return MetaPickle(folder / "meta.pkl")


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "llama", "byte pairs", "meta"])
def test_the_ids_are_the_same(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    sources: dict[str, Any] = {
        "gpt-2": lambda: gguf("starcoder", "gpt-2"),
        "smollm": lambda: gguf("starcoder", "smollm"),
        "llama-bpe": lambda: gguf("llama3", "llama-bpe"),
        "llama": pieces,
        "byte pairs": byte_pairs,
        "meta": lambda: meta(tmp_path),
    }
    source = sources[name]()
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, content in files_of(source).items():
        (folder / file).write_bytes(content)
    for model_type in ("gpt2", "llama"):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        before, after = load_tokenizer(source, VOCABULARY), load_tokenizer(folder, VOCABULARY)
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            ids = before.encode(text)
            assert after.encode(text) == ids == theirs(text)["input_ids"], text
            assert after.decode(ids) == before.decode(ids) == theirs.decode(ids)
        assert after.eos_id == before.eos_id == theirs.eos_token_id and after.prefix == before.prefix


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama", "starcoder2", "nemotron", "stablelm"])
def test_a_sentencepiece_model_is_written_as_it_is(tmp_path: Path, model_type: str | None) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="makes the model")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, minloglevel=2, vocab_size=60
    )
    source = SentencePieceModel(Path("a.nemo"), written.getvalue())
    for file, content in files_of(source).items():
        (tmp_path / file).write_bytes(content)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    before, after = load_tokenizer(source, VOCABULARY), load_tokenizer(tmp_path, VOCABULARY)
    for text in TEXTS:
        if "<s>" not in text:  # which is special in a folder
            assert after.encode(text) == before.encode(text), text


def test_a_folders_own_files(tmp_path: Path) -> None:
    theirs = made("starcoder")
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    folder = write_folder(tmp_path, theirs, "gpt2", {"tokenizer_class": "PreTrainedTokenizerFast"})
    found = files_of(folder)
    assert found.keys() == {"tokenizer.json", "tokenizer_config.json"}  # config.json is the model's
    assert all((folder / name).read_bytes() == content for name, content in found.items())


@pytest.mark.parametrize("source", [GgufTokenizer(Path("a"), {}), BytePairFiles(Path("a"), b"{", b"")], ids=repr)
def test_what_cannot_be_used(source: TokenizerSource) -> None:
    with pytest.raises(CheckpointError):
        files_of(source)
