"""A graph made ready to run: steps over numbered slots, each with its function bound and the slots it frees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nvtripy_portable import fused, reference
from nvtripy_portable.graph import DTYPES, Graph, Operation, Value
from nvtripy_portable.plugins import calling

#: All operations that a graph may hold after the passes.
OPERATIONS: dict[str, Callable[..., Any]] = reference.OPERATIONS | fused.OPERATIONS | {"plugin": calling.run}


def bind(operation: Operation, functions: Mapping[str, Callable[..., Any]] = OPERATIONS) -> Callable[..., Any]:
    """The function of an operation, with its attributes filled in."""
    attributes = operation.attributes
    if "dtype" in attributes:
        attributes = {**attributes, "dtype": DTYPES[attributes["dtype"]]}
    return partial(functions[operation.kind], **attributes)


@dataclass
class Step:
    """One call: ``slots[results] = function(*slots[operands])``; ``freed`` slots are read here for the last time."""

    kind: str
    function: Callable[..., Any]
    operands: tuple[int | None, ...]
    results: tuple[int, ...]
    freed: tuple[int, ...]
    location: str


class Plan:
    """The steps of a graph in order. Slots hold the inputs first, then constants and results as they appear."""

    def __init__(self, graph: Graph) -> None:
        slots: dict[Value, int] = {}
        for entry in graph.inputs:
            slots[entry.value] = len(slots)
        self.num_inputs = len(slots)
        self.constants: dict[int, np.ndarray] = {}
        widened = _values_only_multiplied(graph)
        last_use = _last_uses(graph)
        self.steps: list[Step] = []
        for operation in graph.operations:
            for result in operation.results:
                slots[result] = len(slots)
            if operation.kind == "constant":
                value = operation.attributes["value"]
                result = operation.results[0]
                self.constants[slots[result]] = value.astype(np.float32, order="K") if result in widened else value
                continue
            ends_here = {
                slots[operand]
                for operand in operation.operands
                if operand is not None and operand.constant is None and last_use[operand] is operation
            }
            unused = {slots[result] for result in operation.results if result not in last_use}
            self.steps.append(
                Step(
                    operation.kind,
                    bind(operation),
                    tuple(slots[operand] if operand is not None else None for operand in operation.operands),
                    tuple(slots[result] for result in operation.results),
                    tuple(ends_here | unused),
                    operation.location,
                )
            )
        self.outputs = tuple(slots[output] for output in graph.outputs)
        self.num_slots = len(slots)


#: Where a constant may be float32 instead of half precision, without any difference to the result.
_WIDENED = {("matrix_multiply", 1), ("linear", 1), ("embedding", 2)}


def _values_only_multiplied(graph: Graph) -> set[Value]:
    """Half-precision constants that are right-hand sides of matrix products, and maybe an embedding's table.

    NumPy multiplies matrices fast in float32 alone, so these are widened once instead of at every call. The product is
    computed in float32 either way: the result is the same.
    """
    narrow = {
        operation.results[0]
        for operation in graph.operations
        if operation.kind == "constant" and operation.results[0].type.dtype in ("f16", "bf16")
    }
    multiplied = set()
    for operation in graph.operations:
        for index, operand in enumerate(operation.operands):
            if (operation.kind, index) not in _WIDENED:
                narrow.discard(operand)
            elif operation.kind != "embedding":
                multiplied.add(operand)
    return (narrow & multiplied).difference(graph.outputs)


def _last_uses(graph: Graph) -> dict[Value, Operation | None]:
    """For each value that is read at all, the operation that reads it last; None where the caller gets it."""
    uses: dict[Value, Operation | None] = {}
    for operation in graph.operations:
        for operand in operation.operands:
            if operand is not None:
                uses[operand] = operation
    for output in graph.outputs:
        uses[output] = None
    return uses
