"""A look-up by token, or the sum of one and of a look-up by position, becomes ``embedding``."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.elements import Elements, start_of
from nvtripy_portable.graph import Graph, Operation, Value
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
    graph.remove_dead_operations()
    inputs = {entry.value for entry in graph.inputs}
    alone = [Rule(f"{kind} rows", rows, lambda bound: _alone(bound, inputs)) for kind, rows in _ROWS.items()]
    apply(graph, [*alone, cast])


def _look_ups(what: str) -> dict[str, Op]:
    """A look-up in a table, in its two forms, in a part of a table, and of tokens in two tables."""
    table, scale, indices = Constant(f"{what}_table"), Constant(f"{what}_scale"), Any(f"{what}_indices")
    found = {
        "float": Op("gather", table, indices, axis=0, num_broadcast_dims=0, name=f"{what}_rows"),
        "quantized": Op("quantized_rows", table, scale, indices, name=f"{what}_rows"),
        "shared": Op("shared_rows", indices, table, name=f"{what}_rows"),
    }
    if what == "token":
        found["prompted"] = Op("token_rows", indices, Any("prompts"), table, name=f"{what}_rows")
    return found


def _rows(what: str) -> dict[str, Cast]:
    return {kind: Cast(rows) for kind, rows in _look_ups(what).items()}


_ROWS = _look_ups("token")


def _alone(bound: Bound, inputs: set[Value]) -> list[Operation] | None:
    """Where nothing is added: positions are said otherwise."""
    rows = bound.operations["token_rows"]
    idx, table, scale = _of_tokens(bound)
    if idx not in inputs or idx is None or idx.type.rank != 2 or table is None:
        return None
    result = rows.results[0]
    if result.type.dtype not in FLOATS or result.type.rank != 3:
        return None
    attributes = {
        "weight_dtype": rows.attributes.get("weight_dtype", table.type.dtype),
        "position_dtype": None,
        "width": result.type.shape[-1],
        "dtype": result.type.dtype,
        **_part("token", rows),
    }
    return [Operation("embedding", [idx, None, table, scale, None, None, *_prompts(bound)], attributes, [])]


def _prompts(bound: Bound) -> list[Value | None]:
    """The second table of a look-up by token, if it has one."""
    return [bound.values["prompts"]] if "prompts" in bound.values else []


def _part(what: str, rows: Operation | None) -> dict[str, tuple[int, int]]:
    """Which rows of a shared table there are, if it is one."""
    if rows is None or rows.kind != "shared_rows":
        return {}
    return {f"{what}_rows_of": (rows.attributes["first"], rows.attributes["count"])}


def _of_tokens(bound: Bound) -> list[Value | None]:
    """Indices, table and scale of the look-up by token."""
    idx, table, scale = (bound.values.get(f"token_{name}") for name in ("indices", "table", "scale"))
    rows = bound.operations["token_rows"]
    scales = {"token_rows": 3, "shared_rows": 2}
    return [idx, table, rows.operands[scales[rows.kind]] if rows.kind in scales else scale]


def _looked_up(bound: Bound, elements: Elements) -> list[Operation] | None:
    """With positions that are computed from the sequences' own, or count from 0, or are constants."""
    positions, table = bound.values["position_indices"], bound.constant("position_table")
    scale = bound.constant("position_scale") if "position_scale" in bound.values else None
    rows = bound.operations["position_rows"]
    if rows.kind == "shared_rows":
        scale = None if rows.operands[2] is None else rows.operands[2].constant
        if positions.constant is not None:
            return None
    if positions.constant is not None:  # those of a fixed number of tokens, in a table that has not been widened
        at = positions.constant
        if at.size and not -len(table) <= at.min() <= at.max() < len(table):
            return None  # an error of the program's, when it runs
        return _embedding(bound, None, table[at], scale[at] if scale is not None and scale.ndim else scale)
    shape = bound.values["token_indices"].type.shape
    found = start_of(positions, shape, elements) if positions.type.rank == 2 else None
    return None if found is None else _embedding(bound, found[0], table, scale)


def _embedding(
    bound: Bound, position: Value | None, position_table: np.ndarray, position_scale: np.ndarray | None
) -> list[Operation] | None:
    rows, result = bound.operations["token_rows"], bound.operations["element_wise"].results[0]
    idx, table, scale = _of_tokens(bound)
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
        **_part("token", rows),
        **_part("position", at_rows),
    }
    operands = [idx, position, table, scale, *(each.results[0] for each in positions)]
    operands += [None] * (6 - len(operands)) + _prompts(bound)
    return [*positions, Operation("embedding", operands, attributes, [])]


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["embedding"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    attributes = operation.attributes | {"dtype": cast.attributes["dtype"]}
    return [Operation("embedding", list(operation.operands), attributes, [])]
