"""Operations whose operands are all constant are computed now, once, instead of at every call.

A result that would take more memory than its operands (a broadcast, say) is left to run time once it is large, and a
``dequantize`` always is: its operand is the small form that the weights are meant to be kept in.
"""

from __future__ import annotations

import math

import numpy as np

from nvtripy_portable.graph import DTYPES, Graph, GraphError, Operation, TensorType
from nvtripy_portable.plan import bind

_LARGE_BYTES = 1 << 20
_NEVER_FOLDED = {"constant", "dequantize"}


def run(graph: Graph) -> None:
    folded: list[Operation] = []
    for operation in graph.operations:
        folded.extend(_fold(operation) or [operation])
    graph.operations = folded


def _fold(operation: Operation) -> list[Operation] | None:
    if operation.kind in _NEVER_FOLDED:
        return None
    operands = [operand.constant if operand is not None else None for operand in operation.operands]
    present = [operand is not None for operand in operation.operands]
    if any(expected and value is None for expected, value in zip(present, operands, strict=True)):
        return None
    if _result_bytes(operation) > max(_LARGE_BYTES, sum(value.nbytes for value in operands if value is not None)):
        return None
    try:
        results = bind(operation)(*operands)
    except (ValueError, IndexError, TypeError) as error:
        raise GraphError(f"{operation.kind}: {error}", operation.location) from None
    constants = []
    for result, value in zip(operation.results, results if isinstance(results, tuple) else (results,), strict=True):
        constant = Operation("constant", [], {"value": np.asarray(value)}, [], operation.location)
        constant.results = [result]
        result.producer = constant
        result.set_type(TensorType(result.type.dtype, value.shape))
        constants.append(constant)
    return constants


def _result_bytes(operation: Operation) -> float:
    """Upper bound, in bytes; infinite for a result whose dimensions are not known."""
    total = 0.0
    for result in operation.results:
        if not result.type.is_static:
            return math.inf
        total += math.prod(result.type.shape) * DTYPES[result.type.dtype].itemsize  # type: ignore[arg-type]
    return total
