"""Proofs and symbolic elements: never wrong, on random programs, against the numbers themselves."""

from __future__ import annotations

import itertools
import random as pseudo

import numpy as np
import nvtripy as tp
from graphs import operations, optimized, run, traced
from hypothesis import given, settings
from hypothesis import strategies as st

from nvtripy_portable.dims import Symbolic
from nvtripy_portable.elements import Elements, Read, axis, within
from nvtripy_portable.inequalities import (
    SIGNED,
    AtLeastZero,
    Every,
    Formula,
    Number,
    Some,
    add,
    at_most,
    equal,
    equivalent,
    implies,
    less,
    multiply,
    negated,
)

NAMES = ("a", "b", f"{SIGNED}p")
RANGE = {"a": range(6), "b": range(6), f"{SIGNED}p": range(-6, 7)}


def value(number: Number, values: dict[str, int]) -> int:
    if isinstance(number, int):
        return number
    return sum(coefficient * int(np.prod([values[s] for s in symbols])) for symbols, coefficient in number.terms)


def holds(formula: Formula, values: dict[str, int]) -> bool:
    if isinstance(formula, AtLeastZero):
        return value(formula.number, values) >= 0
    parts = [holds(part, values) for part in formula.parts]
    return all(parts) if isinstance(formula, Every) else any(parts)


numbers = st.recursive(
    st.integers(-4, 4) | st.sampled_from(NAMES).map(Symbolic.of),
    lambda inner: st.builds(add, inner, inner) | st.builds(multiply, st.integers(-3, 3), inner),
    max_leaves=4,
)
formulas = st.recursive(
    st.builds(less, numbers, numbers) | st.builds(equal, numbers, numbers),
    lambda inner: (
        st.lists(inner, max_size=2).map(tuple).flatmap(lambda p: st.sampled_from((Every(p), Some(p))))
        | inner.map(negated)
    ),
    max_leaves=3,
)
POINTS = [dict(zip(NAMES, point, strict=True)) for point in itertools.product(*(RANGE[name] for name in NAMES))]


@settings(max_examples=300, deadline=None)
@given(formulas, formulas)
def test_what_is_proven_holds(given_: Formula, goal: Formula) -> None:
    if implies(given_, goal):
        assert all(holds(goal, point) for point in POINTS if holds(given_, point))
    assert implies(Every((given_, goal)), goal) and implies(given_, Some((goal, negated(goal))))


def test_what_the_passes_need_is_proven() -> None:
    slot, length, begin = Symbolic.of("slot"), Symbolic.of("T"), Symbolic.of(f"{SIGNED}begin")
    end = add(begin, length)
    written = Every((at_most(begin, slot), less(slot, end)))
    assert equivalent(Every(()), negated(Some((less(slot, begin), at_most(end, slot)))), written)
    assert not equivalent(Every(()), Every((at_most(begin, slot), at_most(slot, end))), written)
    row = Symbolic.of("b")
    assert implies(written, at_most(0, add(multiply(row, length), slot, multiply(-1, begin))))
    # Only integers lie between: 0 < 2 a < 2 has no solution.
    double = multiply(2, Symbolic.of("a"))
    assert implies(Every((less(0, double), less(double, 2))), less(1, 0))


class Moves:
    """A random program that only moves elements about."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, x: tp.Tensor) -> tp.Tensor:
        choice, shape = pseudo.Random(self.seed), [2, 3, 4]
        for _ in range(6):
            kind = choice.randrange(6)
            if kind == 0:
                order = choice.sample(range(len(shape)), len(shape))
                x, shape = tp.permute(x, order), [shape[i] for i in order]
            elif kind == 1:
                at = choice.randrange(len(shape))
                x, shape = tp.unsqueeze(x, at), [*shape[:at], 1, *shape[at:]]
            elif kind == 2 and len(shape) > 1:
                at = choice.randrange(len(shape) - 1)
                shape = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
                x = tp.reshape(x, shape)
            elif kind == 3:
                at = choice.randrange(len(shape))
                step = choice.choice((-1, 1))
                index = [slice(None)] * len(shape)
                index[at] = slice(None, None, step) if step < 0 else slice(choice.randrange(shape[at]), None)
                x = x[tuple(index)] if len(index) > 1 else x[index[0]]
                shape[at] = shape[at] if step < 0 else shape[at] - (index[at].start or 0)
            elif kind == 4:
                at = choice.randrange(len(shape))
                indices = [choice.randrange(shape[at])] * 2 if choice.random() < 0.5 else list(range(shape[at]))[::-1]
                x = tp.gather(x, at, tp.Tensor(np.array(indices, np.int32)))
                shape[at] = len(indices)
            elif kind == 5 and shape[-1] % 2 == 0:
                shape = [*shape[:-1], shape[-1] // 2, 2]
                x = tp.reshape(x, shape)
        return x * 1.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_elements_are_followed_to_where_they_come_from(seed: int) -> None:
    graph = optimized(traced(Moves(seed), tp.InputInfo((2, 3, 4), dtype=tp.float32)))
    source = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (result,) = run(graph, [source])
    output = graph.outputs[0]
    assert output.producer is not None and operations(graph)[-1] is output.producer
    moved = next(each for each in output.producer.operands if each is not None and each.constant is None)
    symbols = tuple(axis(f"i{i}", size) for i, size in enumerate(moved.type.shape))
    element = Elements().element(moved, symbols, within(symbols, moved.type.shape))
    assert isinstance(element, Read)
    if element.value is not graph.inputs[0].value:
        return  # it stopped on the way, where it was not sure
    for index in np.ndindex(*result.shape):
        values = {f"@i{i}": place for i, place in enumerate(index)}
        assert source[tuple(value(each, values) for each in element.index)] * 1.5 == result[index]
