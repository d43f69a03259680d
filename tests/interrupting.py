"""Ctrl-C for a process under test."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def interrupt(process: subprocess.Popen[Any]) -> None:
    """Ends it as Ctrl-C does. Python looks at a signal that came just before it begins to wait for input only when the
    wait is over: a person presses again then, and so does this, every five seconds.
    """
    for _ in range(12):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()
