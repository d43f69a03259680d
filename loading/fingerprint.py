"""What of a weight file goes into a checkpoint's fingerprint: all of a small one, samples of a large one; and the
programs that make numbers of it, for whoever keeps something that is made of those numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_FULLY_HASHED = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 2**16

_ROOT = Path(__file__).resolve().parent.parent
#: The sources of what makes a model's numbers, or a rank's, of a checkpoint's files.
READERS = (
    _ROOT / "conversion.py",
    *(_ROOT / "parallelism" / name for name in ("mapping.py", "splitting.py")),
    *sorted((_ROOT / "loading").rglob("*.py")),
)


def content_pieces(path: Path) -> Iterable[bytes]:
    """Its size, and its content; of more than 64 MB its time of modification and evenly spaced samples, among them
    its start and its end.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= _FULLY_HASHED:
            yield repr((path.name, status.st_size)).encode()
            while piece := file.read(2**20):
                yield piece
        else:
            yield repr((path.name, status.st_size, status.st_mtime_ns)).encode()
            last = status.st_size - _SAMPLE_BYTES
            for sample in range(_SAMPLES):
                file.seek(last * sample // (_SAMPLES - 1))
                yield file.read(_SAMPLE_BYTES)
