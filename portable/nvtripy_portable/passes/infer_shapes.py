"""Dimensions, as far as they can be known at compile time.

Input dimensions become numbers (where the least and the greatest size agree) or symbols; every operation's result
follows from its operands. ``fold_constants`` calls this for one operation after another: folding makes more shapes
known, and these make more foldable.
"""

from __future__ import annotations

from nvtripy_portable import shape_inference
from nvtripy_portable.dims import Dim, Symbolic
from nvtripy_portable.graph import Contents, Graph, GraphError, Input, Operation, TensorType


def infer_inputs(graph: Graph) -> None:
    """Types of the graph's inputs from what the user promised about them."""
    for entry in graph.inputs:
        entry.value.set_type(_input_type(entry))
        if entry.value_bounds is not None and entry.value_bounds.min[0] >= 0:  # as symbols are
            entry.value.contents = Symbolic.of(f"%{entry.name}")


def infer_results(operation: Operation) -> None:
    """Types and contents of an operation's results, from those of its operands.

    Raises:
        GraphError: the operands contradict each other, or what is known of the result already.
    """
    if operation.kind == "constant":
        operation.results[0].contents = shape_inference.constant_contents(operation.attributes["value"])
        return
    types = [operand.type if operand is not None else None for operand in operation.operands]
    known = [operand.contents if operand is not None else None for operand in operation.operands]
    try:
        inferred = shape_inference.infer(operation.kind, types, known, operation.attributes)
        for result, type in zip(operation.results, inferred, strict=True):
            result.set_type(shape_inference.refine(result.type, type))
    except GraphError as error:
        raise GraphError(f"{operation.kind}: {error}", operation.location) from None
    contents = shape_inference.infer_value(operation.kind, types, known, operation.attributes)
    operation.results[0].contents = contents if _fits(contents, operation.results[0].type.dtype) else None


def _fits(contents: Contents, dtype: str) -> bool:
    """Whether all numbers are within their type: beyond it, integers wrap around or saturate, and dims do not."""
    elements = contents if isinstance(contents, tuple) else (contents,)
    limit = 1 << (int(dtype[1:]) - 1) if dtype.startswith("i") else 0
    return all(-limit <= each < limit for each in elements if isinstance(each, int))


def _input_type(entry: Input) -> TensorType:
    if entry.shape_bounds is None:
        return entry.value.type
    shape: list[Dim] = []
    for index, (least, greatest) in enumerate(zip(entry.shape_bounds.min, entry.shape_bounds.max, strict=True)):
        symbol = entry.dimension_names.get(index, f"%{entry.name}.{index}")  # no name that a user would give
        shape.append(least if least == greatest else Symbolic.of(symbol))
    return TensorType(entry.value.type.dtype, tuple(shape))
