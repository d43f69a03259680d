"""The intermediate representation: TensorRT-dialect operations in SSA form.

A :class:`Graph` is what nvtripy's trace becomes and what every pass reads and writes. Operations carry the names and
the attributes of the TensorRT dialect that nvtripy emits; attributes are plain Python values, so that a graph prints,
compares and serializes without further machinery. Dimensions are numbers, expressions of dynamic input dimensions, or
unknown (:mod:`nvtripy_portable.dims`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from nvtripy_portable.dims import Dim

Contents = Dim | tuple[Dim, ...]

#: Element types by their MLIR names, as the NumPy types that hold them (int4: one element a byte).
DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "i4": np.dtype(ml_dtypes.int4),
    "i8": np.dtype(np.int8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "i1": np.dtype(np.bool_),
    "u8": np.dtype(np.uint8),  # storage only: packed int4
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class GraphError(Exception):
    """An operation cannot be what it says: shapes or types that contradict each other.

    ``location`` is the location of the offending operation, in the notation that nvtripy finds its tensors by.
    """

    def __init__(self, message: str, location: str = "") -> None:
        super().__init__(message)
        self.location = location


@dataclass(frozen=True)
class TensorType:
    """Element type and dimensions of a tensor, e.g. ``f16[batch, 12, 64]``."""

    dtype: str
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(dim, int) for dim in self.shape)

    def is_dynamic_dim(self, index: int) -> bool:
        return not isinstance(self.shape[index], int)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


class Value:
    """One tensor: an input of the graph, or a result of exactly one operation.

    ``contents`` is what is known at compile time of the elements of a small integer tensor, such as a shape: one dim
    for a scalar, a tuple of dims for a 1-D tensor, None for nothing.
    """

    __slots__ = ("contents", "producer", "type")

    def __init__(self, type: TensorType, producer: Operation | None = None) -> None:
        self.type = type
        self.producer = producer
        self.contents: Contents = None

    def set_type(self, type: TensorType) -> None:
        self.type = type

    @property
    def constant(self) -> np.ndarray | None:
        """The value of a constant's result, else None."""
        if self.producer is not None and self.producer.kind == "constant":
            return self.producer.attributes["value"]
        return None


class Operation:
    """One TensorRT-dialect operation. An absent optional operand is None."""

    __slots__ = ("attributes", "kind", "location", "operands", "results")

    def __init__(
        self,
        kind: str,
        operands: list[Value | None],
        attributes: dict[str, Any],
        result_types: list[TensorType],
        location: str = "",
    ) -> None:
        self.kind = kind
        self.operands = operands
        self.attributes = attributes
        self.results = [Value(type, self) for type in result_types]
        self.location = location


@dataclass(frozen=True)
class Bounds:
    """The least, the typical and the greatest value of each dimension (or of the one value of a host scalar)."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass
class Input:
    """An input of the graph: its value, and what the user promised about it."""

    value: Value
    name: str
    shape_bounds: Bounds | None = None
    dimension_names: dict[int, str] = field(default_factory=dict)
    value_bounds: Bounds | None = None


@dataclass
class Graph:
    """A function of tensors: ``operations`` stand in an order in which every operand precedes its use."""

    inputs: list[Input] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def add(self, operation: Operation) -> Operation:
        self.operations.append(operation)
        return operation

    def names(self) -> dict[Value, str]:
        """Printable names: inputs by their own, results numbered in order."""
        names = {entry.value: f"%{entry.name}" for entry in self.inputs}
        counter: Iterator[int] = iter(range(1 << 62))
        for operation in self.operations:
            for result in operation.results:
                names[result] = f"%{next(counter)}"
        return names

    def remove_dead_operations(self) -> None:
        """Drops every operation whose results nobody reads, unless it does more than compute them."""
        needed = set(self.outputs)
        kept: list[Operation] = []
        for operation in reversed(self.operations):
            is_needed = any(result in needed for result in operation.results)
            if is_needed or operation.attributes.get("has_effects"):
                kept.append(operation)
                needed.update(operand for operand in operation.operands if operand is not None)
        self.operations = kept[::-1]

    def __str__(self) -> str:
        names = self.names()
        signature = ", ".join(f"{names[entry.value]}: {entry.value.type}" for entry in self.inputs)
        lines = [f"graph({signature}):"]
        for operation in self.operations:
            results = ", ".join(names[result] for result in operation.results)
            types = ", ".join(str(result.type) for result in operation.results)
            operands = [names[operand] if operand is not None else "none" for operand in operation.operands]
            attributes = [f"{key}={_print_attribute(value)}" for key, value in operation.attributes.items()]
            lines.append(f"  {results} = {operation.kind}({', '.join(operands + attributes)}) : {types}")
        lines.append(f"  return {', '.join(names[output] for output in self.outputs)}")
        return "\n".join(lines)


def _print_attribute(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.size <= 8:
            return str(value.tolist())
        return f"<{DTYPE_NAMES[value.dtype]}{list(value.shape)}>"
    return str(value)
