"""Which element of which tensor another tensor's element is: programs that move data and compute indices, understood
symbolically.

``Elements.element(value, index)`` follows the element of ``value`` at a symbolic index back through slices, reshapes,
permutations, gathers and selects, to tensors that are computed. Two programs that arrive at the same expression compute
the same thing, in whatever order they spell it. Integers are polynomials in the indices and sizes, conditions are
inequalities between them. Integers are taken for unbounded: indices that wrap around are errors in any program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nvtripy_portable.dims import Dim, Symbolic
from nvtripy_portable.graph import Operation, Value
from nvtripy_portable.inequalities import (
    FALSE,
    SIGNED,
    TRUE,
    AtLeastZero,
    Every,
    Formula,
    Number,
    Some,
    add,
    at_most,
    equal,
    implies,
    less,
    multiply,
    negated,
    subtract,
)

Index = tuple[Number, ...]
FLOATS = ("f32", "f16", "bf16")
_INTEGERS = ("i32", "i64")
_ARITHMETIC: dict[str, Callable[[Number, Number], Number]] = {"kSUM": add, "kSUB": subtract, "kPROD": multiply}


@dataclass(frozen=True)
class Read:
    """An element of a tensor that is followed no further."""

    value: Value
    index: Index


@dataclass(frozen=True)
class Scaled:
    """``element * factor``."""

    element: Element
    factor: float


@dataclass(frozen=True)
class Rounded:
    """``element / scale``, rounded to a narrow type and not scaled back."""

    element: Element
    scale: float
    dtype: str


@dataclass(frozen=True)
class Truncated:
    """A float cast to an integer type."""

    element: Element
    dtype: str


@dataclass(frozen=True)
class Choice:
    """``then`` where the condition holds, and ``otherwise`` where it does not. ``dtype`` is that of both."""

    condition: Formula
    then: Element
    otherwise: Element
    dtype: str


Element = Read | Scaled | Rounded | Truncated | Choice


def axis(name: str, size: Dim) -> Number:
    """The index along a dimension: a symbol, or 0 where there is one element only."""
    return 0 if size == 1 else Symbolic.of(f"@{name}")  # no name that a user would give to a dimension


def within(indices: Sequence[Number], sizes: Sequence[Dim]) -> Formula:
    """That indices are within their dimensions."""
    bounds: list[Formula] = []
    for index, size in zip(indices, sizes, strict=True):
        bounds.append(at_most(0, index))
        if size is not None:
            bounds.append(less(index, size))
    return Every(tuple(bounds))


class Elements:
    """Elements of the values of one graph, which must not change meanwhile."""

    def __init__(self) -> None:
        self._names: dict[Read, str] = {}
        self._reads: dict[str, Read] = {}
        self._elements: dict[tuple[Value, Index, Formula], Element] = {}

    def reads(self, formula: Formula | Number) -> list[Read]:
        """The elements of tensors that a condition or an integer depends on."""
        if isinstance(formula, AtLeastZero):
            return self.reads(formula.number)
        if isinstance(formula, (Every, Some)):
            return list(dict.fromkeys(read for part in formula.parts for read in self.reads(part)))
        terms = formula.terms if isinstance(formula, Symbolic) else ()
        return [self._reads[name] for symbols, _ in terms for name in symbols if name in self._reads]

    def symbol(self, value: Value, index: Index) -> Number:
        """The integer that a tensor holds at an index."""
        read = Read(value, index)
        name = self._names.setdefault(read, f"{SIGNED}{len(self._names)}")
        self._reads[name] = read
        return Symbolic.of(name)

    # --- data ---------------------------------------------------------------------------------------------------------

    def element(self, value: Value, index: Index, given: Formula) -> Element:
        """The element of a float tensor at an index, wherever ``given`` holds."""
        key = (value, index, given)
        if key not in self._elements:
            self._elements[key] = self._element(*self._followed(value, index, given), given)
        return self._elements[key]

    def _element(self, value: Value, index: Index, given: Formula) -> Element:
        operation = value.producer
        if operation is None:
            return Read(value, index)
        first = operation.operands[0] if operation.operands else None
        dtype = value.type.dtype
        if operation.kind == "cast" and first is not None:
            # Widening changes nothing. Narrowing rounds, which whoever asks may do without.
            if dtype in FLOATS and (first.type.dtype in FLOATS or first.type.dtype == "i8"):
                return self.element(first, index, given)
            if dtype == "i8" and first.type.dtype in FLOATS:
                return Truncated(self.element(first, index, given), dtype)
        if operation.kind == "quantize" and first is not None and first.type.dtype in FLOATS:
            scale = _only_number(operation.operands[1])
            if scale is not None:
                return Rounded(self.element(first, index, given), scale, dtype)
        if operation.kind == "dequantize" and first is not None and _only_number(operation.operands[1]) == 1.0:
            return self.element(first, index, given)
        if operation.kind == "element_wise" and operation.attributes["operation"] == "kPROD" and dtype in FLOATS:
            for factor, other in (operation.operands, operation.operands[::-1]):
                number, at = _only_number(factor), aligned(other, value, index)
                if number is not None and other is not None and at is not None:
                    return Scaled(self.element(other, at, given), number)
        if operation.kind == "select":
            parts = self._select_parts(operation, index, given)
            if parts is not None:
                (condition, (then, then_at), (otherwise, otherwise_at)) = parts
                return Choice(
                    condition,
                    self.element(then, then_at, Every((given, condition))),
                    self.element(otherwise, otherwise_at, Every((given, negated(condition)))),
                    dtype,
                )
        return Read(value, index)

    # --- integers and conditions --------------------------------------------------------------------------------------

    def number(self, value: Value, index: Index, given: Formula) -> Number:
        """The integer at an index: a polynomial, in which what is not understood is a symbol of its own."""
        value, index = self._followed(value, index, given)
        known = _known_number(value, index)
        if known is not None:
            return known
        operation = value.producer
        if operation is not None and value.type.dtype in _INTEGERS:
            found = self._computed_number(operation, index, given)
            if found is not None:
                return found
        return self.symbol(value, index)

    def _computed_number(self, operation: Operation, index: Index, given: Formula) -> Number | None:
        if operation.kind == "linspace":
            start, step = _only_number(operation.operands[1]), _numbers(operation.operands[2])
            if start is None or step is None or not all(float(each).is_integer() for each in (start, *step)):
                return None
            return add(int(start), *(multiply(int(by), at) for by, at in zip(step, index, strict=True)))
        first = operation.operands[0] if operation.operands else None
        if operation.kind == "cast" and first is not None and first.type.dtype in _INTEGERS:
            return self.number(first, index, given)
        if operation.kind == "unary" and operation.attributes["operation"] == "kNEG" and first is not None:
            return multiply(-1, self.number(first, index, given))
        if operation.kind == "element_wise":
            pair = self._pair(operation, index, given)
            name = operation.attributes["operation"]
            if pair is not None and name in _ARITHMETIC:
                return _ARITHMETIC[name](*pair)
            if pair is not None and name in ("kMAX", "kMIN"):
                for great, small in (pair, pair[::-1]):
                    if implies(given, at_most(small, great)):
                        return great if name == "kMAX" else small
        return None

    def truth(self, value: Value, index: Index, given: Formula) -> Formula | None:
        """The condition under which a boolean is true; None if it is not understood."""
        value, index = self._followed(value, index, given)
        operation = value.producer
        if operation is None or value.type.dtype != "i1":
            return None
        if value.constant is not None:
            return _constant_truth(value.constant, index)
        name = operation.attributes.get("operation")
        if operation.kind == "unary" and name == "kNOT" and operation.operands[0] is not None:
            inner = self.truth(operation.operands[0], index, given)
            return None if inner is None else negated(inner)
        if operation.kind != "element_wise":
            return None
        if name in ("kLESS", "kGREATER", "kEQUAL"):
            pair = self._pair(operation, index, given)
            if pair is None:
                return None
            return equal(*pair) if name == "kEQUAL" else less(*(pair if name == "kLESS" else pair[::-1]))
        if name in ("kOR", "kAND"):
            parts = []
            for operand in operation.operands:
                at = aligned(operand, operation.results[0], index)
                part = self.truth(operand, at, given) if operand is not None and at is not None else None
                if part is None:
                    return None
                parts.append(part)
            return Some(tuple(parts)) if name == "kOR" else Every(tuple(parts))
        return None

    def _pair(self, operation: Operation, index: Index, given: Formula) -> tuple[Number, Number] | None:
        """Both operands of an operation on integers."""
        numbers = []
        for operand in operation.operands:
            at = aligned(operand, operation.results[0], index)
            if operand is None or at is None or operand.type.dtype not in _INTEGERS:
                return None
            numbers.append(self.number(operand, at, given))
        return numbers[0], numbers[1]

    # --- moves --------------------------------------------------------------------------------------------------------

    def _followed(self, value: Value, index: Index, given: Formula) -> tuple[Value, Index]:
        """Back through operations that only move elements, as far as it goes."""
        while True:
            moved = self._moved(value, index, given)
            if moved is None:
                return value, index
            value, index = moved

    def _moved(self, value: Value, index: Index, given: Formula) -> tuple[Value, Index] | None:
        operation = value.producer
        source = operation.operands[0] if operation is not None and operation.operands else None
        if operation is None or source is None:
            return None
        if operation.kind in ("reshape", "collapse_rank"):
            at = _reshaped(source.type.shape, value.type.shape, index, given)
            return None if at is None else (source, at)
        if operation.kind == "transpose":
            order = operation.attributes["permutation"]
            return source, tuple(index[order.index(i)] for i in range(len(order)))
        if operation.kind == "slice" and operation.attributes["mode"] == "kDEFAULT":
            start, stride = _numbers(operation.operands[1]), _numbers(operation.operands[3])
            if start is None or stride is None:
                return None
            pairs = zip(start, stride, index, strict=True)
            return source, tuple(add(int(first), multiply(int(by), at)) for first, by, at in pairs)
        if operation.kind == "broadcast":
            at = tuple(index[target] for target in operation.attributes["broadcast_dims"])
            at_source = _at_ones(
                source.type.shape, at, [value.type.shape[i] for i in operation.attributes["broadcast_dims"]]
            )
            return None if at_source is None else (source, at_source)
        if operation.kind == "concatenation":
            return _part(operation, index, given)
        if operation.kind == "gather" and operation.attributes["num_broadcast_dims"] == 0:
            indices, position = operation.operands[1], operation.attributes["axis"]
            assert indices is not None
            end = position + indices.type.rank
            at_indices = index[position:end]
            row = self.number(indices, at_indices, given)
            # A negative index counts from the end.
            return (source, (*index[:position], row, *index[end:])) if implies(given, at_most(0, row)) else None
        if operation.kind == "select":
            parts = self._select_parts(operation, index, given)
            if parts is not None:
                condition, then, otherwise = parts
                if implies(given, condition):
                    return then
                if implies(given, negated(condition)):
                    return otherwise
        return None

    def _select_parts(
        self, operation: Operation, index: Index, given: Formula
    ) -> tuple[Formula, tuple[Value, Index], tuple[Value, Index]] | None:
        at = [aligned(operand, operation.results[0], index) for operand in operation.operands]
        condition, then, otherwise = operation.operands
        if None in at or condition is None or then is None or otherwise is None:
            return None
        truth = self.truth(condition, at[0], given)  # type: ignore[arg-type]
        return None if truth is None else (truth, (then, at[1]), (otherwise, at[2]))  # type: ignore[return-value]


def start_of(positions: Value, shape: tuple[Dim, ...], elements: Elements) -> tuple[Value | None] | None:
    """The value ``position`` where ``positions[b, t, ...]`` is ``position[b] + t``, None where it is ``t``.

    Args:
        positions: (B or 1, T, 1, ...), integers.
        shape: (B, T).
    """
    own = positions.type.shape
    if len(own) < 2 or len(shape) != 2 or own[0] not in (1, shape[0]) or own[1] != shape[1]:
        return None
    b, t = axis("b", own[0]), axis("t", own[1])
    index = (b, t, *(0 for _ in own[2:]))
    number = elements.number(positions, index, within((b, t), own[:2]))
    if number == t:
        return (None,)
    for start in elements.reads(number):
        if start.value.type.shape == shape[:1] and number == add(elements.symbol(start.value, (b,)), t):
            return (start.value,)
    return None


def same_index(a: Index, b: Index, given: Formula) -> bool:
    """Whether two indices are proven to be the same."""
    return len(a) == len(b) and all(x == y or implies(given, equal(x, y)) for x, y in zip(a, b, strict=True))


def aligned(operand: Value | None, result: Value, index: Index) -> Index | None:
    """The index into an operand that is broadcast to a result."""
    return None if operand is None else _at_ones(operand.type.shape, index, result.type.shape)


def _at_ones(shape: Sequence[Dim], index: Index, target: Sequence[Dim]) -> Index | None:
    """``index``, with 0 where a dimension of one element is repeated; None where that cannot be told."""
    if len(shape) != len(target) or any(
        dim != 1 and (dim is None or dim != wanted) for dim, wanted in zip(shape, target, strict=True)
    ):
        return None
    return tuple(0 if dim == 1 else at for dim, at in zip(shape, index, strict=True))


def _reshaped(source: Sequence[Dim], target: Sequence[Dim], index: Index, given: Formula) -> Index | None:
    """The index before a reshape from ``source`` to ``target`` of the element at ``index`` after it."""
    if None in source or None in target:
        return None
    old: list[Number] = [dim for dim in source if dim is not None and dim != 1]
    new = [(dim, at) for dim, at in zip(target, index, strict=True) if dim is not None and dim != 1]
    head: list[Number] = []
    tail: list[Number] = []
    while old and new and old[0] == new[0][0]:
        head.append(new.pop(0)[1])
        old.pop(0)
    while old and new and old[-1] == new[-1][0]:
        tail.insert(0, new.pop()[1])
        old.pop()
    flat: Number = 0
    for dim, at in new:
        flat = add(multiply(flat, dim), at)
    middle = _split(flat, old, given)
    if middle is None:
        return None
    found = iter((*head, *middle, *tail))
    return tuple(0 if dim == 1 else next(found) for dim in source)


def _split(flat: Number, sizes: list[Number], given: Formula) -> list[Number] | None:
    """A position in row-major order as an index; None where it cannot be told apart."""
    if not sizes:
        return [] if flat == 0 else None
    index: list[Number] = []
    for position in range(len(sizes) - 1):
        stride: Number = 1
        for size in sizes[position + 1 :]:
            stride = multiply(stride, size)
        divided = _divided(flat, stride)
        if divided is None:
            return None
        quotient, flat = divided
        if not implies(given, Every((at_most(0, flat), less(flat, stride)))):
            return None
        index.append(quotient)
    return [*index, flat]


def _divided(number: Number, divisor: Number) -> tuple[Number, Number] | None:
    """Quotient and remainder, term by term, by a product of sizes."""
    terms = number.terms if isinstance(number, Symbolic) else (((), number),)
    by = divisor.terms if isinstance(divisor, Symbolic) else (((), divisor),)
    if len(by) != 1 or by[0][1] == 0:
        return None
    ((symbols, coefficient),) = by
    quotient: Number = 0
    rest: Number = 0
    for own, own_coefficient in terms:
        remaining = list(own)
        is_multiple = own_coefficient % coefficient == 0
        for symbol in symbols:
            if symbol in remaining:
                remaining.remove(symbol)
            else:
                is_multiple = False
        if is_multiple:
            quotient = add(quotient, _product(own_coefficient // coefficient, remaining))
        else:
            rest = add(rest, _product(own_coefficient, list(own)))
    return quotient, rest


def _product(coefficient: int, symbols: list[str]) -> Number:
    result: Number = coefficient
    for symbol in symbols:
        result = multiply(result, Symbolic.of(symbol))
    return result


def _part(operation: Operation, index: Index, given: Formula) -> tuple[Value, Index] | None:
    """The operand of a concatenation that an element comes from, where its place along the axis tells."""
    axis = operation.attributes["axis"]
    place = index[axis]
    for operand in operation.operands:
        size = operand.type.shape[axis] if operand is not None else None
        if operand is None or size is None:
            return None
        if implies(given, less(place, size)):
            return operand, (*index[:axis], place, *index[axis + 1 :])
        if not implies(given, at_most(size, place)):
            return None
        place = subtract(place, size)
    return None


def _known_number(value: Value, index: Index) -> Number | None:
    """An integer of a constant, or of a shape: they are numbers at equal distances, or are read at one place."""
    if isinstance(value.contents, tuple):
        dims = [dim for dim in value.contents if dim is not None]
        if not dims or len(dims) != len(value.contents):
            return None
        (at,) = index
        if isinstance(at, int):
            return dims[at] if 0 <= at < len(dims) else None
        step = subtract(dims[1], dims[0]) if len(dims) > 1 else 0
        if any(dim != add(dims[0], multiply(i, step)) for i, dim in enumerate(dims)):
            return None
        return add(dims[0], multiply(at, step))
    if value.contents is not None:
        return value.contents
    array = value.constant
    if array is None or array.dtype.kind != "i" or not array.size:
        return None
    origin = int(array[(0,) * array.ndim])
    result: Number = origin
    line = np.full(array.shape, origin, np.int64)
    for position, size in enumerate(array.shape):
        if size > 1:
            step = int(array[tuple(int(i == position) for i in range(array.ndim))]) - origin
            result = add(result, multiply(step, index[position]))
            line += np.arange(size).reshape([-1 if i == position else 1 for i in range(array.ndim)]) * step
    return result if np.array_equal(array, line) else None


def _constant_truth(array: np.ndarray, index: Index) -> Formula | None:
    """The condition that a constant of booleans stands for: all or nothing, or a band along the
    diagonal, which may have one side only."""
    if array.all():
        return TRUE
    if not array.any():
        return FALSE
    axes = [i for i, size in enumerate(array.shape) if size > 1]
    if len(axes) > 2:
        return None
    matrix = array.reshape(-1, array.shape[axes[-1]])
    rows, columns = matrix.shape
    row: Number = index[axes[0]] if len(axes) == 2 else 0
    column = index[axes[-1]]
    for is_negated in (False, True):
        ones = matrix ^ is_negated
        at_row, at_column = np.nonzero(ones)
        low, high = (int(each) for each in ((at_column - at_row).min(), (at_column - at_row).max()))
        band = np.tri(rows, columns, high, dtype=bool) & ~np.tri(rows, columns, low - 1, dtype=bool)
        if np.array_equal(ones, band):
            above, below = at_most(column, add(row, high)), at_most(add(row, low), column)
            sides = (*[above] * (high < columns - 1), *[below] * (low > 1 - rows))
            formula = sides[0] if len(sides) == 1 else Every(sides)
            return negated(formula) if is_negated else formula
    return None


def _only_number(value: Value | None) -> float | None:
    """The number that a constant of one element holds."""
    array = value.constant if value is not None else None
    return float(array.reshape(()).astype(np.float64)) if array is not None and array.size == 1 else None


def _numbers(value: Value | None) -> tuple[float, ...] | None:
    """The elements of a 1-D constant."""
    array = value.constant if value is not None else None
    return tuple(array.tolist()) if array is not None and array.ndim == 1 else None
