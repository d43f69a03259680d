"""Plug-ins with a meaning in NumPy: what nvtripy calls by a name is what was registered under it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest

from nvtripy_portable import engine_file, plugins
from nvtripy_portable.dims import Symbolic
from nvtripy_portable.plugins import Field, PluginError, calling, registry

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
DTYPES: dict[Any, Any] = {
    tp.float32: np.float32,
    tp.float16: np.float16,
    tp.bfloat16: ml_dtypes.bfloat16,
    tp.int8: np.int8,
    tp.int32: np.int32,
    tp.int64: np.int64,
    tp.bool: np.bool_,
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def call(name: str, *inputs: tp.Tensor, outputs: Any = None, **fields: Any) -> Any:
    outputs = outputs or [(inputs[0].rank, inputs[0].dtype)]
    return tp.plugin(name=name, inputs=list(inputs), output_info=outputs, **fields)


def array(tensor: tp.Tensor) -> np.ndarray:
    return np.from_dlpack(tensor)


def on_device(values: np.ndarray) -> tp.Tensor:
    return tp.copy(tp.Tensor(values), tp.device("gpu"))


def compiled(name: str, shape: Any = ((1, 2, 8), 3), **settings: Any) -> tp.Executable:
    return tp.compile(lambda x: call(name, x, **settings), args=[tp.InputInfo(shape, dtype=tp.float32)])


def test_at_once_and_compiled() -> None:
    plugins.register("Twice", compute=lambda x: 2 * x)
    np.testing.assert_array_equal(array(call("Twice", tp.Tensor(X))), 2 * X)
    twice = compiled("Twice")
    for rows in (1, 2, 8):
        x = np.resize(X, (rows, 3))
        np.testing.assert_array_equal(array(twice(on_device(x))), 2 * x)


def test_among_other_operations() -> None:
    plugins.register("Twice", compute=lambda x: 2 * x)
    model = tp.compile(
        lambda x: tp.reshape(call("Twice", x + 1.0), (-1,)) * 3.0, args=[tp.InputInfo(((1, 2, 8), 3), dtype=tp.float32)]
    )
    np.testing.assert_allclose(array(model(on_device(X))), 6 * (X + 1).reshape(-1), rtol=1e-6)


def test_two_outputs_of_their_own_shapes() -> None:
    """The dimensions that come out take part in shape arithmetic, as far as they are known."""
    plugins.register(
        "SumsAndPairs",
        compute=lambda x: (x.sum(-1), np.concatenate([x, x], axis=0)),
        shapes=lambda x: [x[:-1], (2 * x[0], *x[1:])],
        outputs=2,
    )
    outputs = [(1, tp.float32), (2, tp.float32)]
    sums, pairs = call("SumsAndPairs", tp.Tensor(X), outputs=outputs)
    np.testing.assert_array_equal(array(sums), X.sum(-1))
    np.testing.assert_array_equal(array(pairs), np.concatenate([X, X]))

    def model(x: tp.Tensor) -> tp.Tensor:
        sums, pairs = call("SumsAndPairs", x, outputs=outputs)
        return tp.reshape(pairs, (2, x.shape[0], 3)) + tp.unsqueeze(sums, 1)

    both = tp.compile(model, args=[tp.InputInfo(((1, 2, 8), 3), dtype=tp.float32)])
    np.testing.assert_allclose(array(both(on_device(X))), np.stack([X, X]) + X.sum(-1)[:, None], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype: Any) -> None:
    plugins.register("Reversed", compute=lambda x: x[::-1])
    values = (4 * X).astype(DTYPES[dtype])
    found = call("Reversed", tp.cast(tp.Tensor(values.astype(np.float32)), dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(array(tp.cast(found, tp.float32)), values[::-1].astype(np.float32))


def test_fields() -> None:
    """Each kind as it was given, and the defaults of the others."""
    seen: dict[str, Any] = {}
    plugins.register(
        "Look",
        compute=lambda x, **fields: (seen.update(fields), x)[1],
        fields={
            "number": "float32",
            "group": Field("int32", length=0),
            "one": Field("int32", length=0),
            "pair": Field("float64", length=2),
            "label": "text",
            "size": "dims",
            "left": Field("int64", default=7),
            "many": Field("float16", length=0, default=()),
        },
    )
    settings = {"number": 2, "group": [0, 1, 3], "one": [4], "pair": (1, 2.5), "label": "é", "size": (3, 4)}
    call("Look", tp.Tensor(X), **settings).eval()
    expected = {"number": 2.0, "group": (0, 1, 3), "one": (4,), "pair": (1.0, 2.5), "size": (3, 4), "left": 7}
    assert seen == {**settings, **expected, "many": ()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "large"}, r"Invalid value provided for field: scale"),
        ({"scale": [1.0, 2.0]}, r"Expected 1 value\(s\), but got 2"),
        ({"scale": 1.0, "shift": 1.0}, r"has no field called: shift(?s:.*)Valid fields are: \['scale'\]"),
        ({}, r"expected a value for the field 'scale'; its fields are scale"),
    ],
)
def test_fields_that_are_not_the_plug_ins(settings: dict[str, Any], message: str) -> None:
    plugins.register("Scaled", compute=lambda x, scale: x * np.float32(scale), fields={"scale": "float32"})
    with pytest.raises(tp.TripyException, match=message):
        call("Scaled", tp.Tensor(X), **settings).eval()
    with pytest.raises(tp.TripyException, match=message) as refused:
        compiled("Scaled", **settings)
    assert "test_plugins.py" in str(refused.value)  # and points at the call
    assert "plugin_tracing" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "inputs", "outputs", "message"),
    [
        ({"inputs": 2}, 1, 1, "expected 2 inputs but got 1"),
        ({"inputs": (2, 3)}, 4, 1, "expected 2 to 3 inputs but got 4"),
        ({}, 1, 2, "expected output_info of 1 outputs but got 2"),
        ({"shapes": lambda x: x[:-1]}, 1, 1, "expected output 0 of rank 2 but its shape is"),
        ({"shapes": lambda x: [x, x]}, 1, 1, "expected shapes to give 1 shapes but got 2"),
    ],
)
def test_calls_that_do_not_fit(settings: dict[str, Any], inputs: int, outputs: int, message: str) -> None:
    plugins.register("First", compute=lambda x, *rest: x, **settings)
    with pytest.raises(tp.TripyException, match=message):
        given = call("First", *[tp.Tensor(X)] * inputs, outputs=[(2, tp.float32)] * outputs)
        (given[0] if outputs > 1 else given).eval()


def test_shapes_that_are_refused() -> None:
    """Where they are known when it is compiled, then; else when it runs."""

    def shapes(x: Any) -> Any:
        if x[-1] % 2:
            raise ValueError(f"expected an even width but got {x[-1]}")
        return x

    plugins.register("Even", compute=lambda x: x, shapes=shapes)
    with pytest.raises(tp.TripyException, match=r"'Even'.*expected an even width but got 3"):
        compiled("Even", shape=(2, 3))
    dynamic = compiled("Even", shape=(2, (1, 2, 8)))
    np.testing.assert_array_equal(array(dynamic(on_device(X[:, :2].copy()))), X[:, :2])
    with pytest.raises(tp.TripyException, match=r"'Even'.*expected an even width but got 3"):
        dynamic(on_device(X))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda x: x[0], r"expected result 0 to be float32\[2, 3\] but got float32\[3\]"),
        (lambda x: x.astype(np.float64), r"expected result 0 to be float32\[2, 3\] but got float64\[2, 3\]"),
        (lambda x: (x, x), "expected 1 results but got 2"),
        (lambda x: x / [][0], "IndexError: list index out of range"),
        (lambda x: np.negative(x, out=x), "ValueError: .*read-only"),
    ],
)
def test_functions_that_fail(compute: Any, message: str) -> None:
    plugins.register("Wrong", compute=compute)
    wrong = compiled("Wrong")
    with pytest.raises(tp.TripyException, match=rf"plug-in 'Wrong' \(version 1\): {message}") as refused:
        wrong(on_device(X))
    assert "test_plugins.py" in str(refused.value)


def test_names_versions_and_namespaces() -> None:
    plugins.register("Scale", compute=lambda x: 2 * x)
    plugins.register("Scale", compute=lambda x: 3 * x, version="2")
    plugins.register("Scale", compute=lambda x: 4 * x, namespace="mine")
    for settings, factor in (({}, 2), ({"version": "2"}, 3), ({"namespace": "mine"}, 4)):
        np.testing.assert_array_equal(array(call("Scale", tp.Tensor(X), **settings)), np.float32(factor) * X)
    with pytest.raises(tp.TripyException, match=r"'Scale' \(version 3\) is not registered.*'Scale' \(version 2\)"):
        call("Scale", tp.Tensor(X), version="3").eval()
    assert "plug-in 'Scale' (version 1, namespace 'mine')" in plugins.registered()


def test_one_name_has_one_meaning() -> None:
    def twice(x: np.ndarray) -> np.ndarray:
        return 2 * x

    plugins.register("Twice", compute=twice)
    plugins.register("Twice", compute=twice)  # the same again
    with pytest.raises(ValueError, match=r"'Twice' .* is registered with another meaning; replace=True"):
        plugins.register("Twice", compute=lambda x: 3 * x)
    executable = compiled("Twice")
    np.testing.assert_array_equal(array(executable(on_device(X))), 2 * X)
    plugins.register("Twice", compute=lambda x: 3 * x, replace=True)
    np.testing.assert_array_equal(array(executable(on_device(X))), np.float32(3) * X)
    plugins.unregister("Twice")
    with pytest.raises(tp.TripyException, match=r"'Twice' .* is not registered"):
        executable(on_device(X))
    with pytest.raises(PluginError, match="is not registered"):
        plugins.unregister("Twice")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected plug-in 'A' to have a function"),
        ({"compute": abs, "outputs": 0}, "at least one output but got 0"),
        ({"compute": abs, "fields": {"a": "float31"}}, "expected a field's type to be one of .* but got 'float31'"),
        ({"compute": abs, "fields": {"a": lambda: Field("text", length=2)}}, "another length than 2"),
    ],
)
def test_meanings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields = {name: each() if callable(each) else each for name, each in settings.pop("fields", {}).items()}
        plugins.register("A", fields=fields, **settings)


def test_native_functions_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        plugins.register("A", native=(tmp_path / "absent.so", "a"))
    with pytest.raises(TypeError, match="expected a function pointer of ctypes, or a path and a symbol"):
        plugins.register("A", native="a")


def test_a_saved_executable_needs_its_plug_ins(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"compute": lambda x, **_: 2 * x, "fields": {"group": Field("int32", length=0)}}
    plugins.register("Twice", **settings)
    executable = compiled("Twice", group=[1, 2])
    engine_file.save(executable, tmp_path / "engine")
    executable.save(str(tmp_path / "json"))
    for load, name in ((engine_file.load, "engine"), (tp.Executable.load, "json")):
        np.testing.assert_array_equal(array(load(str(tmp_path / name))(on_device(X))), 2 * X)
    plugins.unregister("Twice")
    for load, name in ((engine_file.load, "engine"), (tp.Executable.load, "json")):
        with pytest.raises(Exception, match=r"plug-in 'Twice' \(version 1\) is not registered"):
            load(str(tmp_path / name))
    plugins.register("Twice", compute=lambda x: 2 * x)  # without the field
    with pytest.raises(Exception, match="expected no field 'group'"):
        engine_file.load(tmp_path / "engine")


def test_calls_are_neither_folded_nor_merged() -> None:
    """A plug-in of constants, twice the same, is called twice, whenever the executable is."""
    calls = []
    plugins.register("Count", compute=lambda x: (calls.append(None), x)[1])
    constant = tp.Tensor(X)

    def model(x: tp.Tensor) -> tp.Tensor:
        return x + call("Count", constant) + call("Count", constant)

    executable = tp.compile(model, args=[tp.InputInfo((2, 3), dtype=tp.float32)])
    assert not calls
    for times in (2, 4):
        executable(on_device(X)).eval()
        assert len(calls) == times


@pytest.mark.parametrize("has_effects", [False, True])
def test_results_that_nobody_reads(has_effects: bool) -> None:
    """nvtripy traces what is returned; what the compiler finds out to be needless then stays if it has effects."""
    calls = []
    plugins.register("Tell", compute=lambda x: (calls.append(None), x)[1], has_effects=has_effects)

    def model(x: tp.Tensor) -> tp.Tensor:
        told = call("Tell", x)
        return tp.reshape(x, (told.shape[0] * told.shape[1],))  # of which the shape is known without it

    executable = tp.compile(model, args=[tp.InputInfo((2, 3), dtype=tp.float32)])
    executable(on_device(X)).eval()
    assert len(calls) == has_effects


def test_gelu_of_nvidias() -> None:
    expected = array(tp.gelu(tp.Tensor(X)))
    found = call("CustomGeluPluginDynamic", tp.Tensor(X), type_id=0)
    np.testing.assert_allclose(array(found), expected, atol=1e-3)
    bias = [0.5, -1.0, 2.0]
    shifted = call("CustomGeluPluginDynamic", tp.Tensor(X - np.array(bias, np.float32)), type_id=0, bias=bias)
    np.testing.assert_allclose(array(shifted), expected, atol=1e-3)
    narrow = call("CustomGeluPluginDynamic", tp.cast(tp.Tensor(X), tp.float16), type_id=1)
    np.testing.assert_allclose(array(narrow), expected, atol=2e-3)


def test_nothing_stands_in_for_tensorrt() -> None:
    plugins.register("Twice", compute=lambda x: 2 * x)
    call("Twice", tp.Tensor(X)).eval()
    assert "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt") is None


def test_symbols_are_added_and_multiplied() -> None:
    n, m = Symbolic.of("n"), Symbolic.of("m")
    assert (n + m) * 2 == 2 * m + 2 * n
    assert (2 * n * m) // (2 * m) == n and n + 3 - n == 3 and 5 - (n + 2) == 3 - n


def test_checks_of_counts() -> None:
    plugins.register("Any", compute=abs)
    plugin = registry.find("Any", "1", "")
    calling.check_counts(plugin, 17, 1)
    with pytest.raises(PluginError, match="expected output_info of 1 outputs but got 2"):
        calling.check_counts(plugin, 1, 2)
