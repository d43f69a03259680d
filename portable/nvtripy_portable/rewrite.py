"""Pattern → replacement: the machinery of the passes that recognise several operations as one.

A pattern is written as the expression that it finds, root first::

    Op("matrix_multiply", Any("x"), Op("transpose", Op("dequantize", Constant("weight"), Constant("scale"))))

A rule is a name, a pattern and a function from what the pattern bound to the operation that takes the root's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any as Anything

import numpy as np

from nvtripy_portable.graph import DTYPE_NAMES, Graph, Operation, TensorType, Value

FLOATS = ("f32", "f16", "bf16")


class Bound:
    """What a pattern found: values by the names of ``Any`` and ``Constant``, operations by those of ``Op``.

    ``matched`` are the results of all operations that the pattern covers.
    """

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.operations: dict[str, Operation] = {}
        self.matched: set[Value] = set()

    def constant(self, name: str) -> np.ndarray:
        """The array of a ``Constant``."""
        value = self.values[name].constant
        assert value is not None
        return value

    def copy(self) -> Bound:
        other = Bound()
        other.values, other.operations, other.matched = dict(self.values), dict(self.operations), set(self.matched)
        return other

    def restore(self, other: Bound) -> None:
        self.values, self.operations, self.matched = other.values, other.operations, other.matched


class Any:
    """Any value."""

    def __init__(self, name: str) -> None:
        self._name = name

    def match(self, value: Value | None, bound: Bound) -> bool:
        if value is None:
            return False
        # A name that occurs twice must be the same value both times.
        return bound.values.setdefault(self._name, value) is value


class Constant(Any):
    """A constant."""

    def match(self, value: Value | None, bound: Bound) -> bool:
        return value is not None and value.constant is not None and super().match(value, bound)


class Number:
    """A constant that is one number, as far as its type can hold it."""

    def __init__(self, number: float) -> None:
        self._number = number

    def match(self, value: Value | None, bound: Bound) -> bool:
        array = value.constant if value is not None else None
        if array is None or array.size != 1 or value is None or value.type.dtype not in FLOATS:
            return False
        return bool(array.reshape(()) == np.asarray(self._number, np.float32).astype(array.dtype))


class Op:
    """The result of an operation of one kind whose operands match and whose attributes are those given.

    With ``commutes``, two operands match in either order. A name binds the result, too.
    """

    def __init__(
        self, kind: str, *operands: Pattern, name: str | None = None, commutes: bool = False, **attributes: Anything
    ) -> None:
        self._kind, self._operands, self._name = kind, operands, name
        self._commutes, self._attributes = commutes, attributes

    def match(self, value: Value | None, bound: Bound) -> bool:
        if value is None or value.producer is None or value is not value.producer.results[0]:
            return False
        if self._name is not None and bound.values.setdefault(self._name, value) is not value:
            return False
        return self.match_operation(value.producer, bound)

    def match_operation(self, operation: Operation, bound: Bound) -> bool:
        if operation.kind != self._kind or len(operation.operands) < len(self._operands):
            return False
        if any(operation.attributes.get(name) != wanted for name, wanted in self._attributes.items()):
            return False
        bound.operations[self._name or self._kind] = operation
        bound.matched.update(operation.results)
        before = bound.copy() if self._commutes else bound
        if self._match_operands(operation.operands, bound):
            return True
        if not self._commutes:
            return False
        bound.restore(before)
        return self._match_operands(operation.operands[::-1], bound)

    def _match_operands(self, operands: Sequence[Value | None], bound: Bound) -> bool:
        return all(pattern.match(operand, bound) for pattern, operand in zip(self._operands, operands, strict=False))


class Either:
    """The first of several patterns that matches."""

    def __init__(self, *patterns: Pattern) -> None:
        self._patterns = patterns

    def match(self, value: Value | None, bound: Bound) -> bool:
        for pattern in self._patterns:
            before = bound.copy()
            if pattern.match(value, bound):
                return True
            bound.restore(before)
        return False


class Cast:
    """A pattern, or a cast of it from one float type to another."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern

    def match(self, value: Value | None, bound: Bound) -> bool:
        while value is not None and value.producer is not None and is_float_cast(value.producer):
            bound.matched.add(value)
            value = value.producer.operands[0]
        return self._pattern.match(value, bound)


Pattern = Any | Number | Op | Either | Cast


def is_float_cast(operation: Operation, only_widening: bool = False) -> bool:
    """Whether an operation does nothing but exchange one float type for another, or a narrow one for float32."""
    if operation.kind != "cast" or operation.operands[0] is None:
        return False
    before, after = operation.operands[0].type.dtype, operation.attributes["dtype"]
    return before in FLOATS and after in FLOATS and (after == "f32" or not only_widening)


def binary(operation: str, a: Pattern, b: Pattern, name: str | None = None) -> Op:
    """An element-wise operation of two operands, in either order where that is the same."""
    commutes = operation in ("kSUM", "kPROD", "kMAX", "kMIN")
    return Op("element_wise", a, b, name=name, commutes=commutes, operation=operation)


def constant(value: np.ndarray) -> Operation:
    """A new constant."""
    return Operation("constant", [], {"value": value}, [TensorType(DTYPE_NAMES[value.dtype], value.shape)])


def as_vector(value: Value, length: Anything) -> np.ndarray | None:
    """A constant that varies along its last dimension only, of a known length, as one dimension (a view)."""
    array = value.constant
    return array.reshape(-1) if array is not None and array.ndim and array.shape[-1] == array.size == length else None


@dataclass(frozen=True)
class Rule:
    """``build`` may return None to leave this one as it is, or several operations, the last of which gives the
    result. An ``exclusive`` rule applies only where nobody else reads what the pattern covers below its root: it would
    be computed twice."""

    name: str
    pattern: Op
    build: Callable[[Bound], Sequence[Operation] | None]
    exclusive: bool = False


_Readers = dict[Value, set[Value | None]]  # the first results of the operations that read a value; None: the caller


def apply(graph: Graph, rules: Sequence[Rule]) -> None:
    """One walk over the graph: the first rule that fits an operation replaces it, until none does.

    The replacement's last operation takes over the results of the root, so whoever reads them reads on.
    """
    readers = _readers(graph)
    operations: list[Operation] = []
    for operation in graph.operations:
        current: list[Operation] = [operation]
        while (replacement := _replace(current[-1], rules, readers)) is not None:
            current[-1:] = replacement
            for value in filter(None, current[-1].operands):
                readers.setdefault(value, set()).add(current[-1].results[0])
        operations.extend(current)
    graph.operations = operations


def _readers(graph: Graph) -> _Readers:
    readers: _Readers = {}
    for operation in graph.operations:
        for operand in filter(None, operation.operands):
            readers.setdefault(operand, set()).add(operation.results[0])
    for output in graph.outputs:
        readers.setdefault(output, set()).add(None)
    return readers


def _replace(operation: Operation, rules: Sequence[Rule], readers: _Readers) -> Sequence[Operation] | None:
    for rule in rules:
        bound = Bound()
        if not rule.pattern.match_operation(operation, bound):
            continue
        inner = bound.matched.difference(operation.results) if rule.exclusive else ()
        if any(not readers.get(value, set()) <= bound.matched for value in inner):
            continue
        if (replacement := rule.build(bound)) is not None:
            root = replacement[-1]
            root.results = operation.results
            root.location = operation.location
            for result in root.results:
                result.producer = root
            return replacement
    return None
