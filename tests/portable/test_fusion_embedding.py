"""``embedding``, ``last_rows`` and ``layer_norm``: each for what means it, and for nothing that only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from graphs import assert_close, both, kinds, only, operations, random, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

B, C, E, V = 2, 9, 8, 11
TOKENS = (1, 3, 5)
TABLE, PLACES = tensor(V, E), tensor(C, E, seed=2)
IDX = np.random.default_rng(3).integers(0, V, (B, 3)).astype(np.int32)
START = np.array([2, 4], np.int32)
IDX_INFO, START_INFO = tp.InputInfo((B, TOKENS), dtype=tp.int32), tp.InputInfo((B,), dtype=tp.int32)


def steps(idx: tp.Tensor) -> tp.Tensor:
    return tp.unsqueeze(tp.iota((idx.shape[1],), dtype=tp.int32), 0)


def rows(table: tp.Tensor, indices: tp.Tensor) -> tp.Tensor:
    return tp.gather(table, 0, indices)


def quantized(table: tp.Tensor = TABLE, count: int = V) -> tp.Tensor:
    scale = tp.Tensor(np.linspace(0.01, 0.03, count, dtype=np.float32))
    return tp.dequantize(tp.quantize(table, scale, tp.int8, 0), scale, tp.float32, 0)


def quantized_places() -> tp.Tensor:
    return quantized(PLACES, C)


EMBEDDINGS: dict[str, Callable[[tp.Tensor, tp.Tensor], tp.Tensor]] = {
    "tokens first": lambda idx, start: rows(TABLE, idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx)),
    "positions first": lambda idx, start: rows(PLACES, steps(idx) + tp.unsqueeze(start, 1)) + rows(TABLE, idx),
    "quantized": lambda idx, start: rows(quantized(), idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx)),
    "quantized, positions first": lambda idx, start: (
        rows(PLACES, tp.unsqueeze(start, 1) + steps(idx)) + rows(quantized(), idx)
    ),
    "quantized positions": lambda idx, start: (
        rows(TABLE, idx) + rows(quantized_places(), tp.unsqueeze(start, 1) + steps(idx))
    ),
    "quantized positions first": lambda idx, start: (
        rows(quantized_places(), tp.unsqueeze(start, 1) + steps(idx)) + rows(TABLE, idx)
    ),
    "both quantized": lambda idx, start: (
        rows(quantized(), idx) + rows(quantized_places(), steps(idx) + tp.unsqueeze(start, 1))
    ),
    "both quantized, positions first": lambda idx, start: (
        rows(quantized_places(), tp.unsqueeze(start, 1) + steps(idx)) + rows(quantized(), idx)
    ),
    "cast": lambda idx, start: tp.cast(
        tp.cast(rows(TABLE, idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx)), tp.float16), tp.float32
    ),
}
OTHERS: dict[str, Callable[[tp.Tensor, tp.Tensor], tp.Tensor]] = {
    "one later": lambda idx, start: rows(TABLE, idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx) + 1),
    "every second": lambda idx, start: rows(TABLE, idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx) * 2),
    "all at one place": lambda idx, start: rows(TABLE, idx) + rows(PLACES, tp.unsqueeze(start, 1) + steps(idx) * 0),
    "difference": lambda idx, start: rows(TABLE, idx) - rows(PLACES, tp.unsqueeze(start, 1) + steps(idx)),
    "tokens as places": lambda idx, start: rows(TABLE, idx) + rows(PLACES, idx % 2),
    "quantized, one later": lambda idx, start: (
        rows(quantized(), idx) + rows(quantized_places(), tp.unsqueeze(start, 1) + steps(idx) + 1)
    ),
    "quantized, both by token": lambda idx, start: rows(quantized(), idx) + rows(quantized(), idx),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str) -> None:
    fused, plain = both(EMBEDDINGS[name], IDX_INFO, START_INFO)
    assert [each.kind for each in operations(fused)] == ["embedding"], fused
    assert only(fused, "embedding").operands[1] is fused.inputs[1].value
    # The unfused graph rounds to float16 on the way where it is cast.
    assert_close(fused, plain, [IDX, START], 1e-5 if name != "cast" else 2**-10)


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_of_rows(name: str) -> None:
    fused, plain = both(OTHERS[name], IDX_INFO, START_INFO)
    assert all(each.attributes["position_dtype"] is None for each in operations(fused) if each.kind == "embedding")
    assert_close(fused, plain, [IDX, START])


@pytest.mark.parametrize("table", [lambda: TABLE, quantized], ids=["float", "quantized"])
def test_tokens_alone(table: Callable[[], tp.Tensor]) -> None:
    """Where nothing of positions is added."""
    fused, plain = both(lambda idx: rows(table(), idx), IDX_INFO)
    assert [each.kind for each in operations(fused)] == ["embedding"], fused
    assert only(fused, "embedding").operands[1] is None
    assert_close(fused, plain, [IDX])


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("length", [TOKENS, 3])
def test_positions_from_zero(length: Any, is_quantized: bool) -> None:
    """Those of a fixed number of tokens are constants, looked up when it is compiled."""

    def embedded(idx: tp.Tensor) -> tp.Tensor:
        return rows(TABLE, idx) + rows(quantized_places() if is_quantized else PLACES, steps(idx))

    fused, plain = both(embedded, tp.InputInfo((B, length), dtype=tp.int32))
    assert [each.kind for each in operations(fused)] == ["embedding"]
    operation = only(fused, "embedding")
    assert operation.operands[1] is None
    assert operation.attributes["position_dtype"] == ("i8" if is_quantized else "f32")
    assert_close(fused, plain, [IDX])


# --- last rows --------------------------------------------------------------------------------------------------------

X_INFO = tp.InputInfo((B, TOKENS, E), dtype=tp.float32)
PICKS: dict[str, tuple[Callable[[tp.Tensor, tp.Tensor], tp.Tensor], bool]] = {
    "row by sequence": (lambda x, last: tp.iota((B,), dtype=tp.int32) * x.shape[1] + last, True),
    "the other way round": (lambda x, last: last + x.shape[1] * tp.iota((B,), dtype=tp.int32), True),
    "the row before": (lambda x, last: tp.iota((B,), dtype=tp.int32) * x.shape[1] + last - 1, False),
    "of one sequence": (lambda x, last: last, False),
    "at a fixed distance": (lambda x, last: tp.iota((B,), dtype=tp.int32) * 2 + last, False),
}


@pytest.mark.parametrize("name", PICKS)
def test_last_rows(name: str) -> None:
    pick, is_fused = PICKS[name]
    fused, plain = both(
        lambda x, last: tp.gather(tp.reshape(x, (-1, E)), 0, pick(x, last)), X_INFO, tp.InputInfo((B,), dtype=tp.int32)
    )
    assert ([each.kind for each in operations(fused)] == ["last_rows"]) == is_fused
    assert_close(fused, plain, [random(B, 4, E), np.array([3, 1], np.int32)])


# --- layer norm -------------------------------------------------------------------------------------------------------


def layer_norm(width: int, epsilon: float = 1e-5) -> tp.LayerNorm:
    layer = tp.LayerNorm(width, eps=epsilon)
    layer.weight, layer.bias = tensor(width, seed=4), tensor(width, seed=5)
    return layer


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.sampled_from((1e-5, 1e-3, 0.5)), st.sampled_from(("float32", "float16", "bfloat16")))
def test_layer_norms(width: int, epsilon: float, name: str) -> None:
    layer, dtype = layer_norm(width, epsilon), getattr(tp, name)
    fused, plain = both(
        lambda x: tp.cast(layer(tp.cast(tp.cast(x, dtype), tp.float32)), dtype),
        tp.InputInfo((B, TOKENS, width), dtype=tp.float32),
    )
    operation = only(fused, "layer_norm")
    assert operation.attributes["epsilon"] == pytest.approx(epsilon)
    assert operation.attributes["dtype"] == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name]
    # A number that two ways of summation leave on both sides of a rounding differs by a whole step of the type.
    assert_close(fused, plain, [random(B, 3, width)], {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[name])


def test_a_norm_that_is_wanted_in_both_types_is_computed_once() -> None:
    layer = layer_norm(E)
    fused, plain = both(lambda x: (layer(x), tp.cast(layer(x), tp.float16)), X_INFO)
    assert kinds(fused)["layer_norm"] == kinds(fused)["cast"] == 1
    assert_close(fused, plain, [random(B, 3, E)], 2**-10)


def rms(x: tp.Tensor) -> tp.Tensor:
    wide = tp.cast(x, tp.float32)
    size = tp.rsqrt(tp.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)
    return tp.cast(wide * size * tp.reshape(tensor(E, seed=4), (1, 1, E)), x.dtype)


RMS_NORMS: dict[str, tuple[Callable[[tp.Tensor], tp.Tensor], bool]] = {
    "by the reciprocal root": (rms, True),
    "by division": (
        lambda x: x / tp.sqrt(tp.mean(x * x, dim=-1, keepdim=True) + 1e-3) * tp.reshape(tensor(E, seed=4), (1, 1, E)),
        True,
    ),
    "in float16": (lambda x: rms(tp.cast(x, tp.float16)), True),
    "of the sum": (
        lambda x: x / tp.sqrt(tp.sum(x * x, dim=-1, keepdim=True) + 1e-3) * tp.reshape(tensor(E, seed=4), (1, 1, E)),
        False,
    ),
    "over tokens": (
        lambda x: x / tp.sqrt(tp.mean(x * x, dim=1, keepdim=True) + 1e-3) * tp.reshape(tensor(E, seed=4), (1, 1, E)),
        False,
    ),
    "of another value": (
        lambda x: x / tp.sqrt(tp.mean((x + 1.0) * x, dim=-1, keepdim=True) + 1e-3) * tp.reshape(tensor(E), (1, 1, E)),
        False,
    ),
    "a scale for each token": (
        lambda x: x / tp.sqrt(tp.mean(x * x, dim=-1, keepdim=True) + 1e-3) * tp.reshape(tensor(B), (B, 1, 1)),
        False,
    ),
}


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms(name: str) -> None:
    program, is_fused = RMS_NORMS[name]
    fused, plain = both(program, X_INFO)
    assert ("rms_norm" in kinds(fused)) == is_fused, fused
    assert_close(fused, plain, [random(B, 3, E) + 0.1], 1e-5 if name != "in float16" else 2**-10)


def test_other_norms_are_left_alone() -> None:
    layer = tp.LayerNorm((3, E))
    layer.weight, layer.bias = tensor(3, E, seed=4), tensor(3, E, seed=5)
    fused, plain = both(layer, tp.InputInfo((B, 3, E), dtype=tp.float32))
    assert kinds(fused)["normalization"] == 1 and "layer_norm" not in kinds(fused)
    assert_close(fused, plain, [random(B, 3, E)])
