"""The sum of a look-up by token and one by position becomes ``embedding``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.dims import Dim
from nvtripy_portable.elements import Elements, axis, within
from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.inequalities import add
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Cast, Constant, Op, Rule, apply, constant, is_float_cast


def run(graph: Graph) -> None:
    elements = Elements()
    known = Constant("position_rows")  # those of a fixed number of tokens, looked up already
    rules = [
        Rule(f"{kind} rows of tokens, {at_kind} of positions", Op("element_wise", *operands, operation="kSUM"), build)
        for kind, rows in _rows("token").items()
        for at_kind, at, build in (
            *((kind, at, lambda bound: _looked_up(bound, elements)) for kind, at in _rows("position").items()),
            ("known", known, lambda bound: _embedding(bound, None, bound.constant("position_rows"), None)),
        )
        for operands in ((rows, at), (at, rows))
    ]
    cast = Rule("result in another type", Op("cast", Op("embedding")), _output_cast, exclusive=True)
    apply(graph, [*rules, cast])


def _rows(what: str) -> dict[str, Cast]:
    """A look-up in a table, in its two forms."""
    table, scale, indices = Constant(f"{what}_table"), Constant(f"{what}_scale"), Any(f"{what}_indices")
    return {
        "float": Cast(Op("gather", table, indices, axis=0, num_broadcast_dims=0, name=f"{what}_rows")),
        "quantized": Cast(Op("quantized_rows", table, scale, indices, name=f"{what}_rows")),
    }


def _looked_up(bound: Bound, elements: Elements) -> list[Operation] | None:
    """With positions that are computed from the sequences' own, or count from 0, or are constants."""
    positions, table = bound.values["position_indices"], bound.constant("position_table")
    scale = bound.constant("position_scale") if "position_scale" in bound.values else None
    if positions.constant is not None:  # those of a fixed number of tokens, in a table that has not been widened
        at = positions.constant
        if at.size and not -len(table) <= at.min() <= at.max() < len(table):
            return None  # an error of the program's, when it runs
        return _embedding(bound, None, table[at], scale[at] if scale is not None and scale.ndim else scale)
    found = _start(positions, bound.values["token_indices"].type.shape, elements)
    return None if found is None else _embedding(bound, found[0], table, scale)


def _embedding(
    bound: Bound, position: Value | None, position_table: np.ndarray, position_scale: np.ndarray | None
) -> list[Operation] | None:
    rows, result = bound.operations["token_rows"], bound.operations["element_wise"].results[0]
    idx, table, scale = (bound.values.get(f"token_{name}") for name in ("indices", "table", "scale"))
    assert idx is not None and table is not None
    if idx.type.rank != 2 or rows.results[0].type.shape != result.type.shape or result.type.dtype not in FLOATS:
        return None
    if rows.kind == "gather" and (table.type.rank != 2 or table.type.dtype not in FLOATS):
        return None
    if position_table.ndim == 3 and position_table.shape[:2] == (1, idx.type.shape[1]):
        position_table = position_table[0]
        position_scale = position_scale[0] if position_scale is not None and position_scale.ndim else position_scale
    width = result.type.shape[-1]
    at_rows = bound.operations.get("position_rows")
    at_attributes = at_rows.attributes if at_rows is not None else {}
    if position_table.ndim != 2 or at_attributes.get("width", position_table.shape[1]) != width:
        return None
    positions = [constant(each) for each in (position_table, position_scale) if each is not None]
    attributes = {
        "weight_dtype": rows.attributes.get("weight_dtype", table.type.dtype),
        "position_dtype": at_attributes.get("weight_dtype", positions[0].results[0].type.dtype),
        "width": width,
        "dtype": result.type.dtype,
    }
    operands = [idx, position, table, scale, *(each.results[0] for each in positions)]
    operands += [None] * (6 - len(operands))
    return [*positions, Operation("embedding", operands, attributes, [])]


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
