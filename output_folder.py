"""A folder that a program writes: there in the end, complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from command_line import UsageError


@contextlib.contextmanager
def written_beside(folder: Path, size: int, option: str) -> Iterator[Path]:
    """Gives a new folder beside the one that is asked for, which it becomes in the end.

    Args:
        folder: Must not exist, or be empty. The folders above it are made.
        size: Bytes that will be written.
        option: The one that named the folder, for messages.

    Raises:
        UsageError: there is something at `folder`, or too little space on its disk.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UsageError(f"expected {option} to be a folder that is not there yet, but {folder} is")
    beside = folder.absolute().parent
    made = [path for path in (beside, *beside.parents) if not path.exists()]
    free = shutil.disk_usage(made[-1].parent if made else beside).free
    if size > free:
        raise UsageError(f"the checkpoint takes {in_bytes(size)}, but at {beside} there are {in_bytes(free)} free")
    beside.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=beside))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it for its owner alone
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it is not empty, nor are those above it
                break
        raise


def in_bytes(count: int) -> str:
    """A number of bytes for people.

    >>> in_bytes(1_234_567)
    '1.2 MB'
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1))
    unit, size = next((unit, size) for unit, size in units if count >= size or unit == "B")
    return f"{count / size:,.1f} {unit}"
