"""A look-up by token whose ids go on in a second table, which is no constant, becomes ``token_rows``."""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Cast, Constant, Op, Rule, apply, constant

_OWN = Op("element_wise", Any("idx"), Constant("last"), operation="kMIN")
_BEYOND = Op(
    "element_wise",
    Op("element_wise", Any("idx"), Constant("count"), operation="kSUB"),
    Constant("zero"),
    operation="kMAX",
)
_IS_OWN = Op("reshape", Op("element_wise", Any("idx"), Constant("limit"), operation="kLESS", name="comparison"))
_PROMPTS = Op("gather", Any("prompts"), _BEYOND, axis=0, num_broadcast_dims=0)
_ROWS = (
    Op("gather", Constant("table"), _OWN, axis=0, num_broadcast_dims=0, name="rows"),
    Op("quantized_rows", Constant("table"), Constant("scale"), _OWN, name="rows"),
)


def run(graph: Graph) -> None:
    apply(graph, [Rule("rows of two tables", Op("select", _IS_OWN, Cast(rows), _PROMPTS), _build) for rows in _ROWS])


def _build(bound: Bound) -> list[Operation] | None:
    table, prompts, idx, rows = (bound.values[name] for name in ("table", "prompts", "idx", "rows"))
    result = bound.operations["select"].results[0]
    numbers = [bound.constant(name) for name in ("last", "count", "limit", "zero")]
    if any(each.size != 1 for each in numbers):
        return None
    last, count, limit, zero = (int(each.reshape(())) for each in numbers)
    if not 0 < count == limit == last + 1 or zero != 0:
        return None
    if table.type.rank != 2 or prompts.type.rank != 2 or idx.type.rank != 2 or result.type.dtype not in FLOATS:
        return None
    if prompts.type.dtype not in FLOATS or rows.type.shape[-1] != prompts.type.shape[-1]:
        return None
    attributes = {
        "weight_dtype": bound.operations["rows"].attributes.get("weight_dtype", table.type.dtype),
        "width": rows.type.shape[-1],
        "dtype": result.type.dtype,
    }
    made: list[Operation] = []
    weight, scale = _first_rows(table, count, made), _first_rows(bound.values.get("scale"), count, made)
    if weight is None or weight.type.shape[0] != count:
        return None
    return [*made, Operation("token_rows", [idx, prompts, weight, scale], attributes, [])]


def _first_rows(value: Value | None, count: int, made: list[Operation]) -> Value | None:
    """A constant's rows that have ids: an odd number of int4 rows has one more. One number stands for all rows."""
    array = None if value is None else value.constant
    if array is None or array.ndim == 0 or len(array) <= count:
        return value
    made.append(constant(array[:count]))
    return made[-1].results[0]
