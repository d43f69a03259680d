"""Pattern → replacement: the machinery of the passes that recognise several operations as one.

A pattern is written as the expression that it finds, root first::

    Op("matrix_multiply", Any("x"), Op("transpose", Op("dequantize", Constant("weight"), Constant("scale"))))

A rule is a name, a pattern and a function from what the pattern bound to the operation that takes the root's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvtripy_portable.graph import Graph, Operation, Value


class Bound:
    """What a pattern found: values by the names of ``Any`` and ``Constant``, operations by those of ``Op``."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.operations: dict[str, Operation] = {}


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


class Op:
    """The result of an operation of one kind whose operands match."""

    def __init__(self, kind: str, *operands: Pattern, name: str | None = None) -> None:
        self._kind, self._operands, self._name = kind, operands, name or kind

    def match(self, value: Value | None, bound: Bound) -> bool:
        return value is not None and value.producer is not None and self.match_operation(value.producer, bound)

    def match_operation(self, operation: Operation, bound: Bound) -> bool:
        if operation.kind != self._kind or len(operation.operands) < len(self._operands):
            return False
        bound.operations[self._name] = operation
        return all(
            pattern.match(operand, bound) for pattern, operand in zip(self._operands, operation.operands, strict=False)
        )


Pattern = Any | Op


@dataclass(frozen=True)
class Rule:
    """``build`` may return None to leave this one as it is, or several operations, the last of which gives the
    result."""

    name: str
    pattern: Op
    build: Callable[[Bound], Sequence[Operation] | None]


def apply(graph: Graph, rules: Sequence[Rule]) -> None:
    """One walk over the graph: the first rule that fits an operation replaces it.

    The replacement's last operation takes over the results of the root, so whoever reads them reads on.
    """
    operations: list[Operation] = []
    for operation in graph.operations:
        operations.extend(_replace(operation, rules) or [operation])
    graph.operations = operations


def _replace(operation: Operation, rules: Sequence[Rule]) -> Sequence[Operation] | None:
    for rule in rules:
        bound = Bound()
        if rule.pattern.match_operation(operation, bound):
            replacement = rule.build(bound)
            if replacement is not None:
                root = replacement[-1]
                root.results = operation.results
                root.location = operation.location
                for result in root.results:
                    result.producer = root
                return replacement
    return None
