"""What benchmarks say while they run, and the files that they write."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tqdm import tqdm

from command_line import UsageError
from whole_file import written_whole


def say(message: str) -> None:
    """A line on standard error, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def check_json(path: Path | None) -> None:
    """Proves, before any long work, that the numbers can be written.

    Raises:
        UsageError: they cannot.
    """
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()):
        raise UsageError(f"expected --json to be a file in a writable folder but got {path}")


def write(path: Path, text: str) -> None:
    """All of it, or nothing.

    Raises:
        UsageError: it cannot be written.
    """
    with written_whole(path) as partial:
        partial.write_text(text)
