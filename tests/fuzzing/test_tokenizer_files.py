"""Damaged tokenizer files: the ids of transformers' AutoTokenizer, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzz_json, fuzzing, mutated_bytes, mutated_json
from tokenizer_files import made

from tokenizer import load_tokenizer
from weight_loader import CheckpointError

transformers = pytest.importorskip("transformers", reason="the reference")
tokenizers = pytest.importorskip("tokenizers", reason="makes the tokenizer to be damaged")

pytestmark = pytest.mark.slow

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 600  # of the model: more than the tokenizer's
TEXTS = [
    "Hello world",
    "  it's\nthe <pad> end<|endoftext|>of 12 \u00e9 \U0001f600",
    "<s>the</s> ab <|eot_id|>a  1",
    "the\u00a0<mask>other \t<|endoftext|> x",
    "",
]
_WORDS = """
type content id special normalized lstrip rstrip single_word model vocab merges added_tokens pre_tokenizer
post_processor decoder normalizer truncation padding unk_token BPE ByteLevel WordLevel Sequence Lowercase NFC
Whitespace TemplateProcessing Fuse add_prefix_space use_regex trim_offsets ignore_merges byte_fallback dropout
fuse_unk tokenizer_class GPT2Tokenizer GPT2TokenizerFast PreTrainedTokenizerFast LlamaTokenizer gpt2 bos_token
eos_token pad_token extra_special_tokens additional_special_tokens add_bos_token added_tokens_decoder
split_special_tokens <|endoftext|> <pad> \u0120the t h
"""
WORDS = _WORDS.split()


def sound_files() -> dict[str, Any]:
    """A byte-level BPE with three added tokens, as transformers writes it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the other thing that they thought of, there and then"] * 3, trainer)
    tokenizer.add_tokens(["<mask>"])
    tokenizer.add_special_tokens([tokenizers.AddedToken("<pad>", lstrip=False, normalized=False)])
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": "<pad>",
            "added_tokens_decoder": {"0": {"content": END_OF_TEXT, "special": True}},
            "model_max_length": 64,
        },
        "special_tokens_map.json": {"eos_token": {"content": END_OF_TEXT, "lstrip": False}, "pad_token": "<pad>"},
        "config.json": {"model_type": "gpt2", "vocab_size": VOCABULARY},
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[list[int]]]]:
    """The folder, its files, and the ids of the texts."""
    folder, files = tmp_path_factory.mktemp("tokenizer"), sound_files()
    for name, tree in files.items():
        (folder / name).write_text(json.dumps(tree))
    yield folder, files, reference(folder)


def reference(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def check(folder: Path) -> bool:
    """Whether the files were accepted here and by transformers; both then give the same ids."""
    try:
        ids = [load_tokenizer(folder, VOCABULARY).encode(text) for text in TEXTS]
    except CheckpointError as error:
        assert str(error) and "\n" not in str(error)
        return False
    try:
        expected = reference(folder)
    except BaseException as error:  # pyo3's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        return False  # nothing to compare with: transformers also refuses nonsense that no id depends on
    assert ids == expected
    return True


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("tokenizer.json", True),
        ("tokenizer.json", False),
        ("tokenizer_config.json", False),
        ("special_tokens_map.json", False),
    ],
)
def test_json_files(
    name: str, alone: bool, sound: tuple[Path, dict[str, Any], list[list[int]]], tmp_path: Path
) -> None:
    source, files, _ = sound
    for other in ["config.json", name] if alone else files:
        shutil.copy(source / other, tmp_path / other)
    mutations = 3000 if name == "tokenizer.json" else 2000
    fuzz_json(tmp_path / name, files[name], WORDS, mutations, lambda: check(tmp_path), at_least=mutations // 12)


RELATIVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "backend": ("starcoder", "gpt_bigcode", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}),
    "llama": ("llama2", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True}),
    "llama3": ("llama3", "llama", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives(relative: str, name: str, tmp_path: Path) -> None:
    kind, model_type, settings = RELATIVES[relative]
    files = {
        "tokenizer.json": json.loads(made(kind).to_str()),
        "tokenizer_config.json": settings,
        "config.json": {"model_type": model_type, "vocab_size": VOCABULARY},
    }
    for other, tree in files.items():
        (tmp_path / other).write_text(json.dumps(tree))
    words = [*WORDS, "Digits", "Split", "Metaspace", "Prepend", "Replace", "ByteFallback", "Strip", "prepend_scheme"]
    words += ["first", "never", "legacy", "single", "A", "SpecialToken", "<s>", "</s>", "\u2581", "individual_digits"]
    fuzz_json(tmp_path / name, files[name], words, 1500, lambda: check(tmp_path), at_least=100)


def test_vocab_and_merges(sound: tuple[Path, dict[str, Any], list[list[int]]], tmp_path: Path) -> None:
    _, files, _ = sound
    model = files["tokenizer.json"]["model"]
    merges = "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(merges)
    compared = 0

    @fuzzing(2000)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal compared
        is_vocab = data.draw(st.booleans())
        vocab = mutated_json(data.draw, model["vocab"], WORDS) if is_vocab else json.dumps(model["vocab"]).encode()
        (tmp_path / "vocab.json").write_bytes(vocab)
        (tmp_path / "merges.txt").write_bytes(
            merges.encode() if is_vocab else mutated_bytes(data.draw, merges.encode())
        )
        compared += check(tmp_path)

    fuzz()
    assert compared > 200
