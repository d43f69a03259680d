"""Files that belong together are written together: all of them, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from command_line import UsageError


@contextlib.contextmanager
def written_together(folder: Path, last: str) -> Iterator[Path]:
    """Gives a folder to write files to, which then move to `folder`.

    Args:
        folder: Is made where there is none, and is gone again when nothing could be written.
        last: The suffix of the files that move when the others are there: readers look for them.

    Raises:
        UsageError: the disk is full, or `folder` cannot be written to; what was there before is still there.
    """
    partial = folder / ".partial"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.iterdir(), key=lambda path: (path.suffix == last, path.name)):
            file.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty, nor then are those above it
            for path in made:
                path.rmdir()
