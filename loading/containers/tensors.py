"""What every container gives: named tensors, from headers alone, each read when it is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol

import numpy as np

# Safetensors' names of the types that a checkpoint may hold → NumPy's, or ml_dtypes'.
NUMPY_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header describes it."""

    dtype: str  # of what `read` gives, in safetensors' notation: "F32"
    shape: tuple[int, ...]
    packed_bytes: int | None = None  # that it takes, where it is read into a wider type

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype] if self.packed_bytes is None else self.packed_bytes


class Tensors(Protocol):
    """An open file or folder of tensors: `tensors` comes from headers alone, `read` gives one, or some of its rows."""

    @property
    def tensors(self) -> dict[str, Stored]: ...

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray: ...
