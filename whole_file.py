"""The one way to write a file that is made at once: beside its place first, so that it is never half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from command_line import UsageError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives an empty file to write to, which takes the place of `path` in the end; nothing is left of it where that
    fails, and what was there before is still there.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)  # mkstemp makes it for its owner alone
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
