"""What clients ask: random prompts and lengths, the same for every server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import model_files
import numpy as np
from random_weights import SEED

from load.lexicon import lexicon, text_of
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PROMPT_TOKENS = (16, 512)
ANSWER_TOKENS = (16, 256)


@dataclass(frozen=True)
class Material:
    """What prompts are made of.

    Attributes:
        pieces: Texts of one token each, in whatever order they are put together.
        passage: Or, where there are none: a text's pieces, of which prompts are passages.
        context: How many tokens the model takes.
    """

    pieces: Sequence[str]
    passage: Sequence[str]
    context: int

    def prompt(self, random: np.random.Generator, length: int) -> str:
        """A text of ``length`` tokens (or nearly as many, where it is a passage)."""
        if self.pieces:
            return "".join(self.pieces[each] for each in random.integers(0, len(self.pieces), length).tolist())
        start = int(random.integers(0, len(self.passage) - length))
        return "".join(self.passage[start : start + length])


def material_of(shape: str, cache: Path) -> Material:
    """For a model of bench.py's: made-up words, or passages of the embedded checkpoint's held-out text."""
    source = model_files.float_checkpoint(shape, cache)
    config = open_checkpoint(source).config
    if source != model_files.EMBEDDED:
        words = lexicon(config.vocab_size).words
        return Material([text_of([word]) for word in words], [], config.n_positions)
    tokenizer = load_tokenizer(open_checkpoint(source).tokenizer_source, config.vocab_size)
    text = (source / "held-out.txt").read_text(encoding="utf-8")
    return Material([], [tokenizer.decode([id]) for id in tokenizer.encode(text)], config.n_positions)


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        key: Tells it from others: the client's number and the request's. The same for every server.
        prompt: The text, of ``length`` tokens.
        new: How many tokens are wanted.
    """

    key: tuple[int, int]
    prompt: str
    length: int
    new: int


def requests_of(client: int, material: Material) -> Iterator[Asked]:
    """What one client asks for, one after the other, without an end."""
    random = np.random.Generator(np.random.Philox(key=[SEED, client]))
    half = material.context // 2
    number = 0
    while True:
        length = int(random.integers(PROMPT_TOKENS[0], min(PROMPT_TOKENS[1], half), endpoint=True))
        new = int(random.integers(ANSWER_TOKENS[0], min(ANSWER_TOKENS[1], half), endpoint=True))
        yield Asked((client, number), material.prompt(random, length), length, new)
        number += 1
