"""Plug-ins in C: in the middle of native programs, on arrays where there is no such program, and in a GPT."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest
from plugin_library import compiled_library
from random_gpt import random_model

import model
from engine import _inputs
from model import GPTConfig
from nvtripy_portable import plugins
from nvtripy_portable.cpu import executor as executor_module
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.decoder import Decoder, Piece
from nvtripy_portable.plugins import Field, PluginError, registry

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

ARCHITECTURE: dict[str, Any] = {"vocab_size": 50, "n_positions": 12, "n_layer": 2, "n_head": 2, "n_embd": 128}
X = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
LONG = ((1, 2, 8), (1, 5, 8), 32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_library(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    threads = native.threads()
    yield
    native.set_threads(threads)


@pytest.fixture(params=[True, False], ids=["native", "NumPy"])
def is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there are native programs; without them a plug-in's native function gets arrays of the plan's."""
    if not request.param:
        monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
    return bool(request.param)


def call(name: str, *inputs: tp.Tensor, outputs: Any = None, **fields: Any) -> Any:
    outputs = outputs or [(inputs[0].rank, inputs[0].dtype)]
    return tp.plugin(name=name, inputs=list(inputs), output_info=outputs, **fields)


def gelu(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return (0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))).astype(np.float32)


def compiled(function: Any, dtype: Any = tp.float32, shape: Any = LONG) -> tp.Executable:
    return tp.compile(function, args=[tp.InputInfo(shape, dtype=dtype)])


def runs_natively(executable: tp.Executable) -> bool:
    return isinstance(executable._executable.portable.runner(), Executor)


def run(executable: tp.Executable, x: np.ndarray = X) -> Any:
    found = executable(tp.copy(tp.Tensor(x), tp.device("gpu")))
    return tuple(map(np.from_dlpack, found)) if isinstance(found, tuple) else np.from_dlpack(found)


def test_a_function_between_others(library: Path, is_native: bool) -> None:
    plugins.register("Gelu", native=(library, "gelu"), row_wise=True)
    weight, bias = (
        np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, shape in ((1, (32, 16)), (2, (16,)))
    )
    product, shift = tp.Tensor(weight), tp.Tensor(bias)
    executable = compiled(lambda x: call("Gelu", call("Gelu", x) @ product + shift) + shift)
    assert runs_natively(executable) == is_native
    np.testing.assert_allclose(run(executable), gelu(gelu(X) @ weight + bias) + bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.from_dlpack(call("Gelu", tp.Tensor(X))), gelu(X), rtol=1e-5, atol=1e-6)


def test_weights_are_whole(library: Path, is_native: bool) -> None:
    """Inputs without rows are constants; a learner's layer norm and linear layer, with their fields."""
    fields = {"epsilon": Field("float32", default=1e-5)}
    plugins.register("LayerNorm", native=(library, "layer_norm"), fields=fields, inputs=3, row_wise=[0])
    plugins.register(
        "Linear", native=(library, "linear"), inputs=2, row_wise=[0], shapes=lambda x, weight: (*x[:-1], weight[0])
    )
    random = np.random.default_rng(3)
    scale, shift, weight = (random.standard_normal(shape).astype(np.float32) for shape in (32, 32, (16, 32)))
    constants = [tp.Tensor(each) for each in (scale, shift, weight)]
    offset = tp.Tensor(np.ones(16, np.float32))

    def model(x: tp.Tensor) -> tp.Tensor:
        normed = call("LayerNorm", x, *constants[:2], epsilon=0.1)
        return tp.relu(call("Linear", normed, constants[2]) + offset)

    executable = compiled(model)
    assert runs_natively(executable) == is_native
    normed = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 0.1) * scale + shift
    np.testing.assert_allclose(run(executable), np.maximum(normed @ weight.T + 1, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_wise", [True, False])
def test_two_outputs(library: Path, is_native: bool, row_wise: bool) -> None:
    plugins.register("Both", native=(library, "sum_and_difference"), inputs=2, outputs=2, row_wise=row_wise)
    plugins.register("Gelu", native=(library, "gelu"), row_wise=row_wise)

    def model(x: tp.Tensor) -> Any:
        sums, differences = call("Both", x, call("Gelu", x), outputs=[(3, tp.float32)] * 2)
        return call("Gelu", sums), differences

    executable = compiled(model)
    assert runs_natively(executable) == is_native
    sums, differences = run(executable)
    np.testing.assert_allclose(sums, gelu(X + gelu(X)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(differences, X - gelu(X), rtol=1e-5, atol=1e-5)

    only = compiled(lambda x: call("Both", x, x + 0.0, outputs=[(3, tp.float32)] * 2)[1])
    np.testing.assert_array_equal(run(only), np.zeros_like(X))


FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
OTHERS = {"int8": np.int8, "int32": np.int32, "int64": np.int64, "bool": np.bool_}


@pytest.mark.parametrize("dtype", FLOATS | OTHERS)
def test_every_type(library: Path, is_native: bool, dtype: str) -> None:
    count = ctypes.c_int64(0)
    plugins.register("Copy", native=(library, "copy"), row_wise=True, context=ctypes.addressof(count))
    kind = getattr(tp, dtype)
    executable = compiled(lambda x: call("Copy", x), kind)
    assert runs_natively(executable) == (is_native and dtype in FLOATS)
    values = (4 * X).astype((FLOATS | OTHERS)[dtype])
    given = tp.cast(tp.Tensor(values.astype(np.float32)), kind)
    found = executable(given.eval())
    np.testing.assert_array_equal(np.from_dlpack(tp.cast(found, tp.float32)), values.astype(np.float32))
    assert count.value == 1


def test_casts_around_a_plug_in_are_taken_in(library: Path, is_native: bool) -> None:
    plugins.register("Gelu", native=(library, "gelu"), row_wise=True)
    weight = tp.cast(tp.Tensor(np.eye(32, dtype=np.float32)), tp.float16)

    def model(x: tp.Tensor) -> tp.Tensor:
        return tp.cast(call("Gelu", tp.cast(x @ weight, tp.float32)), tp.float16) @ weight + x

    executable = compiled(model, tp.float16)
    assert runs_natively(executable) == is_native
    kinds = [each.kind for each in executable._executable.portable.graph.operations if each.kind != "constant"]
    assert kinds == ["linear", "plugin", "finish", "linear"]
    narrow = X.astype(np.float16)
    np.testing.assert_allclose(run(executable, narrow), gelu(narrow) + narrow, rtol=2e-3, atol=2e-3)


def test_fields_and_shapes(library: Path, is_native: bool) -> None:
    fields = {
        "group": Field("int32", length=0),
        "scale": Field("float32", default=2),
        "name_of_it": "text",
        "size": "dims",
        "none": Field("float16", length=0, default=()),
    }
    for row_wise, shape in ((True, r"\[10\]\[32\]"), (False, r"\[2\]\[5\]\[32\]")):
        plugins.register("Describe", native=(library, "describe"), fields=fields, row_wise=row_wise, replace=True)
        executable = compiled(lambda x: call("Describe", x, group=[3, -1], name_of_it="é", size=(4, 5)))
        expected = rf"'Describe' \(version 1\): group: 3 -1; scale: 2.00; name_of_it: é; size: 4 5; none:; {shape}"
        with pytest.raises(tp.TripyException, match=expected) as failed:
            run(executable)
        assert "test_plugins_native.py" in str(failed.value)


def test_errors_without_a_text_and_python_functions(library: Path, is_native: bool) -> None:
    plugins.register("Silent", native=(library, "silent"), row_wise=True)
    with pytest.raises(tp.TripyException, match=r"plug-in 'Silent' \(version 1\): error 3"):
        run(compiled(lambda x: call("Silent", x)))
    calls = []
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda call: calls.append(call) or 0)
    plugins.register("Called", native=function)
    run(compiled(lambda x: call("Called", x)))
    assert len(calls) == 1


def test_effects_stay_in_order(is_native: bool) -> None:
    """Whatever is made of what stands between and after them."""
    seen: list[str] = []
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    functions = {each: signature(lambda call, each=each: seen.append(each) or 0) for each in ("Send", "Receive", "Sum")}
    for name, function in functions.items():
        plugins.register(name, native=function, row_wise=True, has_effects=True)
    weight = tp.Tensor(np.eye(32, dtype=np.float32))

    def model(x: tp.Tensor) -> tp.Tensor:
        hidden = call("Receive", call("Send", x) @ weight)
        return tp.cast(tp.cast(call("Sum", hidden @ weight) + x, tp.float16), tp.float32)

    executable = compiled(model)
    for _ in range(2):
        run(executable)
    assert seen == ["Send", "Receive", "Sum"] * 2


def test_the_reference_stands_in_where_no_program_can_be(library: Path) -> None:
    """With both functions the native one runs in programs, the other elsewhere."""
    calls = []
    plugins.register(
        "Gelu", native=(library, "gelu"), compute=lambda x: (calls.append(None), gelu(x))[1], row_wise=True
    )
    np.testing.assert_allclose(run(compiled(lambda x: call("Gelu", x))), gelu(X), rtol=1e-5, atol=1e-6)
    assert not calls
    transposed = compiled(lambda x: call("Gelu", tp.transpose(x, 0, 2)))
    np.testing.assert_allclose(run(transposed), gelu(X.swapaxes(0, 2)), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


# --- in a GPT ---------------------------------------------------------------------------------------------------------


def plugged(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """An activation of the model that is a plug-in of float32."""

    def activation(x: tp.Tensor) -> tp.Tensor:
        return tp.cast(call(name, tp.cast(x, tp.float32)), x.dtype)

    monkeypatch.setitem(model.ACTIVATIONS, name, activation)
    return name


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "int8": {"quant_mode": "int8-weight-only", "dtype": "float16"},
    "rotary": {"norm": "rms", "n_kv_head": 1, "position_embedding": "rotary", "mlp_bias": False, "dtype": "float32"},
}


def decoders(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str) -> tuple[Decoder, Decoder, Any]:
    """The model as it is, and with the plug-in for its GELU."""
    found = []
    for activation in ("gelu_new", plugged(monkeypatch, name)):
        config = GPTConfig(**ARCHITECTURE | options | {"activation_function": activation, "n_positions": 40})
        executable = tp.compile(random_model(config), args=_inputs(config, 2))
        found.append(Decoder.of(executable, page_tokens=8, pages=40))
    first, second = found
    assert first is not None and second is not None
    return first, second, executable


def logits(decoder: Decoder, prompt: list[int], cuts: list[int], generated: int) -> np.ndarray:
    """Of a prompt in pieces and what the model makes of it, each token's; the sequence's pages are given back."""
    table = decoder.pool.take(5)
    rows = []
    for begin, end in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
        rows += [*decoder.step([Piece(prompt[begin:end], begin, table, rows=range(end - begin))])]
    for position in range(len(prompt), len(prompt) + generated):
        rows += [*decoder.step([Piece([int(rows[-1].argmax())], position, table, generated=True)])]
    decoder.pool.release(table)
    return np.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["C", "NumPy"])
def test_a_gpt_says_the_same(library: Path, monkeypatch: pytest.MonkeyPatch, variant: str, kind: str) -> None:
    meaning: dict[str, Any] = {"native": (library, "gelu")} if kind == "C" else {"compute": gelu}
    plugins.register("Gelu", **meaning, row_wise=True)
    plain, with_plugin, executable = decoders(monkeypatch, VARIANTS[variant], "Gelu")
    assert runs_natively(executable) == (kind == "C")
    expected, found = (logits(each, [1, 5, 9, 2, 7, 3, 3, 8, 4], [4], 6) for each in (plain, with_plugin))
    is_exact = VARIANTS[variant]["dtype"] == "float32"
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() * (1e-4 if is_exact else 2e-2))
    if is_exact:
        assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_bits_alone_and_in_company(library: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """However a prompt is cut, whatever is computed with it, on any number of threads."""
    plugins.register("Gelu", native=(library, "gelu"), row_wise=True)
    _, decoder, executable = decoders(monkeypatch, {"dtype": dtype}, "Gelu")
    assert runs_natively(executable)
    prompt = [1, 5, 9, 2, 7, 3, 3, 8, 4, 6, 11]
    alone = logits(decoder, prompt, [], 8)
    tokens = [*prompt, *map(int, alone[len(prompt) - 1 : -1].argmax(-1))]
    for threads in (1, 2, 3):
        native.set_threads(threads)
        np.testing.assert_array_equal(logits(decoder, prompt, [1, 7], 8), alone)
        others = [decoder.pool.take(2) for _ in range(7)]
        table = decoder.pool.take(5)
        first = decoder.step([Piece([7] * 9, 0, others[0]), Piece(prompt, 0, table), Piece([3], 0, others[1])])
        np.testing.assert_array_equal(first[1], alone[len(prompt) - 1])
        for position in range(len(prompt), len(tokens)):
            pieces = [Piece([position], 5 + position - len(prompt), each, generated=True) for each in others[:-1]]
            own = Piece([tokens[position]], position, table, generated=True)
            company = [*pieces, own, Piece([1, 2, 3], 0, others[-1])] if position % 2 else [own, *pieces[:2]]
            found = decoder.step(company)
            np.testing.assert_array_equal(found[company.index(own)], alone[position])
        for each in (*others, table):
            decoder.pool.release(each)


def test_a_plug_in_of_whole_sequences(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not row-wise is native in the executable, whose sequences have one length, and not in the decoder."""
    plugins.register("Gelu", native=(library, "gelu"))
    plain, with_plugin, executable = decoders(monkeypatch, {"dtype": "float32"}, "Gelu")
    assert runs_natively(executable)
    expected, found = (logits(each, [1, 5, 9, 2, 7], [3], 3) for each in (plain, with_plugin))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    plugins.register("Means", native=(library, "means"))
    executable = compiled(lambda x: call("Means", x))
    assert runs_natively(executable)
    np.testing.assert_allclose(run(executable), np.repeat(X.mean(1, keepdims=True), 5, axis=1), atol=1e-6)


def test_the_executable_of_a_batch(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called through nvtripy, with its cache as an input and an output."""
    plugins.register("Gelu", native=(library, "gelu"), row_wise=True)
    results = []
    for activation in ("gelu_new", plugged(monkeypatch, "Gelu")):
        config = GPTConfig(**ARCHITECTURE | {"dtype": "float32", "activation_function": activation})
        executable = tp.compile(random_model(config), args=_inputs(config, 2))
        results.append(_generated(executable, config))
    np.testing.assert_allclose(results[1], results[0], atol=1e-4 * np.abs(results[0]).max())


def _generated(executable: tp.Executable, config: GPTConfig) -> np.ndarray:
    cache: Any = np.zeros(config.cache_shape(2), np.float32)
    rows, position = [], 0
    for idx in (np.array([[1, 2, 3], [4, 5, 6]]), np.array([[7], [8]]), np.array([[9], [10]])):
        arrays = (idx, np.full(2, position), np.full(2, idx.shape[1] - 1))
        given = [tp.copy(tp.Tensor(each.astype(np.int32)), tp.device("gpu")) for each in arrays]
        if isinstance(cache, np.ndarray):
            cache = tp.copy(tp.Tensor(cache), tp.device("gpu"))
        found, cache = executable(*given[:2], cache, given[2])
        rows.append(np.from_dlpack(found))
        position += idx.shape[1]
    return np.stack(rows)


def test_a_failure_in_the_middle_changes_no_input(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer has written into the cache already when the second one's plug-in fails."""
    left = ctypes.c_int64(1 << 40)
    context = ctypes.addressof(left)
    plugins.register("Failing", native=(library, "fail_later"), row_wise=True, context=context)
    config = GPTConfig(**ARCHITECTURE | {"dtype": "float32", "activation_function": plugged(monkeypatch, "Failing")})
    executable = tp.compile(random_model(config), args=_inputs(config, 2))

    def step(cache: Any, token: int, position: int) -> Any:
        arrays = (np.full((2, 1), token), np.full(2, position), np.zeros(2))
        given = [tp.copy(tp.Tensor(each.astype(np.int32)), tp.device("gpu")) for each in arrays]
        return executable(*given[:2], cache, given[2])

    empty = tp.copy(tp.Tensor(np.zeros(config.cache_shape(2), np.float32)), tp.device("gpu"))
    _, cache = step(empty, 1, 0)
    expected = np.from_dlpack(step(cache, 2, 1)[0]).copy()
    _, cache = step(cache, 2, 0)  # at a place that was written before
    before = np.from_dlpack(step(cache, 3, 1)[0]).copy()
    left.value = 1
    with pytest.raises(tp.TripyException, match=r"plug-in 'Failing' .*: that was enough"):
        step(cache, 4, 0)
    left.value = 1 << 40
    np.testing.assert_array_equal(np.from_dlpack(step(cache, 3, 1)[0]), before)
    assert not np.array_equal(before, expected)

    decoder = Decoder.of(executable)
    assert decoder is not None
    table = decoder.pool.take(1)
    left.value = 1
    with pytest.raises(PluginError, match=r"plug-in 'Failing' .*: that was enough"):
        decoder.step([Piece([1, 2], 0, table)])


def test_the_reference_in_pages_fails_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: np.ndarray) -> np.ndarray:
        raise OSError("no network")

    plugins.register("Failing", compute=fail, row_wise=True)
    _, decoder, _ = decoders(monkeypatch, {"dtype": "float32"}, "Failing")
    with pytest.raises(PluginError, match=r"plug-in 'Failing' .*: OSError: no network"):
        decoder.step([Piece([1, 2], 0, decoder.pool.take(1))])


def test_a_call_costs_microseconds(library: Path) -> None:
    """A step of a native program: no Python, whatever else the machine does."""
    count = ctypes.c_int64(0)
    plugins.register("Copy", native=(library, "copy"), row_wise=True, context=ctypes.addressof(count))

    def model(x: tp.Tensor) -> tp.Tensor:
        for _ in range(200):
            x = call("Copy", x)
        return x

    runner = compiled(model, shape=(1, 1, 32))._executable.portable.runner()
    x = np.ones((1, 1, 32), np.float32)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        runner.run([x])
        best = min(best, time.perf_counter() - start)
    assert count.value == 20 * 200
    assert best < 200 * 20e-6
