"""Dimensions that are not known yet: polynomials in the names of dynamic input dimensions.

Enough algebra to see that ``(2*T*4*16) // (4*16)`` is ``2*T``: that is what nvtripy's shape arithmetic comes down to.
What does not simplify (a maximum, an uneven division) becomes a symbol of its own, named by its text, so that equal
texts are equal dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_Terms = dict[tuple[str, ...], int]  # the symbols of a product, sorted → its coefficient


@dataclass(frozen=True)
class Symbolic:
    """A sum of products of symbols. Symbols are sizes: never negative."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @staticmethod
    def of(name: str) -> Symbolic:
        return Symbolic((((name,), 1),))

    def __str__(self) -> str:
        parts = []
        for symbols, coefficient in self.terms:
            factors = [str(coefficient)] if coefficient != 1 or not symbols else []
            parts.append("*".join(factors + list(symbols)))
        return " + ".join(parts)

    # For shapes of plug-ins, which others write down; None where the result cannot be told.

    def __add__(self, other: int | Symbolic) -> Dim:
        return combine("kSUM", self, other)

    def __radd__(self, other: int) -> Dim:
        return combine("kSUM", other, self)

    def __sub__(self, other: int | Symbolic) -> Dim:
        return combine("kSUB", self, other)

    def __rsub__(self, other: int) -> Dim:
        return combine("kSUB", other, self)

    def __mul__(self, other: int | Symbolic) -> Dim:
        return combine("kPROD", self, other)

    def __rmul__(self, other: int) -> Dim:
        return combine("kPROD", other, self)

    def __floordiv__(self, other: int | Symbolic) -> Dim:
        return combine("kFLOOR_DIV", self, other)


#: A number, an expression, or None where nothing is known.
Dim = int | Symbolic | None


def combine(operation: str, a: Dim, b: Dim) -> Dim:
    """Two dims through a TensorRT element-wise operation, or None where the result cannot be told."""
    if a is None or b is None or operation not in _OPERATIONS:
        return None
    return _OPERATIONS[operation](a, b)


def _terms(dim: int | Symbolic) -> _Terms:
    return dict(dim.terms) if isinstance(dim, Symbolic) else {(): dim}


def _from_terms(terms: _Terms) -> int | Symbolic:
    kept = {symbols: coefficient for symbols, coefficient in terms.items() if coefficient}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    return Symbolic(tuple(sorted(kept.items())))


def _add(a: int | Symbolic, b: int | Symbolic) -> Dim:
    terms = _terms(a)
    for symbols, coefficient in _terms(b).items():
        terms[symbols] = terms.get(symbols, 0) + coefficient
    return _from_terms(terms)


def _multiply(a: int | Symbolic, b: int | Symbolic) -> int | Symbolic:
    terms: _Terms = {}
    for symbols, coefficient in _terms(a).items():
        for other_symbols, other in _terms(b).items():
            product = tuple(sorted(symbols + other_symbols))
            terms[product] = terms.get(product, 0) + coefficient * other
    return _from_terms(terms)


def _subtract(a: int | Symbolic, b: int | Symbolic) -> Dim:
    return _add(a, _multiply(b, -1))


def _truncate(a: int | Symbolic, b: int | Symbolic) -> Dim:
    """Division toward zero, as TensorRT divides integers. The same as the floor unless the signs differ."""
    if isinstance(a, int) and isinstance(b, int) and b:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return _floor(a, b) if b != 0 and _is_size(a) and _is_size(b) else None


def _is_size(dim: int | Symbolic) -> bool:
    """Whether a dim is certainly not negative."""
    return all(coefficient >= 0 for coefficient in _terms(dim).values())


def _floor(a: int | Symbolic, b: int | Symbolic) -> Dim:
    if b == 0:
        return None
    if a == 0:
        return 0
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    divisor = _terms(b)
    if len(divisor) == 1:
        ((symbols, coefficient),) = divisor.items()
        quotient: _Terms = {}
        for own, own_coefficient in _terms(a).items():
            rest = list(own)
            if own_coefficient % coefficient or any(own.count(each) < symbols.count(each) for each in symbols):
                break
            for each in symbols:
                rest.remove(each)
            quotient[tuple(rest)] = own_coefficient // coefficient
        else:
            return _from_terms(quotient)
    return Symbolic.of(f"floor(({a})/({b}))") if _is_size(a) and _is_size(b) else None  # a symbol is not negative


def _extreme(name: str, choose: Callable[[int, int], int]) -> Callable[[int | Symbolic, int | Symbolic], Dim]:
    def combine_extreme(a: int | Symbolic, b: int | Symbolic) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return choose(a, b)
        if a == b:
            return a
        if isinstance(a, int):
            a, b = b, a
        # A positive combination of sizes is not negative: the usual clamp at zero changes nothing.
        if isinstance(b, int) and b <= 0 and _is_size(a):
            return a if name == "max" else b
        # Symbols are not negative, so only what is certain not to be can become one.
        certain = (any if name == "max" else all)((_is_size(a), _is_size(b)))
        return Symbolic.of(f"{name}({a}, {b})") if certain else None

    return combine_extreme


_OPERATIONS: dict[str, Callable[[int | Symbolic, int | Symbolic], Dim]] = {
    "kSUM": _add,
    "kSUB": _subtract,
    "kPROD": _multiply,
    "kDIV": _truncate,
    "kFLOOR_DIV": _floor,
    "kMAX": _extreme("max", max),
    "kMIN": _extreme("min", min),
}
