"""The process of its own in which speed and memory are measured."""

from __future__ import annotations

import os

import numpy as np
import pytest

from command_line import UsageError
from evaluation.speed import run_apart
from machine import peak_memory_bytes


def test_memory_of_this_process_is_not_counted() -> None:
    ballast = np.ones(400 << 20, np.uint8)
    assert peak_memory_bytes() > ballast.nbytes
    assert run_apart(peak_memory_bytes) < ballast.nbytes


def test_a_killed_process_is_told() -> None:
    with pytest.raises(UsageError, match="was killed"):
        run_apart(os._exit, 9)
