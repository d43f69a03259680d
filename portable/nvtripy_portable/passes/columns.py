"""Parts of a row that ranks have computed, gathered: ``AllGather`` and what arranges its result become one plug-in.

TensorRT-LLM's plug-in puts what the ranks have one behind the other along the first dimension. A model that wants a
token's numbers together arranges them anew, (P * rows, width) → (rows, P * width), and cuts off what is padding. As one
operation that is a function of each row, of any rows that a decoder has packed (``collectives.COLUMNS``).
"""

from __future__ import annotations

import functools

import numpy as np

from nvtripy_portable import collectives
from nvtripy_portable.graph import Graph, Operation, TensorType
from nvtripy_portable.rewrite import Any, Bound, Constant, Op, Rule, apply

_GATHERED = Op("plugin", Any("x"), name="gathered")
_TOGETHER = Op("reshape", Op("transpose", Op("reshape", _GATHERED, name="by_rank")), name="together")
_CUT = Op("gather", _TOGETHER, Constant("columns"), num_broadcast_dims=0)


def run(graph: Graph) -> None:
    for name, root, is_cut in (("columns, cut off", _CUT, True), ("columns", _TOGETHER, False)):
        replaced: set[Operation] = set()
        build = functools.partial(_build, is_cut=is_cut, replaced=replaced)
        apply(graph, [Rule(name, root, build, exclusive=True)])
        graph.remove_dead_operations()
        # It has an effect, so that it stays where nobody reads what it gives; but now another operation has it.
        graph.operations = [each for each in graph.operations if each not in replaced]


def _build(bound: Bound, is_cut: bool, replaced: set[Operation]) -> list[Operation] | None:
    attributes = bound.operations["gathered"].attributes
    if (attributes["name"], attributes["namespace"]) != ("AllGather", collectives.NAMESPACE):
        return None
    x, together = bound.values["x"], bound.operations["together"].results[0].type
    ranks = len(attributes["fields"]["group"])
    shape, width, last = x.type.shape, x.type.shape[-1], x.type.rank - 1
    if not isinstance(width, int) or None in shape[:-1] or together.shape != (*shape[:-1], ranks * width):
        return None
    # (P * rows, ..., width) → (P, rows, ..., width) → (rows, ..., P, width) → (rows, ..., P * width)
    by_rank, order = bound.values["by_rank"].type.shape, bound.operations["transpose"].attributes["permutation"]
    if by_rank != (ranks, *shape) or tuple(order) != (*range(1, last + 1), 0, last + 1):
        return None
    columns = ranks * width
    if is_cut:
        kept, axis = bound.constant("columns"), bound.operations["gather"].attributes["axis"]
        if axis not in (last, -1) or kept.ndim != 1 or not np.array_equal(kept, np.arange(len(kept))):
            return None
        columns = min(columns, len(kept))
    result = TensorType(together.dtype, (*shape[:-1], columns))
    changes = {
        "name": collectives.COLUMNS,
        "namespace": collectives.COLUMNS_NAMESPACE,
        "fields": attributes["fields"] | {"columns": columns},
        "output_info": ((result.rank, result.dtype),),
    }
    replaced.add(bound.operations["gathered"])
    return [Operation("plugin", [x], attributes | changes, [result])]
