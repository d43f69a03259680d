"""The decode loop and sampling, used by every program in this repository.

Sampling runs on the host, from a counter-based generator (Philox, Salmon et al. 2011): a sequence of tokens depends on
the logits, the seed and the sample's number alone, not on the machine, the batch it ran in or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from nvtripy_portable import sampling

MAX_SEED = (1 << 64) - 1


class LogitsError(Exception):
    """A model's logits give no probabilities. The text is one line, ready to be shown to the user."""

    @staticmethod
    def because(reason: object) -> LogitsError:
        return LogitsError(
            f"the model's numbers are not finite ({reason}): something overflowed on the way; a data type of a larger "
            "range, bfloat16 or float32, may hold it"
        )


class CachedModel(Protocol):
    """What generation needs of a model: ``engine.Engine`` has it."""

    batch: int
    context: int

    def step(self, idx: np.ndarray, position: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Appends tokens (B, T) at ``position`` (B,), 0 for a new sequence.

        Returns float32 logits (B, V), those of each row's token ``last``: what comes after it is padding. -1 is for a
        row that has no token in this step.
        """


class Uniforms:
    """Random numbers from 0 up to but not with 1, by seed, sample and index (Philox, Salmon et al. 2011). They are made
    many at once, as even one takes 17 microseconds after a step that left nothing of NumPy in the processor's caches.
    """

    _BLOCK = 256

    def __init__(self, seed: int, sample: int) -> None:
        self._key = np.array([seed, sample], np.uint64)
        self._number, self._block = -1, [0.0]

    def __getitem__(self, index: int) -> float:
        number, within = divmod(index, self._BLOCK)
        if number != self._number:
            philox = np.random.Philox(key=self._key, counter=number * self._BLOCK // 4)  # four numbers for one count
            self._number, self._block = number, np.random.Generator(philox).random(self._BLOCK).tolist()
        return self._block[within]


class Sampler:
    """Picks a token from logits.

    Args:
        seed: Any integer from 0 to 2**64 - 1.
        sample: The number of the sample under this seed; each number is an independent stream.
        temperature: Divides the logits; 0 picks the most likely token (greedy).
        top_k: Keep the k most likely tokens only; None keeps all.
        top_p: Keep the most likely tokens that together reach this probability (nucleus sampling, Holtzman et al.
            2020).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        seed: int = 0,
        sample: int = 0,
        temperature: float = 0.8,
        top_k: int | None = 5,
        top_p: float | None = None,
    ) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"expected a seed from 0 to {MAX_SEED} but got {seed}")
        if not (0.0 <= temperature < float("inf")):
            raise ValueError(f"expected a finite temperature of at least 0 but got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"expected top-k to be at least 1 but got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"expected top-p to be above 0 and at most 1 but got {top_p}")
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        self._uniforms, self._drawn = Uniforms(seed, sample), 0

    def __call__(self, logits: np.ndarray) -> int:
        """A token id from logits (V,), of which minus infinity is a probability of zero.

        Raises:
            LogitsError: one of them is NaN or infinity, or all are minus infinity.
        """
        try:
            if self._temperature == 0.0:
                token = int(np.argmax(logits))  # of NaN, if there is one
                if not math.isfinite(logits[token]):
                    sampling.check(logits)
                return token
            top_k = None if self._top_k is None else min(self._top_k, len(logits))
            uniform = self._uniforms[self._drawn]
            self._drawn += 1
            return sampling.draw(logits, uniform, self._temperature, top_k, self._top_p)
        except ValueError as error:
            raise LogitsError.because(error) from None


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    samplers: Sequence[Sampler],
    max_new_tokens: int,
    done: set[int],
) -> Iterator[list[tuple[int, int]]]:
    """Continues prompts together, one token each a step.

    Args:
        model: The compiled model; its batch must hold all prompts.
        prompts: Token ids of each prompt, at least one, and at most the context.
        samplers: One for each prompt.
        max_new_tokens: Stop after so many; a prompt stops earlier where the context is full.
        done: Rows that need no more tokens. The caller adds to it between steps, the loop where a context is full.

    Yields:
        (row, token) for every row that is not done. Nothing is computed for a step whose tokens nobody asks for.

    Raises:
        LogitsError: by a sampler.
        ValueError: no prompt, too many, an empty one, or one longer than the context.
    """
    if not 1 <= len(prompts) <= model.batch:
        raise ValueError(f"expected 1 to {model.batch} prompts but got {len(prompts)}")
    for prompt in prompts:
        if not 1 <= len(prompt) <= model.context:
            raise ValueError(f"expected a prompt of 1 to {model.context} tokens but got {len(prompt)}")
    if max_new_tokens < 1:
        return
    lengths = np.zeros(model.batch, dtype=np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    idx = np.zeros((model.batch, int(lengths.max())), dtype=np.int32)
    for row, prompt in enumerate(prompts):
        idx[row, : len(prompt)] = prompt
    logits = model.step(idx, np.zeros(model.batch, dtype=np.int32), lengths - 1)

    # How many tokens each prompt can get: the last of them needs no place in the context. What follows is run for every
    # token, after a step that left nothing of it in the processor's caches: it does no more than it has to.
    room = [model.context - len(prompt) + 1 for prompt in prompts]
    least_room = min(room)
    tokens, only = np.zeros((model.batch, 1), dtype=np.int32), np.full(model.batch, -1, dtype=np.int32)
    only[: len(prompts)] = 0
    position = lengths  # of each row's next token
    for count in range(1, max_new_tokens + 1):
        drawn = []
        for row, sampler in enumerate(samplers):
            if row not in done:
                token = sampler(logits[row])
                tokens[row, 0] = token
                drawn.append((row, token))
        yield drawn
        if count >= least_room:
            done.update(row for row, most in enumerate(room) if count >= most)
            # Where rows cannot be left out, they go on in place: their slot never leaves the context.
            np.minimum(position, model.context - 1, out=position)
        if count == max_new_tokens or len(done) >= len(prompts):
            return
        for row in done:
            only[row] = -1
        logits = model.step(tokens, position, only)
        position += 1
