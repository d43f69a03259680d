"""A .safetensors file, memory-mapped; and how one begins, for those that write one piece by piece."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from conversion import numpy_dtype
from loading.containers.tensors import NUMPY_NAMES, Stored
from loading.errors import CheckpointError, reason


def header_of(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The beginning of a file: its length in 8 bytes, then JSON (https://github.com/huggingface/safetensors).

    Args:
        tensors: In their order in the file: name, type in safetensors' notation, shape, bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


class SafetensorsFile:
    """A memory-mapped .safetensors file.

    The safetensors library validates the file: its header, and that the tensors fill the rest without gap or overlap.
    The values are then taken straight from the mapping, since the library would copy each tensor before its conversion.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            # The library says of a file that may not be read that there is none: it is opened here first.
            with path.open("rb") as file, safe_open(path, framework="numpy"):
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin = 8 + int.from_bytes(self._bytes[:8], "little")
            header = json.loads(self._bytes[8:begin])
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
            raise CheckpointError(f"{path} is not a readable safetensors file: {reason(error)}") from error
        header.pop("__metadata__", None)
        self.tensors = {name: Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        self._offsets = {name: begin + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        stored = self.tensors[name]
        dtype = numpy_dtype(NUMPY_NAMES[stored.dtype])
        count = int(np.prod(stored.shape, dtype=np.int64))
        values = np.frombuffer(self._bytes, dtype, count, self._offsets[name])
        return values.reshape(stored.shape)[rows]
