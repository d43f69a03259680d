"""DLPack capsules in and out, without copies.

NumPy speaks DLPack for its own types only. For bfloat16, float8 and int4, and to look at a capsule before it is
consumed, the structures of ``dlpack.h`` (https://dmlc.github.io/dlpack/latest/c_api.html) are read and written here
through ctypes.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from nvtripy_portable.graph import DTYPES

CPU = 1  # kDLCPU, and in the other capsules kDLCUDAHost: memory that the host can read
_HOST_DEVICES = (1, 3)
_NAME = b"dltensor"
_USED_NAME = b"used_dltensor"

# (DLDataTypeCode, bits) of each element type. Codes: 0 int, 2 float, 4 bfloat, 6 bool, 10 float8_e4m3fn.
_CODES = {
    "i4": (0, 4),
    "i8": (0, 8),
    "i32": (0, 32),
    "i64": (0, 64),
    "f16": (2, 16),
    "f32": (2, 32),
    "bf16": (4, 16),
    "i1": (6, 8),
    "f8e4m3fn": (10, 8),
}
_NAMES = {code: name for name, code in _CODES.items()}
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}  # DLDataTypeCodes in words, for errors


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_get_pointer = _api.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_set_name = _api.PyCapsule_SetName
_set_name.restype = ctypes.c_int
_set_name.argtypes = (ctypes.py_object, ctypes.c_char_p)


def from_capsule(capsule: Any) -> np.ndarray:
    """The array that a capsule describes. It keeps the memory alive.

    Raises:
        TypeError: not an unused DLPack capsule, memory that the host cannot read, an element type that nvtripy
            lacks, or elements that are not in row-major order (in the words by which nvtripy recognises that).
    """
    if not _is_valid(capsule, _NAME):
        raise TypeError("expected an unused DLPack capsule ('dltensor')")
    address = _get_pointer(capsule, _NAME)
    managed = _DLManagedTensor.from_address(address)
    tensor = managed.dl_tensor
    if tensor.device_type not in _HOST_DEVICES:
        raise TypeError(
            f"expected memory of the CPU but got DLPack device type {tensor.device_type}: the portable runtime runs "
            "on the CPU; copy the array to the host first"
        )
    name = _NAMES.get((tensor.dtype_code, tensor.dtype_bits))
    if name is None or tensor.dtype_lanes != 1 or name == "i4":
        kind = _KINDS.get(tensor.dtype_code, f"DLPack type code {tensor.dtype_code}, bits: ")
        lanes = f" in vectors of {tensor.dtype_lanes}" if tensor.dtype_lanes != 1 else ""
        known = ", ".join(sorted(str(DTYPES[each]) for each in _CODES if each != "i4"))
        raise TypeError(f"expected an element type out of {known} but got {kind}{tensor.dtype_bits}{lanes}")
    shape = tensor.shape[: tensor.ndim]
    canonical = canonical_strides(shape)
    strides = tensor.strides[: tensor.ndim] if tensor.strides else canonical
    dtype = DTYPES[name]
    if 0 in shape:
        return np.empty(shape, dtype)
    # The stride of a dimension of size one is never used.
    if any(size != 1 and a != b for size, a, b in zip(shape, strides, canonical, strict=True)):
        raise TypeError(f"Given strides {strides} do not match canonical strides {canonical} for shape {shape}")
    buffer = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(tensor.data + tensor.byte_offset)
    # NumPy keeps `buffer` alive for as long as any view of it lives; the producer hears when it is gone. At the exit of
    # the interpreter it hears nothing: somebody may still look, and the system takes the memory back anyway.
    weakref.finalize(buffer, _call_deleter, address).atexit = False
    _set_name(capsule, _USED_NAME)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _call_deleter(address: int) -> None:
    managed = _DLManagedTensor.from_address(address)
    if managed.deleter:
        managed.deleter(ctypes.pointer(managed))


def canonical_strides(shape: list[int]) -> list[int]:
    """Row-major strides, in elements."""
    strides = [1] * len(shape)
    for index in range(len(shape) - 2, -1, -1):
        strides[index] = strides[index + 1] * shape[index + 1]
    return strides


def to_capsule(array: np.ndarray, dtype: str) -> Any:
    """A capsule that views ``array`` (row-major) as elements of type ``dtype``.

    NumPy makes it, of integers as wide, and its element type is then put right: the capsule's clean-up stays NumPy's
    own, in C, which a consumer may run at moments when no Python code can (while an exception is being raised, say).
    """
    code, bits = _CODES[dtype]
    if array.dtype.isbuiltin != 1:
        array = array.view(f"u{array.dtype.itemsize}")
    capsule = array.__dlpack__()
    tensor = _DLManagedTensor.from_address(_get_pointer(capsule, _NAME)).dl_tensor
    # One byte holds one int4 element here, which is what DLPack calls an 8-bit integer.
    tensor.dtype_code, tensor.dtype_bits = code, max(bits, 8)
    return capsule
