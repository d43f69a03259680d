"""Rotary positions, spelled with cosines, sines and a gather of each dimension's partner, become ``rotary``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.elements import Elements, start_of
from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.rewrite import (
    FLOATS,
    Any,
    Bound,
    Cast,
    Constant,
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
    x, positions = bound.values["x"], bound.values["positions"]
    result = bound.operations["turn"].results[0]
    if x.type.rank != 4 or x.type.shape != result.type.shape or x.type.dtype not in FLOATS:
        return None
    batch, length, _, size = x.type.shape
    if bound.operations["gather"].attributes["axis"] != 3 or positions.type.rank != 4:
        return None
    if positions.type.shape[1:] != (length, 1, 1) or positions.type.shape[0] not in (1, batch):
        return None
    steps, signs, partners = (bound.constant(name).reshape(-1) for name in ("steps", "signs", "partners"))
    frequencies = _frequencies(steps, signs, partners, size)
    if frequencies is None:
        return None
    found = start_of(positions, (batch, length), elements)
    if found is None:
        return None
    operand = constant(frequencies)
    attributes = {"dtype": result.type.dtype}
    return [operand, Operation("rotary", [x, found[0], operand.results[0]], attributes, [])]


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
_ANGLES = binary("kPROD", Op("cast", Any("positions"), dtype="f32"), Constant("steps"))
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
