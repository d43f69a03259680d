"""The look-up of one row of each sequence becomes ``last_rows``."""

from __future__ import annotations

from nvtripy_portable.elements import Elements, axis, within
from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.inequalities import add, multiply
from nvtripy_portable.rewrite import Any, Bound, Op, Rule, apply


def run(graph: Graph) -> None:
    elements = Elements()
    flat = Op("reshape", Any("x"), name="flat")
    root = Op("gather", flat, Any("rows"), axis=0, num_broadcast_dims=0)
    apply(graph, [Rule("one row of each sequence", root, lambda bound: _build(bound, elements))])


def _build(bound: Bound, elements: Elements) -> list[Operation] | None:
    x, rows = bound.values["x"], bound.values["rows"]
    if x.type.rank != 3 or None in x.type.shape or rows.type.shape != x.type.shape[:1]:
        return None
    batch, length, width = x.type.shape
    assert batch is not None and length is not None  # as checked above
    if bound.values["flat"].type.shape != (multiply(batch, length), width):
        return None
    b = axis("b", batch)
    row = elements.number(rows, (b,), within((b,), (batch,)))
    for last in elements.reads(row):
        if last.value.type.shape == (batch,) and row == add(multiply(b, length), elements.symbol(last.value, (b,))):
            return [Operation("last_rows", [x, last.value], {}, [])]
    return None
