"""What can be computed at compile time is: operations on constants, and shapes that turn out to be plain numbers.

A result that would take more memory than its operands (a broadcast, say) is left to run time once it is large. So is a
``dequantize`` always, as its operand is the small form that the weights are meant to be kept in, and a plug-in, which
may do anything. Cosines and sines wait for :mod:`rotary <nvtripy_portable.passes.rotary>`, which can tell positions
from angles, but not from these.
"""

from __future__ import annotations

import math

import numpy as np

from nvtripy_portable.cpu import constants
from nvtripy_portable.graph import DTYPES, Graph, GraphError, Operation, TensorType, Value
from nvtripy_portable.passes.infer_shapes import infer_inputs, infer_results
from nvtripy_portable.plan import OPERATIONS, bind

_LARGE_BYTES = 1 << 20
_FUNCTIONS = OPERATIONS | {"quantize": constants.quantize}


def run(graph: Graph) -> None:
    infer_inputs(graph)
    operations: list[Operation] = []
    for operation in graph.operations:
        infer_results(operation)
        values = _known_contents(operation)
        if values is None and not _is_wave(operation):
            values = _compute(operation)
        operations.extend(_folded(operation, values))
    graph.operations = operations


def run_waves(graph: Graph) -> None:
    """The cosines and sines that nothing was made of, and what follows from them."""
    operations: list[Operation] = []
    folded: set[Value] = set()
    for operation in graph.operations:
        follows = _is_wave(operation) or not folded.isdisjoint(filter(None, operation.operands))
        values = _compute(operation) if follows else None
        folded.update(operation.results if values is not None else ())
        operations.extend(_folded(operation, values))
    graph.operations = operations


def _is_wave(operation: Operation) -> bool:
    return operation.kind == "unary" and operation.attributes["operation"] in ("kCOS", "kSIN")


def _folded(operation: Operation, values: list[np.ndarray] | None) -> list[Operation]:
    """The operation, or constants in its place."""
    if values is None:
        return [operation]
    return [
        _constant(result, value, operation.location) for result, value in zip(operation.results, values, strict=True)
    ]


def _constant(result: Value, value: np.ndarray, location: str) -> Operation:
    """A constant operation in the place of the one that gave ``result``."""
    operation = Operation("constant", [], {"value": value}, [], location)
    operation.results = [result]
    result.producer = operation
    result.set_type(TensorType(result.type.dtype, value.shape))
    infer_results(operation)
    return operation


def _known_contents(operation: Operation) -> list[np.ndarray] | None:
    """The result of shape arithmetic, where every element is a number."""
    result = operation.results[0]
    elements = result.contents if isinstance(result.contents, tuple) else (result.contents,)
    if operation.kind == "constant" or not all(isinstance(each, int) for each in elements):
        return None
    value = np.array(result.contents, dtype=DTYPES[result.type.dtype])
    return [value] if value.ndim == result.type.rank else None


def _compute(operation: Operation) -> list[np.ndarray] | None:
    """The results of an operation on constants."""
    if operation.kind in ("constant", "dequantize", "plugin"):
        return None
    present = [operand for operand in operation.operands if operand is not None]
    if any(operand.constant is None for operand in present):
        return None
    operands = [operand.constant if operand is not None else None for operand in operation.operands]
    if _result_bytes(operation) > max(_LARGE_BYTES, sum(value.nbytes for value in operands if value is not None)):
        return None
    try:
        results = bind(operation, _FUNCTIONS)(*operands)
    except (ValueError, IndexError, TypeError) as error:
        raise GraphError(f"{operation.kind}: {error}", operation.location) from None
    return [np.asarray(value) for value in (results if isinstance(results, tuple) else (results,))]


def _result_bytes(operation: Operation) -> float:
    """Size of the results; infinite where a dimension is not known."""
    total = 0.0
    for result in operation.results:
        if not result.type.is_static:
            return math.inf
        total += math.prod(result.type.shape) * DTYPES[result.type.dtype].itemsize  # type: ignore[arg-type]
    return total
