"""The largest of many logits, for programs that sample."""

from __future__ import annotations

import numpy as np

try:
    from nvtripy_portable import _native  # type: ignore[attr-defined]
except ImportError:  # not built
    _native = None

_GROUP = 64  # logits of which one maximum is taken


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices of the ``k`` largest of float32 ``logits`` (V,), in falling order, the lower index first among equals.

    >>> top_k(np.array([1, 3, 2, 3], np.float32), 3).tolist()
    [1, 3, 2]
    """
    if _native is not None and logits.dtype == np.float32 and logits.flags.c_contiguous:
        return np.array(_native.top_k(logits, k), np.int64)
    candidates = _reaching(logits, k)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:k]


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
