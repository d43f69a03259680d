"""A look-up in a table that ranks share by rows, with zeros for those that others have, becomes ``shared_rows``."""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Cast, Constant, Number, Op, Rule, apply

_OWN = Op("element_wise", Any("idx"), Constant("first"), operation="kSUB")
_BEFORE = Op("element_wise", _OWN, Constant("zero"), operation="kLESS")
_BEHIND = Op("element_wise", _OWN, Constant("last"), operation="kGREATER")
_OTHERS = Op("reshape", Op("element_wise", _BEFORE, _BEHIND, operation="kOR", name="is_others"))
_WITHIN = Op(
    "element_wise",
    Op("element_wise", _OWN, Constant("zero"), operation="kMAX"),
    Constant("last"),
    operation="kMIN",
)
_ROWS = (
    Op("gather", Constant("table"), _WITHIN, axis=0, num_broadcast_dims=0, name="rows"),
    Op("quantized_rows", Constant("table"), Constant("scale"), _WITHIN, name="rows"),
)


def run(graph: Graph) -> None:
    apply(graph, [Rule("rows of a part", Op("select", _OTHERS, Number(0.0), Cast(rows)), _build) for rows in _ROWS])


def _build(bound: Bound) -> list[Operation] | None:
    table, idx, rows = (bound.values[name] for name in ("table", "idx", "rows"))
    result = bound.operations["select"].results[0]
    numbers = [bound.constant(name) for name in ("first", "zero", "last")]
    if any(each.size != 1 for each in numbers):
        return None
    first, zero, last = (int(each.reshape(())) for each in numbers)
    if zero != 0 or last < 0 or first < 0 or table.type.rank != 2 or idx.type.rank != 2:
        return None
    if result.type.dtype not in FLOATS or result.type.shape != (*idx.type.shape, rows.type.shape[-1]):
        return None
    attributes = {
        "first": first,
        "count": last + 1,
        "weight_dtype": bound.operations["rows"].attributes.get("weight_dtype", table.type.dtype),
        "width": rows.type.shape[-1],
        "dtype": result.type.dtype,
    }
    return [Operation("shared_rows", [idx, table, bound.values.get("scale")], attributes, [])]
