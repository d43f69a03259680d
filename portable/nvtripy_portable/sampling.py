"""Picking one of many logits, for programs that generate text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

try:
    from nvtripy_portable import _native  # type: ignore[attr-defined]
except ImportError:  # not built
    _native = None

_NO_IDS = np.empty(0, np.int32)
_GROUP = 64  # logits of which one maximum is taken


def draw(
    logits: np.ndarray,
    uniform: float,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> int:
    """The index on which a random number falls, where each has a share as large as its probability.

    Args:
        logits: Floats, (V,), at least one; read as float32. Minus infinity is a probability of zero. Shares are laid
            out in their falling order, the lower index first among equals.
        uniform: Random, from 0 up to but not with 1.
        temperature: Divides the logits; above 0. One so small that only the largest logit has a share is possible.
        top_k: Only the k largest have a share; None is all of them.
        top_p: Only the largest have a share that together reach this probability of those that are left by ``top_k``
            and ``min_p``; None is all of them.
        min_p: Only those have a share whose probability is at least this part of the largest one's (Nguyen et al.
            2024); None is all of them.

    Raises:
        ValueError: a logit is NaN or infinity, all are minus infinity, or there is none; or ``top_k`` is below 1.

    >>> draw(np.array([1, 3, 2, 3], np.float32), 0.6, temperature=0.8, top_k=2)
    3
    """
    if not len(logits) or (top_k is not None and top_k < 1):
        raise ValueError("expected at least one logit, and one to draw from")
    if logits.dtype != np.float32 or not logits.flags.c_contiguous:
        with np.errstate(over="ignore"):  # refused next
            logits = np.ascontiguousarray(logits, np.float32)
    count = len(logits) if top_k is None else min(top_k, len(logits))
    if _native is not None:
        drawn = int(_native.draw(logits, uniform, temperature, count, top_p, min_p))
    else:
        drawn = _draw(logits, uniform, temperature, count, top_p, min_p)
    if drawn < 0:
        check(logits)
    return drawn


@dataclass
class Adjustment:
    """What a request asks of logits before one is drawn, in the order of the fields.

    Attributes:
        biased, bias: Token ids, int32, and what is added to the logit of each, float64.
        seen, counts: The ids of a text so far, int32, and how often each was generated, int32; 0: it is of the prompt
            only.
        repetition: What a logit above 0 of a token that was seen is divided by, and any other multiplied with (Keskar
            et al. 2019). For those that were generated ``frequency`` times the count, and ``presence``, are taken off.
        allowed: Where there are any, all other ids get minus infinity.
        forbidden: Ids that get minus infinity.
    """

    biased: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bias: np.ndarray = field(default_factory=lambda: np.empty(0))
    seen: np.ndarray = field(default_factory=lambda: _NO_IDS)
    counts: np.ndarray = field(default_factory=lambda: _NO_IDS)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    allowed: np.ndarray = field(default_factory=lambda: _NO_IDS)
    forbidden: np.ndarray = field(default_factory=lambda: _NO_IDS)


def adjust(logits: np.ndarray, how: Adjustment) -> np.ndarray:
    """Logits as they are drawn from, float32 (V,), from a model's, float32 (V,).

    Raises:
        ValueError: an id that is none of the vocabulary's.
    """
    if _native is not None:
        adjusted = np.empty_like(logits)
        penalties = (how.repetition, how.frequency, how.presence)
        _native.adjust(
            *(np.ascontiguousarray(logits), adjusted, how.biased, how.bias, how.seen, how.counts),
            *(penalties, how.allowed, how.forbidden),
        )
        return adjusted
    return _adjust(logits, how)


def _adjust(logits: np.ndarray, how: Adjustment) -> np.ndarray:
    """What sampling.cpp does, step by step, and therefore with the same result to the last bit."""
    for ids in (how.biased, how.seen, how.allowed, how.forbidden):
        if ((ids < 0) | (ids >= len(logits))).any():
            raise ValueError("expected token ids of the vocabulary")
    adjusted = logits.copy()
    for id, bias in zip(how.biased.tolist(), how.bias.tolist(), strict=True):  # one may come twice
        adjusted[id] = float(adjusted[id]) + bias
    wide = adjusted[how.seen].astype(np.float64)
    wide = np.where(wide > 0, wide / how.repetition, wide * how.repetition)
    taken = wide - how.frequency * how.counts - how.presence
    with np.errstate(over="ignore"):
        adjusted[how.seen] = np.where(how.counts > 0, taken, wide)
    if len(how.allowed):
        kept = adjusted[how.allowed]
        adjusted[:] = -np.inf
        adjusted[how.allowed] = kept
    adjusted[how.forbidden] = -np.inf
    return adjusted


def log_sum_exp(logits: np.ndarray) -> float:
    """The logarithm of the sum of the exponentials of float32 logits (V,), none of them NaN: what a logit lies above
    the logarithm of its probability. The two ways agree to a relative 1e-14, not to the last bit."""
    if _native is not None:
        return float(_native.log_sum_exp(np.ascontiguousarray(logits)))
    most = float(logits.max())
    return most if most == -math.inf else most + math.log(np.exp(logits.astype(np.float64) - most).sum())


def largest(logits: np.ndarray, count: int) -> list[int]:
    """Ids of the ``count`` largest float32 logits in falling order, the lower id first among equals."""
    if _native is not None:
        return list(_native.largest(np.ascontiguousarray(logits), count))
    return [int(id) for id in _largest(logits, count)] if count else []


def check(logits: np.ndarray) -> None:
    """Refuses logits that give no probabilities.

    Raises:
        ValueError: one is NaN or infinity, or all are minus infinity; the message names it.
    """
    bad = np.flatnonzero(~(logits < np.inf))
    if bad.size:
        raise ValueError(f"the logit of token {bad[0]} is {float(logits[bad[0]])}")
    if not (logits > -np.inf).any():
        raise ValueError("all logits are -inf")


def _draw(
    logits: np.ndarray, uniform: float, temperature: float, count: int, top_p: float | None, min_p: float | None
) -> int:
    """What sampling.cpp does, step by step, and therefore with the same result to the last bit: -1 for no numbers."""
    if not np.isfinite(logits.max()):
        return -1
    candidates = _largest(logits, count)
    wide = logits[candidates].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        powers = (wide - wide[0]) / temperature  # the difference first: a quotient can overflow
    # The C library's exponential, as there: NumPy's own can differ in the last bit.
    shares = np.array([math.exp(power) for power in powers.tolist()])
    if min_p is not None:
        shares = shares[shares >= min_p]  # the first one's is 1
    cumulative = np.cumsum(shares)
    if top_p is not None:
        # Up to and with the one that takes the sum over the bar, so that at least one stays.
        cumulative = cumulative[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    drawn = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(candidates[min(drawn, len(cumulative) - 1)])


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest in falling order, the lower index first among equals."""
    candidates = _reaching(logits, count)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]


def _reaching(logits: np.ndarray, count: int) -> np.ndarray:
    """Indices, in rising order, among which are the ``count`` largest and all that equal the last of those.

    As many groups as are wanted have a maximum that reaches the bar, so that many logits reach it, and the rest is out:
    one look at each logit, where selecting among all of them would take several.
    """
    groups = len(logits) // _GROUP
    if groups <= count:
        return np.arange(len(logits))
    maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)  # along rows, which vectorises
    bar = np.partition(maxima, -count)[-count]
    return np.flatnonzero(logits >= bar)
