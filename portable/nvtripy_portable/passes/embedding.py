"""The sum of a look-up by token and one by position becomes ``embedding``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.dims import Dim
from nvtripy_portable.elements import Elements, axis, within
from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.inequalities import add
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Constant, Op, Rule, apply, constant, is_float_cast


def run(graph: Graph) -> None:
    elements = Elements()
    floats = _gather("table", "idx", "rows")
    quantized = Op("quantized_rows", Any("table"), Any("table_scale"), Any("idx"), name="rows")
    positions = _gather("position_table", "positions", "position_rows")
    known = Constant("position_rows")  # those of a fixed number of tokens, looked up already
    rules = [
        Rule(f"{name} of tokens and positions", Op("element_wise", *operands, operation="kSUM"), build)
        for name, rows in (("rows", floats), ("quantized rows", quantized))
        for at, build in (
            (positions, lambda bound: _computed(bound, elements)),
            (known, lambda bound: _embedding(bound, None, bound.constant("position_rows"))),
        )
        for operands in ((rows, at), (at, rows))
    ]
    cast = Rule("result in another type", Op("cast", Op("embedding")), _output_cast, exclusive=True)
    apply(graph, [*rules, cast])


def _gather(table: str, indices: str, name: str) -> Op:
    return Op("gather", Constant(table), Any(indices), axis=0, num_broadcast_dims=0, name=name)


def _computed(bound: Bound, elements: Elements) -> list[Operation] | None:
    """With positions that are computed from the sequences' own, or count from 0."""
    idx, table = bound.values["idx"], bound.constant("position_table")
    found = _start(bound.values["positions"], idx.type.shape, elements)
    return None if found is None else _embedding(bound, found[0], table)


def _embedding(bound: Bound, position: Value | None, position_table: np.ndarray) -> list[Operation] | None:
    rows, result = bound.operations["rows"], bound.operations["element_wise"].results[0]
    idx, table, scale = bound.values["idx"], bound.values["table"], bound.values.get("table_scale")
    width = result.type.shape[-1]
    if idx.type.rank != 2 or rows.results[0].type != result.type or result.type.dtype not in FLOATS:
        return None
    if rows.kind == "gather" and (table.type.rank != 2 or table.type.dtype not in FLOATS):
        return None
    if position_table.ndim == 3 and position_table.shape[:2] == (1, idx.type.shape[1]):
        position_table = position_table[0]
    if position_table.ndim != 2 or position_table.shape[1] != width:
        return None
    positions = constant(position_table)
    attributes = {
        "weight_dtype": rows.attributes.get("weight_dtype", table.type.dtype),
        "width": width,
        "dtype": result.type.dtype,
    }
    return [positions, Operation("embedding", [idx, position, table, scale, positions.results[0]], attributes, [])]


def _start(positions: Value, shape: tuple[Dim, ...], elements: Elements) -> tuple[Value | None] | None:
    """The value ``position`` where ``positions[b, t]`` is ``position[b] + t``, None where it is ``t``."""
    if positions.type.rank != 2 or len(shape) != 2 or positions.type.shape not in (shape, (1, shape[1])):
        return None
    b, t = axis("b", positions.type.shape[0]), axis("t", shape[1])
    number = elements.number(positions, (b, t), within((b, t), positions.type.shape))
    if number == t:
        return (None,)
    for start in elements.reads(number):
        if start.value.type.shape == shape[:1] and number == add(elements.symbol(start.value, (b,)), t):
            return (start.value,)
    return None


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["embedding"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    attributes = operation.attributes | {"dtype": cast.attributes["dtype"]}
    return [Operation("embedding", list(operation.operands), attributes, [])]
