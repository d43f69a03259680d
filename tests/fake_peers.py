"""Engines for the tests of benchmarks/: they compute nothing, and some fail as real ones do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

import numpy as np
from peers import Peer
from peers.task import Prompts, Task


class Steady:
    """Every step takes a millisecond, whatever is asked for."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        return np.zeros(1000, np.float32)

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        assert len(prompts) <= self.task.sequences
        assert self.task.context is None or all(len(prompt) + new <= self.task.context for prompt in prompts)
        begin, moments = time.perf_counter(), []
        for _ in range(new):
            time.sleep(0.001)
            moments.append(time.perf_counter() - begin)
        return moments


class CannotLoad(Steady):
    """As a library that refuses a file."""

    def __init__(self, task: Task) -> None:
        raise RuntimeError("it does not know\nthis file")


class Crashes(Steady):
    """As llama.cpp did with some instructions."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGSEGV)
        return np.zeros(0)


class CrashesTogether(Steady):
    """With more than one sequence."""

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        if len(prompts) > 1:
            os._exit(3)
        return super().generate(prompts, new)


def peer(make: type[Steady], is_elsewhere: bool = False) -> Peer:
    """What the table of peers says of one: "fp16" and "int8"."""
    variants = {"fp16": ("fp16",), "int8": ("int8",)}
    weights = {"fp16": "none", "int8": "none"}
    return Peer(make, (), (), variants, weights, is_elsewhere=is_elsewhere)
