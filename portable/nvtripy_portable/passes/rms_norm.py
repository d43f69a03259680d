"""A root mean square over the last dimension, and the division by it, become ``rms_norm``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.graph import Graph, Operation
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
    as_vector,
    binary,
    constant,
    is_float_cast,
)


def run(graph: Graph) -> None:
    apply(graph, _RULES)


def _rms_norm(bound: Bound) -> list[Operation] | None:
    x, mean = bound.values["x"], bound.operations["mean"]
    scale, epsilon = as_vector(bound.values["scale"], x.type.shape[-1]), bound.constant("epsilon")
    if scale is None or epsilon.size != 1 or x.type.dtype not in FLOATS:
        return None
    if mean.attributes["axes"] != (x.type.rank - 1,) or mean.results[0].type.dtype != "f32":
        return None  # in float16 the squares may overflow, and what the program gives then is another number
    operand = constant(scale)
    attributes = {
        "epsilon": float(epsilon.astype(np.float32).reshape(())),
        "dtype": bound.operations["element_wise"].results[0].type.dtype,
    }
    return [operand, Operation("rms_norm", [x, operand.results[0]], attributes, [])]


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["rms_norm"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    attributes = operation.attributes | {"dtype": cast.attributes["dtype"]}
    return [Operation("rms_norm", list(operation.operands), attributes, [])]


_X = Cast(Any("x"))
_MEAN = Op("reduce", binary("kPROD", _X, _X), operation="kAVG", keep_dimensions=True, name="mean")
_ROOT = Op("unary", binary("kSUM", _MEAN, Constant("epsilon")), operation="kSQRT")
_NORMALIZED = Either(
    binary("kPROD", _X, Op("unary", _ROOT, operation="kRECIP")),
    binary("kDIV", _X, _ROOT),
)

_RULES = (
    Rule(
        "division by the root of the mean square",
        Op("element_wise", Cast(_NORMALIZED), Constant("scale"), operation="kPROD", commutes=True),
        _rms_norm,
    ),
    Rule("result in another type", Op("cast", Op("rms_norm")), _output_cast, exclusive=True),
)
