"""The token files of a prepared text → the batches of a training run."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from command_line import UsageError
from tokenizer import BytePairTokenizer, Tokenizer, build, byte_ids
from tokenizing.description import Description, from_json
from training.config import TrainConfig
from weight_loader import CheckpointError, read_json


@dataclass(frozen=True)
class Dataset:
    """What prepare.py wrote: token ids (uint16) of the parts, and their tokenizer."""

    train: np.ndarray  # (tokens,)
    val: np.ndarray  # (tokens,)
    test: np.ndarray  # (tokens,)
    tokens_per_char: dict[str, float]  # of each part: turns nats per token into nats per character
    tokenizer: Tokenizer
    description: Description  # of the tokenizer
    vocab_size: int
    eos_token_id: int | None  # None: the tokenizer has no END_OF_TEXT


def load_dataset(folder: Path, block_size: int) -> Dataset:
    """Open a folder filled by prepare.py; each part must be longer than one window."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        # Mapped, not read: a text may be larger than the memory, and every process of a run has it open.
        parts = {name: np.memmap(folder / f"{name}.bin", dtype="<u2", mode="r") for name in ("train", "val", "test")}
        description = from_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json"))
        tokenizer = build(description, description.vocab_size)
        tokens_per_char = {name: meta[f"{name}_tokens"] / meta[f"{name}_chars"] for name in parts}
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}; run prepare.py first") from None
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError, CheckpointError) as error:
        raise UsageError(f"{folder} is damaged ({type(error).__name__}: {error}); run prepare.py again") from None
    for name, ids in parts.items():
        if len(ids) <= block_size:
            raise UsageError(
                f"{folder / name}.bin is too short: {len(ids)} tokens, but block_size={block_size} needs at least "
                f"{block_size + 1}; give a longer text or a smaller block_size"
            )
    return Dataset(
        **parts,
        tokens_per_char=tokens_per_char,
        tokenizer=tokenizer,
        description=description,
        vocab_size=description.vocab_size,
        eos_token_id=tokenizer.eos_id,
    )


class SubwordRegularizer:
    """BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267): the same text, cut into other tokens each time.

    The `tokenizers` library has it too, but draws from a generator that cannot be seeded. Here a handful of ways to cut
    each distinct word is drawn once, and an epoch draws one of them for each occurrence of the word, which costs a few
    NumPy gathers instead of a tokenization.
    """

    VARIANTS = 24  # ways to cut a word; at p = 0.1 most words have fewer that matter

    def __init__(self, data: Dataset, p: float, seed: int) -> None:
        """Draw the ways in which the words of `data.train` are cut; an added token is a word that is not cut.

        Raises:
            UsageError: the tokenizer is an alphabet.
        """
        description, vocabulary = data.description, data.description.vocabulary
        if description.merges is None or not isinstance(data.tokenizer, BytePairTokenizer):
            raise UsageError(f"bpe_dropout={p} needs a dataset with a BPE tokenizer, but this one's has no merges")
        self._merges = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(description.merges)
        }
        self._p = p
        self._random = random.Random(seed)
        letters = byte_ids(description)
        numbers: dict[bytes | int, int] = {}
        words = data.tokenizer.words(data.tokenizer.decode(data.train.tolist()))
        self._occurrences = np.array([numbers.setdefault(word, len(numbers)) for word in words])  # (words,)
        cuts = [
            [word] if isinstance(word, int) else self._cut([letters[byte] for byte in word])
            for word in numbers
            for _ in range(self.VARIANTS)
        ]
        self._pool = np.array([token for cut in cuts for token in cut], dtype=np.uint16)
        self._lengths = np.array([len(cut) for cut in cuts])  # (distinct words * VARIANTS,)
        self._starts = np.cumsum(self._lengths) - self._lengths  # of each cut, in the pool

    def _cut(self, ids: list[int]) -> list[int]:
        """Merge as BPE does, except that each candidate sits out a round with probability p."""
        while True:
            best: tuple[int, int, int] | None = None  # (rank, position, merged id): the lowest rank, then the leftmost
            for position in range(len(ids) - 1):
                merge = self._merges.get((ids[position], ids[position + 1]))
                if merge and (best is None or merge[0] < best[0]) and self._random.random() >= self._p:
                    best = (merge[0], position, merge[1])
            if best is None:
                return ids
            _, position, merged = best
            ids[position : position + 2] = [merged]

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return the whole text as token ids, uint16, each word cut in one of its ways."""
        chosen = self._occurrences * self.VARIANTS + rng.integers(self.VARIANTS, size=len(self._occurrences))
        lengths = self._lengths[chosen]
        ends = np.cumsum(lengths)
        shift = np.repeat(self._starts[chosen] - (ends - lengths), lengths)  # from a place in the epoch to the pool
        return self._pool[np.arange(ends[-1]) + shift]


@dataclass(frozen=True)
class Batch:
    """The windows of one batch; each field is (windows, tokens) int64, a window's targets being its next tokens."""

    inputs: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


class Batches:
    """Windows of batch_size * block_size tokens in all, cut from the training text at random places.

    With several processes each batch is drawn for all of them together, and each takes its part of the windows: two
    processes with batches of 4 see what one sees with batches of 8.

    With BPE-dropout a window comes from the re-tokenized text with a probability that falls from 1 to 0 over the run:
    the end of the training is spent on the cut that the tokenizer itself makes, the only one met afterwards. Where the
    tokenizer has an end-of-text token, one window in eight begins with it, so that a prompt of that token alone is one
    that the model knows.

    Short windows first, long ones at the end, is Press et al. 2020 (arXiv:2012.15832): attention over a long window is
    a quarter of the time of a small model's step, and of little use before the model knows its words. A short window
    stands at a random place of the context, so that every position's embedding is trained from the start.
    """

    def __init__(self, config: TrainConfig, data: Dataset, rank: int = 0, processes: int = 1) -> None:
        self._config, self._data, self._rank, self._processes = config, data, rank, processes
        self._rng = np.random.Generator(np.random.Philox(config.seed))
        self._tokens = config.batch_size * config.block_size * processes
        self._steps_per_epoch = max(1, len(data.train) // (self._tokens * config.gradient_accumulation_steps))
        self._regularizer = None
        if config.bpe_dropout:
            self._regularizer = SubwordRegularizer(data, config.bpe_dropout, config.seed)
        self._recut = data.train
        self._epoch_began: dict[str, Any] | None = None  # the generator's state when `_recut` was drawn

    def begin_step(self, step: int) -> None:
        """At the first step of an epoch, the text is cut anew."""
        if self._regularizer and step % self._steps_per_epoch == 0:
            self._epoch_began = _plain(self._rng.bit_generator.state)
            self._recut = self._regularizer.epoch(self._rng)

    def draw(self, step: int) -> Batch:
        """The next batch of a step, of this process."""
        config, data = self._config, self._data
        is_short = step < config.short_share * config.max_iters
        size = config.short_block_size if is_short else config.block_size
        windows = np.empty((self._tokens // size, size + 1), dtype=np.int64)
        for row in windows:
            source = self._recut if self._rng.random() >= step / config.max_iters else data.train
            start = self._rng.integers(len(source) - size)
            row[:] = source[start : start + size + 1]
            if data.eos_token_id is not None and self._rng.random() < 1 / 8:
                row[0] = data.eos_token_id
        first = self._rng.integers(config.block_size - size + 1, size=(len(windows), 1))
        mine = slice(self._rank * len(windows) // self._processes, (self._rank + 1) * len(windows) // self._processes)
        ids = torch.from_numpy(windows[mine])
        return Batch(ids[:, :-1], torch.from_numpy(first[mine] + np.arange(size)), ids[:, 1:])

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here, in plain values."""
        return {"rng": _plain(self._rng.bit_generator.state), "epoch_began": self._epoch_began}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same windows as if nothing had happened."""
        if self._regularizer and state["epoch_began"] is not None:
            self._epoch_began = state["epoch_began"]
            self._rng.bit_generator.state = _arrays(state["epoch_began"])
            self._recut = self._regularizer.epoch(self._rng)
        self._rng.bit_generator.state = _arrays(state["rng"])
        if self._regularizer and state["epoch_began"] is None:  # the run had no BPE-dropout so far
            self._epoch_began = state["rng"]
            self._recut = self._regularizer.epoch(self._rng)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A generator's state with lists for its arrays, which torch.load would refuse."""
    key_and_counter = {name: array.tolist() for name, array in state["state"].items()}
    return {**state, "state": key_and_counter, "buffer": state["buffer"].tolist()}


def _arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_plain`."""
    key_and_counter = {name: np.array(values, np.uint64) for name, values in state["state"].items()}
    return {**state, "state": key_and_counter, "buffer": np.array(state["buffer"], np.uint64)}
