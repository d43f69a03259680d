"""Beam search: the likeliest of many continuations, rather than one that is drawn.

It knows logits and tokens, and nothing of pages: whoever computes the beams is told which of them go on, and with what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from generation import LogitsError
from nvtripy_portable import sampling
from serving.drawing import TokenScores, scores
from serving.settings import BeamSettings


@dataclass(frozen=True)
class Hypothesis:
    """A continuation.

    Attributes:
        logprob: The logarithm of its probability.
        scores: Of its tokens, where they are wanted.
    """

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    scores: list[TokenScores] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A continuation that has ended, and what it is worth: ``logprob / len(ids) ** length_penalty``."""

    hypothesis: Hypothesis
    score: float


class BeamSearch:
    """Keeps the likeliest continuations of a prompt, and goes on from all of them at once (Lowerre 1976, "The HARPY
    speech recognition system"), with lengths and endings as transformers 5 has them.

    Args:
        endings: Ids that end a continuation. One that does so counts only if it is among the ``beams`` likeliest of its
            step; it is a token as any other where lengths are counted.
        max_tokens: Of a continuation, at least 1; then it ends.
        logprobs: Of how many of the likeliest tokens, beside those of the continuation, log-probabilities are kept;
            None: of none at all.

    Attributes:
        live: Those that go on, the likeliest first; at the beginning an empty one.
        found: Those that have ended, at most ``beams``, the best first.
        is_over: Whether there will be no others.
    """

    def __init__(
        self, settings: BeamSettings, endings: frozenset[int], max_tokens: int, logprobs: int | None = None
    ) -> None:
        self._settings, self._endings, self._max_tokens, self._logprobs = settings, endings, max_tokens, logprobs
        self.live = [Hypothesis()]
        self.found: list[Found] = []
        self.is_over = False

    def advance(self, logits: Sequence[np.ndarray]) -> list[int]:
        """Goes on by one token.

        Args:
            logits: Of each live continuation's next token, float32 (V,).

        Returns:
            From which of the continuations that were live until now each of the new ones goes on.

        Raises:
            LogitsError: they give no probabilities.
        """
        beams, length = self._settings.beams, len(self.live[0].ids) + 1
        is_last = length == self._max_tokens
        parents: list[int] = []
        going_on: list[Hypothesis] = []
        for place, (logprob, parent, id) in enumerate(self._candidates(logits)):
            if is_last or id in self._endings:
                if place < beams:
                    ended = self._extended(parent, id, logprob, logits[parent])
                    self.found.append(Found(ended, logprob / length**self._settings.length_penalty))
            elif len(parents) < beams:
                parents.append(parent)
                going_on.append(self._extended(parent, id, logprob, logits[parent]))
        self.found = sorted(self.found, key=lambda each: -each.score)[:beams]
        self.live = going_on
        self.is_over = is_last or self._has_enough(length)
        return parents

    def _candidates(self, logits: Sequence[np.ndarray]) -> list[tuple[float, int, int]]:
        """The likeliest continuations by one token, as (logprob, parent, id), in falling order; among equals the
        earlier parent comes first, then the lower id. There are so many that enough of them go on, whichever end."""
        count = self._settings.candidates(len(self._endings))
        found = []
        for parent, (hypothesis, row) in enumerate(zip(self.live, logits, strict=True)):
            try:
                if not np.isfinite(row.max()):
                    sampling.check(row)
            except ValueError as error:
                raise LogitsError.because(error) from None
            total = sampling.log_sum_exp(row)
            found += [
                (hypothesis.logprob + (float(row[id]) - total), parent, id) for id in sampling.largest(row, count)
            ]
        return sorted(found, key=lambda each: -each[0])[:count]

    def _extended(self, parent: int, id: int, logprob: float, logits: np.ndarray) -> Hypothesis:
        before = self.live[parent]
        told = [] if self._logprobs is None else [*before.scores, scores(logits, id, self._logprobs)]
        return Hypothesis([*before.ids, id], logprob, told)

    def _has_enough(self, length: int) -> bool:
        """Whether what goes on, ``length`` tokens long, is taken to be no better than what has ended."""
        settings = self._settings
        if len(self.found) < settings.beams:
            return False
        if settings.early_stopping is True:
            return True
        # A positive penalty makes what is longer better: it may become as long as it can. For False it is judged as if
        # it ended here, which may be wrong, but is what others do.
        at = self._max_tokens if settings.early_stopping == "never" and settings.length_penalty > 0 else length
        return self.live[0].logprob / at**settings.length_penalty <= self.found[-1].score
