"""Choosing an answer's next token from logits, and what is told of how likely it was."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from generation import LogitsError, Uniforms
from nvtripy_portable import sampling
from serving.settings import SamplingSettings


@dataclass(frozen=True)
class TokenScores:
    """How likely a token was.

    Attributes:
        id: The token.
        logprob: The logarithm of its probability, by the model's own logits.
        rank: 1 for the likeliest of all.
        top: The likeliest ids, and the logarithms of their probabilities, in falling order.
    """

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Drawer:
    """Draws the tokens of one answer. Which token is drawn depends on the logits, on the settings, on the tokens so far
    and on the answer's number, and on nothing else.

    Args:
        sample: The answer's number among those of its request.
        prompt: The prompt's ids.
        endings: Ids that end an answer, which are not drawn before ``min_tokens``.
    """

    def __init__(self, settings: SamplingSettings, sample: int, prompt: list[int], endings: frozenset[int]) -> None:
        self._settings, self._uniforms = settings, Uniforms(settings.seed, sample)
        self._endings = np.array(sorted(endings), np.int32)
        self._has_penalties = (
            settings.repetition_penalty != 1.0 or settings.frequency_penalty != 0.0 or settings.presence_penalty != 0.0
        )
        self._prompt = prompt
        self._counts: Counter[int] | None = None
        bias, allowed = settings.logit_bias, settings.allowed_token_ids
        self._fixed = sampling.Adjustment(
            biased=np.array(list(bias), np.int32),
            bias=np.array(list(bias.values()), np.float64),
            repetition=settings.repetition_penalty,
            frequency=settings.frequency_penalty,
            presence=settings.presence_penalty,
            allowed=np.array(sorted(set(allowed or ())), np.int32),
        )
        self._is_adjusted = bool(bias or allowed or self._has_penalties)

    def __call__(self, logits: np.ndarray, generated: list[int]) -> int:
        """The next token after those that were generated, from float32 logits (V,).

        Raises:
            LogitsError: they give no probabilities.
        """
        settings = self._settings
        ending_is_early = len(generated) < settings.min_tokens and len(self._endings) > 0
        try:
            if self._is_adjusted or ending_is_early:
                sampling.check(logits)
                logits = sampling.adjust(logits, self._adjustment(generated, ending_is_early))
            if settings.temperature == 0.0:
                token = int(np.argmax(logits))  # of NaN, if there is one
                if not math.isfinite(logits[token]):
                    sampling.check(logits)
                return token
            top_k = None if settings.top_k is None else min(settings.top_k, len(logits))
            uniform = self._uniforms[len(generated)]
            return sampling.draw(logits, uniform, settings.temperature, top_k, settings.top_p, settings.min_p)
        except ValueError as error:
            raise LogitsError.because(error) from None

    def _adjustment(self, generated: list[int], ending_is_early: bool) -> sampling.Adjustment:
        changes: dict[str, Any] = {}
        if self._has_penalties:
            counts = self._count(generated)
            changes["seen"] = np.fromiter(counts.keys(), np.int32, len(counts))
            changes["counts"] = np.fromiter(counts.values(), np.int32, len(counts))
        if ending_is_early:
            changes["forbidden"] = self._endings
        return replace(self._fixed, **changes)

    def _count(self, generated: list[int]) -> Counter[int]:
        """How often each token of the text was generated; 0 for those of the prompt alone."""
        if self._counts is None or self._counts.total() > len(generated):
            self._counts = Counter(dict.fromkeys(self._prompt, 0))
        for id in generated[self._counts.total() :]:
            self._counts[id] += 1
        return self._counts


def scores(logits: np.ndarray, id: int, count: int) -> TokenScores:
    """How likely a token is by float32 logits (V,), and the ``count`` likeliest."""
    total = sampling.log_sum_exp(logits)
    top = tuple((other, float(logits[other]) - total) for other in sampling.largest(logits, count))
    return TokenScores(id, float(logits[id]) - total, int((logits > logits[id]).sum()) + 1, top)
