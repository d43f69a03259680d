"""SentencePiece models: the ids that the package gives, alone and beside a folder's settings."""

from __future__ import annotations

import io
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, mutated_bytes
from tokenizer_texts import CORPUS, FRAGMENTS, PROPERTY, TEXT

import tokenizer as ours
from tokenizer import StreamDecoder, load_tokenizer
from tokenizing.sources import SentencePieceModel
from weight_loader import CheckpointError

sentencepiece = pytest.importorskip("sentencepiece", reason="the reference, and what the tokenizer runs on")

VOCABULARY = 1000
SOURCE = Path("archive.nemo:tokenizer.model")

_LLAMA: dict[str, Any] = {
    **{"model_type": "bpe", "vocab_size": 350, "byte_fallback": True, "normalization_rule_name": "identity"},
    **{"remove_extra_whitespaces": False, "split_digits": True},
}
_UD = {"user_defined_symbols": ["<|im_start|>", "  ", "\t"], "control_symbols": ["<extra_0>"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "symbols": {**_LLAMA, **_UD, "pad_id": 3},
    "no-prefix": {**_LLAMA, "add_dummy_prefix": False},
    "nemo": {"model_type": "bpe", "vocab_size": 90},
    "unigram": {"model_type": "unigram", "vocab_size": 66},
    "no-end": {**_LLAMA, "bos_id": -1, "eos_id": -1},
    "extra-spaces-kept": {"model_type": "unigram", "vocab_size": 66, "remove_extra_whitespaces": False},
}


@cache
def model(name: str) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, minloglevel=2, character_coverage=0.98, **MODELS[name]
    )
    return written.getvalue()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: Any) -> tuple[ours.Tokenizer, Any]:
    """Our tokenizer and the package's of one model."""
    content = model(request.param)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    return load_tokenizer(SentencePieceModel(SOURCE, content), VOCABULARY), processor


def check(mine: ours.Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs.encode(text)
    assert mine.encode(text) == ids
    assert [id for part in mine.encode_in_parts(text) for id in part] == ids
    assert mine.decode(ids) == theirs.decode(ids)


FIXED = [
    "",
    " ",
    "   ",
    *FRAGMENTS,
    "".join(FRAGMENTS),
    *CORPUS,
    "<s>x</s>",
    "<|im_start|>a  b\tc",
    "<extra_0>",
    "▁ ▁x",
]


def test_fixed_texts(pair: tuple[ours.Tokenizer, Any]) -> None:
    for text in FIXED:
        check(*pair, text)
    assert pair[0].eos_id == (pair[1].eos_id() if pair[1].eos_id() >= 0 else None)
    assert pair[0].prefix == ()


@PROPERTY
@given(text=TEXT)
def test_any_text(pair: tuple[ours.Tokenizer, Any], text: str) -> None:
    check(*pair, text)


@PROPERTY
@given(ids=st.lists(st.integers(0, 349), max_size=30))
def test_any_ids_decode(pair: tuple[ours.Tokenizer, Any], ids: list[int]) -> None:
    """As the package does, but for bytes that are not UTF-8: it makes one U+FFFD of each."""
    mine, theirs = pair
    ids = [id for id in ids if id < theirs.get_piece_size()]
    text = mine.decode(ids)
    assert "\ufffd" in text or text == theirs.decode(ids)


@PROPERTY
@given(before=TEXT, text=TEXT, cut=st.integers(0, 1000))
def test_a_stream_continues_the_text(pair: tuple[ours.Tokenizer, Any], before: str, text: str, cut: int) -> None:
    mine, _ = pair
    ids = mine.encode(before + text)
    cut = min(cut, len(ids))
    start = mine.decode(ids[:cut])
    stream = StreamDecoder(mine)
    after = "".join([stream.push(id) for id in ids[cut:]]) + stream.flush()
    if start and not start.endswith("\ufffd"):
        assert start + after == mine.decode(ids)


def test_lone_surrogates_are_replacement_characters(pair: tuple[ours.Tokenizer, Any]) -> None:
    assert pair[0].encode("a\ud800b") == pair[1].encode("a\ufffdb")


# --- folders ---------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, name: str = "llama", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model(name))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return folder


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_a_folder_equals_transformers(tmp_path: Path, begin: bool, end: bool) -> None:
    """But where a text begins with a space, and behind special tokens: there SentencePiece puts one more before it."""
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with it")
    from transformers import AutoTokenizer

    extra = ["<|im_start|>"]
    folder = write_folder(tmp_path, add_bos_token=begin, add_eos_token=end, extra_special_tokens=extra, legacy=True)
    mine, theirs = load_tokenizer(folder, VOCABULARY), AutoTokenizer.from_pretrained(folder)
    for text in [*FRAGMENTS, *CORPUS, "x<s>y", "a<|im_start|>b</s>", "12 345"]:
        if not text.startswith((" ", "▁")):
            assert mine.encode(text) == theirs(text)["input_ids"], text
            assert mine.decode(mine.encode(text)) == theirs.decode(mine.encode(text))
    assert mine.eos_id == theirs.eos_token_id
    assert mine.prefix == ((theirs.bos_token_id,) if begin else ())


def test_a_folder_of_the_model_alone_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model("llama"))
    mine, theirs = (
        load_tokenizer(tmp_path, VOCABULARY),
        sentencepiece.SentencePieceProcessor(model_proto=model("llama")),
    )
    for text in [" a  b", *FRAGMENTS, *CORPUS]:
        assert mine.encode(text) == theirs.encode(text)
    assert mine.encode("<s>")[:1] == [1]  # which a text may have here, as with transformers


def test_special_tokens_beyond_the_embeddings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, extra_special_tokens=["<|x|>"])
    assert load_tokenizer(folder, 351).encode("<|x|>") == [350]
    assert load_tokenizer(folder, 350).encode("<|x|>") != [350]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "GemmaTokenizer"}, "tokenizer_class='GemmaTokenizer' is not supported"),
        ({"add_bos_token": 3}, "expected add_bos_token to be true or false, got 3"),
        ({"split_special_tokens": True}, "split_special_tokens=True is not supported"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(write_folder(tmp_path, **settings), VOCABULARY)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_larger_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="has ids up to 349, but the model's vocabulary has 349"):
        load_tokenizer(SentencePieceModel(SOURCE, model("llama")), 349)


def test_white_space_as_suffix() -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=written,
        minloglevel=2,
        vocab_size=60,
        treat_whitespace_as_suffix=True,
    )
    with pytest.raises(CheckpointError, match="treat_whitespace_as_suffix is not supported"):
        load_tokenizer(SentencePieceModel(SOURCE, written.getvalue()), VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"x", b"IQ== 0\nIg== 1\n", os.urandom(1000), os.urandom(1_000_000)])
def test_what_is_no_model(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="is not a SentencePiece model") as error:
        load_tokenizer(SentencePieceModel(SOURCE, content), VOCABULARY)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_damaged_models() -> None:
    """Of a damaged model either one is read that encodes as the package does, or one line tells what is wrong."""
    read = 0

    @fuzzing(3000)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal read
        content = mutated_bytes(data.draw, model("llama"))
        try:
            mine = load_tokenizer(SentencePieceModel(SOURCE, content), VOCABULARY)
            ids = mine.encode(CORPUS[0])
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)
            return
        assert ids == sentencepiece.SentencePieceProcessor(model_proto=content).encode(CORPUS[0])
        mine.decode(ids)
        read += 1

    fuzz()
    assert read > 100


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match="needs the package sentencepiece"):
        load_tokenizer(SentencePieceModel(SOURCE, model("llama")), VOCABULARY)
