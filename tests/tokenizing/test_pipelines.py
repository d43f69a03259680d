"""Tokenizers of GPT-2's relatives against transformers' of the same folder, on arbitrary text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import made, write_folder
from tokenizer_texts import CORPUS, FRAGMENTS, PROPERTY, TEXT
from tokenizers import AddedToken, Tokenizer

import tokenizer as ours
from tokenizer import StreamDecoder, load_tokenizer
from tokenizing.pipelines import PipelineTokenizer
from tokenizing.sources import BytePairFiles
from weight_loader import CheckpointError

VOCABULARY = 1000  # of the model

#: What the special tokens of these kinds are, beside and within other text.
SPECIAL = ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>", "<fim_prefix>", "<|im_start|>", " <s> ", "<0x0A>"]
SPECIAL += ["\u2581", "\u2581\u2581x", "  two", "Quux", " zzyzx", " zzyzxy", "12 345", "  7", "a1b22"]
TEXTS = st.one_of(
    TEXT, st.lists(st.sampled_from([*FRAGMENTS, *SPECIAL, *SPECIAL]), min_size=1, max_size=12).map("".join)
)
FIXED = ["", " ", "  ", *FRAGMENTS, *SPECIAL, "".join(FRAGMENTS), "".join(SPECIAL), *CORPUS, " lead", "<s>x</s> y"]

_BYTE_LEVEL = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
_LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
#: kind of tokenizer, model_type, tokenizer_config.json
FOLDERS: dict[str, tuple[str, str | None, dict[str, Any] | None]] = {
    "starcoder": ("starcoder", "gpt_bigcode", {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False}),
    "santacoder": ("starcoder", "gpt2", _BYTE_LEVEL),
    "starcoder2": ("starcoder", "starcoder2", _BYTE_LEVEL),
    "granite": ("starcoder", "granite", {"tokenizer_class": "GPT2Tokenizer"}),
    "stablelm": ("starcoder", "stablelm", {"tokenizer_class": "GPT2Tokenizer"}),
    "nemotron": ("llama2", "nemotron", {**_LLAMA, "legacy": True}),
    "smollm2": ("starcoder", "llama", {**_BYTE_LEVEL, "additional_special_tokens": ["<|im_start|>"]}),
    "bare": ("starcoder", None, None),
    "llama3": ("llama3", "llama", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}),
    "llama3-as-llama": ("llama3", "llama", {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end_of_text|>"}),
    "llama2-as-it-is": ("llama2", "llama", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
    "llama2": ("llama2", "llama", {**_LLAMA, "add_bos_token": True, "legacy": False}),
    "llama2-legacy": ("llama2", "llama", {**_LLAMA, "legacy": True, "add_eos_token": True}),
    "llama2-undecided": ("llama2", "llama", {**_LLAMA, "legacy": None, "add_prefix_space": None}),
    "llama2-no-space": ("llama2", "llama", {**_LLAMA, "add_prefix_space": False}),
    "llama2-chat": ("llama2", None, {**_LLAMA, "additional_special_tokens": ["<|im_start|>"], "pad_token": "<pad>"}),
    "mistral": ("llama2", "mistral", {**_LLAMA, "legacy": True}),
    "unigram": ("unigram", "llama", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
}


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ours.Tokenizer, Any]:
    """Our tokenizer and transformers' of one folder."""
    from transformers import AutoTokenizer

    kind, model_type, settings = FOLDERS[request.param]
    folder = write_folder(tmp_path_factory.mktemp(request.param), made(kind), model_type, settings)
    return load_tokenizer(folder, VOCABULARY), AutoTokenizer.from_pretrained(folder)


def check(mine: ours.Tokenizer, theirs: Any, text: str) -> None:
    ids = theirs(text)["input_ids"]
    parts = list(mine.encode_in_parts(text))
    assert [id for part in parts for id in part] == ids
    assert mine.encode(text) == ids
    assert mine.decode(ids) == theirs.decode(ids)


def test_fixed_texts(pair: tuple[ours.Tokenizer, Any]) -> None:
    for text in FIXED:
        check(*pair, text)


@PROPERTY
@given(text=TEXTS)
def test_any_text(pair: tuple[ours.Tokenizer, Any], text: str) -> None:
    check(*pair, text)


@PROPERTY
@given(before=TEXTS, text=TEXTS, cut=st.integers(0, 1000))
def test_a_stream_continues_the_text(pair: tuple[ours.Tokenizer, Any], before: str, text: str, cut: int) -> None:
    mine, _ = pair
    ids = mine.encode(before + text)
    cut = min(cut, len(ids))
    stream = StreamDecoder(mine)
    pieces = [stream.push(id) for id in ids[cut:]]
    after = "".join(pieces) + stream.flush()
    assert mine.decode_bytes(ids) == mine.decode_bytes(ids[:cut]) + mine.decode_bytes(ids[cut:])
    if mine.decode_bytes(ids[:cut]).decode("utf-8", "replace").endswith("\ufffd") or not mine.decode(ids[:cut]):
        return  # the cut is within a character, or nothing stands before it
    assert mine.decode(ids[:cut]) + after == mine.decode(ids)


@PROPERTY
@given(ids=st.lists(st.integers(0, VOCABULARY), max_size=30))
def test_any_ids_decode(pair: tuple[ours.Tokenizer, Any], ids: list[int]) -> None:
    """As transformers does, but for bytes that are not UTF-8: of a run of them it makes one U+FFFD for each."""
    mine, theirs = pair
    expected = theirs.backend_tokenizer.decode(ids, skip_special_tokens=False)
    text = mine.decode(ids)
    assert "\ufffd" in text or text == expected


def test_ends_and_beginnings(pair: tuple[ours.Tokenizer, Any]) -> None:
    mine, theirs = pair
    assert isinstance(mine, PipelineTokenizer)
    if theirs.eos_token_id is not None:
        assert mine.eos_id == theirs.eos_token_id
    whole, own = theirs("x")["input_ids"], theirs("x", add_special_tokens=False)["input_ids"]
    assert list(mine.prefix) == whole[: len(whole) - len(own)]


def test_archives_files_equal_transformers(tmp_path: Path) -> None:
    """vocab.json and merges.txt as their bytes, such as those within a .nemo archive."""
    from transformers import GPT2Tokenizer

    model = json.loads(made("starcoder").to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    for has_end in (True, False):
        words = [word for word in model["vocab"] if has_end or word != "<|endoftext|>"]
        vocabulary = {word: id for id, word in enumerate(words)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text(merges)
        theirs = GPT2Tokenizer.from_pretrained(tmp_path)
        source = BytePairFiles(Path("a.nemo"), json.dumps(vocabulary).encode(), merges.encode())
        mine = load_tokenizer(source, VOCABULARY)
        for text in FIXED:
            assert mine.encode(text) == theirs(text)["input_ids"], text
        assert mine.eos_id == theirs.eos_token_id


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        (b"{", b"", "its vocabulary is not valid JSON"),
        (b"[" * 100_000, b"", "its vocabulary is not valid JSON"),
        (b"[]", b"", "distinct ids"),
        (b"\xff\xff", b"", "its vocabulary is not valid JSON"),
        (b'{"a": 0}', b"\xff", "cannot read a.nemo as UTF-8 text"),
        (b'{"a": 0}', b"a b c", "expected a merge of two tokens"),
    ],
)
def test_damaged_files_of_archives(vocabulary: bytes, merges: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(BytePairFiles(Path("a.nemo"), vocabulary, merges), VOCABULARY)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["starcoder2", "llama", "gpt2"])
def test_digits_stay_apart_in_gpt2s_class(tmp_path: Path, model_type: str) -> None:
    """transformers 5 forgets them there, transformers 4 and the training did not: tokenizer.json is right."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = made("starcoder")
    folder = write_folder(tmp_path, theirs, model_type, {"tokenizer_class": "GPT2Tokenizer"})
    mine, reference = load_tokenizer(folder, VOCABULARY), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in FIXED:
        assert mine.encode(text) == theirs.encode(text).ids == reference(text)["input_ids"]
    assert mine.eos_id == theirs.token_to_id("<|endoftext|>")
    assert mine.encode("a  1") != AutoTokenizer.from_pretrained(folder)("a  1")["input_ids"]


def test_a_document_is_a_part(pair: tuple[ours.Tokenizer, Any]) -> None:
    mine, theirs = pair
    assert mine.eos_id is not None
    end = theirs.convert_ids_to_tokens(mine.eos_id)
    text = end.join(["one two", " three", "", "four  5"])
    parts = [part for part in mine.encode_in_parts(text) if part not in ([], list(mine.prefix))]
    assert len(parts) == 4
    check(mine, theirs, text)


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_parts_with_tokens_that_look_around_them(tmp_path: Path, flags: dict[str, bool]) -> None:
    """And with tokens that are part of others: a cut before one of these would give other ids."""
    theirs = made("starcoder")
    theirs.add_tokens([AddedToken("[m]", normalized=flags.pop("normalized", False), **flags)])
    theirs.add_tokens([AddedToken(token, normalized=False) for token in ("x<|en", "<<|", "|>y", "_w_", "é")])
    mine = load_tokenizer(write_folder(tmp_path, theirs), VOCABULARY)
    for text in ["a [m] <|endoftext|> b", "x<|endoftext|>", "<<|endoftext|>y", "a[m]<fim_prefix> [m]b", "a_w_é _w_"]:
        assert mine.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("kind", ["starcoder", "llama3", "llama2", "unigram"])
def test_tokens_beyond_the_embeddings(tmp_path: Path, kind: str) -> None:
    theirs = made(kind)
    size = theirs.get_vocab_size()
    plain = theirs.encode("a<extra>b").ids
    theirs.add_special_tokens(["<extra>"])
    folder = write_folder(tmp_path, theirs, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(folder, size).encode("a<extra>b") == plain
    assert load_tokenizer(folder, size + 1).encode("a<extra>b") == theirs.encode("a<extra>b").ids
    with pytest.raises(CheckpointError, match=r"has ids up to \d+, but the model's vocabulary has 50"):
        load_tokenizer(folder, 50)


def test_lone_surrogates_are_replacement_characters(pair: tuple[ours.Tokenizer, Any]) -> None:
    mine, theirs = pair
    assert mine.encode("a\ud800b") == theirs("a\ufffdb")["input_ids"]
    assert mine.encode("\ud83d\ude00") == theirs("\U0001f600")["input_ids"]


@pytest.mark.parametrize("text", [" " * 60_000 + "x", "\n \t\u3000" * 15_000, "ab" * 30_000])
def test_long_runs(pair: tuple[ours.Tokenizer, Any], text: str) -> None:
    check(*pair, text)


def test_truncation_and_padding_are_not_the_tokenizers_business(tmp_path: Path) -> None:
    theirs = made("starcoder")
    expected = theirs.encode("the 12 the").ids
    theirs.enable_truncation(2)
    theirs.enable_padding(length=50)
    assert load_tokenizer(write_folder(tmp_path, theirs), VOCABULARY).encode("the 12 the") == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("starcoder", {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder.type='WordPiece'"),
    ("starcoder", {"decoder": None}, "decoder.type=None is not supported"),
    ("llama2", {"decoder": {"type": "Sequence", "decoders": []}}, "expected a decoder that says how"),
    ("llama2", {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Fuse"}]}}, "type='Fuse'"),
    ("starcoder", {"model": 3}, "expected a model with its vocabulary"),
    ("starcoder", {"model": {"vocab": {"a": 0, "b": 0}}}, "distinct ids"),
    ("unigram", {"model": {"type": "Unigram", "vocab": [3]}}, "a list of tokens with their scores"),
    ("unigram", {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}, "cannot read this tokenizer"),
    ("starcoder", {"normalizer": {"type": "Magic"}}, "cannot read this tokenizer"),
    ("starcoder", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, "cannot read this tokenizer"),
    ("llama2", {"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}}, "only a template"),
    ("llama2", {"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}}, "only a temp"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_by_name(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    raw = json.loads(made(kind).to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path, VOCABULARY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dropout_is_refused(tmp_path: Path) -> None:
    raw = json.loads(made("llama2").to_str())
    raw["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"model\.dropout=0\.1 is not supported"):
        load_tokenizer(tmp_path, VOCABULARY)


def test_llamas_class_needs_bpe(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, made("unigram"), "llama", _LLAMA)
    with pytest.raises(CheckpointError, match=r"model\.type='Unigram' is not supported, only 'BPE'"):
        load_tokenizer(folder, VOCABULARY)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = write_folder(tmp_path, made("starcoder"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match="needs the package tokenizers"):
        load_tokenizer(folder, VOCABULARY)


def test_gpt2s_own_kind_does_not_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tokenizers import decoders, pre_tokenizers

    theirs = Tokenizer.from_str(made("starcoder").to_str())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    expected = theirs.encode(CORPUS[0]).ids
    folder = write_folder(tmp_path, theirs)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(folder, VOCABULARY).encode(CORPUS[0]) == expected
