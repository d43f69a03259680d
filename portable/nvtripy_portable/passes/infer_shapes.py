"""Dimensions, as far as they can be known at compile time.

Input dimensions become numbers (where the least and the greatest size agree) or symbols; every operation's result follows. A shape
tensor whose contents turn out to be plain numbers becomes a constant, which leaves no shape arithmetic behind in static graphs.
"""

from __future__ import annotations

import numpy as np

from nvtripy_portable import shape_inference
from nvtripy_portable.graph import DTYPES, Dim, Graph, GraphError, Input, Operation, TensorType, Value
from nvtripy_portable.shape_inference import Contents


def run(graph: Graph) -> None:
    contents: dict[Value, Contents] = {}
    for entry in graph.inputs:
        entry.value.set_type(_input_type(entry))
        if entry.value_bounds is not None:
            contents[entry.value] = entry.name
    replaced: list[Operation] = []
    for operation in graph.operations:
        if operation.kind == "constant":
            contents[operation.results[0]] = shape_inference.constant_contents(operation.attributes["value"])
            replaced.append(operation)
            continue
        types = [operand.type if operand is not None else None for operand in operation.operands]
        known = [contents.get(operand) if operand is not None else None for operand in operation.operands]
        try:
            inferred = shape_inference.infer(operation.kind, types, known, operation.attributes)
            for result, type in zip(operation.results, inferred, strict=True):
                result.set_type(shape_inference.refine(result.type, type))
        except GraphError as error:
            raise GraphError(f"{operation.kind}: {error}", operation.location) from None
        value = shape_inference.infer_value(operation.kind, types, known, operation.attributes)
        contents[operation.results[0]] = value
        replaced.append(_as_constant(operation, value) or operation)
    graph.operations = replaced


def _input_type(entry: Input) -> TensorType:
    if entry.shape_bounds is None:
        return entry.value.type
    shape: list[Dim] = []
    for index, (least, greatest) in enumerate(zip(entry.shape_bounds.min, entry.shape_bounds.max, strict=True)):
        symbol = entry.dimension_names.get(index, f"{entry.name}.{index}")
        shape.append(least if least == greatest else symbol)
    return TensorType(entry.value.type.dtype, tuple(shape))


def _as_constant(operation: Operation, contents: Contents) -> Operation | None:
    """A constant with the operation's own result, where every element of the result is a number."""
    elements = contents if isinstance(contents, tuple) else (contents,)
    result = operation.results[0]
    if contents is None or len(operation.results) != 1 or not all(isinstance(each, int) for each in elements):
        return None
    value = np.array(contents, dtype=DTYPES[result.type.dtype])
    if value.ndim != result.type.rank:
        return None
    constant = Operation("constant", [], {"value": value}, [], operation.location)
    constant.results = [result]
    result.producer = constant
    result.set_type(TensorType(result.type.dtype, value.shape))
    return constant
