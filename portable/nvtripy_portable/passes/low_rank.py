"""The product with two small matrices that each sequence chooses by number becomes ``low_rank``."""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Constant, Op, Rule, apply, is_float_cast


def _chosen(table: str, layer: str) -> Op:
    """``table[:, layer][slot]``."""
    of_layer = Op("gather", Any(table), Constant(layer), axis=1, num_broadcast_dims=0)
    return Op("gather", of_layer, Any("slot"), axis=0, num_broadcast_dims=0)


_DOWN = Op(
    "matrix_multiply", Any("x"), Op("transpose", _chosen("down", "layer"), name="turn"), op0="kNONE", op1="kNONE"
)
_PRODUCT = Op("matrix_multiply", _DOWN, _chosen("up", "layer of up"), op0="kNONE", op1="kNONE", name="product")


def run(graph: Graph) -> None:
    rules = [
        Rule("product with chosen matrices", _PRODUCT, _build, exclusive=True),
        Rule("input as it is", Op("low_rank", Op("cast", Any("x"))), _input_cast),
        Rule("result in another type", Op("cast", Op("low_rank", name="product")), _output_cast, exclusive=True),
    ]
    apply(graph, rules)


def _build(bound: Bound) -> list[Operation] | None:
    x, slot, down, up = (bound.values[name] for name in ("x", "slot", "down", "up"))
    layers = [bound.constant(name) for name in ("layer", "layer of up")]
    if bound.operations["turn"].attributes["permutation"] != (0, 2, 1) or any(each.size != 1 for each in layers):
        return None
    layer = int(layers[0].reshape(()))
    if x.type.rank != 3 or slot.type.rank != 1 or slot.type.shape != x.type.shape[:1] or layer != layers[1]:
        return None
    layers_there = down.type.shape[1] if _are_tables(down, up) else None
    if not isinstance(layers_there, int) or not 0 <= layer < layers_there:
        return None
    dtype = bound.operations["product"].results[0].type.dtype
    return [Operation("low_rank", [x, slot, down, up], {"layer": layer, "gate": None, "dtype": dtype}, [])]


def _are_tables(down: Value, up: Value) -> bool:
    """(adapters, layers, rank, width) and (adapters, layers, rank, N), of the same numbers."""
    shapes = (down.type.shape, up.type.shape)
    if any(value.type.rank != 4 or not value.type.is_static or value.type.dtype not in FLOATS for value in (down, up)):
        return False
    return shapes[0][:3] == shapes[1][:3]


def _input_cast(bound: Bound) -> list[Operation] | None:
    root = bound.operations["low_rank"]
    if not is_float_cast(bound.operations["cast"], only_widening=True):
        return None
    return [Operation("low_rank", [bound.values["x"], *root.operands[1:]], root.attributes, [])]


def _output_cast(bound: Bound) -> list[Operation] | None:
    cast, root = bound.operations["cast"], bound.operations["product"]
    if not is_float_cast(cast):
        return None
    return [Operation("low_rank", root.operands, {**root.attributes, "dtype": cast.attributes["dtype"]}, [])]
