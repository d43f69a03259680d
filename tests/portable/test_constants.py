"""What is computed of constants natively is what the reference computes, to the last bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nvtripy_portable import reference
from nvtripy_portable.cpu import constants

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

BF16, I4, F8 = ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn

#: Shape, and the axis of a 1-D scale, the number of blocks, or neither: a scalar scale.
SHAPES: list[tuple[tuple[int, ...], int | None, int | None]] = [
    ((), None, None),
    ((1,), None, None),
    ((300,), 0, None),
    ((5, 67), None, None),
    ((5, 67), 0, None),
    ((5, 67), 1, None),
    ((5, 67), -1, None),
    ((3, 4, 33), 1, None),
    ((3, 4, 1), 1, None),
    ((96, 50), None, 3),
    ((7, 130), None, 7),
    ((700, 513), 0, None),
    ((4, 0), None, None),
]


@pytest.fixture(params=native.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", request.param)
    return request.param


@pytest.mark.parametrize(("shape", "axis", "blocks"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("target", [np.int8, I4, F8])
def test_quantize(shape: tuple[int, ...], axis: int | None, blocks: int | None, dtype: Any, target: Any) -> None:
    random = np.random.default_rng(len(shape))
    for spread in (0.5, 5.0, 300.0):
        numbers = (spread * random.standard_normal(shape)).astype(dtype)
        scale_shape = (blocks, shape[1]) if blocks else () if axis is None else (shape[axis],)
        scale = np.exp2(random.integers(-2, 2, scale_shape)).astype(np.float32)  # halves come out exactly
        for scales in (scale, np.asarray(random.uniform(0.1, 2.0, scale_shape)).astype(dtype)):
            expected = reference.quantize(numbers, scales, dtype=target, axis=axis)
            found = constants.quantize(numbers, scales, dtype=target, axis=axis)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("target", [np.int8, I4, F8])
def test_numbers_at_the_edges(target: Any) -> None:
    with np.errstate(over="ignore"):
        edges = [
            0.0,
            0.5,
            1.5,
            2.5,
            7.4,
            7.5,
            126.5,
            127.5,
            1e-3,
            2**-10,
            1.5 * 2**-9,
            2**-7,
            2**-6,
            448,
            464,
            465,
            1e30,
        ]
        numbers = np.array([*edges, np.inf, np.nan], np.float32)
        numbers = np.concatenate([numbers, -numbers])
    scales = np.array([1.0, 0.0, np.inf], np.float32)
    for scale in scales:
        expected = reference.quantize(numbers, np.asarray(scale), dtype=target)
        found = constants.quantize(numbers, np.asarray(scale), dtype=target)
        # A NaN has no sign that anybody should look at.
        as_numbers = [each.astype(np.float32) for each in (found, expected)]
        np.testing.assert_array_equal(*as_numbers)
        np.testing.assert_array_equal(
            np.signbit(as_numbers[0]) & ~np.isnan(as_numbers[0]), np.signbit(as_numbers[1]) & ~np.isnan(as_numbers[1])
        )


def test_any_layout() -> None:
    numbers = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float16).T
    scale = np.linspace(0.01, 0.1, 30, dtype=np.float32)
    expected = reference.quantize(numbers, scale, dtype=np.int8, axis=0)
    np.testing.assert_array_equal(constants.quantize(numbers, scale, dtype=np.int8, axis=0), expected)


def test_a_scale_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="quantize expects a 1-D scale with one element for each channel along axis 0"):
        constants.quantize(np.zeros((3, 4), np.float32), np.ones(4, np.float32), dtype=np.int8, axis=0)


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling goes on: running says what is wrong."""
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", "sse9")
    assert constants.quantize(np.array([3.0], np.float32), np.float32(1), dtype=np.int8).tolist() == [3]
