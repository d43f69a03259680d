"""Every kernel against its meaning in fused.py, on fresh random inputs, on every instruction set that the CPU has and
those that are emulated; the quick tests, on the best."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fused_graphs import (
    WEIGHT_DTYPES,
    Shape,
    add_input,
    attention_attributes,
    constant,
    linear_graph,
    model_graph,
    random_weight,
)
from selection import partly_slow

from nvtripy_portable import fused, interpreter, reference
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.fused import ACTIVATIONS
from nvtripy_portable.graph import DTYPES, Graph, Operation, TensorType, Value
from nvtripy_portable.plan import Plan

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

ISAS = native.testable_isas()
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 64)

#: Float32 sums in another order: some last places of the largest term.
EXACT = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=[pytest.param(name, marks=() if name == ISAS[0] else pytest.mark.slow) for name in ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> object:
    before = native.threads()
    yield
    native.set_threads(before)


def both(graph: Graph, inputs: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the native executor gives, the same on one, two and three threads, and what the reference gives."""
    executor = Executor.of(graph)
    assert executor is not None
    results = []
    for count in (1, 2, 3):
        native.set_threads(count)
        results.append(
            [np.asarray(each if isinstance(each, np.ndarray) else each.copy()) for each in executor.run(inputs)]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes(), "the result depends on the number of threads"
    return results[0], interpreter.run(Plan(graph), inputs)


def check(graph: Graph, inputs: list[np.ndarray], tolerance: dict[str, float] | np.ndarray) -> None:
    """Compares all outputs; an array is the absolute tolerance of each output feature."""
    for ours, expected in zip(*both(graph, inputs), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        if isinstance(tolerance, np.ndarray):
            assert (np.abs(ours - expected) <= tolerance + 2e-5 * np.abs(expected)).all()
        else:
            np.testing.assert_allclose(ours.astype(np.float32), expected.astype(np.float32), **tolerance)


def tolerance_of(
    weight: np.ndarray, scale: np.ndarray | None, dtype: str, x: np.ndarray
) -> dict[str, float] | np.ndarray:
    """int8 and int4 weights meet inputs rounded to 16 bits of the largest among 128. The errors are independent, and
    uniform within a step of that grid: a product is off by the step / sqrt(12) * the norm of the weights, on average.
    Here six times as much is allowed."""
    if dtype not in ("i8", "i4"):
        return EXACT
    rows = reference.widened_rows(weight, scale, dtype, x.shape[-1])
    step = np.abs(x).max() / 32767
    return 6 * step / np.sqrt(12) * np.linalg.norm(rows, axis=1) + 1e-6


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_products(isa: str, weight_dtype: str, tokens: int) -> None:
    random = np.random.default_rng([tokens, *weight_dtype.encode()])
    for rows, width in ((1, 1), (3, 17), (13, 130), (50, 256), (30, 771), (7, 1600)):
        for scales in ("none", "scalar", "rows"):
            weight, scale = random_weight(random, weight_dtype, rows, width, scales)
            x = random.standard_normal((1, tokens, width)).astype(np.float32)
            if scale is None and weight_dtype in ("i8", "i4", "f8e4m3fn"):
                x /= 64 if weight_dtype != "i4" else 4
            graph = linear_graph(weight, scale, weight_dtype, width)
            check(graph, [x], tolerance_of(weight, scale, weight_dtype, x))


@pytest.mark.parametrize("tokens", (1, 2, 4, 5, 17))
@pytest.mark.parametrize("block", (6, 32, 48, 64, 96, 128, 160, 256))
@pytest.mark.parametrize("weight_dtype", ("i8", "i4", "f8e4m3fn", "f16"))
def test_scales_of_blocks(isa: str, weight_dtype: str, block: int, tokens: int) -> None:
    random = np.random.default_rng([tokens, block, *weight_dtype.encode()])
    for rows, blocks in ((1, 1), (9, 3), (26, 7)):
        width = block * blocks
        weight, scale = random_weight(random, weight_dtype, rows, width, str(block))
        x = random.standard_normal((1, tokens, width)).astype(np.float32)
        if weight_dtype == "f16":
            weight = (weight * np.float16(16)).astype(np.float16)
        graph = linear_graph(weight, scale, weight_dtype, width)
        check(graph, [x], tolerance_of(weight, scale, weight_dtype, x))


@pytest.mark.parametrize("tokens", (1, 3, 5, 6, 7, 64, 257))
@pytest.mark.parametrize("weight_dtype", ("i8", "i4"))
def test_inputs_of_16_bits_become_integers(isa: str, weight_dtype: str, tokens: int) -> None:
    random = np.random.default_rng([tokens, *weight_dtype.encode()])
    scales = (*("none", "scalar", "rows"), *("2", "32", "48", "64", "96", "128", "160", "192", "256"))
    for rows, width in ((1, 1), (13, 130), (65, 256), (130, 771), (3, 1600)):
        for scale_of in scales[:3]:
            check_integers(random, weight_dtype, rows, width, scale_of, tokens)
    for rows, blocks in ((1, 1), (70, 3)):
        for scale_of in scales[3:]:
            check_integers(random, weight_dtype, rows, int(scale_of) * blocks, scale_of, tokens)


def check_integers(
    random: np.random.Generator, weight_dtype: str, rows: int, width: int, scales: str, tokens: int
) -> None:
    weight, scale = random_weight(random, weight_dtype, rows, width, scales)
    x = random.standard_normal((1, tokens, width)).astype(np.float16)
    if scale is None:
        x /= np.float16(64 if weight_dtype == "i8" else 4)
    graph = linear_graph(weight, scale, weight_dtype, width, dtype="f16")
    check(graph, [x], tolerance_of(weight, scale, weight_dtype, x))


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_more_tokens_than_meet_a_panel_together(isa: str, weight_dtype: str) -> None:
    random = np.random.default_rng([*weight_dtype.encode()])
    for tokens, rows, width in ((257, 63, 129), (300, 65, 128), (515, 8, 40)):
        weight, scale = random_weight(random, weight_dtype, rows, width, "rows")
        x = random.standard_normal((1, tokens, width)).astype(np.float32)
        check(linear_graph(weight, scale, weight_dtype, width), [x], EXACT)


@pytest.mark.parametrize("tokens", (1, 3, 6, 17))
@pytest.mark.parametrize("weight_dtype", ("f16", "i8", "i4", "f8e4m3fn"))
@pytest.mark.parametrize("input_dtype", (None, "i8", "f8e4m3fn"))
def test_inputs_are_scaled_and_rounded(isa: str, weight_dtype: str, input_dtype: str | None, tokens: int) -> None:
    random = np.random.default_rng([tokens, *weight_dtype.encode(), *(input_dtype or "").encode()])
    for rows, width in ((5, 33), (40, 384)):
        for per_token in (False, True):
            weight, scale = random_weight(random, weight_dtype, rows, width, "rows")
            x = (3 * random.standard_normal((1, tokens, width))).astype(np.float32)
            x[0, 0, 0] = 1e4  # beyond what the scale can hold
            x[0, -1] *= 1e-9  # next to nothing
            graph = linear_graph(
                weight,
                scale,
                weight_dtype,
                width,
                pre_scale=random.uniform(0.5, 2, width).astype(np.float32),
                input_dtype=input_dtype,
                input_scale=None if per_token or input_dtype is None else np.array(0.04, np.float32),
            )
            ours, expected = (each[0] for each in both(graph, [x]))
            # A product of the pre-scale that falls between two steps may be rounded to either by a last place.
            largest = np.abs(expected).max(axis=-1, keepdims=True)
            assert (np.abs(ours - expected) <= 3e-4 * largest + 1e-6).all()


@pytest.mark.parametrize("tokens", (1, 2, 9))
@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_what_follows_a_product(isa: str, activation: str | None, tokens: int) -> None:
    random = np.random.default_rng(tokens)
    for rows, width in ((1, 5), (37, 64)):
        weight, scale = random_weight(random, "f32", rows, width, "none")
        bias = (4 * random.standard_normal(rows)).astype(np.float32)
        norm = (random.standard_normal(width).astype(np.float32), random.standard_normal(width).astype(np.float32))
        x = (1 + random.standard_normal((1, tokens, width))).astype(np.float32)
        for arguments in (
            {},
            {"bias": bias},
            {"bias": bias, "has_residual": True, "norm": norm},
            {"has_residual": True, "norm": norm[:1]},
        ):
            graph = linear_graph(weight, scale, "f32", width, activation=activation, **arguments)
            check(graph, [x], EXACT)


@pytest.mark.parametrize("tokens", (1, 3, 6, 17))
@pytest.mark.parametrize("weight_dtype", ("f32", "f16", "i8", "i4"))
@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_gates(isa: str, gate: str, weight_dtype: str, tokens: int) -> None:
    random = np.random.default_rng([tokens, *gate.encode()])
    for rows, width in ((1, 1), (5, 33), (40, 384)):
        weight, scale = random_weight(random, weight_dtype, rows, width, "rows")
        x = random.standard_normal((1, tokens, 2 * width)).astype(np.float16)
        for pre_scale in (None, random.uniform(0.5, 2, width).astype(np.float32)):
            graph = linear_graph(weight, scale, weight_dtype, width, gate=gate, pre_scale=pre_scale, dtype="f16")
            gated = fused.ACTIVATIONS[gate](x[..., :width].astype(np.float32)) * x[..., width:]
            tolerance = tolerance_of(weight, scale, weight_dtype, gated * 2)
            check(graph, [x], tolerance)


def test_activations_far_from_zero(isa: str) -> None:
    x = np.concatenate((-np.geomspace(1e-6, 300, 100), np.geomspace(1e-6, 300, 100)))
    for activation in ACTIVATIONS:
        graph = linear_graph(np.ones((1, 1), np.float32), None, "f32", 1, activation=activation)
        check(graph, [x.astype(np.float32).reshape(1, -1, 1)], {"rtol": 1e-5, "atol": 1e-6})


def test_every_float8(isa: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    for tokens in (1, 5):
        weight = codes.reshape(256, 1)
        graph = linear_graph(weight, None, "f8e4m3fn", 1)
        ours, expected = both(graph, [np.ones((1, tokens, 1), np.float32)])
        np.testing.assert_array_equal(ours[0], expected[0])
        assert np.isnan(ours[0]).sum() == 2 * tokens


def test_what_is_not_finite_stays_so(isa: str) -> None:
    random = np.random.default_rng(0)
    for weight_dtype in WEIGHT_DTYPES:
        weight, scale = random_weight(random, weight_dtype, 6, 300, "rows")
        for tokens in (2, 6):
            x = random.standard_normal((1, tokens, 300)).astype(np.float32)
            x[0, 1, 7] = np.nan
            ours, expected = both(linear_graph(weight, scale, weight_dtype, 300), [x])
            assert (np.isnan(ours[0]) == np.isnan(expected[0])).all()


@pytest.mark.parametrize("width", (1, 3, 16, 33, 768))
@pytest.mark.parametrize("kind", ("layer_norm", "rms_norm"))
def test_norms(isa: str, kind: str, width: int) -> None:
    random = np.random.default_rng(width)
    graph = Graph()
    x = add_input(graph, "x", "f16", (None, width))
    numbers = [random.standard_normal(width).astype(np.float32) for _ in range(2 if kind == "layer_norm" else 1)]
    operands = [x, *(constant(graph, each) for each in numbers)]
    type = TensorType("f16", x.type.shape)
    attributes = {"epsilon": 1e-5, "dtype": "f16"}
    graph.outputs = [graph.add(Operation(kind, operands, attributes, [type])).results[0]]
    for rows in (1, 2, 9, 64):
        check(graph, [(5 + random.standard_normal((rows, width))).astype(np.float16)], {"rtol": 2e-3, "atol": 2e-3})


@pytest.mark.parametrize(
    ("tables", "places"), [*((dtype, "bf16") for dtype in WEIGHT_DTYPES), ("i8", "i8"), ("f16", "i8")]
)
def test_embedding_takes_indices_as_numpy_does(isa: str, tables: str, places: str) -> None:
    random = np.random.default_rng(1)
    for width in (1, 31, 64):
        graph = Graph()
        idx, position = add_input(graph, "idx", "i32", (2, None)), add_input(graph, "position", "i32", (2,))
        weight, scale = random_weight(random, tables, 11, width, "rows")
        positions, position_scale = random_weight(random, places, 20, width, "rows" if places == "i8" else "none")
        operands = [idx, position, *(constant(graph, each) for each in (weight, scale, positions, position_scale))]
        attributes = {"weight_dtype": tables, "position_dtype": places, "width": width, "dtype": "f32"}
        type = TensorType("f32", (*idx.type.shape, width))
        graph.outputs = [graph.add(Operation("embedding", operands, attributes, [type])).results[0]]
        ids = np.array([[0, 10, -1, -11, 5], [1, 2, 3, 4, 5]], np.int32)
        check(graph, [ids, np.array([15, -5], np.int32)], EXACT)
        check(graph, [ids[:, :1], np.array([19, 0], np.int32)], EXACT)


@pytest.mark.parametrize("tokens", partly_slow(TOKENS, (1, 3, 8, 17)))
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        ("f32", None),
        ("f16", None),
        ("bf16", None),
        ("i8", "i8"),
        ("f16", "i8"),
        ("f16", "f8e4m3fn"),
        ("f32", "f8e4m3fn"),
    ],
)
def test_attention_over_a_cache(isa: str, dtype: str, rounding: str | None, tokens: int) -> None:
    for heads, size, context in ((1, 3, 70), (3, 16, 600), (2, 64, 300), (1, 80, 130), (1, 136, 70)):
        check_attention([tokens, *dtype.encode()], dtype, rounding, tokens, heads, heads, size, context)


_CACHES = [("f16", None), ("bf16", None), ("i8", "i8")]
# What a window does is the same for every type of numbers: all of them meet all lengths in float32.
_WINDOWS = [(window, "f32", None) for window in (None, 1, 5, 64, 100, 257, 1000)]
_TYPES = [(window, dtype, rounding) for window in (None, 64) for dtype, rounding in _CACHES]


@pytest.mark.parametrize(
    ("window", "dtype", "rounding", "tokens"),
    [
        pytest.param(*case, tokens, marks=() if case in _WINDOWS and tokens in (1, 3, 17) else pytest.mark.slow)
        for case, lengths in [*((each, TOKENS) for each in _WINDOWS), *((each, (1, 3, 8, 17, 64)) for each in _TYPES)]
        for tokens in lengths
    ],
)
def test_attention_of_relatives(isa: str, window: int | None, dtype: str, rounding: str | None, tokens: int) -> None:
    """Groups of heads that share keys, windows shorter and longer than what is there, heads that turn in part."""
    for heads, groups, size, context, half in ((4, 1, 16, 600, 8), (6, 2, 20, 300, 3), (9, 3, 64, 320, 32)):
        seed = [tokens, window or 0, *dtype.encode()]
        check_attention(seed, dtype, rounding, tokens, heads, groups, size, context, half=half, window=window)
        check_attention(seed, dtype, rounding, tokens, heads, groups, size, context, window=window)


def attention_graph(
    heads: int,
    groups: int,
    size: int,
    cache: tuple[str, int] | None,
    rounding: str | None,
    half: int,
    window: int | None,
) -> Graph:
    """Of two sequences; ``cache`` is its type and how many tokens it holds."""
    graph = Graph()
    qkv = add_input(graph, "qkv", "f32", (2, None, (heads + 2 * groups) * size))
    operands: list[Value | None] = [qkv, None, None]
    types = [TensorType("f32", (*qkv.type.shape[:2], heads * size))]
    if cache is not None:
        position = add_input(graph, "position", "i32", (2,))
        operands[1:] = [add_input(graph, "cache", cache[0], (2, 2, 2, groups, cache[1], size)), position]
        assert operands[1] is not None
        types.append(operands[1].type)
    operands += [constant(graph, np.array(each, np.float32)) if rounding else None for each in (0.03, 0.05)]
    operands.append(constant(graph, (0.5 ** np.arange(half)).astype(np.float32)) if half else None)
    attributes = attention_attributes(
        heads, size, groups=groups, layer=int(cache is not None), rounding=rounding, window=window
    )
    graph.outputs = graph.add(Operation("attention", operands, attributes, types)).results
    return graph


def check_attention(
    seed: list[int],
    dtype: str,
    rounding: str | None,
    tokens: int,
    heads: int,
    groups: int,
    size: int,
    context: int,
    half: int = 0,
    window: int | None = None,
) -> None:
    random = np.random.default_rng(seed)
    graph = attention_graph(heads, groups, size, (dtype, context), rounding, half, window)
    shape = (2, 2, 2, groups, context, size)
    before = 100 * random.standard_normal(shape) if rounding == "i8" else random.standard_normal(shape)
    before = before.astype(np.float32).clip(-127, 127).astype(DTYPES[dtype])
    x = random.standard_normal((2, tokens, (heads + 2 * groups) * size)).astype(np.float32)
    for position_of in ((0, context - tokens), (min(257, context - tokens), 5), (context - 1, -1)):
        ours, expected = both(graph, [x, np.array(position_of, np.int32), before])
        caches = [each[1].astype(np.float32) for each in (ours, expected)]
        if half:
            # A cosine differs by its last place from NumPy's, and a turned key by a step of its type then.
            step = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "i8": 1.0}[dtype]
            np.testing.assert_allclose(*caches, rtol=step, atol=step)
            assert (caches[0] != caches[1]).mean() < (1.0 if dtype == "f32" else 0.01)
        else:
            np.testing.assert_array_equal(*caches)
        tolerance = 1e-4 if not half or dtype == "f32" else {"f16": 1e-3, "bf16": 1e-2, "i8": 5e-2}[dtype]
        np.testing.assert_allclose(ours[0], expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rounding", (None, "i8", "f8e4m3fn"))
@pytest.mark.parametrize("window", (None, 3, 70))
def test_attention_without_a_cache(isa: str, window: int | None, rounding: str | None) -> None:
    random = np.random.default_rng(3)
    for tokens in (1, 2, 5, 64, 300):
        for heads, groups, half in ((3, 3, 0), (4, 2, 0), (4, 2, 3)):
            graph = attention_graph(heads, groups, 8, None, rounding, half, window)
            x = random.standard_normal((2, tokens, (heads + 2 * groups) * 8)).astype(np.float32)
            # Rounding makes a step of a cosine's last place.
            tolerance = 1e-4 if not half or rounding is None else 2e-2
            check(graph, [x], {"rtol": tolerance, "atol": tolerance})


def test_the_whole_model_on_every_instruction_set(isa: str) -> None:
    shape = Shape(batch=2)
    graph = model_graph(shape, cache_dtype=None)
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (2, 20)).astype(np.int32)
    check(graph, [ids], {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize(("weight_dtype", "scales"), [("i8", "rows"), ("i4", "32"), ("f16", "none")])
def test_a_model_in_half_precision(isa: str, weight_dtype: str, scales: str) -> None:
    shape = Shape(batch=2, context=64)
    graph = model_graph(shape, weight_dtype=weight_dtype, scales=scales, cache_dtype=None, dtype="f16")
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (2, 50)).astype(np.int32)
    check(graph, [ids], {"rtol": 2e-2, "atol": 2e-2})


def test_copies_leave_out_zeros() -> None:
    random = np.random.default_rng(6)
    for count in (1, 4095, 4096, 4097, 50000):
        source = random.integers(0, 255, count).astype(np.uint8)
        source[: count // 2] = 0
        target = np.zeros_like(source)
        native.copy_nonzero(target, source)
        np.testing.assert_array_equal(target, source)


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"expected NVTRIPY_PORTABLE_ISA to be one of .* but got 'sse9'"):
        native.kernels_for("sse9")


def test_emulated_tiles_are_never_chosen_by_themselves() -> None:
    assert "amx-emulated" in native.testable_isas()
    assert "amx-emulated" not in native.available_isas()
    assert native.kernels_for("") == native.available_isas()[0]
    assert native.kernels_for("amx-emulated") == "amx-emulated"
