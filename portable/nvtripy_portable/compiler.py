"""The compiler: the passes, in order, and the ownership of what is left."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.graph import Graph
from nvtripy_portable.passes import fold_constants, merge_equal, quantized_weights

PASSES = (fold_constants.run, merge_equal.run, quantized_weights.run)


def optimize(graph: Graph) -> None:
    """Runs every pass over ``graph``, in place.

    Raises:
        GraphError: an operation's operands contradict each other; the error says where.
    """
    sources = {id(_root(value)) for value in _constants(graph).values()}
    for run in PASSES:
        run(graph)
        graph.remove_dead_operations()
    _own_constants(graph, sources)


def _own_constants(graph: Graph, sources: set[int]) -> None:
    """Copies what still views the caller's memory, so that changing that memory later changes nothing."""
    for operation in graph.operations:
        if operation.kind == "constant":
            value = operation.attributes["value"]
            # In row-major order, as a saved executable has them: sums in another order would differ in the last bits.
            if id(_root(value)) in sources or not value.flags.c_contiguous:
                operation.attributes["value"] = value.copy(order="C")


def _constants(graph: Graph) -> dict[int, np.ndarray]:
    return {
        index: operation.attributes["value"]
        for index, operation in enumerate(graph.operations)
        if operation.kind == "constant"
    }


def _root(array: np.ndarray) -> np.ndarray:
    """The array at the bottom of a chain of views."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
