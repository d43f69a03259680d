"""Stored numbers → arrays of the type asked for, every one of them finite.

What is not a finite number, or becomes infinite in the type asked for, raises `ValueError` with a text that names the
tensor, the value, and the types that would hold it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

import machine

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

PARAMETER_DTYPES = ("float32", "float16", "bfloat16")

_TOGETHER = 2**18  # numbers that are looked at together: they stay in the processor's caches
_STRIP = 16  # rows that are transposed together
_HALVES = {"float16": 0x7C00, "bfloat16": 0x7F80}  # the bits of infinity


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name, with bfloat16, which is not NumPy's own."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def largest_of(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a float type."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).max)


def convert(name: str, source: np.ndarray, dtype: np.dtype[Any], transpose: bool = False) -> np.ndarray:
    """A C-contiguous array of `dtype` that owns its memory: `source` or, of a matrix, its transpose.

    Raises:
        ValueError: a number is not finite, or not in `dtype`.
    """
    limit = largest_of(dtype)
    result = np.empty(source.shape[::-1] if transpose else source.shape, dtype)
    values, target = np.atleast_1d(source), np.atleast_1d(result)
    step = max(1, _TOGETHER * len(values) // max(1, values.size) // _STRIP * _STRIP)

    def convert_part(row: int) -> None:
        part = values[row : row + step]
        if not _largest_magnitude(part) <= limit:
            _check(name, part, dtype)
        if not transpose:
            target[row : row + step] = part
            return
        converted = part.astype(dtype, copy=False)
        for strip in range(0, len(converted), _STRIP):  # that the cache holds: twice as fast as in one go
            target[:, row + strip : row + strip + _STRIP] = converted[strip : strip + _STRIP].T

    rows = range(0, len(values), step)
    if len(rows) == 1:
        convert_part(0)
    else:
        # NumPy lets go of the interpreter meanwhile. Of several errors the first part's counts.
        for _ in _threads().map(convert_part, rows):
            pass
    return result


@functools.cache
def _threads() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(machine.usable_cores(), thread_name_prefix="converts")


def scaled(name: str, numbers: np.ndarray, scales: np.ndarray, dtype: np.dtype[Any], transpose: bool) -> np.ndarray:
    """``numbers`` (rows, in) times ``scales``, one, (rows,) or (rows, blocks), as `convert` gives it.

    The scales come rounded to ``dtype`` already: the ratio of the two is then closest to an integer again.
    """
    rows, width = numbers.shape
    result = np.empty((width, rows) if transpose else (rows, width), dtype)
    step = max(1, 2**16 // max(1, width))  # rows at a time that the caches hold
    for row in range(0, rows, step):
        by = (scales[row : row + step] if scales.ndim else scales).astype(np.float32)
        part = numbers[row : row + step].astype(np.float32)
        blocks = part.reshape(len(part), by.shape[1], -1) if by.ndim == 2 else part
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name next
            blocks *= by[..., None] if by.ndim else by
        at = np.s_[:, row : row + step] if transpose else np.s_[row : row + step]
        result[at] = convert(name, part, dtype, transpose)
    return result


def _largest_magnitude(values: np.ndarray) -> float:
    """NaN or infinity if there is one of them."""
    infinity = _HALVES.get(values.dtype.name)
    if not values.size:
        return 0.0
    if infinity is None:
        return max(-float(values.min()), float(values.max()))  # both are NaN if there is one
    # NumPy compares these types one by one. As integers, the bits of magnitudes compare as the numbers do.
    bits = (values.view(np.uint16) & np.uint16(0x7FFF)).max()
    return float(np.array(bits).view(values.dtype)) if bits <= infinity else float("nan")


def _check(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Refuses what is not finite, in itself or in `dtype`; what rounds down to the largest number of `dtype` is."""
    with np.errstate(over="ignore", invalid="ignore"):
        infinite = ~np.isfinite(values.astype(dtype))
    if not infinite.any():
        return
    value = float(values[infinite][0])
    if not np.isfinite(value):
        raise ValueError(f"{name} holds {value:g}: expected finite numbers")
    holding = [each for each in PARAMETER_DTYPES if abs(value) <= largest_of(numpy_dtype(each))]
    hint = f"; {' or '.join(holding)} would hold it" if holding else ""
    raise ValueError(
        f"{name} holds {value:g}, which overflows {dtype.name} (its largest value is {largest_of(dtype):g}){hint}"
    )
