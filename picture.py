"""Pictures as files: whether one can be drawn and written, told before any long work, and the writing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from command_line import UsageError
from whole_file import written_whole

SUFFIXES = (".png", ".svg")


def check(path: Path, requirements: str, option: str = "--plot") -> None:
    """Proves, before any long work, that a picture can be drawn and written.

    Args:
        path: Where to.
        requirements: The file that matplotlib is in.
        option: That asks for the picture, for messages.

    Raises:
        UsageError: it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"expected {option} to end in {' or '.join(SUFFIXES)} but got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{option} needs matplotlib ({error}): pip install -r {requirements}") from None
    if path.is_dir():
        raise UsageError(f"expected a file to write with {option} but {path} is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def write(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as the format that ``path`` ends in, the same figure as the same bytes where
    ``svg.hashsalt`` is set.

    Raises:
        UsageError: it cannot be written.
    """
    form = path.suffix.lower().removeprefix(".")
    with written_whole(path) as partial:
        figure.savefig(partial, format=form, metadata={"Date": None} if form == "svg" else None)
