"""Picking one of many logits, for programs that generate text."""

from __future__ import annotations

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
        logits: Float32, (V,), at least one. Shares are laid out in their falling order, the lower index first among
            equals.
        uniform: Random, from 0 up to but not with 1.
        temperature: Divides the logits; above 0.
        top_k: Only the k largest have a share; None is all of them.
        top_p: Only the largest have a share that together reach this probability of the ``top_k``; None is all of them.

    >>> draw(np.array([1, 3, 2, 3], np.float32), 0.6, temperature=0.8, top_k=2)
    3
    """
    count = len(logits) if top_k is None else top_k
    if _native is not None and logits.dtype == np.float32 and logits.flags.c_contiguous:
        return int(_native.draw(logits, uniform, temperature, count, top_p))
    candidates = _largest(logits, count)
    scaled = logits[candidates].astype(np.float64) / temperature
    cumulative = np.cumsum(np.exp(scaled - scaled[0]))
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
    return np.flatnonzero(~(logits < bar))
