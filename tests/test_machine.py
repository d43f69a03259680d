"""The machine is asked, not guessed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest

import machine


def test_the_processor_has_a_name_and_cores() -> None:
    assert machine.processor().strip()
    assert machine.instruction_set().startswith(platform.machine())
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes to cores")
def test_cores_that_may_not_be_used_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_the_peak_of_memory_stays_when_the_memory_is_given_back() -> None:
    before = machine.peak_memory_bytes()
    ballast = np.ones(before + (64 << 20), np.uint8)
    assert machine.peak_memory_bytes() > before + (64 << 20)
    del ballast
    assert machine.peak_memory_bytes() > before + (64 << 20)
