"""Graphs for the tests of the compiler: traced from nvtripy functions, optimized by some passes, run and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import nvtripy as tp
import pytest

from nvtripy_portable import compiler, interpreter
from nvtripy_portable.graph import Graph, Input, Operation, Value
from nvtripy_portable.passes import fold_constants, merge_equal
from nvtripy_portable.plan import Plan

#: Those that leave nvtripy's own operations as they are: what comes out of them is what fused graphs are compared with.
UNFUSED = (fold_constants.run, merge_equal.run)


def clone(graph: Graph) -> Graph:
    """A graph of its own values and operations, on the same constants."""
    copies = {entry.value: Value(entry.value.type) for entry in graph.inputs}
    result = Graph(
        [
            Input(copies[each.value], each.name, each.shape_bounds, each.dimension_names, each.value_bounds)
            for each in graph.inputs
        ]
    )
    for operation in graph.operations:
        operands = [None if operand is None else copies[operand] for operand in operation.operands]
        types = [value.type for value in operation.results]
        added = result.add(Operation(operation.kind, operands, dict(operation.attributes), types, operation.location))
        copies.update(zip(operation.results, added.results, strict=True))
    result.outputs = [copies[output] for output in graph.outputs]
    return result


def traced(function: Callable[..., Any], *infos: Any) -> Graph:
    """The graph of a function as it comes from nvtripy, before any pass."""
    graphs: list[Graph] = []
    with pytest.MonkeyPatch.context() as patch:
        original = compiler.optimize
        patch.setattr(compiler, "optimize", lambda graph: (graphs.append(clone(graph)), original(graph)))
        tp.compile(function, args=list(infos))
    return graphs[-1]  # those before it are of tensors that the program evaluated to trace


def optimized(graph: Graph, passes: tuple[Callable[[Graph], None], ...] = UNFUSED) -> Graph:
    graph = clone(graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "PASSES", passes)
        compiler.optimize(graph)
    return graph


def kinds(graph: Graph) -> Counter[str]:
    return Counter(operation.kind for operation in graph.operations)


def run(graph: Graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """By the reference functions, whatever could run faster: it is the graph that is tested."""
    return interpreter.run(Plan(graph), inputs)


def both(function: Callable[..., Any], *infos: Any) -> tuple[Graph, Graph]:
    """A function fused, and as nvtripy's own operations."""
    graph = traced(function, *infos)
    return optimized(graph, compiler.PASSES), optimized(graph, UNFUSED)


def operations(graph: Graph) -> list[Operation]:
    """All but the constants."""
    return [operation for operation in graph.operations if operation.kind != "constant"]


def only(graph: Graph, kind: str) -> Operation:
    (found,) = (operation for operation in graph.operations if operation.kind == kind)
    return found


def assert_close(fused: Graph, plain: Graph, inputs: list[np.ndarray], tolerance: float = 1e-5) -> None:
    """In float32 only the order of summation differs: 1e-5 of the norm is some hundred roundings."""
    for found, expected in zip(run(fused, inputs), run(plain, inputs), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def random(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def tensor(*shape: int, seed: int = 0) -> tp.Tensor:
    """A random constant."""
    return tp.Tensor(random(*shape, seed=seed))
