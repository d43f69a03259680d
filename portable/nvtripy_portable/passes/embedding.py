"""The sum of a look-up by token and one by position becomes ``embedding``."""

from __future__ import annotations

from nvtripy_portable.elements import Elements, axis, within
from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.inequalities import Formula, Number, add
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Constant, Op, Pattern, Rule, apply, binary, is_float_cast


def run(graph: Graph) -> None:
    elements = Elements()
    quantized = Op("quantized_rows", Any("table"), Any("table_scale"), Any("idx"), name="rows")
    apply(
        graph,
        [
            Rule("rows of floats and positions", _sum(_gather("table", "idx", "rows")), lambda b: _build(b, elements)),
            Rule("positions and rows of floats", _sum(_gather("table", "idx", "rows"), True), lambda b: _build(b, elements)),
            Rule("quantized rows and positions", _sum(quantized), lambda b: _build(b, elements)),
            Rule("quantized rows of positions", _sum(quantized, True), lambda b: _build(b, elements)),
            Rule("result in another type", Op("cast", Op("embedding")), _output_cast, exclusive=True),
        ],
    )


def _gather(table: str, indices: str, name: str) -> Op:
    return Op("gather", Constant(table), Any(indices), axis=0, num_broadcast_dims=0, name=name)


def _sum(rows: Pattern, is_swapped: bool = False) -> Op:
    positions = _gather("position_table", "positions", "position_rows")
    operands = (positions, rows) if is_swapped else (rows, positions)
    return Op("element_wise", *operands, operation="kSUM")


def _build(bound: Bound, elements: Elements) -> list[Operation] | None:
    rows, result = bound.operations["rows"], bound.operations["element_wise"].results[0]
    idx, table, position_table = (bound.values[name] for name in ("idx", "table", "position_table"))
    if idx.type.rank != 2 or position_table.type.rank != 2 or rows.results[0].type.shape != result.type.shape:
        return None
    if position_table.type.dtype not in FLOATS or rows.results[0].type.dtype not in FLOATS:
        return None
    batch, length = idx.type.shape
    width = rows.results[0].type.shape[-1]
    if rows.kind == "gather" and (table.type.rank != 2 or table.type.dtype not in FLOATS):
        return None
    found = _start(bound.values["positions"], batch, length, elements)
    if found is None or position_table.type.shape[1] != width:
        return None
    attributes = {
        "weight_dtype": rows.attributes.get("weight_dtype", table.type.dtype),
        "width": width,
        "dtype": result.type.dtype,
    }
    scale = bound.values.get("table_scale")
    return [Operation("embedding", [idx, found[0], table, scale, position_table], attributes, [])]


def _start(positions: Value, batch: object, length: object, elements: Elements) -> tuple[Value | None] | None:
    """The value ``position`` where ``positions[b, t]`` is ``position[b] + t``, None where it is ``t``."""
    if positions.type.rank != 2 or positions.type.shape[1] != length or positions.type.shape[0] not in (1, batch):
        return None
    b, t = axis("b", positions.type.shape[0]), axis("t", positions.type.shape[1])
    given = within((b, t), positions.type.shape)
    number = elements.number(positions, (b, t), given)
    if number == t:
        return (None,)
    if positions.type.shape[0] != batch:
        return None
    starts = [start for start in elements.reads(number) if _is_sum(elements, start.value, b, t, number)]
    return (starts[0].value,) if starts and starts[0].value.type.shape == (batch,) else None


def _is_sum(elements: Elements, start: Value, b: Number, t: Number, number: Number) -> bool:
    return start.type.rank == 1 and number == add(elements.symbol(start, (b,)), t)


def _output_cast(bound: Bound) -> list[Operation] | None:
    operation, cast = bound.operations["embedding"], bound.operations["cast"]
    if not is_float_cast(cast):
        return None
    attributes = operation.attributes | {"dtype": cast.attributes["dtype"]}
    return [Operation("embedding", list(operation.operands), attributes, [])]
