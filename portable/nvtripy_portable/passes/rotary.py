"""Rotary positions, spelled with cosines, sines and a gather of each dimension's partner, become ``rotary``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.dims import Dim
from nvtripy_portable.elements import Elements, start_of
from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.rewrite import (
    FLOATS,
    Any,
    Bound,
    Cast,
    Constant,
    Either,
    Op,
    Rule,
    apply,
    binary,
    constant,
    is_float_cast,
)


def run(graph: Graph) -> None:
    elements = Elements()
    apply(graph, [Rule("a turn of pairs of dimensions", _TURN, lambda bound: _rotary(bound, elements)), _CAST])


def _rotary(bound: Bound, elements: Elements) -> list[Operation] | None:
    x = bound.values["x"]
    result = bound.operations["turn"].results[0]
    if x.type.rank != 4 or x.type.shape != result.type.shape or x.type.dtype not in FLOATS:
        return None
    batch, length, _, size = x.type.shape
    if bound.operations["gather"].attributes["axis"] != 3:
        return None
    found: tuple[Value | None] | None
    if "angles" in bound.values:
        found, steps = (None,), _steps_from_zero(bound.constant("angles"), (length, size))
    elif "one" in bound.values:
        found, steps = (None,), _steps_from_zero(bound.constant("one") * bound.constant("other"), (length, size))
    else:
        positions, steps = bound.values["positions"], bound.constant("steps").reshape(-1)
        if positions.type.shape[1:] != (length, 1, 1) or positions.type.shape[0] not in (1, batch):
            return None
        found = start_of(positions, (batch, length), elements)
    if found is None or steps is None:
        return None
    signs, partners = (bound.constant(name).reshape(-1) for name in ("signs", "partners"))
    frequencies = _frequencies(steps, signs, partners, size)
    if frequencies is None:
        return None
    operand = constant(frequencies)
    attributes = {"dtype": result.type.dtype}
    return [operand, Operation("rotary", [x, found[0], operand.results[0]], attributes, [])]


def _steps_from_zero(angles: np.ndarray, shape: tuple[Dim, Dim]) -> np.ndarray | None:
    """The frequencies (D,) of which ``angles``, (1, T, 1, D), are the multiples 0 to T - 1."""
    if angles.ndim != 4 or angles.shape[::2] != (1, 1) or angles.shape[1::2] != shape or angles.dtype != np.float32:
        return None
    steps = angles[0, min(1, len(angles[0]) - 1), 0]
    multiples = np.arange(len(angles[0]), dtype=np.float32)[:, np.newaxis] * steps
    return steps if np.array_equal(angles[0, :, 0], multiples) else None


def _frequencies(steps: np.ndarray, signs: np.ndarray, partners: np.ndarray, size: object) -> np.ndarray | None:
    """Those of the first half of the dimensions that turn, if it is with the second half that they do."""
    if not len(steps) == len(signs) == len(partners) == size:
        return None
    half = int(np.count_nonzero(signs < 0))
    first, second, rest = slice(0, half), slice(half, 2 * half), slice(2 * half, None)
    numbers = np.arange(len(partners))
    is_half_split = (
        half > 0
        and (signs[first] == -1).all()
        and (signs[second] == 1).all()
        and np.array_equal(steps[first], steps[second])
        and np.array_equal(partners[first], numbers[second])
        and np.array_equal(partners[second], numbers[first])
        and not (steps[rest].any() or signs[rest].any())
    )
    return steps[first].astype(np.float32) if is_half_split else None


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["rotary"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    return [Operation("rotary", list(operation.operands), {"dtype": cast.attributes["dtype"]}, [])]


_X = Cast(Any("x"))
_ANGLES = Either(
    binary("kPROD", Op("cast", Any("positions"), dtype="f32"), Constant("steps")),
    Constant("angles"),  # where T is known when it is compiled
    binary("kPROD", Constant("one"), Constant("other")),  # and where they are too many to be computed then
)
_COS = Op("unary", _ANGLES, operation="kCOS")
_SIN = binary("kPROD", Op("unary", _ANGLES, operation="kSIN"), Constant("signs"))
_PARTNERS = Op("gather", _X, Constant("partners"), num_broadcast_dims=0)
_TURN = Op(
    "element_wise",
    binary("kPROD", _X, _COS),
    binary("kPROD", _PARTNERS, _SIN),
    operation="kSUM",
    commutes=True,
    name="turn",
)
_CAST = Rule("result in another type", Op("cast", Op("rotary")), _output_cast, exclusive=True)
