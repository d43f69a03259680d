"""``attention``: recognised in whatever way masks and caches are spelled, and only where it is what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from graphs import assert_close, both, kinds, only, operations, random, run
from hypothesis import given, settings
from hypothesis import strategies as st

from nvtripy_portable.graph import Graph

B, H, C, D, L = 2, 2, 6, 4, 2
E = H * D
TOKENS = (1, 2, 4)


def split(x: tp.Tensor, part: int) -> tp.Tensor:
    """Queries, keys or values of all heads, (B, H, T, D)."""
    third = x[:, :, part * E : (part + 1) * E]
    return tp.permute(tp.reshape(third, (x.shape[0], x.shape[1], H, D)), (0, 2, 1, 3))


def attend(
    q: tp.Tensor, k: tp.Tensor, v: tp.Tensor, visible: tp.Tensor, scale: Any = 0.5, order: Any = (0, 2, 1, 3)
) -> tp.Tensor:
    scores = (q * scale) @ tp.transpose(k, 2, 3)
    y = tp.softmax(tp.where(visible, scores, -math.inf), dim=3) @ v
    return tp.reshape(tp.permute(y, order), (q.shape[0], q.shape[2], E))


def row(length: Any) -> tp.Tensor:
    return tp.reshape(tp.iota((length,), dtype=tp.int32), (1, 1, 1, -1))


def column(length: Any) -> tp.Tensor:
    return tp.reshape(tp.iota((length,), dtype=tp.int32), (1, 1, -1, 1))


# --- without a cache --------------------------------------------------------------------------------------------------

MASKS: dict[str, Callable[[Any], tp.Tensor]] = {
    "slot <= t": lambda n: row(n) <= column(n),
    "t >= slot": lambda n: column(n) >= row(n),
    "not slot > t": lambda n: ~(row(n) > column(n)),
    "slot < t + 1": lambda n: row(n) < column(n) + 1,
    "slot - t < 1": lambda n: row(n) - column(n) < 1,
    "slot < t or slot == t": lambda n: (row(n) < column(n)) | (row(n) == column(n)),
    "2 slot <= 2 t + 1": lambda n: row(n) * 2 <= column(n) * 2 + 1,
}
OTHER_MASKS: dict[str, Callable[[Any], tp.Tensor]] = {
    "slot < t": lambda n: row(n) < column(n),
    "slot >= t": lambda n: row(n) >= column(n),
    "slot <= t + 1": lambda n: row(n) <= column(n) + 1,
    "a band": lambda n: ~((row(n) > column(n) + 1) | (row(n) < column(n) - 1)),
    "a window of nothing": lambda n: ~((row(n) > column(n)) | (row(n) <= column(n))),
    "every second": lambda n: ~((row(n) > column(n)) | (row(n) * 2 < column(n))),
}
WINDOWS: dict[str, tuple[Callable[[Any], tp.Tensor], int]] = {
    "two": (lambda n: ~((row(n) > column(n)) | (row(n) < column(n) - 1)), 2),
    "three": (lambda n: ~(~(row(n) <= column(n)) | ~(column(n) - row(n) < 3)), 3),
    "the diagonal": (lambda n: row(n) == column(n), 1),
}


def stateless(mask: Callable[[Any], tp.Tensor], **changes: Any) -> Callable[[tp.Tensor], tp.Tensor]:
    return lambda x: attend(split(x, 0), split(x, 1), split(x, 2), mask(x.shape[1]), **changes)


@pytest.mark.parametrize("length", [TOKENS, 3, 1])
@pytest.mark.parametrize("name", MASKS)
def test_causal_masks(name: str, length: Any) -> None:
    fused, plain = both(stateless(MASKS[name]), tp.InputInfo((B, length, 3 * E), dtype=tp.float32))
    assert [each.kind for each in operations(fused)] == ["attention"], fused
    attention = only(fused, "attention")
    assert attention.operands[1:] == [None] * 5
    assert attention.attributes["scale"] == 0.5 and attention.attributes["heads"] == H
    assert_close(fused, plain, [random(B, 3 if length == TOKENS else length, 3 * E)])


@pytest.mark.parametrize("length", [TOKENS, 3])
@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_masks(name: str, length: Any) -> None:
    fused, plain = both(stateless(OTHER_MASKS[name]), tp.InputInfo((B, length, 3 * E), dtype=tp.float32))
    assert "attention" not in kinds(fused)
    with np.errstate(all="ignore"):  # a token that sees nothing
        for found, expected in zip(run(fused, [random(B, 3, 3 * E)]), run(plain, [random(B, 3, 3 * E)]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [TOKENS, 4])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, length: Any) -> None:
    mask, window = WINDOWS[name]
    fused, plain = both(stateless(mask), tp.InputInfo((B, length, 3 * E), dtype=tp.float32))
    assert [each.kind for each in operations(fused)] == ["attention"], fused
    assert only(fused, "attention").attributes["window"] == window
    assert_close(fused, plain, [random(B, 4, 3 * E)])


CAUSAL = MASKS["slot <= t"]
STATELESS: dict[str, tuple[Callable[[tp.Tensor], Any], bool]] = {
    "the hidden part first": (
        lambda x: tp.reshape(
            tp.permute(
                tp.softmax(
                    tp.where(
                        row(x.shape[1]) > column(x.shape[1]), -math.inf, split(x, 0) @ tp.transpose(split(x, 1), 2, 3)
                    ),
                    dim=3,
                )
                @ split(x, 2),
                (0, 2, 1, 3),
            ),
            (B, x.shape[1], E),
        ),
        True,
    ),
    "no scale": (stateless(CAUSAL, scale=1.0), True),
    "a finite mask": (
        lambda x: tp.reshape(
            tp.permute(
                tp.softmax(tp.where(CAUSAL(x.shape[1]), split(x, 0) @ tp.transpose(split(x, 1), 2, 3), -1e4), dim=3)
                @ split(x, 2),
                (0, 2, 1, 3),
            ),
            (B, x.shape[1], E),
        ),
        False,
    ),
    "a scale for each head": (stateless(CAUSAL, scale=tp.reshape(tp.Tensor([0.5, 0.25]), (1, H, 1, 1))), False),
    "heads beside tokens": (stateless(CAUSAL, order=(0, 1, 2, 3)), False),
    "keys for values": (lambda x: attend(split(x, 0), split(x, 2), split(x, 1), CAUSAL(x.shape[1])), False),
    "values of queries": (lambda x: attend(split(x, 0), split(x, 1), split(x, 0), CAUSAL(x.shape[1])), False),
    "scaled keys": (lambda x: attend(split(x, 0), split(x, 1) * 2.0, split(x, 2), CAUSAL(x.shape[1])), False),
    "keys of a neighbour": (
        lambda x: attend(split(x, 0), tp.gather(split(x, 1), 1, tp.Tensor([1, 0])), split(x, 2), CAUSAL(x.shape[1])),
        False,
    ),
    "all heads in their places": (
        lambda x: attend(split(x, 0), tp.gather(split(x, 1), 1, tp.Tensor([0, 1])), split(x, 2), CAUSAL(x.shape[1])),
        True,
    ),
    "keys the other way round": (
        lambda x: attend(split(x, 0), tp.flip(split(x, 1), dim=3), split(x, 2), CAUSAL(x.shape[1])),
        False,
    ),
    "heads split feature first": (
        lambda x: attend(
            split(x, 0),
            tp.permute(tp.reshape(x[:, :, E : 2 * E], (B, x.shape[1], D, H)), (0, 3, 1, 2)),
            split(x, 2),
            CAUSAL(x.shape[1]),
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", STATELESS)
def test_variants(name: str) -> None:
    program, is_fused = STATELESS[name]
    fused, plain = both(program, tp.InputInfo((B, TOKENS, 3 * E), dtype=tp.float32))
    assert ("attention" in kinds(fused)) == is_fused, fused
    if is_fused:
        assert [each.kind for each in operations(fused)] == ["attention"]
    assert_close(fused, plain, [random(B, 3, 3 * E)])


# --- heads that share keys, and heads that turn -----------------------------------------------------------------------

Q, G = 4, 2  # heads, and groups of them
WIDTH = (Q + 2 * G) * D
Spread = Callable[[tp.Tensor], tp.Tensor]


def beside(x: tp.Tensor) -> tp.Tensor:
    """(B, G, T, D) as (B, G, 1, T, D)."""
    return tp.unsqueeze(x, 2)


def grouped(turn: Spread | None = None, order: list[int] | None = None, keys: Spread = beside) -> Callable[..., Any]:
    """Heads ``order``, behind each other by twos, meet the keys of a group."""

    def program(x: tp.Tensor) -> tp.Tensor:
        length = x.shape[1]
        heads = tp.reshape(x, (B, length, Q + 2 * G, D))
        qk = tp.gather(heads, 2, tp.Tensor([*range(Q + G)]))
        qk = qk if turn is None else turn(qk)
        q = tp.permute(tp.gather(qk, 2, tp.Tensor(order or [*range(Q)])), (0, 2, 1, 3))
        k = tp.permute(tp.gather(qk, 2, tp.Tensor([*range(Q, Q + G)])), (0, 2, 1, 3))
        v = tp.permute(tp.gather(heads, 2, tp.Tensor([*range(Q + G, Q + 2 * G)])), (0, 2, 1, 3))
        scores = (tp.reshape(q, (B, G, Q // G, length, D)) * 0.5) @ tp.transpose(keys(k), 3, 4)
        visible = tp.unsqueeze(CAUSAL(length), 1)
        y = tp.softmax(tp.where(visible, scores, -math.inf), dim=4) @ beside(v)
        return tp.reshape(tp.permute(y, (0, 3, 1, 2, 4)), (B, length, Q * D))

    return program


def turned(
    half: int = 2, partners: tuple[int, ...] = (2, 3, 0, 1), signs: tuple[float, ...] = (-1, -1, 1, 1), shift: int = 0
) -> Spread:
    def turn(x: tp.Tensor) -> tp.Tensor:
        steps = [0.5**i for i in range(half)]
        steps = [*steps, *steps, *[0.0] * (D - 2 * half)]
        positions = tp.reshape(tp.iota((x.shape[1],), dtype=tp.int32), (1, -1, 1, 1)) + shift
        angles = tp.cast(positions, tp.float32) * tp.reshape(tp.Tensor(steps), (1, 1, 1, D))
        by = tp.reshape(tp.Tensor([float(each) for each in signs]), (1, 1, 1, D))
        return x * tp.cos(angles) + tp.gather(x, 3, tp.Tensor([*partners])) * (tp.sin(angles) * by)

    return turn


GROUPED: dict[str, tuple[Callable[..., Any], bool]] = {
    "heads behind each other": (grouped(), True),
    "heads by turns": (grouped(order=[0, 2, 1, 3]), False),
    "groups swapped": (grouped(keys=lambda k: beside(tp.gather(k, 1, tp.Tensor([1, 0])))), False),
    "turned": (grouped(turned()), True),
    "turned in part": (grouped(turned(1, (1, 0, 2, 3), (-1, 1, 0, 0))), True),
    "turned the other way": (grouped(turned(signs=(1, 1, -1, -1))), False),
    "turned in neighbouring pairs": (grouped(turned(partners=(1, 0, 3, 2), signs=(-1, 1, -1, 1))), False),
    "turned from another position": (grouped(turned(shift=1)), False),
    "keys turned twice": (
        grouped(turned(), keys=lambda k: beside(tp.permute(turned()(tp.permute(k, (0, 2, 1, 3))), (0, 2, 1, 3)))),
        False,
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_turns(name: str) -> None:
    program, is_fused = GROUPED[name]
    fused, plain = both(program, tp.InputInfo((B, TOKENS, WIDTH), dtype=tp.float32))
    assert ([each.kind for each in operations(fused)] == ["attention"]) == is_fused, fused
    if is_fused:
        attention = only(fused, "attention")
        assert (attention.attributes["heads"], attention.attributes["groups"]) == (Q, G)
        assert (attention.operands[5] is not None) == name.startswith("turned")
    assert_close(fused, plain, [random(B, 4, WIDTH)])


@pytest.mark.parametrize("name", ["t", "c", "b"])
@pytest.mark.slow
def test_dimensions_may_have_any_name(name: str) -> None:
    tokens = tp.NamedDimension(name, *TOKENS)
    infos = [tp.InputInfo((B, tokens, 3 * E), dtype=tp.float32)]
    fused, plain = both(stateless(CAUSAL), *infos)
    assert kinds(fused)["attention"] == 1
    assert_close(fused, plain, [random(B, 3, 3 * E)])
    fused, _ = both(stateless(OTHER_MASKS["a band"]), *infos)
    assert "attention" not in kinds(fused)


def test_scores_that_are_wanted_themselves_stay() -> None:
    def program(x: tp.Tensor) -> list[tp.Tensor]:
        scores = (split(x, 0) * 0.5) @ tp.transpose(split(x, 1), 2, 3)
        return [stateless(CAUSAL)(x), scores]

    fused, plain = both(program, tp.InputInfo((B, TOKENS, 3 * E), dtype=tp.float32))
    assert kinds(fused)["attention"] == kinds(fused)["matrix_multiply"] == 1
    assert_close(fused, plain, [random(B, 4, 3 * E)])


@pytest.mark.parametrize(("dtype", "back"), [(tp.int8, 0.03), (tp.float8, 0.03), (tp.int8, 0.02), (tp.int8, None)])
def test_rounded_keys_and_values(dtype: tp.dtype, back: float | None) -> None:
    """The same scale back, or it is another function."""

    def rounded(x: tp.Tensor) -> tp.Tensor:
        x = tp.cast(tp.quantize(x, 0.03, dtype), tp.float32)
        return x if back is None else x * back

    fused, plain = both(
        lambda x: attend(split(x, 0), rounded(split(x, 1)), rounded(split(x, 2)), CAUSAL(x.shape[1])),
        tp.InputInfo((B, TOKENS, 3 * E), dtype=tp.float32),
    )
    assert ("attention" in kinds(fused)) == (back == 0.03)
    assert_close(fused, plain, [random(B, 4, 3 * E)])


# --- with a cache -----------------------------------------------------------------------------------------------------

Update = Callable[[tp.Tensor, tp.Tensor, tp.Tensor], tp.Tensor]


def offsets(position: tp.Tensor) -> tp.Tensor:
    return tp.reshape(tp.iota((C,), dtype=tp.int32), (1, C)) - tp.unsqueeze(position, 1)  # (B, C)


def taken(new: tp.Tensor, offset: tp.Tensor) -> tp.Tensor:
    """Row ``offset`` (B, C) of each sequence's new rows, (B, H, C, D)."""
    length = new.shape[2]
    rows = tp.reshape(tp.permute(new, (0, 2, 1, 3)), (-1, H, D))
    first = tp.unsqueeze(tp.iota((B,), dtype=tp.int32) * length, 1)
    return tp.permute(tp.gather(rows, 0, first + offset), (0, 2, 1, 3))


def in_place(cache: tp.Tensor, new: tp.Tensor, position: tp.Tensor) -> tp.Tensor:
    offset = offsets(position)
    is_new = ~((offset < 0) | (offset >= new.shape[2]))
    return tp.where(tp.reshape(is_new, (B, 1, C, 1)), taken(new, tp.where(is_new, offset, 0)), cache)


def by_clamping(cache: tp.Tensor, new: tp.Tensor, position: tp.Tensor) -> tp.Tensor:
    offset = offsets(position)
    nearest = tp.maximum(tp.where(offset < new.shape[2], offset, 0), 0)
    is_old = (offset < 0) | ~(offset < new.shape[2])
    return tp.where(tp.reshape(is_old, (B, 1, C, 1)), cache, taken(new, nearest))


def one_late(cache: tp.Tensor, new: tp.Tensor, position: tp.Tensor) -> tp.Tensor:
    return in_place(cache, new, position + 1)


def first_row_only(cache: tp.Tensor, new: tp.Tensor, position: tp.Tensor) -> tp.Tensor:
    offset = offsets(position)
    return tp.where(tp.reshape(offset == 0, (B, 1, C, 1)), taken(new, offset * 0), cache)


def added(cache: tp.Tensor, new: tp.Tensor, position: tp.Tensor) -> tp.Tensor:
    return in_place(cache, new + 1.0, position)


def cached(
    update: Update, layers: tuple[int, ...] = (0, 1), stacked: tuple[int, ...] | None = None, extra: int = 0
) -> Callable[..., Any]:
    def program(x: tp.Tensor, position: tp.Tensor, cache: tp.Tensor) -> list[tp.Tensor]:
        slots, t = row(C), column(x.shape[1])
        visible = slots <= tp.reshape(position, (B, 1, 1, 1)) + t + extra
        new, y = {}, x
        for layer in layers:
            old = cache[layer]
            k, v = update(old[0], split(y, 1), position), update(old[1], split(y, 2), position)
            attended = attend(split(y, 0), k, v, visible)
            y = y + tp.concatenate([attended, attended, attended], dim=2)
            new[layer] = tp.stack([k, v])
        return [y, tp.stack([new.get(layer, cache[layer]) for layer in stacked or range(L)])]

    return program


def infos(length: Any = TOKENS) -> list[tp.InputInfo]:
    return [
        tp.InputInfo((B, length, 3 * E), dtype=tp.float32),
        tp.InputInfo((B,), dtype=tp.int32),
        tp.InputInfo((L, 2, B, H, C, D), dtype=tp.float32),
    ]


def inputs(length: int = 2, positions: tuple[int, ...] = (3, 0)) -> list[np.ndarray]:
    return [random(B, length, 3 * E), np.array(positions, np.int32), random(L, 2, B, H, C, D, seed=1)]


@pytest.mark.parametrize("length", [TOKENS, 2, 1])
@pytest.mark.parametrize("update", [in_place, by_clamping])
def test_the_cache_goes_from_layer_to_layer(update: Update, length: Any) -> None:
    fused, plain = both(cached(update), *infos(length))
    attentions = [each for each in operations(fused) if each.kind == "attention"]
    assert set(kinds(fused)) <= {"attention", "concatenation", "element_wise", "constant"}, fused
    assert [each.attributes["layer"] for each in attentions] == [0, 1]
    assert attentions[0].operands[1] is fused.inputs[2].value
    assert attentions[1].operands[1] is attentions[0].results[1] and fused.outputs[1] is attentions[1].results[1]
    assert all(each.operands[2] is fused.inputs[1].value for each in attentions)
    for positions in ((3, 0), (0, 0), (C - 2, 1)):
        assert_close(fused, plain, inputs(2 if length == TOKENS else length, positions))


def test_a_layer_without_attention_stays_as_it_is() -> None:
    fused, plain = both(cached(in_place, layers=(1,)), *infos())
    assert only(fused, "attention").attributes["layer"] == 1 and "select" not in kinds(fused)
    assert_close(fused, plain, inputs())


@pytest.mark.parametrize(
    "program",
    [
        cached(one_late),
        cached(first_row_only),
        cached(added),
        cached(in_place, stacked=(1, 0)),  # another layer's place
        cached(in_place, stacked=(0, 0)),
        cached(in_place, extra=1),  # another mask
        lambda x, position, cache: cached(in_place)(x, position, cache)[0],  # no cache is returned
    ],
    ids=["later", "first row only", "another row", "layers swapped", "a layer twice", "mask", "not returned"],
)
@pytest.mark.slow
def test_other_caches_are_left_alone(program: Callable[..., Any]) -> None:
    fused, plain = both(program, *infos())
    assert "attention" not in kinds(fused), fused
    assert_close(fused, plain, inputs())


def test_keys_that_are_wanted_themselves() -> None:
    """They are computed beside the attention, from the cache as it came."""

    def program(x: tp.Tensor, position: tp.Tensor, cache: tp.Tensor) -> list[tp.Tensor]:
        return [*cached(in_place)(x, position, cache), in_place(cache[0][0], split(x, 1), position)]

    fused, plain = both(program, *infos())
    assert kinds(fused)["attention"] == 2 and kinds(fused)["select"] >= 1
    assert_close(fused, plain, inputs())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, C), min_size=B, max_size=B), st.integers(0, 99))
def test_any_positions(length: int, positions: list[int], seed: int) -> None:
    """Those too from which the new rows would reach beyond the cache."""
    fused, plain = _PAIR
    arrays = inputs(length, tuple(positions))
    arrays[0] = random(B, length, 3 * E, seed=seed)
    assert_close(fused, plain, arrays)


_PAIR: tuple[Graph, Graph] = both(cached(in_place), *infos())
