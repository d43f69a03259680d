"""Random numbers for checkpoints: block by block, the same for a seed, on any number of threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from conversion import numpy_dtype

BLOCK = 2**20  # numbers that are drawn together: what a thread holds at a time
Label = TypeVar("Label")


@dataclass(frozen=True)
class Draw(Generic[Label]):
    """A block of numbers that is wanted.

    Attributes:
        label: What the numbers are for.
        count: How many.
        deviation: Of normal numbers; None: ones.
        place: The seed, and the numbers of the tensor and of the block: each has numbers of its own.
    """

    label: Label
    count: int
    deviation: float | None
    place: tuple[int, int, int]


def drawn(draws: Iterable[Draw[Label]], dtype: str) -> Iterator[tuple[Label, np.ndarray]]:
    """What each block is for, and its numbers, as bytes; a few are drawn ahead, by several threads."""
    threads = min(os.cpu_count() or 1, 16)
    ahead: deque[tuple[Label, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for draw in draws:
            ahead.append((draw.label, pool.submit(_numbers, draw, dtype)))
            if len(ahead) > threads:
                label, future = ahead.popleft()
                yield label, future.result()
        while ahead:
            label, future = ahead.popleft()
            yield label, future.result()


def _numbers(draw: Draw[Label], dtype: str) -> np.ndarray:
    """The bytes of a block: the same, whoever draws it and when."""
    if draw.deviation is None:
        return np.ones(draw.count, numpy_dtype(dtype)).view(np.uint8)
    seed, number, block = draw.place
    random = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, block, 0]))
    values = random.standard_normal(draw.count, np.float32)
    values *= np.float32(draw.deviation)
    return values.astype(numpy_dtype(dtype), copy=False).view(np.uint8)
