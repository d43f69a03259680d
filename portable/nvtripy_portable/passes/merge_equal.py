"""Operations that compute the same thing are computed once.

Equal means: the same operation on the same operands with the same attributes; or, for small integer tensors, the same
contents in terms of the input dimensions, however they were arrived at. The second merges the shape arithmetic that
nvtripy repeats for every tensor. Of plug-ins nobody knows what they compute: each call of one stays.
"""

from __future__ import annotations

from collections.abc import Hashable

from nvtripy_portable.graph import Graph, Operation, Value

_SMALL_BYTES = 4096  # larger constants are weights: they are equal if they are the same memory, seen the same way


def run(graph: Graph) -> None:
    first: dict[Hashable, Operation] = {}
    replacement: dict[Value, Value] = {}
    kept: list[Operation] = []
    for operation in graph.operations:
        operation.operands = [replacement.get(each, each) if each is not None else None for each in operation.operands]
        keys = _keys(operation) if operation.kind != "plugin" else []
        equal = next((first[key] for key in keys if key in first), None)
        if equal is None:
            kept.append(operation)
            first.update(dict.fromkeys(keys, operation))
        else:
            replacement.update(zip(operation.results, equal.results, strict=True))
    graph.operations = kept
    graph.outputs = [replacement.get(output, output) for output in graph.outputs]


def _keys(operation: Operation) -> list[Hashable]:
    if operation.kind == "constant":
        value = operation.attributes["value"]
        if value.nbytes <= _SMALL_BYTES:
            return [("constant", value.dtype, value.shape, value.tobytes())]
        return [("view", value.dtype, value.shape, value.strides, value.__array_interface__["data"][0])]
    operands = tuple(id(operand) if operand is not None else None for operand in operation.operands)
    keys: list[Hashable] = [(operation.kind, operands, tuple(operation.attributes.items()))]
    contents = operation.results[0].contents
    elements = contents if isinstance(contents, tuple) else (contents,)
    if len(operation.results) == 1 and None not in elements:
        keys.append(("contents", operation.results[0].type.dtype, contents))
    return keys
