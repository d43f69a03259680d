"""A vocabulary as large as GPT-2's, of made-up words: every server splits the same texts into the same tokens.

Random weights have no tokenizer, and GPT-2's own is not in a registry of packages. This one is a byte-level BPE, as
GPT-2's is (Sennrich et al. 2016; Radford et al. 2019): the 256 bytes, pairs of letters, words of two pairs, and these
with a space before them. A pair's first letter is never another's second, so that a word falls into its pairs in one
way, and a text of such words, each with its space, has as many tokens as words.
"""

from __future__ import annotations

import functools
import itertools
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPACE = "Ġ"  # how GPT-2's vocabulary writes it
ENDING = "<|endoftext|>"


@dataclass(frozen=True)
class Lexicon:
    """Tokens by their ids, merges by their rank, and the words of one token."""

    tokens: list[str]
    merges: list[str]
    words: list[str]


@functools.cache
def lexicon(vocabulary: int) -> Lexicon:
    """The one with so many tokens, of which the last ends a text.

    Raises:
        ValueError: there is no room for a word.
    """
    firsts, seconds = string.ascii_lowercase[::2], string.ascii_lowercase[1::2]
    letters = list(itertools.product(firsts, seconds))
    pairs = [first + second for first, second in letters]
    tokens = [*_bytes(), *pairs]
    count = (vocabulary - len(tokens) - 1) // 2
    if count < 1:
        raise ValueError(f"expected a vocabulary of at least {len(tokens) + 3} tokens but got {vocabulary}")
    merges = [f"{first} {second}" for first, second in letters]
    # The first pair varies fastest, so that words begin with every letter.
    halves = list(itertools.islice(((first, second) for second in pairs for first in pairs), count))
    words = [first + second for first, second in halves]
    merges += [f"{first} {second}" for first, second in halves]
    merges += [f"{SPACE} {word}" for word in words]
    tokens += [*words, *(SPACE + word for word in words)]
    tokens += [f"<|unused{number}|>" for number in range(vocabulary - len(tokens) - 1)]
    return Lexicon([*tokens, ENDING], merges, words)


def _bytes() -> list[str]:
    """The signs for the 256 bytes: themselves where they can be seen, else signs from 256 on, as GPT-2 has them."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def text_of(words: Sequence[str]) -> str:
    """A text with a token for each word."""
    return "".join(f" {word}" for word in words)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes the files that HuggingFace's and our tokenizers read."""
    found = lexicon(vocabulary)
    last = vocabulary - 1
    special: dict[str, Any] = {
        "id": last,
        "content": ENDING,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(found.tokens)},
            "merges": found.merges,
        },
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": ENDING, "eos_token": ENDING, "unk_token": ENDING}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
