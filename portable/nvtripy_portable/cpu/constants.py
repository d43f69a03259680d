"""What the compiler computes of constants and takes NumPy seconds: the functions of ``reference.py``, native."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nvtripy_portable import reference
from nvtripy_portable.cpu import native
from nvtripy_portable.graph import DTYPE_NAMES

_FROM, _TO = ("f32", "f16", "bf16"), ("i8", "i4", "f8e4m3fn")


def quantize(input: np.ndarray, scale: np.ndarray, *, dtype: Any, axis: int | None = None) -> np.ndarray:
    """``reference.quantize``, bit for bit, on all threads."""
    shape, dtype = input.shape, np.dtype(dtype)
    module = _module()
    if module is None or not input.size or DTYPE_NAMES[input.dtype] not in _FROM or DTYPE_NAMES[dtype] not in _TO:
        return reference.quantize(input, scale, dtype=dtype, axis=axis)
    view, scales = reference.by_scale("quantize", shape, scale, axis)
    # As rows of which each has one scale, or one for each number.
    if scales.ndim == 0:
        width, rows_per_scale, per_number = shape[-1] if shape else 1, input.size, False
    elif len(view) != len(shape):  # blocks along the first of two dimensions
        width, rows_per_scale, per_number = view[2], view[1], True
    else:
        channels, inner = len(scales), math.prod(shape[len(shape) - scales.ndim + 1 :])
        per_number = inner == 1
        width, rows_per_scale = (channels, input.size) if per_number else (inner, 1)
    result = np.empty(shape, np.uint8)
    numbers = np.ascontiguousarray(input)
    numbers = numbers if numbers.dtype == np.float32 else numbers.view(np.uint16)
    scales = np.ascontiguousarray(scales)
    names = DTYPE_NAMES[input.dtype], DTYPE_NAMES[dtype]
    module.quantize(native.isa(), result, numbers, names[0], scales, names[1], width, rows_per_scale, per_number)
    return result.view(dtype)


def _module() -> Any | None:
    """The compiled module, unless the environment asks it for what it does not have: running says so, not compiling."""
    try:
        module = native.load()
        if module is not None:
            module.kernels_for(native.isa())
    except ValueError:
        return None
    return module
