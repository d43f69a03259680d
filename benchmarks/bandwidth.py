"""How fast this machine's threads read memory: the limit that decoding one token after another cannot pass."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

LEAST_BYTES = 256 << 20  # where the size of the caches is not known, or small
UNKNOWN_CACHE = 64 << 20


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor, as Linux tells it; a guess of 64 MiB elsewhere."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=UNKNOWN_CACHE)


class Bandwidth:
    """A buffer of at least four last-level caches, and threads that read it from end to end.

    The reading is NumPy's maximum of int32, which is made of vector instructions only, so that the memory and not the
    arithmetic sets the pace. On two cores of an EPYC it was the fastest of NumPy's reductions, and read as much per
    second as a loop in C with AVX2 and OpenMP; NumPy's sum and BLAS's dot product read less.

    Args:
        threads: How many read, each a part of its own.
    """

    def __init__(self, threads: int) -> None:
        numbers = max(LEAST_BYTES, 4 * last_level_cache()) // 4
        self._parts = np.array_split(np.arange(numbers, dtype=np.int32), threads)  # written, so that pages exist
        self._bytes = 4 * numbers
        self._pool = ThreadPoolExecutor(threads)
        self.measure(1)  # starts the threads

    def measure(self, passes: int = 3) -> float:
        """Bytes per second of the fastest of some passes."""
        fastest = float("inf")
        for _ in range(passes):
            begin = time.perf_counter()
            list(self._pool.map(np.maximum.reduce, self._parts))
            fastest = min(fastest, time.perf_counter() - begin)
        return self._bytes / fastest
