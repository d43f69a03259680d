"""Quantized weights as one operation: the same numbers as the operations that it replaces, from weights that stay
small.

The replaced operations round twice in float16 where the one rounds once, so results are compared in float32, where both
are a sum of the same products: 1e-6 relative to the norm is sixteen roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nvtripy_portable import compiler, fused
from nvtripy_portable.packing import pack_int4, unpack_int4
from nvtripy_portable.passes import fold_constants, merge_equal

BLOCK = 16
Weight = Callable[[np.random.Generator], tp.Tensor]
N, K = 24, 64


def channel(dtype: tp.dtype, top: float) -> Weight:
    """(N, K), a scale a row, transposed to multiply from the right."""

    def make(rng: np.random.Generator) -> tp.Tensor:
        weight = rng.standard_normal((N, K)).astype(np.float32)
        scale = (np.abs(weight).max(axis=1) / top).astype(np.float32)
        quantized = tp.quantize(tp.Tensor(weight), tp.Tensor(scale), dtype, 0)
        return tp.transpose(tp.dequantize(quantized, tp.Tensor(scale), tp.float32, 0), 0, 1)

    return make


def tensor(dtype: tp.dtype, top: float, is_transposed: bool) -> Weight:
    """One scale for all."""

    def make(rng: np.random.Generator) -> tp.Tensor:
        weight = rng.standard_normal((N, K) if is_transposed else (K, N)).astype(np.float32)
        scale = float(np.abs(weight).max() / top)
        rounded = tp.dequantize(tp.quantize(tp.Tensor(weight), scale, dtype), scale, tp.float32)
        return tp.transpose(rounded, 0, 1) if is_transposed else rounded

    return make


def block(rng: np.random.Generator) -> tp.Tensor:
    """(K, N) int4, a scale for each 16 input features of each output feature."""
    weight = rng.standard_normal((K, N)).astype(np.float32)
    scale = (np.abs(weight).reshape(K // BLOCK, BLOCK, N).max(axis=1) / 7).astype(np.float32)
    quantized = tp.quantize(tp.Tensor(weight), tp.Tensor(scale), tp.int4)
    return tp.dequantize(quantized, tp.Tensor(scale), tp.float32)


WEIGHTS: dict[str, Weight] = {
    "int8 by channel": channel(tp.int8, 127),
    "float8 by channel": channel(tp.float8, 448),
    "int8 by tensor": tensor(tp.int8, 127, True),
    "float8 by tensor": tensor(tp.float8, 448, True),
    "int8 by tensor, as it is": tensor(tp.int8, 127, False),
    "int4 by block": block,
}


def compile_both(
    function: Callable[[tp.Tensor], tp.Tensor], info: tp.InputInfo, monkeypatch: pytest.MonkeyPatch
) -> tuple[tp.Executable, tp.Executable]:
    """With the pass and without it."""
    with_pass = tp.compile(function, args=[info])
    monkeypatch.setattr(compiler, "PASSES", (fold_constants.run, merge_equal.run))
    return with_pass, tp.compile(function, args=[info])


def kinds(executable: tp.Executable) -> list[str]:
    return [operation.kind for operation in executable._executable.portable.graph.operations]


def constant_bytes(executable: tp.Executable) -> int:
    operations = executable._executable.portable.graph.operations
    return sum(each.attributes["value"].nbytes for each in operations if each.kind == "constant")


def call(executable: tp.Executable, array: np.ndarray) -> np.ndarray:
    return np.from_dlpack(executable(tp.copy(tp.Tensor(array), tp.device("gpu"))))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("shape", [(3, K), (2, 5, K), (1, 1, K)])
def test_a_product_is_one_operation(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "float8 by channel":  # which TensorRT refuses, and the kernels can
        monkeypatch.setenv("NVTRIPY_PORTABLE_VERIFY", "0")
    rng = np.random.default_rng(len(name) + len(shape))
    weight = WEIGHTS[name](rng)
    fast, plain = compile_both(lambda x: x @ weight, tp.InputInfo(shape, dtype=tp.float32), monkeypatch)
    assert "linear" in kinds(fast) and "dequantize" not in kinds(fast)
    assert "dequantize" in kinds(plain)
    x = rng.standard_normal(shape).astype(np.float32)
    expected = call(plain, x)
    assert np.linalg.norm(call(fast, x) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_the_weights_stay_small() -> None:
    """An eighth of float32 and the scales for int4 in memory, and in the file, where the header comes on top."""
    weight = block(np.random.default_rng(0))
    executable = tp.compile(lambda x: x @ weight, args=[tp.InputInfo((1, K), dtype=tp.float32)])
    small = N * K // 2 + 4 * N * K // BLOCK
    assert small <= constant_bytes(executable) <= small + 64  # and a shape or two
    assert len(executable._executable.serialize()) < small + 8000


@pytest.mark.parametrize("is_block", [False, True])
def test_a_head_that_is_the_embedding_too_is_held_once(is_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    right = block(rng) if is_block else channel(tp.int8, 127)(rng)

    def model(idx: tp.Tensor) -> tp.Tensor:
        rows = tp.gather(tp.transpose(right, 0, 1), 0, idx)  # (T, K)
        return tp.relu(rows) @ right

    if not is_block:
        weight = rng.standard_normal((N, K)).astype(np.float32)
        scale = tp.Tensor((np.abs(weight).max(axis=1) / 127).astype(np.float32))
        rounded = tp.dequantize(tp.quantize(tp.Tensor(weight), scale, tp.int8, 0), scale, tp.float32, 0)

        def model(idx: tp.Tensor) -> tp.Tensor:
            return tp.relu(tp.gather(rounded, 0, idx)) @ tp.transpose(rounded, 0, 1)

    fast, plain = compile_both(model, tp.InputInfo((7,), dtype=tp.int32), monkeypatch)
    assert {"linear", "quantized_rows"} <= set(kinds(fast)) and "dequantize" not in kinds(fast)
    half = 2 if is_block else 1
    assert constant_bytes(fast) <= N * K // half + 4 * max(N, N * K // BLOCK) + 64
    idx = rng.integers(0, N, 7).astype(np.int32)
    expected = call(plain, idx)
    assert np.linalg.norm(call(fast, idx) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["int8 by tensor", "int4 by block"])
def test_the_first_columns_of_weights_are_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the others is nothing: neither a slice nor the memory."""
    weight = block(np.random.default_rng(3))
    if name == "int8 by tensor":
        values, scale = np.random.default_rng(3).standard_normal((K, N)).astype(np.float32), 0.02
        weight = tp.dequantize(tp.quantize(tp.Tensor(values), scale, tp.int8), scale, tp.float32)

    def model(x: tp.Tensor) -> tp.Tensor:
        return x @ weight[:, : N - 1]

    fast, plain = compile_both(model, tp.InputInfo((3, K), dtype=tp.float32), monkeypatch)
    assert "slice" in kinds(plain) and not {"slice", "dequantize"} & set(kinds(fast))
    assert constant_bytes(fast) < constant_bytes(plain)
    x = np.random.default_rng(4).standard_normal((3, K)).astype(np.float32)
    expected = call(plain, x)
    assert expected.shape == (3, N - 1)
    assert np.linalg.norm(call(fast, x) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_other_columns_of_weights_are_left_alone() -> None:
    weight = block(np.random.default_rng(3))
    executable = tp.compile(lambda x: x @ weight[:, 1:], args=[tp.InputInfo((3, K), dtype=tp.float32)])
    assert "slice" in kinds(executable)


def test_what_it_cannot_hold_is_left_alone() -> None:
    """Scales along the input features are not a factor of the result."""
    weight = np.ones((K, N), np.float32)
    scale = tp.Tensor(np.full(K, 0.5, np.float32))
    rounded = tp.dequantize(tp.quantize(tp.Tensor(weight), scale, tp.int8, 0), scale, tp.float32, 0)
    executable = tp.compile(lambda x: x @ rounded, args=[tp.InputInfo((1, K), dtype=tp.float32)])
    assert "dequantize" in kinds(executable) and "linear" not in kinds(executable)
    assert np.array_equal(call(executable, np.ones((1, K), np.float32)), np.full((1, N), K))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_widened_in_parts(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are widened at once, the last part not a full one."""
    monkeypatch.setattr(fused, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(2)
    weight, scale = rng.integers(-128, 128, (23, 10)).astype(np.int8), rng.random(23).astype(np.float32)
    x = rng.standard_normal((3, 10)).astype(dtype)
    found = linear(x, weight, scale, dtype)
    expected = x.astype(np.float32) @ (weight * scale[:, None]).T
    assert found.dtype == dtype
    # One rounding to the result's type: 2**-11 for float16, 2**-8 for bfloat16.
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=1e-3)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="last dimension of 10"):
        linear(np.ones((1, 9), np.float32), np.ones((2, 10), np.int8), np.ones(2, np.float32), "float32")


def linear(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    return fused.linear(
        *(x, weight, scale, None, None, None, None),
        weight_dtype="i8",
        width=10,
        gate=None,
        input_dtype=None,
        activation=None,
        dtype=np.dtype(dtype),
    )


ARRAYS = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9)


@given(hnp.arrays(np.int8, ARRAYS, elements=st.integers(-8, 7)))
def test_packing_is_reversible(values: np.ndarray) -> None:
    packed = pack_int4(values.astype(ml_dtypes.int4))
    assert packed.dtype == np.uint8 and packed.shape == (*values.shape[:-1], (values.shape[-1] + 1) // 2)
    assert np.array_equal(unpack_int4(packed, values.shape[-1]), values)


def test_the_first_element_is_in_the_low_half() -> None:
    assert pack_int4(np.array([1, -1], np.int8)).tolist() == [0xF1]
