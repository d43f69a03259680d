"""Plug-ins take away the casts in front of them, and what follows them becomes one operation.

``finish`` does to the result of a plug-in what a linear operation does to its product: bias, activation, residual and
cast. So a plug-in in the middle of a model leaves it one native program. The plug-ins themselves stay where they are,
in their order.
"""

from __future__ import annotations

from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.rewrite import FLOATS, is_float_cast


def open_results(graph: Graph) -> None:
    """Before ``linear``: each result gets a ``finish`` that does nothing yet, for its rules to fill."""
    opened: dict[Value, Value] = {}
    operations: list[Operation] = []
    for operation in graph.operations:
        operation.operands = [opened.get(each, each) if each is not None else None for each in operation.operands]
        operations.append(operation)
        if operation.kind != "plugin":
            continue
        operation.operands = [_before_casts(each) if each is not None else None for each in operation.operands]
        for result in operation.results:
            if result.type.dtype in FLOATS:
                attributes = {"activation": None, "dtype": result.type.dtype}
                finish = Operation("finish", [result, None, None, None], attributes, [result.type], operation.location)
                operations.append(finish)
                opened[result] = finish.results[0]
    graph.operations = operations
    graph.outputs = [opened.get(output, output) for output in graph.outputs]


def _before_casts(value: Value) -> Value:
    while value.producer is not None and is_float_cast(value.producer) and value.producer.operands[0] is not None:
        value = value.producer.operands[0]
    return value


def close_results(graph: Graph) -> None:
    """After it: those that still do nothing go."""
    closed: dict[Value, Value] = {}
    operations: list[Operation] = []
    for operation in graph.operations:
        operation.operands = [closed.get(each, each) if each is not None else None for each in operation.operands]
        x = operation.operands[0] if operation.operands else None
        if x is not None and operation.kind == "finish" and _does_nothing(operation, x):
            closed[operation.results[0]] = x
        else:
            operations.append(operation)
    graph.operations = operations
    graph.outputs = [closed.get(output, output) for output in graph.outputs]


def _does_nothing(operation: Operation, x: Value) -> bool:
    return operation.operands[1:] == [None, None, None] and operation.attributes == {
        "activation": None,
        "dtype": x.type.dtype,
    }
