"""Ctrl-C before and after what a program does, while its modules are being imported or the interpreter ends.

An interrupt then is a traceback of some library's, and libraries may even swallow it. A program calls
:func:`end_quietly` before it imports anything else; :func:`command_line.main` does its work within :func:`raised`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 130  # what shells make of SIGINT


def end_quietly() -> None:
    """From here on Ctrl-C ends the program at once, with exit code 130; unless it is ignored, as behind nohup."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it Ctrl-C is a KeyboardInterrupt, as it is where nobody has called :func:`end_quietly`."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)
