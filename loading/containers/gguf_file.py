"""A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), memory-mapped.

The header is read here: the package `gguf` takes seconds for a vocabulary of 50,000 tokens. Weights in packed blocks
are unpacked by that package, to float32, tensor by tensor; files without any do not need it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from conversion import numpy_dtype
from loading.containers.tensors import NUMPY_NAMES, Stored
from loading.errors import CheckpointError, reason, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
INSTALL = "pip install gguf==0.19.0"

# Numbers of types in the metadata → struct's letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Numbers of types of tensors → safetensors' names of those that are plain, and gguf's names of those in blocks.
_PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_PACKED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"} | {
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}
}
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class _Place:
    """Where a tensor is."""

    kind: int
    shape: tuple[int, ...]  # the slowest dimension first
    offset: int
    num_bytes: int


class GgufFile:
    """The metadata and the tensors of a GGUF file.

    Attributes:
        metadata: Its keys and values: str, bool, int, float and lists of these.

    Raises:
        CheckpointError: it cannot be read, is damaged, or of a version or a type of tensor that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
            raise CheckpointError(f"{path} is not a readable GGUF file: {reason(error)}") from error
        try:
            self._read_header(_Cursor(self._bytes))
        except (ValueError, UnicodeDecodeError, MemoryError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {reason(error)}") from error
        self._package: Any = None
        if any(place.kind in _PACKED for place in self._places.values()):
            self._package = _package(path)
        self.tensors = {name: self._header(name, place) for name, place in self._places.items()}

    def _read_header(self, cursor: _Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise ValueError(f"it does not begin with {MAGIC.decode()}")
        version = cursor.scalar("I")
        if version and version & 0xFFFF == 0:
            raise ValueError("it is of a machine whose bytes are in the other order")
        if version not in VERSIONS:
            raise ValueError(f"expected version {' or '.join(map(str, VERSIONS))}, got {version}")
        num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"{shown(key)} is there twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        infos = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.scalar("I")
            if num_dims > _MOST_DIMENSIONS:
                raise ValueError(f"expected at most {_MOST_DIMENSIONS} dimensions, got {num_dims} in {shown(name)}")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dims)]))
            infos.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"expected general.alignment to be a positive integer, got {shown(alignment)}")
        begin = -(-cursor.position // alignment) * alignment
        self._places: dict[str, _Place] = {}
        for name, shape, kind, offset in infos:
            if name in self._places:
                raise ValueError(f"the tensor {shown(name)} is there twice")
            if kind not in _PLAIN and kind not in _PACKED:
                known = ", ".join([*_PLAIN.values(), *_PACKED.values()])
                raise ValueError(f"expected tensors of the types {known}, got number {kind} in {shown(name)}")
            self._places[name] = _Place(kind, shape, begin + offset, 0)

    def _header(self, name: str, place: _Place) -> Stored:
        count = math.prod(place.shape)
        if place.kind in _PLAIN:
            stored = Stored(_PLAIN[place.kind], place.shape)
        else:
            block, block_bytes = self._package.GGML_QUANT_SIZES[self._kind(place.kind)]
            if not place.shape or place.shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: expected {name} to have rows that blocks of {block} divide, got {place.shape}"
                )
            stored = Stored("F32", place.shape, packed_bytes=count // block * block_bytes)
        if place.offset + stored.num_bytes > len(self._bytes):
            raise CheckpointError(f"{self.path} is not a readable GGUF file: it ends within {shown(name)}")
        return stored

    def _kind(self, number: int) -> Any:
        return self._package.GGMLQuantizationType[_PACKED[number]]

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        place, stored = self._places[name], self.tensors[name]
        if place.kind in _PLAIN:
            dtype = numpy_dtype(NUMPY_NAMES[stored.dtype])
            values = np.frombuffer(self._bytes, dtype, math.prod(place.shape), place.offset)
            return values.reshape(place.shape)[rows]
        packed = np.frombuffer(self._bytes, np.uint8, stored.num_bytes, place.offset)
        by_row = packed.reshape(*place.shape[:-1], -1)[rows]
        values = self._package.quants.dequantize(by_row, self._kind(place.kind))
        return values


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"the package gguf is needed to read {path}, whose weights are in blocks, and is not installed: {INSTALL}"
        ) from error
    return gguf


class _Cursor:
    """Reads one value after the other. What goes beyond the end raises `ValueError`."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._size, self.position = content, len(content), 0

    def take(self, size: int) -> bytes:
        begin = self.position
        if size > self._size - begin:
            raise ValueError("it ends within its header")
        self.position = begin + size
        return self._content[begin : begin + size]

    def scalar(self, letter: str) -> Any:
        [value] = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of an unknown type, number {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            if count > self._size // 8:  # each has its length before it
                raise ValueError("it ends within its header")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"it has an array of an unknown type, number {kind}")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        if count > self._size // size:
            raise ValueError("it ends within its header")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size)))
