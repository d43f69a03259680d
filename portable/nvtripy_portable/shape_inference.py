"""Result types of operations: element type, rank and, as far as they can be known, dimensions.

nvtripy computes shapes *in* the graph, with small integer tensors, so knowing a dimension needs the contents of such
tensors as well as the types: :func:`infer` therefore takes, beside each operand's type, its contents where they are
known, as dims (a tuple for a 1-D tensor, one dim for a scalar). :func:`infer_value` follows those contents through an
operation. Both raise :class:`~nvtripy_portable.graph.GraphError` where shapes contradict each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nvtripy_portable.dims import Dim, combine
from nvtripy_portable.graph import Contents, GraphError, TensorType
from nvtripy_portable.plugins import calling
from nvtripy_portable.reference import CHANGED_VOLUME, NOT_CONFORMABLE, OUT_OF_BOUNDS, UNEQUAL_PARTS

_COMPARISONS = {"kLESS", "kGREATER", "kEQUAL", "kOR", "kAND", "kXOR"}
_MAX_TRACKED_ELEMENTS = 16  # shape tensors are as long as a rank; larger tensors are data


def infer(
    kind: str, operands: list[TensorType | None], contents: list[Contents], attributes: dict[str, Any]
) -> list[TensorType]:
    """Types of the results of an operation whose result type nvtripy does not state."""
    return _RULES[kind](operands, contents, attributes)


def refine(declared: TensorType, inferred: TensorType) -> TensorType:
    """The dims of both, where they agree; a symbol or number is preferred to nothing, a number to a symbol."""
    if declared.rank != inferred.rank:
        raise GraphError(f"expected a result of rank {declared.rank} but inferred {inferred}")
    return TensorType(declared.dtype, tuple(_meet(a, b) for a, b in zip(declared.shape, inferred.shape, strict=True)))


def _meet(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int) and a != b:
        raise GraphError(f"expected a dimension of {a} but got {b}")
    if isinstance(a, int) or b is None:
        return a
    return b


# --- broadcasting -----------------------------------------------------------------------------------------------------


def _broadcast_dim(a: Dim, b: Dim) -> Dim:
    if a == 1:
        return b
    if b == 1 or a == b:
        return a
    if isinstance(a, int) and isinstance(b, int):
        raise GraphError(f"{a} and {b}")
    # A dynamic dim beside a static one: the static one unless the dynamic one proves larger at run time.
    return a if isinstance(a, int) else b if isinstance(b, int) else None


def _broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    a = (1,) * (rank - len(a)) + a
    b = (1,) * (rank - len(b)) + b
    try:
        return tuple(_broadcast_dim(x, y) for x, y in zip(a, b, strict=True))
    except GraphError as error:
        raise GraphError(
            f"{NOT_CONFORMABLE}: equal, or one of them 1, but got {error} in shapes {_text(a)} and {_text(b)}"
        ) from None


def _text(shape: Sequence[Dim]) -> str:
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in shape) + ")"


def changed_volume(source: Sequence[Dim], target: Sequence[Dim]) -> str:
    """What is said of a reshape between static shapes of different numbers of elements, in TensorRT's words."""
    before, after = (math.prod(shape) for shape in (source, target))  # type: ignore[arg-type]
    low, high = sorted((before, after))
    is_multiple = low and high % low == 0
    return (
        f"{CHANGED_VOLUME}{' to multiple of original non-zero volume' if is_multiple else ''}: expected "
        f"{before} elements, those of {_text(source)}, but got {_text(target)}"
    )


def _as_shape(contents: Contents, rank: int | None) -> tuple[Dim, ...]:
    if isinstance(contents, tuple):
        return contents
    if rank is None:
        raise GraphError("the length of a shape tensor must be known")
    return (None,) * rank


# --- one rule an operation --------------------------------------------------------------------------------------------

_Rule = Callable[[list[Any], list[Contents], dict[str, Any]], list[TensorType]]


def _same(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [operands[0]]


def _normalization(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data, groups = operands[0], attributes["num_groups"]
    for parameter in operands[1:]:
        for axis, (size, wanted) in enumerate(zip(parameter.shape, data.shape, strict=True)):
            is_group = axis == 1 and groups != 1 and size == groups
            if isinstance(size, int) and isinstance(wanted, int) and size not in (1, wanted) and not is_group:
                raise GraphError(f"{NOT_CONFORMABLE}, but got {_text(parameter.shape)} for {_text(data.shape)}")
    return [data]


def _with_dtype(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [TensorType(attributes["dtype"], operands[0].shape)]


def _element_wise(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    dtype = "i1" if attributes["operation"] in _COMPARISONS else operands[0].dtype
    return [TensorType(dtype, _broadcast(operands[0].shape, operands[1].shape))]


def _select(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    shape = _broadcast(_broadcast(operands[0].shape, operands[1].shape), operands[2].shape)
    return [TensorType(operands[1].dtype, shape)]


def _concatenation(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    axis = attributes["axis"]
    shape = list(operands[0].shape)
    for operand in operands[1:]:
        for index, dim in enumerate(operand.shape):
            try:
                shape[index] = combine("kSUM", shape[index], dim) if index == axis else _meet(shape[index], dim)
            except GraphError:
                raise GraphError(
                    f"{UNEQUAL_PARTS} ({axis}), but got shapes {' and '.join(_text(each.shape) for each in operands)}"
                ) from None
    return [TensorType(operands[0].dtype, tuple(shape))]


def _top_k(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    shape = list(operands[0].shape)
    size, k = shape[attributes["axis"]], attributes["k"]
    if isinstance(size, int) and k > size:
        raise GraphError(f"top-k needs k <= the size of its dimension, but got k = {k} and a dimension of {size}")
    shape[attributes["axis"]] = k
    return [TensorType(operands[0].dtype, tuple(shape)), TensorType("i32", tuple(shape))]


def _linspace(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [TensorType(attributes["dtype"], _as_shape(contents[0], operands[0].shape[0]))]


def _reduce(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    axes, keep = attributes["axes"], attributes["keep_dimensions"]
    shape = [1 if i in axes else dim for i, dim in enumerate(operands[0].shape) if keep or i not in axes]
    return [TensorType(operands[0].dtype, tuple(shape))]


def _shape(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [TensorType("i32", (operands[0].rank,))]


def _collapse_rank(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [TensorType(operands[0].dtype, tuple(attributes["shape"]))]


def _slice(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data = operands[0]
    if attributes["mode"] == "kDEFAULT":
        window = (_as_shape(each, data.rank) for each in contents[1:4])
        for axis, (length, start, size, stride) in enumerate(zip(data.shape, *window, strict=True)):
            if all(isinstance(each, int) for each in (length, start, size, stride)) and size > 0:
                last = start + (size - 1) * stride
                if min(start, last) < 0 or max(start, last) >= length:
                    raise GraphError(
                        f"{OUT_OF_BOUNDS} on axis {axis}: expected elements within [0, {length}) but got those from "
                        f"{start} to {last}"
                    )
    return [TensorType(data.dtype, _as_shape(contents[2], data.rank))]


def _reshape(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    shape = _as_shape(contents[1], operands[1].shape[0])
    if operands[0].is_static:
        total = math.prod(operands[0].shape)
        rest = math.prod(dim for dim in shape if isinstance(dim, int) and dim != -1)
        if -1 in shape and all(isinstance(dim, int) for dim in shape) and rest:
            shape = tuple(total // rest if dim == -1 else dim for dim in shape)
        if all(isinstance(dim, int) for dim in shape) and math.prod(shape) != total:  # type: ignore[arg-type]
            raise GraphError(changed_volume(operands[0].shape, shape))
    return [TensorType(operands[0].dtype, tuple(None if dim == -1 else dim for dim in shape))]


def _transpose(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return [TensorType(operands[0].dtype, tuple(operands[0].shape[i] for i in attributes["permutation"]))]


def _broadcast_to(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    shape = _as_shape(contents[1], operands[1].shape[0])
    for source, target in zip(operands[0].shape, attributes["broadcast_dims"], strict=True):
        wanted = shape[target]
        if isinstance(source, int) and isinstance(wanted, int) and source not in (1, wanted):
            raise GraphError(f"{NOT_CONFORMABLE}, but got {_text(operands[0].shape)} for {_text(shape)}")
    return [TensorType(operands[0].dtype, shape)]


def _gather(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data, indices, axis = operands[0].shape, operands[1].shape, attributes["axis"]
    skipped = attributes["num_broadcast_dims"]
    return [TensorType(operands[0].dtype, data[:axis] + indices[skipped:] + data[axis + 1 :])]


def _matrix_multiply(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    def split(type: TensorType, op: str, is_left: bool) -> tuple[tuple[Dim, ...], list[Dim], Dim]:
        if op == "kVECTOR":
            return type.shape[:-1], [], type.shape[-1]
        rows, columns = type.shape[-2:]
        if op == "kTRANSPOSE":
            rows, columns = columns, rows
        return (type.shape[:-2], [rows], columns) if is_left else (type.shape[:-2], [columns], rows)

    left_batch, rows, left_inner = split(operands[0], attributes["op0"], True)
    right_batch, columns, right_inner = split(operands[1], attributes["op1"], False)
    if isinstance(left_inner, int) and isinstance(right_inner, int) and left_inner != right_inner:
        raise GraphError(
            f"matrix multiplication needs equal inner dimensions, but got {left_inner} and {right_inner} "
            f"in shapes {_text(operands[0].shape)} and {_text(operands[1].shape)}"
        )
    return [TensorType(operands[0].dtype, (*_broadcast(left_batch, right_batch), *rows, *columns))]


def _window(size: Dim, kernel: Dim, stride: int, padding: int, dilation: int) -> Dim:
    if not isinstance(size, int) or not isinstance(kernel, int):
        return None
    result = (size + padding - ((kernel - 1) * dilation + 1)) // stride + 1
    if result < 1:
        raise GraphError(f"a window of {kernel} (dilation {dilation}) does not fit into {size} with padding {padding}")
    return result


def _padding(attributes: dict[str, Any]) -> list[int]:
    return [pre + post for pre, post in zip(attributes["pre_padding"], attributes["post_padding"], strict=True)]


def _convolution(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data, kernel = operands[0].shape, operands[1].shape
    channels = combine("kPROD", kernel[1], attributes["num_groups"])
    if isinstance(data[1], int) and isinstance(channels, int) and data[1] != channels:
        raise GraphError(
            f"convolution expected {channels} input channels (kernel {_text(kernel)}, "
            f"{attributes['num_groups']} groups) but got {data[1]} in {_text(data)}"
        )
    windows = zip(data[2:], kernel[2:], attributes["stride"], _padding(attributes), attributes["dilation"], strict=True)
    return [TensorType(operands[0].dtype, (data[0], kernel[0], *(_window(*each) for each in windows)))]


def _deconvolution(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data, kernel = operands[0].shape, operands[1].shape
    if isinstance(data[1], int) and isinstance(kernel[0], int) and data[1] != kernel[0]:
        raise GraphError(f"deconvolution expected {kernel[0]} input channels but got {data[1]} in {_text(data)}")
    spatial: list[Dim] = []
    for size, window, stride, padding, dilation in zip(
        data[2:], kernel[2:], attributes["stride"], _padding(attributes), attributes["dilation"], strict=True
    ):
        known = isinstance(size, int) and isinstance(window, int)
        spatial.append((size - 1) * stride - padding + dilation * (window - 1) + 1 if known else None)
    channels = combine("kPROD", kernel[1], attributes["num_groups"])
    return [TensorType(operands[0].dtype, (data[0], channels, *spatial))]


def _pooling(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data = operands[0].shape
    windows = zip(data[2:], attributes["window_size"], attributes["stride"], _padding(attributes), strict=True)
    return [TensorType(operands[0].dtype, (*data[:2], *(_window(*each, 1) for each in windows)))]


def _resize(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    data = operands[0]
    if len(operands) > 1 and operands[1] is not None:
        return [TensorType(data.dtype, _as_shape(contents[1], data.rank))]
    scaled = [
        math.floor(dim * scale) if isinstance(dim, int) else None
        for dim, scale in zip(data.shape, attributes["scales"], strict=True)
    ]
    return [TensorType(data.dtype, tuple(scaled))]


def _plugin(operands: list[Any], contents: list[Contents], attributes: dict[str, Any]) -> list[TensorType]:
    return calling.infer(operands, attributes)


_RULES: dict[str, _Rule] = {
    "activation": _same,
    "broadcast": _broadcast_to,
    "cast": _with_dtype,
    "collapse_rank": _collapse_rank,
    "concatenation": _concatenation,
    "convolution": _convolution,
    "deconvolution": _deconvolution,
    "dequantize": _with_dtype,
    "element_wise": _element_wise,
    "gather": _gather,
    "linspace": _linspace,
    "matrix_multiply": _matrix_multiply,
    "normalization": _normalization,
    "plugin": _plugin,
    "pooling": _pooling,
    "quantize": _with_dtype,
    "reduce": _reduce,
    "reshape": _reshape,
    "resize_cubic": _resize,
    "resize_linear": _resize,
    "resize_nearest": _resize,
    "select": _select,
    "shape": _shape,
    "slice": _slice,
    "softmax": _same,
    "top_k": _top_k,
    "transpose": _transpose,
    "unary": _same,
}


# --- the contents of shape tensors ------------------------------------------------------------------------------------


def constant_contents(value: np.ndarray) -> Contents:
    """The contents of a constant, where it may take part in a shape computation."""
    if value.dtype.kind not in "iub" or value.ndim > 1 or value.size > _MAX_TRACKED_ELEMENTS:
        return None
    return tuple(int(each) for each in value) if value.ndim else int(value)


def infer_value(
    kind: str, operands: list[TensorType | None], contents: list[Contents], attributes: dict[str, Any]
) -> Contents:
    """Contents of the (first) result of an operation on shape tensors; None where they are not known."""
    first = operands[0] if operands else None
    if kind == "shape" and first is not None:
        return first.shape
    if not contents or contents[0] is None:
        return None
    if kind == "cast" and attributes["dtype"] in ("i32", "i64"):
        return contents[0]
    if kind in ("collapse_rank", "reshape"):
        rank = len(attributes["shape"]) if kind == "collapse_rank" else None
        flat = contents[0] if isinstance(contents[0], tuple) else (contents[0],)
        if rank == 0 or (kind == "reshape" and contents[1] == ()):
            return flat[0] if len(flat) == 1 else None
        return flat if rank == 1 or (kind == "reshape" and contents[1] == (len(flat),)) else None
    if kind == "concatenation":
        return tuple(dim for each in contents for dim in each) if all(isinstance(c, tuple) for c in contents) else None  # type: ignore[union-attr]
    if kind == "slice" and attributes["mode"] == "kDEFAULT" and isinstance(contents[0], tuple):
        start, size, stride = map(_only_number, contents[1:4])
        if start is None or size is None or stride is None:
            return None
        picked = [start + stride * i for i in range(size)]
        return tuple(contents[0][i] for i in picked) if all(0 <= i < len(contents[0]) for i in picked) else None
    if kind == "gather" and isinstance(contents[0], tuple) and isinstance(contents[1], int):
        return contents[0][contents[1]] if -len(contents[0]) <= contents[1] < len(contents[0]) else None
    if kind == "element_wise" and attributes["operation"] not in _COMPARISONS and contents[1] is not None:
        return _element_wise_contents(attributes["operation"], contents[0], contents[1])
    return None


def _only_number(contents: Contents) -> int | None:
    """The number that a 1-D tensor of length one holds."""
    only = contents[0] if isinstance(contents, tuple) and len(contents) == 1 else None
    return only if isinstance(only, int) else None


def _element_wise_contents(operation: str, a: Contents, b: Contents) -> Contents:
    if not isinstance(a, tuple) and not isinstance(b, tuple):
        return combine(operation, a, b)
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(combine(operation, x, y) for x, y in zip(a, b, strict=True))
    return None
