"""What each operation of the TensorRT dialect means: one plain NumPy function per operation.

This file is the oracle that every faster version of an operation is tested against, and the executor of whatever
nobody has made a faster version of. It therefore prefers the obvious algorithm, vectorised, to the clever one.

Every function is called as ``function(*operands, **attributes)`` and returns an ndarray (`top_k`: a pair of them).

* Operands and results are ndarrays of a storage dtype: float32, float16, ``ml_dtypes.bfloat16``,
  ``ml_dtypes.float8_e4m3fn``, int64, int32, int8, ``ml_dtypes.int4`` (one element a byte) or bool. A shape, a start or
  a scale that the program computes is an operand, too.
* Attributes are plain Python values; an enumeration's value is the string that TensorRT uses, such as ``"kSUM"``.
* The narrow floats (float16, bfloat16, float8) are computed in float32 and rounded once, to the result's dtype, which
  is the operands' dtype unless the docstring says otherwise. float8 has no infinity: it saturates at ±448.
* A result may be a view of an operand (`transpose`, `reshape`, `broadcast`, `slice`) and may be read-only.
* Floating-point exceptions give infinities and NaNs silently, as they do on the device.
* An operand of the wrong shape or dtype, or an unknown enumeration value, raises `ValueError`.

Semantics: NVIDIA, "TensorRT API reference" (the layer of each operation's name) and nvtripy's own docstrings.
"""

from __future__ import annotations

import builtins
import functools
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from nvtripy_portable.packing import unpack_int4

Array = NDArray[Any]

BOOL = np.dtype(np.bool_)
INT4 = np.dtype(ml_dtypes.int4)
INT8 = np.dtype(np.int8)
INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)

#: TensorRT's own words, which those who match its messages look for.
CHANGED_VOLUME = "reshape changes volume"
NOT_CONFORMABLE = "broadcast dimensions must be conformable"
OUT_OF_BOUNDS = "out of bounds access"
UNEQUAL_PARTS = "all concat input tensors must have the same dimensions except on the concatenation axis"

FLOAT8_MAX = 448.0
INTEGER_RANGE = {
    dtype: (int(ml_dtypes.iinfo(dtype).min), int(ml_dtypes.iinfo(dtype).max)) for dtype in (INT4, INT8, INT32, INT64)
}

# float32 holds every value of these exactly, and NumPy or ml_dtypes are slow, or less exact, in them.
_NARROW = frozenset((FLOAT16, BFLOAT16, FLOAT8, INT4))


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


def _widen(array: Array) -> Array:
    """`array` in the dtype to compute in: float32 for a narrow dtype, otherwise its own."""
    return array.astype(np.float32) if array.dtype in _NARROW else array


def _store(values: Any, dtype: np.dtype[Any]) -> Array:
    """Round computed `values` (an array or a NumPy scalar, which ufuncs make of rank 0) to the storage `dtype`."""
    values = np.asarray(values)
    if values.dtype == dtype:
        return values
    if dtype in INTEGER_RANGE:
        return _saturate_to_integer(np.rint(values) if values.dtype.kind == "f" else values, dtype)
    if dtype == FLOAT8:
        values = np.asarray(np.clip(values, -FLOAT8_MAX, FLOAT8_MAX))  # a NaN stays one
    return values.astype(dtype)


def _saturate_to_integer(values: Any, dtype: np.dtype[Any]) -> Array:
    """Truncate toward zero; what `dtype` cannot hold becomes its nearest value, and NaN 0 (as CUDA's conversions)."""
    values = np.asarray(values)
    low, high = INTEGER_RANGE[dtype]
    if values.dtype.kind == "f":
        # NumPy's own conversion leaves what does not fit undefined. `high` may round up to the next power of two in
        # the comparisons, which is right: the float below that power fits.
        result = values.astype(INT8 if dtype == INT4 else dtype)
        if not np.all(np.abs(values) < high):  # NaN compares false
            result = np.where(values >= high, result.dtype.type(high), result)
            result = np.where(values <= low, result.dtype.type(low), result)
            result = np.where(np.isnan(values), result.dtype.type(0), result)
        return result.astype(dtype, copy=False)
    if values.dtype in INTEGER_RANGE and INTEGER_RANGE[values.dtype][1] > high:
        values = np.asarray(np.clip(values, low, high))
    return values.astype(dtype)


def _require_same_dtype(operation: str, *operands: Array) -> None:
    first = operands[0].dtype
    for operand in operands:
        if operand.dtype != first:
            came = ", ".join(str(operand.dtype) for operand in operands)
            raise ValueError(f"{operation} expects operands of one dtype, but they have {came}.")


def _look_up(table: dict[str, Any], value: str, operation: str) -> Any:
    """`table[value]`, or an error that says which values `operation` knows."""
    try:
        return table[value]
    except KeyError:
        raise ValueError(f"{operation} expects one of {', '.join(table)}, but got {value!r}.") from None


@np.errstate(all="ignore")
def cast(input: Array, *, dtype: DTypeLike) -> Array:
    """Convert to `dtype`: float to integer truncates toward zero, and to bool asks whether an element is not 0.

    What an integer dtype or float8 cannot hold saturates; float to integer makes 0 of NaN.
    """
    dtype = np.dtype(dtype)
    if input.dtype == dtype:
        return input
    values = _widen(input)
    if dtype == BOOL:
        return np.asarray(values != 0)
    return _saturate_to_integer(values, dtype) if dtype in INTEGER_RANGE else _store(values, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and data movement


def _integers(operand: Any) -> tuple[int, ...]:
    """A 1-D integer operand (a shape, a start) as Python's own integers, which are much the faster to compute with."""
    return tuple(np.asarray(operand).tolist())


def shape(input: Array) -> Array:
    """The shape of `input`, as int32 (rank,)."""
    return np.array(input.shape, dtype=np.int32)


def reshape(input: Array, shape: Array) -> Array:
    """`input` with the dimensions `shape` (rank,); one of them may be -1 and takes what remains. 0 means 0."""
    dimensions = _integers(shape)
    try:
        return input.reshape(dimensions)
    except ValueError:
        raise ValueError(
            f"reshape expects a shape of {input.size} elements for an input of shape {input.shape}, "
            f"but got {dimensions}: {CHANGED_VOLUME}."
        ) from None


def collapse_rank(input: Array, *, shape: Sequence[int]) -> Array:
    """`input` without some of its dimensions of size 1, which leaves `shape`."""
    shape = tuple(shape)
    if [size for size in input.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(
            f"collapse_rank expects a shape that lacks only dimensions of size 1 of {input.shape}, but got {shape}."
        )
    return input.reshape(shape)


def transpose(input: Array, *, permutation: Sequence[int]) -> Array:
    """Dimension i of the result is dimension ``permutation[i]`` of `input`."""
    if sorted(permutation) != list(range(input.ndim)):
        raise ValueError(
            f"transpose expects a permutation of the {input.ndim} dimensions of an input of shape "
            f"{input.shape}, but got {list(permutation)}."
        )
    return input.transpose(permutation)


def broadcast(input: Array, shape: Array, *, broadcast_dims: Sequence[int]) -> Array:
    """Repeat `input` to the dimensions `shape` (rank,); its dimension i becomes dimension ``broadcast_dims[i]``."""
    target = _integers(shape)
    if input.shape == target:
        return input
    aligned = [1] * len(target)
    try:
        for size, dimension in zip(input.shape, broadcast_dims, strict=True):
            aligned[dimension] = size
        return np.broadcast_to(input.reshape(aligned), target)
    except (ValueError, IndexError):
        raise ValueError(
            f"broadcast expects an input whose dimensions are 1 or those of {target} at "
            f"{list(broadcast_dims)}, but its shape is {input.shape}: {NOT_CONFORMABLE}."
        ) from None


def concatenation(*inputs: Array, axis: int) -> Array:
    """The `inputs` one after another along `axis`; their other dimensions are equal."""
    _require_same_dtype("concatenation", *inputs)
    try:
        return np.concatenate(inputs, axis=axis)
    except ValueError:  # which NumPy's error for a wrong axis is, too
        raise ValueError(
            f"concatenation expects inputs whose dimensions other than {axis} are equal, but their "
            f"shapes are {', '.join(str(item.shape) for item in inputs)}: {UNEQUAL_PARTS} ({axis})."
        ) from None


def slice(
    input: Array, start: Array, size: Array, stride: Array, fill: Array | None = None, *, mode: str = "kDEFAULT"
) -> Array:
    """Element i of each dimension d of the result is element ``start[d] + i * stride[d]`` of the input's, i < size[d].

    A stride may be negative, or 0 to repeat one element. What lies outside of the input is, by `mode`, an error
    (kDEFAULT), the scalar `fill` (kFILL; 0 if it is not given), the input mirrored at the middle of its border elements
    (kREFLECT), its border element (kCLAMP), or the input repeated (kWRAP).
    """
    starts, sizes, strides = _integers(start), _integers(size), _integers(stride)
    if not len(starts) == len(sizes) == len(strides) == input.ndim:
        raise ValueError(
            f"slice expects one start, size and stride for each dimension of an input of shape "
            f"{input.shape}, but got {starts}, {sizes} and {strides}."
        )
    if mode == "kDEFAULT":
        return _slice_inside(input, starts, sizes, strides)
    if mode == "kFILL":
        return _slice_with_fill(input, starts, sizes, strides, fill)
    to_inside = _look_up(_TO_INSIDE, mode, "slice, beside kDEFAULT and kFILL,")
    for axis, (length, *parameters) in enumerate(zip(input.shape, starts, sizes, strides, strict=True)):
        position = _positions(*parameters)
        if length == 0 and position.size:
            raise ValueError(f"slice expects something to repeat in {mode}, but the input's shape is {input.shape}.")
        input = np.take(input, to_inside(position, length), axis=axis)
    return input


def _positions(start: int, size: int, stride: int) -> NDArray[np.int64]:
    return start + np.arange(size, dtype=np.int64) * stride


def _reflect(position: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Map any position inside [0, length) by mirroring at the border elements, which are not themselves repeated."""
    period = max(2 * (length - 1), 1)
    phase = position % period
    return np.minimum(phase, period - phase) if length > 1 else phase


_TO_INSIDE: dict[str, Callable[[NDArray[np.int64], int], NDArray[np.int64]]] = {
    "kREFLECT": _reflect,
    "kCLAMP": lambda position, length: np.clip(position, 0, length - 1),
    "kWRAP": lambda position, length: position % length,
}


def _slice_inside(input: Array, starts: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A slice that must lie within the input, as a view of it."""
    index = []
    repeats = False
    for length, first, count, step in zip(input.shape, starts, sizes, strides, strict=True):
        last = first + (count - 1) * step
        if count < 0 or (count and not (0 <= first < length and 0 <= last < length)):
            raise ValueError(
                f"slice expects to stay within an input of shape {input.shape}, but got start {starts}, "
                f"size {sizes} and stride {strides}: {OUT_OF_BOUNDS}."
            )
        if count == 0:
            index.append(builtins.slice(0, 0))
        elif step > 0:
            index.append(builtins.slice(first, last + 1, step))
        elif step < 0:
            index.append(builtins.slice(first, last - 1 if last else None, step))  # -1 would count from the end
        else:
            index.append(builtins.slice(first, first + 1))
            repeats = True
    view = input[tuple(index)] if index else input
    return np.broadcast_to(view, sizes) if repeats else view


def _slice_with_fill(
    input: Array, starts: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...], fill: Array | None
) -> Array:
    """A slice whose part outside of the input is `fill`: the part inside is one block, and is copied as such."""
    if any(count < 0 for count in sizes):
        raise ValueError(f"slice expects no negative size, but got {sizes}.")
    if fill is not None and fill.size != 1:
        raise ValueError(f"slice expects a scalar fill, but its shape is {fill.shape}.")
    result = np.full(sizes, 0 if fill is None else fill.reshape(()), dtype=input.dtype)
    block, inner_starts, inner_sizes = [], [], []
    for length, first, count, step in zip(input.shape, starts, sizes, strides, strict=True):
        position = _positions(first, count, step)
        inside = np.flatnonzero((position >= 0) & (position < length))
        if inside.size == 0:
            return result
        block.append(builtins.slice(int(inside[0]), int(inside[-1]) + 1))
        inner_starts.append(int(position[inside[0]]))
        inner_sizes.append(inside.size)
    result[tuple(block)] = _slice_inside(input, tuple(inner_starts), tuple(inner_sizes), strides)
    return result


def gather(data: Array, indices: Array, *, axis: int, num_broadcast_dims: int = 0) -> Array:
    """Replace dimension `axis` of `data` by what `indices` (any shape, int32 or int64) selects from it.

    The result's shape is ``data.shape[:axis] + indices.shape + data.shape[axis + 1:]``, as numpy.take's, which
    nvtripy's documentation names as the model; so -1 is the last element. The first `num_broadcast_dims` dimensions of
    `indices` are not new ones but run along with those of `data`. An index out of range raises `IndexError`.
    """
    length = data.shape[axis]
    try:
        if num_broadcast_dims == 0:
            return np.asarray(np.take(data, indices, axis=axis))
        return _gather_by_batch(data, indices, axis, num_broadcast_dims)
    except IndexError:
        raise IndexError(
            f"gather expects indices in [-{length}, {length}) for dimension {axis} of data of shape "
            f"{data.shape}, but they reach from {indices.min()} to {indices.max()}."
        ) from None


def _gather_by_batch(data: Array, indices: Array, axis: int, batch_rank: int) -> Array:
    """`gather` where the first `batch_rank` dimensions, equal or 1, are common to `data` and `indices`."""
    if batch_rank > min(axis, indices.ndim):
        raise ValueError(
            f"gather expects no more than {min(axis, indices.ndim)} common dimensions for axis {axis} and "
            f"indices of shape {indices.shape}, but got {batch_rank}."
        )
    try:
        batch = np.broadcast_shapes(data.shape[:batch_rank], indices.shape[:batch_rank])
    except ValueError:
        raise ValueError(
            f"gather expects the first {batch_rank} dimensions of data and indices to match, but the "
            f"shapes are {data.shape} and {indices.shape}."
        ) from None
    data = np.moveaxis(np.broadcast_to(data, batch + data.shape[batch_rank:]), axis, batch_rank)
    indices = np.broadcast_to(indices, batch + indices.shape[batch_rank:])
    new_rank = indices.ndim - batch_rank
    batch_index = [
        np.arange(size).reshape((-1,) + (1,) * (indices.ndim - 1 - dimension)) for dimension, size in enumerate(batch)
    ]
    picked = data[(*batch_index, indices)]  # (*batch, *new, *between, *after)
    return np.moveaxis(picked, range(batch_rank, batch_rank + new_rank), range(axis, axis + new_rank))


def select(condition: Array, then_input: Array, else_input: Array) -> Array:
    """`then_input` where `condition` (bool) is true, otherwise `else_input`; dimensions of size 1 are repeated."""
    _require_same_dtype("select", then_input, else_input)
    if condition.dtype != BOOL:
        raise ValueError(f"select expects a condition of dtype bool, but got {condition.dtype}.")
    try:
        return np.where(condition, then_input, else_input)
    except ValueError:
        raise ValueError(
            f"select expects operands whose dimensions are equal or 1, but their shapes are "
            f"{condition.shape}, {then_input.shape} and {else_input.shape}: {NOT_CONFORMABLE}."
        ) from None


def linspace(shape: Array, start: Array, step: Array, *, dtype: DTypeLike) -> Array:
    """Numbers at equal distances: ``result[i] = start + sum(step[d] * i[d] for each dimension d)``.

    `shape` (rank,) gives the dimensions, `start` is a scalar, and `step` (rank,) has one distance per dimension.
    """
    dtype = np.dtype(dtype)
    dimensions = _integers(shape)
    if step.shape != (len(dimensions),):
        raise ValueError(
            f"linspace expects one step for each dimension of {dimensions}, but its shape is {step.shape}."
        )
    computed_in = dtype if dtype in (FLOAT32, INT32, INT64) else FLOAT32
    steps = step.astype(computed_in)
    result = np.full(dimensions, start.reshape(()), dtype=computed_in)
    for dimension, size in enumerate(dimensions):
        if steps[dimension]:
            ramp = np.arange(size, dtype=computed_in) * steps[dimension]
            result += ramp.reshape((-1,) + (1,) * (len(dimensions) - 1 - dimension))
    return _store(result, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Element by element


def _divide(lhs: Array, rhs: Array) -> Array:
    """Division; that of integers truncates toward zero, as C's. NumPy makes 0 of an integer division by zero."""
    if lhs.dtype.kind == "f":
        return np.divide(lhs, rhs)
    quotient, remainder = np.divmod(lhs, rhs)  # rounded down, with a remainder of rhs's sign
    return quotient + ((remainder != 0) & ((remainder ^ lhs) < 0))


def _floor_divide(lhs: Array, rhs: Array) -> Array:
    """Division rounded down: nvtripy's ``%`` and its ceiling division ``-(a // -b)`` rely on the direction."""
    return np.floor(np.divide(lhs, rhs)) if lhs.dtype.kind == "f" else np.floor_divide(lhs, rhs)


def _power(lhs: Array, rhs: Array) -> Array:
    """Power; of integers, a negative exponent truncates 1 / lhs**-rhs toward zero (0 for lhs = 0)."""
    if lhs.dtype.kind == "f" or not np.any(rhs < 0):
        return np.power(lhs, rhs)
    units = np.where(np.abs(lhs) == 1, lhs, 0)  # the only bases whose inverse is not a fraction
    return np.where(rhs < 0, units * np.power(units, np.abs(rhs) + 1), np.power(lhs, np.maximum(rhs, 0)))


_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "kSUM": np.add,
    "kSUB": np.subtract,
    "kPROD": np.multiply,
    "kDIV": _divide,
    "kPOW": _power,
    "kFLOOR_DIV": _floor_divide,
    "kMAX": np.maximum,
    "kMIN": np.minimum,
}
_PREDICATES: dict[str, Callable[[Array, Array], Array]] = {
    "kLESS": np.less,
    "kGREATER": np.greater,
    "kEQUAL": np.equal,
    "kOR": np.logical_or,
    "kAND": np.logical_and,
    "kXOR": np.logical_xor,
}
_ELEMENT_WISE = _ARITHMETIC | _PREDICATES


@np.errstate(all="ignore")
def element_wise(lhs: Array, rhs: Array, *, operation: str) -> Array:
    """`lhs` op `rhs`, of equal rank and dtype; dimensions of size 1 are repeated.

    kLESS, kGREATER, kEQUAL, kOR, kAND and kXOR give bool. Integers wrap around; their kDIV truncates toward zero, while
    kFLOOR_DIV rounds down, and both give 0 for a division by zero (TensorRT leaves that undefined).
    """
    function = _look_up(_ELEMENT_WISE, operation, "element_wise")
    _require_same_dtype("element_wise", lhs, rhs)
    if lhs.ndim != rhs.ndim:
        raise ValueError(
            f"element_wise expects operands of equal rank, but their shapes are {lhs.shape} and {rhs.shape}."
        )
    try:
        result = function(_widen(lhs), _widen(rhs))
    except ValueError:
        raise ValueError(
            f"element_wise expects operands whose dimensions are equal or 1, but their shapes are "
            f"{lhs.shape} and {rhs.shape}: {NOT_CONFORMABLE}."
        ) from None
    return _store(result, BOOL if operation in _PREDICATES else lhs.dtype)


# Coefficients of W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation
# 23 (1969), pp. 631-637, with the highest power first: erf(x) = x R(x²) near 0, erf(x) = 1 - exp(-x²) R(x) beyond.
_ERF_NEAR_NUMERATOR = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
_ERF_NEAR_DENOMINATOR = (
    1.0,
    2.36012909523441209e1,
    2.44024637934444173e2,
    1.28261652607737228e3,
    2.84423683343917062e3,
)
_ERF_FAR_NUMERATOR = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e0,
    6.61191906371416295e1,
    2.98635138197400131e2,
    8.81952221241769090e2,
    1.71204761263407058e3,
    2.05107837782607147e3,
    1.23033935479799725e3,
)
_ERF_FAR_DENOMINATOR = (
    1.0,
    1.57449261107098347e1,
    1.17693950891312499e2,
    5.37181101862009858e2,
    1.62138957456669019e3,
    3.29079923573345963e3,
    4.36261909014324716e3,
    3.43936767414372164e3,
    1.23033935480374942e3,
)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Horner's rule, with the highest power's coefficient first."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


def erf(x: Array) -> Array:
    """The error function, computed in float64: within 1e-15 of the true value before it is rounded to x's dtype."""
    # Beyond 6, erf is 1 in float64. Cody's second formula is meant for up to 4, but above that what it describes is
    # below 2e-8, and what it misses of that does not count beside 1: his third one is not needed for erf.
    magnitude = np.asarray(np.minimum(np.abs(x, dtype=np.float64), 6.0))
    square = np.asarray(magnitude * magnitude)
    near = _polynomial(_ERF_NEAR_NUMERATOR, square)
    near /= _polynomial(_ERF_NEAR_DENOMINATOR, square)
    near *= magnitude
    far = _polynomial(_ERF_FAR_NUMERATOR, magnitude)
    far /= _polynomial(_ERF_FAR_DENOMINATOR, magnitude)
    far *= np.exp(np.negative(square, out=square), out=square)
    np.subtract(1.0, far, out=far)
    # Both formulas for every element: that is faster than to pick out the elements of each.
    result = np.where(magnitude <= 0.46875, near, far)
    return np.copysign(result, x, out=result).astype(x.dtype)


_UNARY_OF_FLOAT: dict[str, Callable[[Array], Array]] = {
    "kEXP": np.exp,
    "kLOG": np.log,
    "kSQRT": np.sqrt,
    "kRECIP": np.reciprocal,
    "kABS": np.abs,
    "kNEG": np.negative,
    "kSIN": np.sin,
    "kCOS": np.cos,
    "kTAN": np.tan,
    "kSINH": np.sinh,
    "kCOSH": np.cosh,
    "kASIN": np.arcsin,
    "kACOS": np.arccos,
    "kATAN": np.arctan,
    "kASINH": np.arcsinh,
    "kACOSH": np.arccosh,
    "kATANH": np.arctanh,
    "kCEIL": np.ceil,
    "kFLOOR": np.floor,
    "kERF": erf,
    "kSIGN": np.sign,
    "kROUND": np.rint,  # a half goes to the even neighbour
    "kISINF": np.isinf,
    "kISNAN": np.isnan,
}
_UNARY_OF_INTEGER: dict[str, Callable[[Array], Array]] = {"kABS": np.abs, "kNEG": np.negative, "kSIGN": np.sign}
_UNARY_OF_BOOL: dict[str, Callable[[Array], Array]] = {"kNOT": np.logical_not}


@np.errstate(all="ignore")
def unary(input: Array, *, operation: str) -> Array:
    """`operation` of each element: kABS, kNEG and kSIGN also of integers, kNOT of bool only, the others of floats.

    kISINF and kISNAN give bool. kROUND takes a half to the even neighbour.
    """
    values = _widen(input)
    table = {"f": _UNARY_OF_FLOAT, "i": _UNARY_OF_INTEGER, "b": _UNARY_OF_BOOL}[values.dtype.kind]
    result = _look_up(table, operation, f"unary of {input.dtype}")(values)
    return _store(result, BOOL if operation in ("kISINF", "kISNAN") else input.dtype)


def _sigmoid(x: Array) -> Array:
    result = np.exp(-x)
    result += 1
    return np.reciprocal(result)


def _gelu_erf(x: Array) -> Array:
    result = erf(x * x.dtype.type(math.sqrt(0.5)))
    result += 1
    result *= x
    result *= 0.5
    return result


def _gelu_tanh(x: Array) -> Array:
    result = x * x
    result *= 0.044715
    result += 1
    result *= x
    result *= math.sqrt(2 / math.pi)
    result = np.tanh(result)
    result += 1
    result *= x
    result *= 0.5
    return result


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "kRELU": lambda x: np.maximum(x, 0),
    "kSIGMOID": _sigmoid,
    "kTANH": np.tanh,
    "kSOFTSIGN": lambda x: x / (1 + np.abs(x)),
    "kGELU_ERF": _gelu_erf,
    "kGELU_TANH": _gelu_tanh,
}
_ACTIVATIONS_WITH_ALPHA: dict[str, Callable[[Array, float], Array]] = {
    "kLEAKY_RELU": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "kELU": lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(x)),
    "kTHRESHOLDED_RELU": lambda x, alpha: np.where(x <= alpha, 0, x),  # NaN stays NaN
}
_ACTIVATIONS_WITH_ALPHA_AND_BETA: dict[str, Callable[[Array, float, float], Array]] = {
    "kSELU": lambda x, alpha, beta: beta * np.where(x > 0, x, alpha * np.expm1(x)),
    "kSOFTPLUS": lambda x, alpha, beta: alpha * np.logaddexp(beta * x, 0),  # log(exp(beta x) + 1), without overflow
    "kCLIP": lambda x, alpha, beta: np.maximum(alpha, np.minimum(beta, x)),
    "kHARD_SIGMOID": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "kSCALED_TANH": lambda x, alpha, beta: alpha * np.tanh(beta * x),
}
ACTIVATION_PARAMETERS: dict[str, tuple[str, ...]] = (
    dict.fromkeys(_ACTIVATIONS, ())
    | dict.fromkeys(_ACTIVATIONS_WITH_ALPHA, ("alpha",))
    | dict.fromkeys(_ACTIVATIONS_WITH_ALPHA_AND_BETA, ("alpha", "beta"))
)
_ACTIVATION_FUNCTIONS: dict[str, Callable[..., Array]] = (
    _ACTIVATIONS | _ACTIVATIONS_WITH_ALPHA | _ACTIVATIONS_WITH_ALPHA_AND_BETA
)


@np.errstate(all="ignore")
def activation(input: Array, *, operation: str, alpha: float | None = None, beta: float | None = None) -> Array:
    """An activation function of each element; the formulas are those of TensorRT's ``ActivationType``.

    `alpha` is needed by kLEAKY_RELU, kELU and kTHRESHOLDED_RELU, and `alpha` and `beta` by kSELU, kSOFTPLUS, kCLIP,
    kHARD_SIGMOID and kSCALED_TANH. Integers are computed in float32 and rounded to the nearest, a half to the even;
    their kRELU is exact.
    """
    names = _look_up(ACTIVATION_PARAMETERS, operation, "activation")
    parameters = [{"alpha": alpha, "beta": beta}[name] for name in names]
    if None in parameters:
        raise ValueError(f"activation expects {' and '.join(names)} for {operation}, but got {parameters}.")
    values = _widen(input)
    if values.dtype.kind == "i" and operation != "kRELU":
        values = values.astype(np.float32)
    return _store(_ACTIVATION_FUNCTIONS[operation](values, *parameters), input.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Along dimensions


def _lowest(dtype: np.dtype[Any]) -> Any:
    return -np.inf if dtype.kind == "f" else False if dtype == BOOL else INTEGER_RANGE[dtype][0]


def _highest(dtype: np.dtype[Any]) -> Any:
    return np.inf if dtype.kind == "f" else True if dtype == BOOL else INTEGER_RANGE[dtype][1]


_REDUCERS: dict[str, Callable[..., Any]] = {
    "kSUM": np.add.reduce,
    "kPROD": np.multiply.reduce,
    "kMAX": np.maximum.reduce,
    "kMIN": np.minimum.reduce,
    "kAVG": np.add.reduce,
}


@np.errstate(all="ignore")
def reduce(input: Array, *, axes: Sequence[int], operation: str, keep_dimensions: bool) -> Array:
    """Sum, product, maximum, minimum or average (kSUM, kPROD, kMAX, kMIN, kAVG) over the dimensions `axes`.

    Narrow floats accumulate in float32. Integers keep their dtype: sums and products wrap around, and the average
    truncates toward zero. Over no elements at all, the result is 0, 1, the lowest value, the highest value, and NaN (0
    for integers), respectively.
    """
    reducer = _look_up(_REDUCERS, operation, "reduce")
    values = _widen(input)
    axes = tuple(axes)
    dtype = values.dtype
    if operation == "kMAX":
        result = reducer(values, axis=axes, keepdims=keep_dimensions, initial=_lowest(dtype))
    elif operation == "kMIN":
        result = reducer(values, axis=axes, keepdims=keep_dimensions, initial=_highest(dtype))
    elif operation == "kAVG":
        accumulator = dtype if dtype.kind == "f" else INT64
        count = np.array(math.prod(values.shape[axis] for axis in axes), dtype=accumulator)
        result = _divide(reducer(values, axis=axes, keepdims=keep_dimensions, dtype=accumulator), count)
    else:
        result = reducer(values, axis=axes, keepdims=keep_dimensions, dtype=dtype)
    return _store(result, input.dtype)


def top_k(input: Array, *, k: int, axis: int, operation: str) -> tuple[Array, Array]:
    """The `k` largest (kMAX) or smallest (kMIN) elements along `axis`, sorted, and their positions (int32).

    Of equal elements the one with the lower index comes first. NaN counts as the largest.
    """
    length = input.shape[axis]
    if not 0 <= k <= length:
        raise ValueError(
            f"top_k expects k of at most {length} for axis {axis} of an input of shape {input.shape}, but got {k}."
        )
    values = _widen(input)
    if operation == "kMAX" and k == 1:  # greedy decoding; argmax, too, takes the first, and NaN for the largest
        indices = np.argmax(values, axis=axis, keepdims=True)
    elif operation in ("kMAX", "kMIN"):
        if operation == "kMAX":  # sorted backward twice, so that the stable order is that of the indices
            order = length - 1 - np.flip(np.argsort(np.flip(values, axis), axis=axis, kind="stable"), axis)
        else:
            order = np.argsort(values, axis=axis, kind="stable")
        indices = np.take(order, range(k), axis=axis)
    else:
        raise ValueError(f"top_k expects kMAX or kMIN, but got {operation!r}.")
    return np.take_along_axis(input, indices, axis=axis), indices.astype(np.int32)


@np.errstate(all="ignore")
def softmax(input: Array, *, axis: int) -> Array:
    """``exp(input) / sum(exp(input))`` along `axis`, with the maximum subtracted first."""
    values = _widen(input)
    result = values - np.maximum.reduce(values, axis=axis, keepdims=True, initial=-np.inf)
    result = np.asarray(result)
    np.exp(result, out=result)
    result /= np.add.reduce(result, axis=axis, keepdims=True)
    return _store(result, input.dtype)


@np.errstate(all="ignore")
def normalization(
    input: Array, scale: Array, bias: Array, *, axis: Sequence[int], eps: float, num_groups: int = 1
) -> Array:
    """``(input - mean) / sqrt(variance + eps) * scale + bias``, with mean and population variance over `axis`.

    `scale` and `bias` have the input's rank, and dimensions of size 1 where they are constant. nvtripy's LayerNorm has
    the last dimensions as `axis` and one group. With more groups (N, C, D1, ...) splits its channels into `num_groups`
    and the statistics are also over the channels of a group, for which scale and bias may be (1, num_groups, 1, ...) or
    (1, C, 1, ...); with C groups that is nvtripy's InstanceNorm. Computed in float32.
    """
    values = input.astype(np.float32, copy=False)
    scale = scale.astype(np.float32, copy=False)
    bias = bias.astype(np.float32, copy=False)
    axes = tuple(axis)
    if num_groups != 1:
        if input.ndim < 2 or input.shape[1] % num_groups:
            raise ValueError(
                f"normalization expects a number of channels that {num_groups} groups divide, but the "
                f"input's shape is {input.shape}."
            )
        batch, channels, *spatial = input.shape
        values = values.reshape(batch, num_groups, channels // num_groups, *spatial)
        axes = (2, *(dimension + 1 for dimension in axes if dimension > 1))
        if scale.ndim == input.ndim and scale.shape[1] == num_groups:
            scale, bias = np.expand_dims(scale, 2), np.expand_dims(bias, 2)
        else:
            scale, bias = (parameter.reshape(1, num_groups, -1, *parameter.shape[2:]) for parameter in (scale, bias))
    count = math.prod(values.shape[dimension] for dimension in axes)
    mean = np.add.reduce(values, axis=axes, keepdims=True)
    mean /= count
    result = values - mean
    variance = np.add.reduce(result * result, axis=axes, keepdims=True)
    variance /= count
    variance += eps
    result /= np.sqrt(variance, out=variance)
    try:
        result *= scale
        result += bias
    except ValueError:
        raise ValueError(
            f"normalization expects a scale and a bias whose dimensions are those of the input's shape "
            f"{input.shape} or 1, but they have {scale.shape} and {bias.shape}: {NOT_CONFORMABLE}."
        ) from None
    return _store(result, input.dtype).reshape(input.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix multiplication and quantization


@np.errstate(all="ignore")
def matrix_multiply(lhs: Array, rhs: Array, *, op0: str, op1: str) -> Array:
    """Matrix product of the last two dimensions; those before them are a batch, in which size 1 is repeated.

    An operand with kTRANSPOSE has its last two dimensions swapped first; one with kVECTOR is a batch of vectors, and
    its missing matrix dimension does not appear in the result. Floats accumulate in float32, and the result has lhs's
    dtype: a narrow rhs may already have been widened to float32. Two int8 operands are multiplied and added exactly,
    and give int32: int8 could not hold the sums.
    """
    lhs_matrix = _matrix_operand(lhs, op0, vector_axis=-2)
    rhs_matrix = _matrix_operand(rhs, op1, vector_axis=-1)
    dtype = lhs.dtype
    if lhs.dtype == INT8 and rhs.dtype == INT8:
        # NumPy multiplies only floats in BLAS; float64 holds such sums exactly up to 2**39 terms.
        lhs_matrix, rhs_matrix, dtype = lhs_matrix.astype(np.float64), rhs_matrix.astype(np.float64), INT32
    try:
        result = np.matmul(_widen(lhs_matrix), _widen(rhs_matrix))
    except ValueError:
        raise ValueError(
            f"matrix_multiply expects matrices of equal inner dimensions in batches whose dimensions "
            f"are equal or 1, but got {op0} {lhs.shape} and {op1} {rhs.shape}."
        ) from None
    if op0 == "kVECTOR":
        result = result[..., 0, :]
    if op1 == "kVECTOR":
        result = result[..., 0]
    return _store(result, dtype)


def _matrix_operand(operand: Array, op: str, vector_axis: int) -> Array:
    """`operand` with the matrix in its last two dimensions, which a vector gains by an axis of size 1."""
    least_rank = _look_up({"kNONE": 2, "kTRANSPOSE": 2, "kVECTOR": 1}, op, "matrix_multiply")
    if operand.ndim < least_rank:
        raise ValueError(f"matrix_multiply expects a rank of at least {least_rank} for {op}, but got {operand.shape}.")
    if op == "kVECTOR":
        return np.expand_dims(operand, vector_axis)
    return operand.swapaxes(-1, -2) if op == "kTRANSPOSE" else operand


def by_scale(
    operation: str, shape: tuple[int, ...], scale: Array, axis: int | None
) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    """The shape to view an input of `shape` in, and the float32 scale that broadcasts over that view.

    A scalar scale is for the whole tensor, a 1-D one for the channels along `axis`, and a 2-D one (D0 / block, D1), for
    an input (D0, D1), for blocks along the first dimension.
    """
    scale = scale.astype(np.float32, copy=False)
    if axis is not None and scale.ndim == 1 and scale.shape[0] == shape[axis]:
        return shape, scale.reshape((-1,) + (1,) * (len(shape) - 1 - axis % len(shape)))
    if axis is None and scale.size == 1 and scale.ndim < 2:
        return shape, scale.reshape(())
    if axis is None and scale.ndim == 2 and len(shape) == 2 and scale.shape[1] == shape[1]:
        blocks = scale.shape[0]
        if blocks and shape[0] % blocks == 0:
            return (blocks, shape[0] // blocks, shape[1]), scale[:, None, :]
    expected = (
        "a scalar scale, or a 2-D one (D0 / block, D1) for an input (D0, D1),"
        if axis is None
        else (f"a 1-D scale with one element for each channel along axis {axis}")
    )
    raise ValueError(f"{operation} expects {expected} but the scale's shape is {scale.shape} and the input's {shape}.")


@np.errstate(all="ignore")
def quantize(input: Array, scale: Array, *, dtype: DTypeLike, axis: int | None = None) -> Array:
    """``input / scale`` in `dtype`: int8, int4 (rounded to the nearest, a half to the even) or float8.

    `scale` is a scalar (per tensor), 1-D along `axis` (per channel), or 2-D (D0 / block, D1) for an input (D0, D1)
    (block by block, along the first dimension). Computed in float32. What does not fit saturates; NaN becomes 0 in an
    integer.
    """
    dtype = np.dtype(dtype)
    if dtype not in (INT8, INT4, FLOAT8):
        raise ValueError(f"quantize expects a dtype of int8, int4 or float8_e4m3fn, but got {dtype}.")
    view, scale = by_scale("quantize", input.shape, scale, axis)
    values = np.asarray(np.divide(input.astype(np.float32, copy=False).reshape(view), scale)).reshape(input.shape)
    if dtype == FLOAT8:
        return _store(values, dtype)
    low, high = INTEGER_RANGE[dtype]
    np.rint(values, out=values)
    np.clip(values, low, high, out=values)
    np.copyto(values, 0, where=np.isnan(values))
    return values.astype(np.int8).astype(dtype, copy=False)  # int8 first: ml_dtypes is slow from float32 to int4


@np.errstate(all="ignore")
def dequantize(input: Array, scale: Array, *, dtype: DTypeLike, axis: int | None = None) -> Array:
    """``input * scale`` in `dtype`, for an input of int8, int4 or float8; `scale` and `axis` as for `quantize`."""
    view, scale = by_scale("dequantize", input.shape, scale, axis)
    values = input.astype(np.float32).reshape(view)
    values *= scale
    return _store(values.reshape(input.shape), np.dtype(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Convolution, pooling and resizing


def _require_spatial(operation: str, spatial_rank: int, **attributes: Sequence[int]) -> None:
    for name, values in attributes.items():
        if len(values) != spatial_rank:
            raise ValueError(
                f"{operation} expects one {name} for each of {spatial_rank} spatial dimensions, but got {list(values)}."
            )


def _require_positive(operation: str, input: Array, sizes: Sequence[int]) -> None:
    if any(size < 1 for size in sizes):
        raise ValueError(
            f"{operation} expects windows that fit into the padded input, but the input's shape is "
            f"{input.shape} and the spatial dimensions would be {list(sizes)}."
        )


def _window(tap: Sequence[int], dilation: Sequence[int], stride: Sequence[int], count: Sequence[int]) -> Any:
    """An index of the padded image's last dimensions: where, in `count` windows `stride` apart, element `tap` lies."""
    slices = (
        builtins.slice(t * d, t * d + (n - 1) * s + 1, s)
        for t, d, s, n in zip(tap, dilation, stride, count, strict=True)
    )
    return (..., *slices)


def _require_bias(operation: str, bias: Array | None, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{operation} expects a bias of shape {(channels,)}, but got {bias.shape}.")


@np.errstate(all="ignore")
def convolution(
    input: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    num_groups: int = 1,
    dilation: Sequence[int],
) -> Array:
    """Cross-correlation: (N, C, D1, ...) with a kernel (O, C / groups, K1, ...) and a bias (O,) → (N, O, E1, ...).

    ``E = (D + pre_padding + post_padding - dilation * (K - 1) - 1) // stride + 1``; the padding is zeros. It is the
    sum, over the kernel's elements, of a matrix product of that element (O, C) and the input's elements that it meets.
    """
    _require_spatial(
        "convolution",
        input.ndim - 2,
        stride=stride,
        pre_padding=pre_padding,
        post_padding=post_padding,
        dilation=dilation,
    )
    if kernel.ndim != input.ndim or input.shape[1] != kernel.shape[1] * num_groups or kernel.shape[0] % num_groups:
        raise ValueError(
            f"convolution expects a kernel (O, C / groups, ...) for an input (N, C, ...) in {num_groups} "
            f"groups, but their shapes are {kernel.shape} and {input.shape}."
        )
    batch, channels_out, taps = input.shape[0], kernel.shape[0], kernel.shape[2:]
    _require_bias("convolution", bias, channels_out)
    padded = np.pad(
        input.astype(np.float32, copy=False), ((0, 0), (0, 0), *zip(pre_padding, post_padding, strict=True))
    )
    count = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(padded.shape[2:], dilation, taps, stride, strict=True)
    ]
    _require_positive("convolution", input, count)
    group_out, group_in = channels_out // num_groups, kernel.shape[1]
    weights = kernel.astype(np.float32, copy=False).reshape(num_groups, group_out, group_in, math.prod(taps))
    result = np.zeros((batch, num_groups, group_out, math.prod(count)), dtype=np.float32)
    for index, tap in enumerate(product(*map(range, taps))):
        met = padded[_window(tap, dilation, stride, count)]  # (N, C, E1, ...)
        result += np.matmul(weights[..., index], met.reshape(batch, num_groups, group_in, math.prod(count)))
    result = result.reshape(batch, channels_out, *count)
    if bias is not None:
        result += bias.astype(np.float32).reshape(-1, *(1,) * len(count))
    return _store(result, input.dtype)


@np.errstate(all="ignore")
def deconvolution(
    input: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    num_groups: int = 1,
    dilation: Sequence[int],
) -> Array:
    """Transposed convolution: (N, C, D1, ...), kernel (C, O / groups, K1, ...), bias (O,) → (N, O, E1, ...).

    The adjoint of `convolution`: each input element adds the kernel, times itself, to the result at a distance of
    `stride`. The padding is what is cut off: ``E = (D - 1) * stride + dilation * (K - 1) + 1 - pre_padding -
    post_padding``.
    """
    _require_spatial(
        "deconvolution",
        input.ndim - 2,
        stride=stride,
        pre_padding=pre_padding,
        post_padding=post_padding,
        dilation=dilation,
    )
    if kernel.ndim != input.ndim or input.shape[1] != kernel.shape[0] or input.shape[1] % num_groups:
        raise ValueError(
            f"deconvolution expects a kernel (C, O / groups, ...) for an input (N, C, ...) in {num_groups} "
            f"groups, but their shapes are {kernel.shape} and {input.shape}."
        )
    batch, channels_in, *spatial = input.shape
    channels_out, taps = kernel.shape[1] * num_groups, kernel.shape[2:]
    _require_bias("deconvolution", bias, channels_out)
    full = [(size - 1) * s + d * (k - 1) + 1 for size, s, d, k in zip(spatial, stride, dilation, taps, strict=True)]
    count = [size - pre - post for size, pre, post in zip(full, pre_padding, post_padding, strict=True)]
    _require_positive("deconvolution", input, [*spatial, *count])
    group_in, group_out = channels_in // num_groups, kernel.shape[1]
    weights = kernel.astype(np.float32, copy=False).reshape(num_groups, group_in, group_out, math.prod(taps))
    values = input.astype(np.float32, copy=False).reshape(batch, num_groups, group_in, math.prod(spatial))
    result = np.zeros((batch, channels_out, *full), dtype=np.float32)
    for index, tap in enumerate(product(*map(range, taps))):
        added = np.matmul(weights[..., index].swapaxes(-1, -2), values)  # (N, groups, O / groups, D1 * ...)
        result[_window(tap, dilation, stride, spatial)] += added.reshape(batch, channels_out, *spatial)
    ones = (1,) * len(count)
    result = result[_window(pre_padding, ones, ones, count)]
    if bias is not None:
        result = result + bias.astype(np.float32).reshape(-1, *(1,) * len(count))
    return _store(result, input.dtype)


@np.errstate(all="ignore")
def pooling(
    input: Array,
    *,
    window_size: Sequence[int],
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    pooling_type: str,
    average_count_excludes_padding: bool | None = None,
) -> Array:
    """The maximum (kMAX) or average (kAVERAGE) of each window of the last dimensions: (..., D1, ...) → (..., E1, ...).

    ``E = (D + pre_padding + post_padding - window_size) // stride + 1``. The padding never is a maximum. In an average
    it is zeros, which count as elements unless `average_count_excludes_padding` (None: TensorRT's default, which is
    true). The average of int8 is rounded to the nearest, a half to the even.
    """
    spatial_rank = len(window_size)
    _require_spatial("pooling", spatial_rank, stride=stride, pre_padding=pre_padding, post_padding=post_padding)
    if input.ndim < spatial_rank:
        raise ValueError(f"pooling expects {spatial_rank} spatial dimensions, but the input's shape is {input.shape}.")
    if pooling_type not in ("kMAX", "kAVERAGE"):
        raise ValueError(f"pooling expects kMAX or kAVERAGE, but got {pooling_type!r}.")
    spatial = input.shape[input.ndim - spatial_rank :]
    padding = list(zip(pre_padding, post_padding, strict=True))
    count = [
        (size + pre + post - window) // s + 1
        for size, (pre, post), window, s in zip(spatial, padding, window_size, stride, strict=True)
    ]
    _require_positive("pooling", input, count)
    values = _widen(input)
    averages = pooling_type == "kAVERAGE"
    if averages:
        values = values.astype(np.float32, copy=False)
    outside = 0 if averages else _lowest(values.dtype)
    padded = np.pad(values, [(0, 0)] * (input.ndim - spatial_rank) + padding, constant_values=outside)
    dilation = (1,) * spatial_rank
    windows = [_window(tap, dilation, stride, count) for tap in product(*map(range, window_size))]
    result = padded[windows[0]].copy()
    for window in windows[1:]:
        if averages:
            result += padded[window]
        else:
            np.maximum(result, padded[window], out=result)
    if averages:
        if average_count_excludes_padding is False:
            result /= len(windows)
        else:
            real = np.pad(np.ones(spatial, dtype=np.float32), padding)
            result /= np.maximum(sum(real[window] for window in windows), 1)  # a window of padding alone gives 0
    return _store(result, input.dtype)


def _resize_geometry(
    operation: str, input: Array, output_shape: Array | None, scales: Sequence[float] | None
) -> list[tuple[int, np.float32]]:
    """For each dimension the result's size, and input elements per element of the result.

    With `scales` that distance is the scale's inverse, even where the size is rounded down (as torch and ONNX have it).
    float32, as torch computes it: whether a coordinate such as 3 * (1 / 3) reaches 1 depends on the precision.
    """
    if output_shape is not None:
        sizes = _integers(output_shape)
        pitches = [np.float32(n) / np.float32(max(m, 1)) for n, m in zip(input.shape, sizes, strict=False)]
    elif scales is not None:
        sizes = tuple(math.floor(n * scale) for n, scale in zip(input.shape, scales, strict=False))
        pitches = [np.float32(1 / scale) for scale in scales]
    else:
        raise ValueError(f"{operation} expects an output shape or scales, but got neither.")
    if not len(sizes) == len(pitches) == input.ndim or 0 in input.shape or any(size < 1 for size in sizes):
        raise ValueError(
            f"{operation} expects a size of at least 1 for each dimension of an input of shape "
            f"{input.shape}, but got {sizes}."
        )
    return list(zip(sizes, pitches, strict=True))


def _half_pixel(position: Array, pitch: np.float32, length: int) -> Array:
    return (position + np.float32(0.5)) * pitch - np.float32(0.5)


def _align_corners(position: Array, pitch: np.float32, length: int) -> Array:
    return position * (np.float32(length - 1) / np.float32(max(position.size - 1, 1)))


_COORDINATES: dict[str, Callable[[Array, np.float32, int], Array]] = {
    "kASYMMETRIC": lambda position, pitch, length: position * pitch,
    "kALIGN_CORNERS": _align_corners,
    "kHALF_PIXEL": _half_pixel,
}


def _coordinates(length: int, size: int, pitch: np.float32, transformation: str, selector: str) -> NDArray[np.float32]:
    """The coordinate in an input of `length` elements of each of the result's `size` elements.

    The only element of a result is, by `selector`, at the formula's coordinate (kFORMULA) or at 0 (kUPPER).
    """
    to_input = _look_up(_COORDINATES, transformation, "resize")
    if _look_up({"kFORMULA": False, "kUPPER": True}, selector, "resize") and size == 1:
        return np.zeros(1, dtype=np.float32)
    return to_input(np.arange(size, dtype=np.float32), pitch, length)


def _interpolate(
    input: Array,
    geometry: list[tuple[int, np.float32]],
    transformation: str,
    selector: str,
    taps_and_weights: Callable[[NDArray[np.float32], int], list[tuple[Array, Array]]],
) -> Array:
    """Resize one dimension after the other, each as a weighted sum of input elements.

    `taps_and_weights(coordinates, length)` gives, for each term of the sum, which element it takes and its weight.
    """
    values = input.astype(np.float32, copy=False)
    for axis, (size, pitch) in enumerate(geometry):
        length = values.shape[axis]
        if size == length and pitch == 1:  # every formula gives back the elements themselves
            continue
        terms = taps_and_weights(_coordinates(length, size, pitch, transformation, selector), length)
        columns = (-1,) + (1,) * (values.ndim - 1 - axis)
        weighted = [np.take(values, tap, axis=axis) * weight.reshape(columns) for tap, weight in terms]
        values = functools.reduce(np.add, weighted)
    return _store(values, input.dtype)


_ROUNDING: dict[str, Callable[[Array], Array]] = {
    "kHALF_UP": lambda x: np.floor(x + np.float32(0.5)),
    "kHALF_DOWN": lambda x: np.ceil(x - np.float32(0.5)),
    "kFLOOR": np.floor,
    "kCEIL": np.ceil,
}


def resize_nearest(
    input: Array,
    output_shape: Array | None = None,
    *,
    scales: Sequence[float] | None = None,
    coordinate_transformation: str,
    nearest_rounding: str,
    selector: str,
) -> Array:
    """Resize to `output_shape` (rank,), or by `scales`, taking the element at the rounded coordinate.

    With kASYMMETRIC and kFLOOR this is ``torch.nn.functional.interpolate(mode="nearest")``.
    """
    rounded = _look_up(_ROUNDING, nearest_rounding, "resize_nearest")
    for axis, (size, pitch) in enumerate(_resize_geometry("resize_nearest", input, output_shape, scales)):
        length = input.shape[axis]
        coordinate = rounded(_coordinates(length, size, pitch, coordinate_transformation, selector))
        input = np.take(input, np.clip(coordinate, 0, length - 1).astype(np.int64), axis=axis)
    return input


def resize_linear(
    input: Array,
    output_shape: Array | None = None,
    *,
    scales: Sequence[float] | None = None,
    coordinate_transformation: str,
    selector: str,
) -> Array:
    """Resize to `output_shape` (rank,), or by `scales`, interpolating between the two elements beside the coordinate.

    In any number of dimensions; beyond the border, the border element holds. Equals torch's "linear", "bilinear" and
    "trilinear" with kHALF_PIXEL, and with kALIGN_CORNERS their align_corners=True.
    """

    def taps_and_weights(coordinate: NDArray[np.float32], length: int) -> list[tuple[Array, Array]]:
        coordinate = np.clip(coordinate, 0, np.float32(length - 1))
        left = np.floor(coordinate)
        fraction = coordinate - left
        tap = left.astype(np.int64)
        return [(tap, 1 - fraction), (np.minimum(tap + 1, length - 1), fraction)]

    geometry = _resize_geometry("resize_linear", input, output_shape, scales)
    return _interpolate(input, geometry, coordinate_transformation, selector, taps_and_weights)


def resize_cubic(
    input: Array,
    output_shape: Array | None = None,
    *,
    scales: Sequence[float] | None = None,
    coordinate_transformation: str,
    selector: str,
    cubic_coeff: float,
) -> Array:
    """Resize to `output_shape` (rank,), or by `scales`, by cubic convolution of the four elements at the coordinate.

    R. G. Keys, "Cubic convolution interpolation for digital image processing", IEEE Trans. ASSP 29 (1981), pp.
    1153-1160, with `cubic_coeff` as its parameter a; beyond the border, the border element holds. Equals torch's
    "bicubic" for -0.75.
    """
    a = np.float32(cubic_coeff)

    def taps_and_weights(coordinate: NDArray[np.float32], length: int) -> list[tuple[Array, Array]]:
        left = np.floor(coordinate)
        fraction = coordinate - left
        terms = []
        for offset in (-1, 0, 1, 2):
            x = np.abs(fraction - np.float32(offset))
            if offset in (0, 1):  # x <= 1
                weight = ((a + 2) * x - (a + 3)) * x * x + 1
            else:
                weight = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            terms.append((np.clip(left.astype(np.int64) + offset, 0, length - 1), weight))
        return terms

    geometry = _resize_geometry("resize_cubic", input, output_shape, scales)
    return _interpolate(input, geometry, coordinate_transformation, selector, taps_and_weights)


# ---------------------------------------------------------------------------------------------------------------------
# What the passes make: rows of weights, and look-ups in them


def widened_rows(weight: Array, scale: Array | None, weight_dtype: str, width: int) -> NDArray[np.float32]:
    """Stored rows as the float32 numbers that they stand for, (N, width); int4 is packed two a byte along the row.

    `scale` is None, a scalar, (N,), or (N, width / block) for blocks along each row.
    """
    rows = (unpack_int4(weight, width) if weight_dtype == "i4" else weight).astype(np.float32, copy=scale is not None)
    if scale is None:
        return rows
    if scale.ndim == 2:
        blocks = rows.reshape(len(rows), scale.shape[1], -1)
        blocks *= scale[:, :, None]
        return rows
    rows *= scale[:, None] if scale.ndim == 1 else scale
    return rows


def quantized_rows(
    weight: Array, scale: Array | None, indices: Array, *, weight_dtype: str, width: int, dtype: DTypeLike
) -> Array:
    """The rows (…, width) at `indices` (…) of what `weight` and `scale` stand for, as `widened_rows` takes them."""
    flat = indices.reshape(-1)
    rows = gather(weight, flat, axis=0)
    scales = gather(scale, flat, axis=0) if scale is not None and scale.ndim else scale
    return _store(widened_rows(rows, scales, weight_dtype, width).reshape(*indices.shape, width), np.dtype(dtype))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "cast": cast,
    "shape": shape,
    "reshape": reshape,
    "collapse_rank": collapse_rank,
    "transpose": transpose,
    "broadcast": broadcast,
    "concatenation": concatenation,
    "slice": slice,
    "gather": gather,
    "select": select,
    "linspace": linspace,
    "element_wise": element_wise,
    "unary": unary,
    "activation": activation,
    "reduce": reduce,
    "top_k": top_k,
    "softmax": softmax,
    "normalization": normalization,
    "matrix_multiply": matrix_multiply,
    "quantize": quantize,
    "dequantize": dequantize,
    "convolution": convolution,
    "deconvolution": deconvolution,
    "pooling": pooling,
    "resize_nearest": resize_nearest,
    "resize_linear": resize_linear,
    "resize_cubic": resize_cubic,
    "quantized_rows": quantized_rows,
}
