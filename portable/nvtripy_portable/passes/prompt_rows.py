"""A look-up by token whose ids go on in a second table, which is no constant, becomes ``token_rows``."""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Cast, Constant, Op, Rule, apply

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
    count = table.type.shape[0]
    limits = {"last": -1, "count": 0, "limit": 0}
    if not isinstance(count, int) or bound.constant("zero").any() or bound.constant("zero").size != 1:
        return None
    if any(bound.constant(name).size != 1 or bound.constant(name) != count + limits[name] for name in limits):
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
    return [Operation("token_rows", [idx, prompts, table, bound.values.get("scale")], attributes, [])]
