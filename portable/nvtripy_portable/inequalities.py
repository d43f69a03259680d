"""Proofs about integers: what follows from linear inequalities.

Just enough logic to see that ``~((slot < begin) | (slot >= begin + T))`` means ``begin <= slot < begin + T``, however
a program spells it. Whatever is not proven counts as unknown, never as false.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from nvtripy_portable.dims import Symbolic, combine

Number = int | Symbolic  # here a symbol may be negative if its name starts with SIGNED
SIGNED = "!"
_MOST_CONSTRAINTS = 200  # beyond which a proof is given up


@dataclass(frozen=True)
class AtLeastZero:
    number: Number


@dataclass(frozen=True)
class Every:
    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Some:
    parts: tuple[Formula, ...]


Formula = AtLeastZero | Every | Some
TRUE, FALSE = Every(()), Some(())


def add(*numbers: Number) -> Number:
    return functools.reduce(functools.partial(_combined, "kSUM"), numbers)


def subtract(a: Number, b: Number) -> Number:
    return _combined("kSUB", a, b)


def multiply(a: Number, b: Number) -> Number:
    return _combined("kPROD", a, b)


def _combined(operation: str, a: Number, b: Number) -> Number:
    result = combine(operation, a, b)
    assert result is not None  # sums, differences and products always are expressions
    return result


def at_most(a: Number, b: Number) -> Formula:
    return AtLeastZero(subtract(b, a))


def less(a: Number, b: Number) -> Formula:
    return at_most(add(a, 1), b)


def equal(a: Number, b: Number) -> Formula:
    return Every((at_most(a, b), at_most(b, a)))


def negated(formula: Formula) -> Formula:
    if isinstance(formula, AtLeastZero):
        return AtLeastZero(subtract(-1, formula.number))
    parts = tuple(map(negated, formula.parts))
    return Some(parts) if isinstance(formula, Every) else Every(parts)


@functools.lru_cache(maxsize=4096)
def implies(given: Formula, goal: Formula) -> bool:
    """Whether ``goal`` is proven to hold wherever ``given`` does."""
    return all(_contradicts(case) for case in _cases(Every((given, negated(goal)))))


def equivalent(given: Formula, a: Formula, b: Formula) -> bool:
    """Whether ``a`` and ``b`` are proven to be the same wherever ``given`` holds."""
    return implies(Every((given, a)), b) and implies(Every((given, b)), a)


def _cases(formula: Formula) -> Iterator[list[Number]]:
    """The formula as alternatives, each a list of numbers that are all at least zero (disjunctive normal form)."""
    if isinstance(formula, AtLeastZero):
        yield [formula.number]
    elif isinstance(formula, Some):
        for part in formula.parts:
            yield from _cases(part)
    else:
        for each in itertools.product(*(list(_cases(part)) for part in formula.parts)):
            yield [number for case in each for number in case]


_Constraint = tuple[int, tuple[tuple[tuple[str, ...], int], ...]]  # a constant and coefficients; the sum is >= 0


def _contradicts(numbers: list[Number]) -> bool:
    """Whether no integers make all ``numbers`` at least zero, by Fourier-Motzkin elimination.

    Products of symbols count as unknowns of their own; all that is known of them is the sign. So it may miss a
    contradiction, but never sees one that is not there.
    """
    constraints = {_constraint(dict(n.terms) if isinstance(n, Symbolic) else {(): n}) for n in numbers}
    unknowns = {unknown for _, terms in constraints for unknown, _ in terms}
    sizes = [unknown for unknown in unknowns if not any(symbol.startswith(SIGNED) for symbol in unknown)]
    constraints |= {(0, ((unknown, 1),)) for unknown in sizes}
    while constraints and len(constraints) <= _MOST_CONSTRAINTS:
        if any(constant < 0 and not terms for constant, terms in constraints):
            return True
        unknowns = {unknown for _, terms in constraints for unknown, _ in terms}
        if not unknowns:
            return False
        # The unknown whose elimination leaves the fewest constraints.
        constraints = min((_eliminated(constraints, unknown) for unknown in sorted(unknowns)), key=len)
    return False


def _eliminated(constraints: set[_Constraint], unknown: tuple[str, ...]) -> set[_Constraint]:
    lower: list[tuple[int, _Constraint]] = []
    upper: list[tuple[int, _Constraint]] = []
    result: set[_Constraint] = set()
    for constraint in constraints:
        coefficient = dict(constraint[1]).get(unknown, 0)
        if coefficient:
            (lower if coefficient > 0 else upper).append((abs(coefficient), constraint))
        else:
            result.add(constraint)
    for (a, (constant_a, terms_a)), (b, (constant_b, terms_b)) in itertools.product(lower, upper):
        total: dict[tuple[str, ...], int] = {(): b * constant_a + a * constant_b}
        for factor, terms in ((b, terms_a), (a, terms_b)):
            for each, coefficient in terms:
                total[each] = total.get(each, 0) + factor * coefficient
        result.add(_constraint(total))
    return result


def _constraint(terms: dict[tuple[str, ...], int]) -> _Constraint:
    """In lowest terms. The unknowns are integers, so the constant may be rounded down with them."""
    unknowns = tuple(sorted((each, coefficient) for each, coefficient in terms.items() if each and coefficient))
    divisor = math.gcd(*(coefficient for _, coefficient in unknowns)) if unknowns else 1
    return terms.get((), 0) // divisor, tuple((each, coefficient // divisor) for each, coefficient in unknowns)
