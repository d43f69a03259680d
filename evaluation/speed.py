"""Speed and peak memory of a saved engine, in a process of its own that opens it and generates."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from command_line import UsageError
from machine import peak_memory_bytes

if TYPE_CHECKING:
    from model import GPTConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """Medians of the runs, and the peak of the process that opened the saved engine and ran them."""

    tokens_per_second: float | None  # None where the context leaves no room for two tokens
    first_token_seconds: float
    peak_memory_bytes: int


def measure_speed(saved_engine: str, config: GPTConfig, prompt: list[int], new_tokens: int, runs: int) -> Speed:
    """Generates from a saved engine, with sampling as example.py does it. For a process of its own."""
    from engine import Engine
    from generation import Sampler, generate
    from nvtripy_portable import engine_file

    engine = Engine(engine_file.load(saved_engine), config, 1)
    rates, firsts = [], []
    for run in range(runs + 1):  # the first one warms up
        started = time.perf_counter()
        first, count = 0.0, 0
        for _ in generate(engine, [prompt], [Sampler(seed=run)], new_tokens if run else 2, set()):
            first = first or time.perf_counter()
            count += 1
        if run:
            firsts.append(first - started)
            if count > 1:
                rates.append((count - 1) / (time.perf_counter() - first))
    return Speed(statistics.median(rates) if rates else None, statistics.median(firsts), peak_memory_bytes())


def run_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a fresh process, which shares no memory with this one.

    Raises:
        UsageError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UsageError("the process that measures speed was killed: is there enough memory?") from None
