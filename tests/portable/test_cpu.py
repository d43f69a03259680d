"""The native executor as a whole: models with caches, and caches that look functional."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from fused_graphs import Shape, empty_cache, model_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from mlir_tensorrt.runtime import api
from nvtripy_portable import interpreter
from nvtripy_portable.cpu.versions import Version
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.plan import Plan

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # float16 caches: one last place of a row that fell on the other side


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def contents(cache: np.ndarray | Version) -> np.ndarray:
    return (cache.copy() if isinstance(cache, Version) else cache).astype(np.float32)


@pytest.mark.parametrize(
    ("weight_dtype", "scales", "cache_dtype", "rounding", "input_dtype"),
    [
        ("f32", "none", "f32", None, None),
        ("f16", "none", "f16", None, None),
        ("bf16", "none", "bf16", None, None),
        ("i8", "rows", "f16", None, None),
        ("i4", "32", "f16", None, None),
        ("f8e4m3fn", "scalar", "f16", None, "f8e4m3fn"),
        ("i8", "rows", "i8", "i8", "i8"),
        ("f16", "none", "f16", "f8e4m3fn", None),
    ],
)
@pytest.mark.parametrize("batch", (1, 3))
def test_a_prompt_and_steps_are_what_the_reference_computes(
    weight_dtype: str, scales: str, cache_dtype: str, rounding: str | None, input_dtype: str | None, batch: int
) -> None:
    shape = Shape(batch=batch, context=24)
    graph = model_graph(
        shape,
        weight_dtype=weight_dtype,
        scales=scales,
        cache_dtype=cache_dtype,
        rounding=rounding,
        input_dtype=input_dtype,
    )
    executable, plan = Executable(graph), Plan(graph)
    random = np.random.default_rng(batch)
    cache: np.ndarray | Version = empty_cache(shape, cache_dtype)
    expected_cache = empty_cache(shape, cache_dtype)
    position = np.zeros(batch, np.int32)
    for length in (7, 1, 1, 3, 1):
        ids = random.integers(0, shape.vocabulary, (batch, length)).astype(np.int32)
        last = random.integers(0, length, batch).astype(np.int32)
        # From one cache, so that a number which was rounded to the other side does not grow into another model.
        expected, expected_cache = interpreter.run(plan, [ids, position, expected_cache, last])
        logits, cache = executable.run([ids, position, cache, last])
        assert isinstance(logits, np.ndarray) and isinstance(cache, Version)
        assert logits.shape == expected.shape and logits.dtype == np.float32
        if input_dtype is None and rounding is None:
            np.testing.assert_allclose(logits, expected, **CLOSE)
            np.testing.assert_allclose(contents(cache), contents(expected_cache), rtol=1e-2, atol=1e-3)
        else:
            assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).mean() + 1e-3
        position = (position + length).astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_caches_are_functional(data: st.DataObject) -> None:
    """Random steps from random handles, old and new, some of them looked into: always what a copy would give."""
    shape = Shape(layers=2, heads=1, head_size=8, context=10, batch=2, vocabulary=9)
    graph = model_graph(shape)
    executable, plan = Executable(graph), Plan(graph)
    start = empty_cache(shape, "f32")
    handles: list[tuple[np.ndarray | Version, np.ndarray]] = [(start, start.copy())]
    exposed: list[tuple[np.ndarray, np.ndarray]] = [(start, start.copy())]
    for _ in range(data.draw(st.integers(1, 12))):
        cache, expected_cache = handles[data.draw(st.integers(0, len(handles) - 1))]
        action = data.draw(st.sampled_from(("step", "step", "step", "look", "drop", "fail")))
        if action == "look" and isinstance(cache, Version):
            exposed.append((cache.array(), expected_cache.copy()))
        elif action == "drop" and len(handles) > 1:
            handles.pop(data.draw(st.integers(0, len(handles) - 1)))
        elif action == "fail":
            with pytest.raises(interpreter.ExecutionError, match="expects indices in"):
                executable.run([i32(9, 0).reshape(2, 1), i32(0, 0), cache, i32(0, 0)])
        else:
            length = data.draw(st.integers(1, 3))
            position = np.array(data.draw(st.tuples(*[st.integers(0, 10 - length)] * 2)), np.int32)
            ids = np.array(data.draw(st.lists(st.integers(0, 8), min_size=2 * length, max_size=2 * length)), np.int32)
            inputs = [ids.reshape(2, length), position]
            logits, new = executable.run([*inputs, cache, i32(0, length - 1)])
            expected, expected_new = interpreter.run(plan, [*inputs, expected_cache, i32(0, length - 1)])
            np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
            handles.append((new, expected_new))
    for cache, expected_cache in handles:
        np.testing.assert_allclose(contents(cache), expected_cache, rtol=1e-3, atol=1e-3)
    for array, expected_array in exposed:
        np.testing.assert_allclose(array, expected_array, rtol=1e-3, atol=1e-3)


def test_two_branches_from_one_handle() -> None:
    shape = Shape()
    executable = Executable(model_graph(shape))
    _, root = executable.run([i32(1, 2, 3).reshape(1, 3), i32(0), empty_cache(shape, "f32"), i32(2)])
    before = contents(root)
    first, a = executable.run([i32(4).reshape(1, 1), i32(3), root, i32(0)])
    second, b = executable.run([i32(5).reshape(1, 1), i32(3), root, i32(0)])
    again, _ = executable.run([i32(4).reshape(1, 1), i32(3), root, i32(0)])
    assert first.tobytes() == again.tobytes() and first.tobytes() != second.tobytes()
    assert contents(a).tobytes() != contents(b).tobytes()
    assert contents(root).tobytes() == before.tobytes()


def test_going_on_copies_nothing() -> None:
    shape = Shape()
    executable = Executable(model_graph(shape))
    _, cache = executable.run([i32(1).reshape(1, 1), i32(0), empty_cache(shape, "f32"), i32(0)])
    memory = cache._memory
    for position in range(1, 5):
        old = cache
        _, cache = executable.run([i32(1).reshape(1, 1), i32(position), cache, i32(0)])
        assert cache._memory is memory and old._memory is None


def session(graph: Graph) -> api.RuntimeSession:
    return api.RuntimeSession(api.RuntimeSessionOptions(1, 0), api.Executable.of(Executable(graph)))


def memref(array: np.ndarray) -> api.MemRefValue:
    return api.MemRefValue.view_of(array, api.PointerType.device)


def test_a_cache_that_was_handed_out_stays_as_it_is() -> None:
    shape = Shape()
    running = session(model_graph(shape))
    arguments = [memref(i32(1).reshape(1, 1)), memref(i32(0))]
    _, cache = running.execute_function("main", [*arguments, memref(empty_cache(shape, "f32")), memref(i32(0))])
    assert isinstance(cache, api.MemRefValue) and cache.address_space is api.PointerType.device
    assert tuple(cache.shape) == shape.cache and cache.dtype is api.ScalarTypeCode.f32
    view = np.from_dlpack(cache)
    before = view.copy()
    step = [memref(i32(2).reshape(1, 1)), memref(i32(0))]
    _, new = running.execute_function("main", [*step, cache, memref(i32(0))])
    np.testing.assert_array_equal(view, before)
    host = api.RuntimeClient().copy_to_host(new)
    assert host.address_space is api.PointerType.host and not np.array_equal(host.array, before)
    np.testing.assert_array_equal(np.asarray(new), host.array)


@pytest.mark.parametrize(
    ("ids", "position", "last", "message"),
    [
        ([50], [0], [0], r"gather of token embeddings expects indices in \[-50, 50\) but got 50"),
        ([-51], [0], [0], r"gather of token embeddings expects indices in \[-50, 50\) but got -51"),
        ([1], [32], [0], r"gather of position embeddings expects indices in \[-32, 32\) but got 32"),
        ([1, 1], [31], [0], r"gather of position embeddings expects indices in \[-32, 32\) but got 32"),
        ([1], [0], [1], r"gather of last rows expects indices in \[-1, 1\) but got 1"),
    ],
)
def test_indices_outside_of_their_tables(ids: list[int], position: list[int], last: list[int], message: str) -> None:
    shape = Shape()
    running = session(model_graph(shape))
    inputs = [memref(i32(*ids).reshape(1, -1)), memref(i32(*position)), memref(empty_cache(shape, "f32"))]
    with pytest.raises(api.MTRTException, match=message):
        running.execute_function("main", [*inputs, memref(i32(*last))])


def test_other_operations_are_interpreted() -> None:
    shape = Shape()
    graph = model_graph(shape, cache_dtype=None)
    (logits,) = graph.outputs
    double = graph.add(Operation("element_wise", [logits, logits], {"operation": "kSUM"}, [logits.type]))
    graph.outputs = double.results
    ids = i32(1, 2).reshape(1, 2)
    (twice,) = Executable(graph).run([ids])
    (once,) = Executable(model_graph(shape, cache_dtype=None)).run([ids])
    np.testing.assert_allclose(twice, 2 * np.asarray(once), rtol=1e-4, atol=1e-4)


def test_an_executable_that_was_saved_runs_natively_too() -> None:
    shape = Shape()
    graph = model_graph(shape, weight_dtype="i4", scales="32", cache_dtype="bf16")
    inputs = [i32(1, 2).reshape(1, 2), i32(0), empty_cache(shape, "bf16"), i32(1)]
    fresh, _ = Executable(graph).run(inputs)
    loaded = api.Executable(Executable(graph).serialize()).portable
    logits, cache = loaded.run(inputs)
    assert isinstance(cache, Version) and logits.tobytes() == fresh.tobytes()


PROGRAM = """
import numpy as np
from fused_graphs import Shape, model_graph
from nvtripy_portable.executable import Executable
for _ in range(2):
    print(Executable(model_graph(Shape(), cache_dtype=None)).run([np.ones((1, 2), np.int32)])[0].sum())
"""


def run_program(start: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", start + PROGRAM],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def test_without_the_compiled_module_the_slow_path_says_so_once() -> None:
    done = run_program("import sys; sys.modules['nvtripy_portable._native'] = None\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "running on the slow path (NumPy), because the native executor cannot be loaded" in done.stderr


def test_a_wrong_instruction_set_or_number_of_threads() -> None:
    wrong = run_program(NVTRIPY_PORTABLE_ISA="sse9")
    assert wrong.returncode and "expected NVTRIPY_PORTABLE_ISA to be one of" in wrong.stderr.splitlines()[-1]
    wrong = run_program(NVTRIPY_PORTABLE_THREADS="none")
    assert wrong.returncode and "expected NVTRIPY_PORTABLE_THREADS to be 1 to 1024" in wrong.stderr.splitlines()[-1]
    assert run_program(NVTRIPY_PORTABLE_THREADS="3").returncode == 0
