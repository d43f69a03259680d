"""Executables in files whose constants are mapped into memory, not read.

nvtripy's own format is JSON with everything in it. Here its JSON holds all but the constants, and they follow as they
are in memory. Opening such a file costs the JSON alone; the weights come in as they are first used, from the page cache
that all processes share.

Layout: the magic, the length of the JSON, the JSON, then the constants at a multiple of the page size.

Example::

    from nvtripy_portable import engine_file

    engine_file.save(executable, "model.engine")
    executable = engine_file.load("model.engine")
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nvtripy_portable import executable as portable

if TYPE_CHECKING:
    import nvtripy as tp

_MAGIC = b"NVTPENG1"
_PREFIX = struct.Struct("<8sQ")
_PAGE = 4096  # of a file; where the system's pages are larger, mappings begin at the file's start all the same
_MAX_JSON = 1 << 30


def save(executable: tp.Executable, path: str | os.PathLike[str]) -> None:
    """Writes an executable to a file. Where NVIDIA's runtime made it, in nvtripy's own format.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder, portable.constants_apart() as constants:
        part = Path(folder) / "executable.json"
        executable.save(str(part))
        described = part.read_bytes()
    with open(path, "wb") as file:
        if not constants:
            file.write(described)
            return
        file.write(_PREFIX.pack(_MAGIC, len(described)))
        file.write(described)
        file.write(b"\0" * (-file.tell() % _PAGE))
        for chunk in constants:
            file.write(chunk)


def load(path: str | os.PathLike[str]) -> tp.Executable:
    """The executable in a file that :func:`save` or nvtripy wrote.

    Raises:
        OSError: the file cannot be read.
        Exception: of any kind that nvtripy has, if it holds anything else.
    """
    import nvtripy as tp

    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            return tp.Executable.load(str(path))
        _, length = _PREFIX.unpack(prefix)
        described = file.read(min(length, _MAX_JSON))
        start = file.tell() + (-file.tell() % _PAGE)
        if len(described) != length or os.fstat(file.fileno()).st_size < start:
            raise portable.FormatError("the engine file is cut short")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    with tempfile.TemporaryDirectory() as folder, portable.constants_apart(mapped[start:]):
        part = Path(folder) / "executable.json"
        part.write_bytes(described)
        return tp.Executable.load(str(part))
