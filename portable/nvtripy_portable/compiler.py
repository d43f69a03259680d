"""The compiler: the passes, in order, and the ownership of what is left."""

from __future__ import annotations

import os
import sys

import numpy as np

from nvtripy_portable import interpreter, verify
from nvtripy_portable.graph import Graph
from nvtripy_portable.passes import (
    attention,
    embedding,
    fold_constants,
    last_rows,
    layer_norm,
    linear,
    low_rank,
    merge_equal,
    plugins,
    prompt_rows,
    rms_norm,
    rotary,
    weights,
)
from nvtripy_portable.unchanging import is_unchanging

PASSES = (
    merge_equal.run,  # weights that are quantized twice, for a head and an embedding, become one constant
    fold_constants.run,
    merge_equal.run,
    weights.run,
    rms_norm.run,
    low_rank.run,  # before linear operations take what is added to them for a residual
    plugins.open_results,
    linear.run,
    plugins.close_results,
    layer_norm.run,
    rotary.run,
    fold_constants.run_waves,
    attention.run,
    prompt_rows.run,
    embedding.run,
    last_rows.run,
    merge_equal.run,  # weights that two passes made rows of
)


def optimize(graph: Graph) -> None:
    """Verifies that TensorRT would accept ``graph``, and runs every pass over it, in place.

    With ``NVTRIPY_PORTABLE_VERIFY=0`` in the environment it is not verified.
    With ``NVTRIPY_PORTABLE_PRINT_GRAPH=1`` in the environment the graph is printed to standard error after each pass;
    with a pass's name instead of the 1, after that one.

    Raises:
        GraphError: TensorRT would refuse an operation, or its operands contradict each other; the error says where.
    """
    if os.environ.get("NVTRIPY_PORTABLE_VERIFY") != "0":
        verify.run(graph)
    roots = [_root(value) for value in _constants(graph).values()]
    sources = {id(root) for root in roots if not is_unchanging(root)}
    wanted = os.environ.get("NVTRIPY_PORTABLE_PRINT_GRAPH", "")
    for run in PASSES:
        run(graph)
        graph.remove_dead_operations()
        name = run.__module__.rpartition(".")[2]
        if wanted in ("1", name):
            print(f"--- after {name}\n{graph}", file=sys.stderr, flush=True)
    _own_constants(graph, sources)
    for operation in graph.operations:
        operation.location = interpreter.shortened(operation.location)


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
