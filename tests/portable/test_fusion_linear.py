"""``linear``: what it takes in computes the same as before, and what it must not take in stays outside."""

from __future__ import annotations

import math
import random as pseudo
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from graphs import assert_close, both, kinds, only, operations, random, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from nvtripy_portable.graph import Graph, Operation

N, K = 24, 16
X = tp.InputInfo((2, (1, 3, 5), K), dtype=tp.float32)
INPUTS = [random(2, 3, K, seed=1)]


def operand(linear: Operation, name: str) -> Any:
    names = ("x", "weight", "weight_scale", "bias", "residual", "pre_scale", "input_scale")
    return linear.operands[names.index(name)]


def fused(function: Callable[..., Any], *infos: Any, inputs: list[np.ndarray] = INPUTS) -> Graph:
    graph, plain = both(function, *(infos or (X,)))
    assert_close(graph, plain, inputs)
    return graph


def gelu_tanh(x: tp.Tensor) -> tp.Tensor:
    inner = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x * (tp.tanh(inner) + 1.0) * 0.5


def gelu_tanh_otherwise(x: tp.Tensor) -> tp.Tensor:
    """The same with the operands of every sum and product in the other order."""
    inner = math.sqrt(2.0 / math.pi) * (0.044715 * (x * (x * x)) + x)
    return 0.5 * ((1.0 + tp.tanh(inner)) * x)


def squared_relu(x: tp.Tensor) -> tp.Tensor:
    positive = tp.relu(x)
    return positive * positive


ACTIVATIONS = {
    "gelu_tanh": gelu_tanh,
    "gelu_tanh, otherwise": gelu_tanh_otherwise,
    "gelu_erf": tp.gelu,
    "relu": tp.relu,
    "relu2": squared_relu,
    "silu": tp.silu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_everything_after_the_product(name: str) -> None:
    weight, bias = tensor(K, K), tensor(K, seed=2)
    graph = fused(lambda x: x + ACTIVATIONS[name](x @ weight + bias))
    assert [each.kind for each in operations(graph)] == ["linear"]
    linear = only(graph, "linear")
    assert linear.attributes["activation"] == name.partition(",")[0]
    assert operand(linear, "bias") is not None and operand(linear, "residual") is graph.inputs[0].value


def halves(x: tp.Tensor) -> tuple[tp.Tensor, tp.Tensor]:
    pair = tp.reshape(x, (2, x.shape[1], 2, K))
    return tuple(tp.gather(pair, 2, tp.Tensor(half)) for half in range(2))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_before_the_product(name: str) -> None:
    weight, by = tensor(K, N), tensor(K, seed=3)

    def gated(x: tp.Tensor) -> tp.Tensor:
        first, second = halves(x)
        return ACTIVATIONS[name](first) * second

    info, inputs = tp.InputInfo((2, (1, 3, 5), 2 * K), dtype=tp.float32), [random(2, 3, 2 * K)]
    graph = fused(lambda x: (gated(x) * by) @ weight, info, inputs=inputs)
    assert [each.kind for each in operations(graph)] == ["linear"]
    assert only(graph, "linear").attributes["gate"] == name.partition(",")[0]
    assert operand(only(graph, "linear"), "pre_scale") is not None
    # The other half, or the same half twice, is another function.
    for program in (
        lambda x: (ACTIVATIONS[name](halves(x)[1]) * halves(x)[0]) @ weight,
        lambda x: (ACTIVATIONS[name](halves(x)[0]) * halves(x)[0]) @ weight,
        lambda x: (ACTIVATIONS[name](halves(x)[0]) + halves(x)[1]) @ weight,
    ):
        assert only(fused(program, info, inputs=inputs), "linear").attributes["gate"] is None


def by_token(x: tp.Tensor, top: float = 127.0, least: float = 1e-6, dim: int = -1) -> tp.Tensor:
    scale = tp.maximum(tp.max(abs(x), dim=dim, keepdim=True) / top, least)
    return tp.cast(tp.quantize(x / scale, 1.0, tp.int8), tp.float32) * scale


@pytest.mark.parametrize("dtype", [tp.int8, tp.float8])
def test_everything_before_the_product(dtype: tp.dtype) -> None:
    weight, by = tensor(K, N), tensor(K, seed=3)

    def rounded(x: tp.Tensor) -> tp.Tensor:
        return tp.dequantize(tp.quantize(x * by, 0.02, dtype), 0.02, tp.float32)

    graph = fused(lambda x: rounded(x) @ weight)
    assert [each.kind for each in operations(graph)] == ["linear"]
    linear = only(graph, "linear")
    assert linear.attributes["input_dtype"] == {tp.int8: "i8", tp.float8: "f8e4m3fn"}[dtype]
    assert operand(linear, "input_scale").constant == np.float32(0.02)
    assert np.array_equal(operand(linear, "pre_scale").constant, random(K, seed=3))


def test_rounding_token_by_token() -> None:
    weight, by = tensor(K, N), tensor(K, seed=3)
    graph = fused(lambda x: by_token(x * by) @ weight)
    assert [each.kind for each in operations(graph)] == ["linear"]
    linear = only(graph, "linear")
    assert linear.attributes["input_dtype"] == "i8" and operand(linear, "input_scale") is None


def test_casts_around_the_product() -> None:
    weight = tp.cast(tensor(K, N), tp.float16)
    graph, plain = both(lambda x: tp.cast(x @ weight, tp.float32), tp.InputInfo((3, K), dtype=tp.float16))
    assert [each.kind for each in operations(graph)] == ["linear"]
    linear = only(graph, "linear")
    assert (linear.attributes["weight_dtype"], linear.attributes["dtype"]) == ("f16", "f32")
    assert_close(graph, plain, [random(3, K, dtype=np.float16)], 2**-11)  # the unfused graph's rounding to float16


def test_a_head_shares_its_rows_with_the_embedding() -> None:
    """One constant, held once, that is the transpose's own memory."""
    table, positions = tensor(N, K), tensor(5, K, seed=2)

    def model(idx: tp.Tensor) -> tp.Tensor:
        x = tp.gather(table, 0, idx) + tp.gather(
            positions, 0, tp.unsqueeze(tp.iota((idx.shape[1],), dtype=tp.int32), 0)
        )
        return x @ tp.transpose(table, 0, 1)

    graph, plain = both(model, tp.InputInfo((2, (1, 3, 5)), dtype=tp.int32))
    assert [each.kind for each in operations(graph)] == ["embedding", "linear"]
    assert only(graph, "embedding").operands[2] is only(graph, "linear").operands[1]
    assert sum(each.results[0].constant.size for each in graph.operations if each.kind == "constant") == (N + 5) * K
    assert_close(graph, plain, [np.arange(6, dtype=np.int32).reshape(2, 3)])


W, SQUARE = tensor(K, N), tensor(K, K)
BIAS = tensor(N, seed=2)


@pytest.mark.parametrize(
    ("program", "left"),
    [
        (lambda x: (x @ W, x @ W + BIAS), {"element_wise": 1}),  # the product is wanted itself
        (lambda x: tp.relu(x @ W) + BIAS, {"element_wise": 1}),  # a bias after the activation
        (lambda x: tp.relu(x + x @ SQUARE), {"activation": 1}),  # an activation after the residual
        (lambda x: x @ SQUARE + tp.sum(x, dim=1, keepdim=True), {"element_wise": 1, "reduce": 1}),  # a broadcast
        (lambda x: x @ SQUARE + tp.reshape(tensor(1), (1, 1, 1)), {"element_wise": 1}),  # one number for all
        (lambda x: tp.sigmoid(x @ W), {"activation": 1}),
        (lambda x: (x @ W) * tp.sigmoid(x @ W + BIAS), {"activation": 1, "element_wise": 1}),  # not of itself
        (lambda x: by_token(x, top=100.0) @ W, {"quantize": 1}),
        (lambda x: by_token(x, least=1e-3) @ W, {"quantize": 1}),
        (lambda x: by_token(x, dim=0) @ W, {"quantize": 1}),
        (
            lambda x: tp.dequantize(tp.quantize(x, 0.5, tp.int8), 0.25, tp.float32) @ W,
            {"quantize": 1, "dequantize": 1},
        ),  # another scale back
        (
            lambda x: (tp.dequantize(tp.quantize(x, 0.5, tp.int8), 0.5, tp.float32) * tensor(K)) @ W,
            {"quantize": 1, "dequantize": 1},
        ),  # scaled after it was rounded
        (lambda x: (x * tensor(2, 3, K)) @ W, {"element_wise": 1}),  # a factor for each element
    ],
)
def test_what_does_not_belong_stays_outside(program: Callable[..., Any], left: dict[str, int]) -> None:
    graph = fused(program, tp.InputInfo((2, 3, K), dtype=tp.float32))
    found = kinds(graph)
    assert "linear" in found and all(found[kind] >= count for kind, count in left.items()), graph


def test_gelu_with_other_numbers_is_left_alone() -> None:
    def almost(x: tp.Tensor) -> tp.Tensor:
        inner = (x + x * x * x * 0.0447) * math.sqrt(2.0 / math.pi)
        return x * (tp.tanh(inner) + 1.0) * 0.5

    graph = fused(lambda x: almost(x @ W))
    assert only(graph, "linear").attributes["activation"] is None and kinds(graph)["activation"] == 1


def test_products_of_two_computed_matrices_are_left_alone() -> None:
    graph = fused(lambda x: x @ tp.transpose(x, 1, 2))
    assert kinds(graph) == Counter(transpose=1, matrix_multiply=1)


class Chain:
    """A random program around products: whatever is fused of it, the numbers stay."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, x: tp.Tensor) -> list[tp.Tensor]:
        choice = pseudo.Random(self.seed)
        pool = [x]
        steps: list[Callable[[tp.Tensor], tp.Tensor]] = [
            lambda y: y @ tensor(K, K, seed=choice.randrange(9)),
            lambda y: y @ tp.transpose(tensor(K, K, seed=choice.randrange(9)), 0, 1),
            lambda y: y + tensor(K, seed=choice.randrange(9)),
            lambda y: tensor(K, seed=choice.randrange(9)) * y,
            lambda y: y + choice.choice(pool),
            lambda y: choice.choice(pool) + y,
            lambda y: y * choice.choice(pool),
            lambda y: y * 0.5,
            lambda y: choice.choice(list(ACTIVATIONS.values()))(y),
            lambda y: tp.cast(tp.cast(y, tp.float32), tp.float32),
        ]
        for _ in range(14):
            source = pool[-1] if choice.random() < 0.8 else choice.choice(pool)
            y = choice.choice(steps[:2] if choice.random() < 0.3 else steps)(source)
            pool.append(y / tp.sqrt(tp.mean(y * y) + 1.0) if choice.random() < 0.2 else y)
        return [pool[-1], choice.choice(pool[1:])]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_random_programs(seed: int) -> None:
    graph, plain = both(Chain(seed), X)
    # Products of products grow differences of rounding: ten times the usual tolerance.
    assert_close(graph, plain, INPUTS, 1e-4)
