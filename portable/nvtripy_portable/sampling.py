"""Picking one of many logits, for programs that generate text."""

from __future__ import annotations

import math

import numpy as np

try:
    from nvtripy_portable import _native  # type: ignore[attr-defined]
except ImportError:  # not built
    _native = None

_GROUP = 64  # logits of which one maximum is taken


def draw(
    logits: np.ndarray, uniform: float, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> int:
    """The index on which a random number falls, where each has a share as large as its probability.

    Args:
        logits: Floats, (V,), at least one; read as float32. Minus infinity is a probability of zero. Shares are laid
            out in their falling order, the lower index first among equals.
        uniform: Random, from 0 up to but not with 1.
        temperature: Divides the logits; above 0. One so small that only the largest logit has a share is possible.
        top_k: Only the k largest have a share; None is all of them.
        top_p: Only the largest have a share that together reach this probability of the ``top_k``; None is all of them.

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
        drawn = int(_native.draw(logits, uniform, temperature, count, top_p))
    else:
        drawn = _draw(logits, uniform, temperature, count, top_p)
    if drawn < 0:
        check(logits)
    return drawn


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


def _draw(logits: np.ndarray, uniform: float, temperature: float, count: int, top_p: float | None) -> int:
    """What sampling.cpp does, step by step, and therefore with the same result to the last bit: -1 for no numbers."""
    if not np.isfinite(logits.max()):
        return -1
    candidates = _largest(logits, count)
    wide = logits[candidates].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        powers = (wide - wide[0]) / temperature  # the difference first: a quotient can overflow
    # The C library's exponential, as there: NumPy's own can differ in the last bit.
    cumulative = np.cumsum([math.exp(power) for power in powers.tolist()])
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
