"""``normalization`` over the last dimension becomes ``layer_norm``, which takes in the casts around it."""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Constant, Op, Rule, apply, as_vector, constant, is_float_cast


def run(graph: Graph) -> None:
    apply(graph, _RULES)


def _layer_norm(bound: Bound) -> list[Operation] | None:
    x, operation = bound.values["x"], bound.operations["normalization"]
    vectors = [as_vector(bound.values[name], x.type.shape[-1]) for name in ("scale", "bias")]
    if operation.attributes["axis"] != (x.type.rank - 1,) or x.type.dtype not in FLOATS:
        return None
    if any(vector is None for vector in vectors):
        return None
    scale, bias = (constant(vector) for vector in vectors if vector is not None)
    attributes = {"epsilon": operation.attributes["eps"], "dtype": operation.results[0].type.dtype}
    return [scale, bias, Operation("layer_norm", [x, scale.results[0], bias.results[0]], attributes, [])]


def _input_cast(bound: Bound) -> list[Operation] | None:
    operation = bound.operations["layer_norm"]
    if not is_float_cast(bound.operations["cast"], only_widening=True):
        return None
    return [Operation("layer_norm", [bound.values["x"], *operation.operands[1:]], operation.attributes, [])]


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["layer_norm"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    attributes = operation.attributes | {"dtype": cast.attributes["dtype"]}
    return [Operation("layer_norm", list(operation.operands), attributes, [])]


_RULES = (
    Rule(
        "normalization of the last dimension",
        Op("normalization", Any("x"), Constant("scale"), Constant("bias"), num_groups=1),
        _layer_norm,
    ),
    Rule("input as it is", Op("layer_norm", Op("cast", Any("x"))), _input_cast),
    Rule("result in another type", Op("cast", Op("layer_norm")), _output_cast, exclusive=True),
)
