"""The decoder against the executable that it is of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from fused_graphs import Shape, empty_cache, model_graph

from nvtripy_portable.decoder import Decoder
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import Graph

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")


def compiled(graph: Graph) -> Any:
    """As nvtripy holds what the portable runtime gave it."""
    return SimpleNamespace(_executable=SimpleNamespace(portable=Executable(graph)))


def decoder_of(graph: Graph) -> Decoder:
    decoder = Decoder.of(compiled(graph))
    assert decoder is not None
    return decoder


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(("cache_dtype", "rounding"), [("f32", None), ("f16", None), ("bf16", None), ("i8", "i8")])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_those_of_the_executable(cache_dtype: str, rounding: str | None, batch: int) -> None:
    """To the last bit: it is the same program."""
    shape = Shape(batch=batch)
    graph = model_graph(shape, weight_dtype="f16", cache_dtype=cache_dtype, rounding=rounding)
    executable, decoder = Executable(graph), decoder_of(graph)
    random = np.random.default_rng(batch)
    for _ in range(2):  # the second sequence finds the first one's numbers in the decoder's cache
        cache: Any = empty_cache(shape, cache_dtype)
        position = np.zeros(batch, np.int32)
        for length in (9, 1, 1, 3, 1):
            ids = random.integers(0, shape.vocabulary, (batch, length)).astype(np.int32)
            last = random.integers(0, length, batch).astype(np.int32)
            expected, cache = executable.run([ids, position, cache, last])
            found = decoder.step(ids, position, last)
            assert isinstance(expected, np.ndarray) and found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)
            position = position + np.int32(length)


def test_results_stay_as_they_are() -> None:
    decoder = decoder_of(model_graph(Shape()))
    first = decoder.step(i32(1, 2)[None], i32(0), i32(1))
    before = first.copy()
    decoder.step(i32(3)[None], i32(2), i32(0))
    np.testing.assert_array_equal(first, before)


def test_integers_of_any_type_and_layout() -> None:
    decoder = decoder_of(model_graph(Shape(batch=2)))
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    expected = decoder.step(ids.astype(np.int32), i32(0, 0), i32(2, 2))
    np.testing.assert_array_equal(decoder.step(np.asfortranarray(ids), np.zeros(2), np.full(2, 2)), expected)


@pytest.mark.parametrize(
    ("idx", "position", "last", "message"),
    [
        ([[1, 50]], [3], [0], "token embeddings expects indices in"),
        ([[1, 2]], [31], [0], "position embeddings expects indices in"),
        ([[1, 2]], [3], [2], "last rows expects indices in"),
        ([[1, 2]], [3, 3], [0], "position: expected 1 numbers but got 2"),
        ([[1], [2]], [3, 3], [0, 0], "the cache does not fit"),
    ],
)
def test_inputs_that_do_not_fit(idx: list[list[int]], position: list[int], last: list[int], message: str) -> None:
    """They are refused, and the next step is as if they had not been."""
    graph = model_graph(Shape())
    decoder, other = decoder_of(graph), decoder_of(graph)
    for each in (decoder, other):
        each.step(i32(7, 8, 9)[None], i32(0), i32(2))
    with pytest.raises(ValueError, match=message):
        decoder.step(np.array(idx, np.int32), i32(*position), i32(*last))
    expected = other.step(i32(4)[None], i32(3), i32(0))
    np.testing.assert_array_equal(decoder.step(i32(4)[None], i32(3), i32(0)), expected)


def test_what_is_no_decoder() -> None:
    assert Decoder.of(compiled(model_graph(Shape(), cache_dtype=None))) is None  # no cache
    assert Decoder.of(tp.compile(lambda x: x + 1.0, args=[tp.InputInfo((2,), dtype=tp.float32)])) is None
    assert Decoder.of(SimpleNamespace(_executable=object())) is None  # type: ignore[arg-type]  # NVIDIA's


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"expected NVTRIPY_PORTABLE_ISA to be one of .* but got 'sse9'"):
        decoder_of(model_graph(Shape()))
