"""A cache that looks functional and is written in place: Baker's persistent array (Baker 1991, "Shallow binding makes
functional arrays fast").

Each step of a model makes a new :class:`Version` of its cache. The newest owns the memory; an older one knows only the
rows that were overwritten since, and which version came after it. So going on from the newest costs nothing but those
rows, and who still holds an older one reads from it exactly what it was.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

#: Held while versions change hands and while a program writes into their memory.
LOCK = threading.RLock()


class Version:
    """One state of a cache (L, 2, B, H, C, D)."""

    __slots__ = ("_exposed", "_memory", "_native", "_newer", "_position", "_saved", "dtype", "shape")

    def __init__(self, memory: np.ndarray, native: Any) -> None:
        self.shape = memory.shape
        self.dtype = memory.dtype
        self._memory: np.ndarray | None = memory
        self._native = native
        self._exposed = False
        self._newer: Version | None = None
        self._saved: np.ndarray | None = None  # (L, 2, B, H, T, D): what the next version overwrote
        self._position: np.ndarray | None = None  # (B,): where

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def array(self) -> np.ndarray:
        """The contents as an array that stays as it is: from now on nothing is written into its memory."""
        with LOCK:
            if self._memory is None:
                self._memory = self._materialise()
                self._newer = self._saved = self._position = None
            self._exposed = True
            return self._memory

    def copy(self) -> np.ndarray:
        """The contents as an array of the caller's own."""
        with LOCK:
            return self._materialise() if self._memory is None else _copy(self._memory, self._native)

    def _materialise(self) -> np.ndarray:
        chain: list[Version] = []
        version = self
        while version._memory is None:
            chain.append(version)
            assert version._newer is not None
            version = version._newer
        memory = _copy(version._memory, self._native)
        for each in reversed(chain):  # back in time
            assert each._saved is not None
            self._native.exchange_rows(raw(memory), raw(each._saved), each._position, each._saved.shape[4], True)
        return memory


class Step:
    """One step from a cache to its next version, taken back if it fails.

    ``memory`` is what the step is to write into; it holds the old contents.
    """

    def __init__(self, old: np.ndarray | Version, position: np.ndarray, length: int, native: Any) -> None:
        self._old: Version | None = None
        self._native = native
        if isinstance(old, Version) and old._memory is not None and not old._exposed:
            self.memory = old._memory
            layers, two, batch, heads, _, size = old.shape
            saved = np.empty((layers, two, batch, heads, length, size), old.dtype)
            native.exchange_rows(raw(self.memory), raw(saved), position, length, False)
            self.new = Version(self.memory, native)
            self._old, old._memory, old._newer = old, None, self.new
            old._saved, old._position = saved, position.copy()
        else:
            self.memory = old.copy() if isinstance(old, Version) else _copy(old, native)
            self.new = Version(self.memory, native)

    def take_back(self) -> None:
        """Undoes the step, even where a part of it has been written."""
        if self._old is not None:
            saved, position = self._old._saved, self._old._position
            assert saved is not None
            self._native.exchange_rows(raw(self.memory), raw(saved), position, saved.shape[4], True)
            self._old._memory = self.memory
            self._old._newer = self._old._saved = self._old._position = None


def _copy(array: np.ndarray, native: Any) -> np.ndarray:
    result = np.zeros(array.shape, array.dtype)
    native.copy_nonzero(raw(result), raw(np.ascontiguousarray(array)))
    return result


def raw(array: np.ndarray) -> np.ndarray:
    """Integers of the same size: NumPy offers no buffer of a type that is not its own, such as bfloat16."""
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
