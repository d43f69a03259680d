"""The compiled module, where it was built; and the instruction set that it is told to use."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

MAX_THREADS = 1024  # far more than any machine has cores; the system would refuse or choke somewhere above


@functools.cache
def load() -> Any | None:
    """``nvtripy_portable._native``, or None where it was not built, which is said once on stderr."""
    try:
        from nvtripy_portable import _native  # type: ignore[attr-defined]
    except ImportError as error:
        print(
            "nvtripy_portable: running on the slow path (NumPy), because the native executor cannot be loaded: "
            f"{error}; portable/README.md says how to build it",
            file=sys.stderr,
        )
        return None
    threads = os.environ.get("NVTRIPY_PORTABLE_THREADS")
    if threads:
        if not threads.isdecimal() or not 1 <= int(threads[:20]) <= MAX_THREADS:
            raise ValueError(f"expected NVTRIPY_PORTABLE_THREADS to be 1 to {MAX_THREADS} but got {threads[:20]!r}")
        _native.set_threads(int(threads))
    return _native


def isa() -> str:
    """The instruction set that ``NVTRIPY_PORTABLE_ISA`` forces; empty for the best that the CPU has."""
    return os.environ.get("NVTRIPY_PORTABLE_ISA", "")
