"""A plug-in's native function: where it is, and how it is called on NumPy arrays.

The structures are those of ``include/nvtripy_portable_plugin.h``. A native program makes its own of them (``csrc/``);
these are for graphs that run operation by operation.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvtripy_portable.graph import DTYPE_NAMES

#: A function pointer of ctypes, or the path of a shared library and a symbol.
Function = Any | tuple[str | os.PathLike[str], str]

#: Element types as the header numbers them.
DTYPE_CODES = {"f32": 0, "f16": 1, "bf16": 2, "f8e4m3fn": 3, "i4": 4, "i8": 5, "i32": 6, "i64": 7, "i1": 8}
INTEGERS, NUMBERS, TEXT = range(3)  # kinds of a field's values

#: A field's name, the kind of its values, and these: integers, numbers, or the bytes of a text.
Described = tuple[str, int, Sequence[int] | Sequence[float] | bytes]

_VERSION = 1
_MESSAGE_BYTES = 1024


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("values", ctypes.c_void_p),
    )


_WORK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
_EACH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, _WORK, ctypes.c_void_p)


class _Call(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int32),
        ("num_inputs", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_fields", ctypes.c_int32),
        ("inputs", ctypes.POINTER(_Tensor)),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("fields", ctypes.POINTER(_Field)),
        ("context", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_size_t),
        ("each", _EACH),
        ("runtime", ctypes.c_void_p),
    )


_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call))


@_EACH
def _one_after_the_other(call: int, units: int, work: Any, argument: int) -> None:
    for unit in range(units):
        work(unit, argument)


class NativeError(Exception):
    """A native function returned an error; the message is its own."""


@dataclass(frozen=True)
class Native:
    """A native function: its address, the pointer that it is given, and what keeps it where it is."""

    address: int
    context: int
    owner: Any

    @staticmethod
    def of(function: Function, context: int) -> Native:
        """From what ``register`` is given.

        Raises:
            OSError: the library cannot be loaded.
            AttributeError: it has no such symbol.
            TypeError: the function is neither a pointer nor a path and a symbol.
        """
        owner = function
        if isinstance(function, tuple):
            path, symbol = function
            function = ctypes.CDLL(os.fspath(path))[symbol]
            owner = os.fspath(path)  # what was loaded stays loaded
        if not isinstance(function, ctypes._CFuncPtr) or not function:  # type: ignore[attr-defined]
            raise TypeError(f"expected a function pointer of ctypes, or a path and a symbol, but got {function!r}")
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        return Native(address, context, owner)

    def call(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], fields: Sequence[Described]) -> None:
        """Fills ``outputs``. All arrays are row-major.

        Raises:
            NativeError: the function says that it failed.
        """
        held = [_values(kind, values) for _, kind, values in fields]
        members = [
            _Field(name.encode(), kind, 0, len(values), ctypes.cast(each, ctypes.c_void_p))
            for (name, kind, values), each in zip(fields, held, strict=True)
        ]
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        call = _Call(
            _VERSION,
            len(inputs),
            len(outputs),
            len(members),
            (_Tensor * len(inputs))(*map(_tensor, inputs)),
            (_Tensor * len(outputs))(*map(_tensor, outputs)),
            (_Field * len(members))(*members),
            self.context,
            ctypes.cast(message, ctypes.c_char_p),
            _MESSAGE_BYTES,
            _one_after_the_other,
            None,
        )
        code = _FUNCTION(self.address)(ctypes.byref(call))
        if code:
            raise NativeError(message.value.decode(errors="replace") or f"error {code}")


def _values(kind: int, values: Any) -> Any:
    if kind == TEXT:
        return ctypes.create_string_buffer(values)
    return ((ctypes.c_int64 if kind == INTEGERS else ctypes.c_double) * len(values))(*values)


def _tensor(array: np.ndarray) -> _Tensor:
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    return _Tensor(array.__array_interface__["data"][0], DTYPE_CODES[DTYPE_NAMES[array.dtype]], array.ndim, shape)


def as_rows(array: np.ndarray) -> np.ndarray:
    """(..., width) as (rows, width)."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def include_folder() -> str:
    """The folder of ``nvtripy_portable_plugin.h``, for a compiler's ``-I``."""
    return str(Path(__file__).resolve().parent.parent / "include")
