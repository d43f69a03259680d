"""Pictures as files: whether one can be drawn and written, told before any long work, and the writing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from command_line import UsageError

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
    ``svg.hashsalt`` is set; beside its place first, so that it is never half-written.

    Raises:
        UsageError: it cannot be written.
    """
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        form = path.suffix.lower().removeprefix(".")
        figure.savefig(partial, format=form, metadata={"Date": None} if form == "svg" else None)
        os.chmod(partial, 0o644)  # mkstemp makes it for its owner alone
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        Path(partial).unlink(missing_ok=True)
