"""importing.py, stack_info.py and __main__.py: nvtripy is found, NVIDIA's packages win, and nothing is left behind.

What an import does can be seen once in a process only, so most tests here start their own. In the place of NVIDIA's
packages, which need their hardware, are packages of a few lines in the test's own folder.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import nvtripy_portable

PORTABLE = Path(nvtripy_portable.__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    any(importlib.machinery.PathFinder.find_spec(name) for name in ("mlir_tensorrt", "tensorrt")),
    reason="NVIDIA's packages are installed: the portable runtime stands back, as it should",
)


def python(
    *arguments: str | Path, path: Sequence[Path] = (PORTABLE,), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a fresh Python that imports from ``path`` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300
    )


def run(code: str, *, path: Sequence[Path] = (PORTABLE,), cwd: Path | None = None) -> list[str]:
    """The lines that ``code`` prints in a fresh Python; it must succeed in silence on stderr."""
    result = python("-c", textwrap.dedent(code), path=path, cwd=cwd)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.splitlines()


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def nvidia(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a stand-in for NVIDIA's ``mlir_tensorrt``: a regular package, or one without an ``__init__.py``."""
    files = {"mlir_tensorrt/runtime/__init__.py": "", "mlir_tensorrt/runtime/api.py": "MAKER = 'NVIDIA'"}
    if getattr(request, "param", "regular") == "regular":
        files["mlir_tensorrt/__init__.py"] = ""
    return write(tmp_path / "nvidia", files)


# --- mlir_tensorrt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nvidia", ["regular", "namespace"], indirect=True)
@pytest.mark.parametrize("first", ["nvidia", "portable"])
@pytest.mark.parametrize("imported_before", [True, False], ids=["imported", "not imported"])
def test_nvidias_own_package_wins(nvidia: Path, first: str, imported_before: bool) -> None:
    order = (nvidia, PORTABLE) if first == "nvidia" else (PORTABLE, nvidia)
    code = "import nvtripy_portable\n" if imported_before else ""
    assert run(code + "import mlir_tensorrt.runtime.api as api; print(api.MAKER)", path=order) == ["NVIDIA"]


def test_nvidias_own_package_wins_when_its_folder_joins_the_path_late(nvidia: Path) -> None:
    code = f"""
        import sys
        import nvtripy_portable
        sys.path.append({str(nvidia)!r})
        import mlir_tensorrt.runtime.api as api
        print(api.MAKER)
    """
    assert run(code) == ["NVIDIA"]


def test_nvtripy_is_left_alone_where_nvidias_package_is(nvidia: Path) -> None:
    write(nvidia, {"nvtripy/__init__.py": "import sys; print('tensorrt' in sys.modules)"})
    code = "import nvtripy_portable, nvtripy; print(type(nvtripy.__loader__).__name__, 'nvtripy.utils' in sys.modules)"
    assert run("import sys\n" + code, path=(nvidia, PORTABLE)) == ["False", "SourceFileLoader False"]


def test_ours_is_used_where_there_is_no_other() -> None:
    code = """
        import nvtripy_portable
        import mlir_tensorrt, mlir_tensorrt.runtime.api
        print(mlir_tensorrt.__file__)
        print(mlir_tensorrt.runtime.api.__name__)
    """
    bindings = PORTABLE / "nvtripy_portable" / "bindings" / "__init__.py"
    assert run(code) == [str(bindings), "mlir_tensorrt.runtime.api"]


def test_importing_the_distribution_is_cheap_and_can_be_repeated() -> None:
    # Its .pth file imports it at every start of Python, whatever the program.
    code = """
        import sys
        import nvtripy_portable
        before = list(sys.meta_path)
        nvtripy_portable.importing.install()
        print(sys.meta_path == before)
        print({"numpy", "ml_dtypes", "nvtripy", "mlir_tensorrt"} & {name.partition(".")[0] for name in sys.modules})
    """
    assert run(code) == ["True", "set()"]
    # -S: what the other packages' .pth files import is not ours; -I: nor what lies in the current folder.
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import nvtripy_portable
        dear = {"importlib.abc", "importlib.util", "collections", "contextlib", "functools", "re", "tempfile", "typing"}
        print(dear & set(sys.modules))
    """
    alone = python("-IS", "-c", textwrap.dedent(code), PORTABLE)
    assert (alone.stdout, alone.stderr) == ("set()\n", "")


# --- tensorrt ---------------------------------------------------------------------------------------------------------


def test_the_stand_in_for_tensorrt_does_not_outlive_the_import() -> None:
    code = """
        import importlib.util, sys
        import nvtripy_portable
        import nvtripy
        print("tensorrt" in sys.modules, importlib.util.find_spec("tensorrt"))
        try:
            import tensorrt
        except ModuleNotFoundError as error:
            print(error)
        print((nvtripy.Tensor([1, 2]) + 1).tolist())
    """
    assert run(code) == ["False None", "No module named 'tensorrt'", "[2, 3]"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.slow
def test_torch_compiles_after_the_import() -> None:
    # torch._dynamo probes for TensorRT with find_spec, which raises where a module without a spec is in the way.
    code = """
        import nvtripy_portable
        import nvtripy, torch
        print(torch.compile(lambda x: x + 1, backend="eager")(torch.tensor([1, 2])).tolist())
    """
    assert run(code) == ["[2, 3]"]


def test_a_real_tensorrt_is_used_and_stays(tmp_path: Path) -> None:
    names = ("float32", "float16", "fp8", "bfloat16", "int4", "int8", "int32", "int64", "bool")
    write(tmp_path, {"tensorrt/__init__.py": "".join(f"{name} = 'real {name}'\n" for name in names)})
    code = """
        import sys
        import nvtripy_portable
        import nvtripy as tp
        from nvtripy.frontend.ops.plugin_qdp import TRT_FROM_TRIPY_DTYPE
        print(TRT_FROM_TRIPY_DTYPE[tp.float8], TRT_FROM_TRIPY_DTYPE[tp.bool])
        import tensorrt
        print(tensorrt.__file__, tensorrt is sys.modules["tensorrt"])
    """
    real = tmp_path / "tensorrt" / "__init__.py"
    assert run(code, path=(PORTABLE, tmp_path)) == ["real fp8 real bool", f"{real} True"]


def test_a_tensorrt_that_a_program_made_up_is_used_and_stays() -> None:
    # As a program's tests may do: such a module has no spec, at which find_spec raises ValueError.
    code = """
        import sys, types
        import nvtripy_portable
        mock = types.ModuleType("tensorrt")
        for name in ("float32", "float16", "fp8", "bfloat16", "int4", "int8", "int32", "int64", "bool"):
            setattr(mock, name, "made up " + name)
        sys.modules["tensorrt"] = mock
        from nvtripy.frontend.ops.plugin_qdp import TRT_FROM_TRIPY_DTYPE
        print(list(TRT_FROM_TRIPY_DTYPE.values())[0], sys.modules["tensorrt"] is mock)
    """
    assert run(code) == ["made up float32 True"]


def test_the_stand_in_goes_when_the_import_fails(tmp_path: Path) -> None:
    write(tmp_path, {"nvtripy/__init__.py": "import tensorrt\nprint(tensorrt.fp8)\nraise ImportError('halfway')"})
    code = """
        import sys
        import nvtripy_portable
        try:
            import nvtripy
        except ImportError as error:
            print(error, "tensorrt" in sys.modules, "nvtripy" in sys.modules)
    """
    assert run(code, path=(tmp_path, PORTABLE)) == ["tensorrt.fp8", "halfway False False"]


def test_a_plugin_call_says_what_it_needs() -> None:
    import nvtripy as tp

    with pytest.raises(ImportError, match="plug-ins need NVIDIA's tensorrt package") as quickly_deployable:
        tp.plugin("a::b", inputs=[tp.Tensor([1.0])])
    assert quickly_deployable.value.__cause__ is None
    for _ in range(2):  # nvtripy loads TensorRT's library the first time only
        unknown = tp.plugin(name="Gelu", inputs=[tp.Tensor([1.0])], output_info=[(1, tp.float32)])
        with pytest.raises(tp.TripyException, match=r"'Gelu' \(version 1\) is not registered.*CustomGeluPluginDynamic"):
            unknown.eval()
    assert "tensorrt" not in sys.modules


# --- nvtripy as a package ---------------------------------------------------------------------------------------------


def test_nvtripys_sources_and_files_can_be_read() -> None:
    # Debuggers, inspect and importlib.resources ask the loader, which is wrapped here.
    code = """
        import nvtripy_portable
        import importlib.resources, inspect, nvtripy, pkgutil
        source = inspect.getsource(nvtripy)
        print(source == pkgutil.get_data("nvtripy", "__init__.py").decode())
        print(source == importlib.resources.files("nvtripy").joinpath("__init__.py").read_text())
        print(nvtripy.__loader__.get_filename("nvtripy") == nvtripy.__file__ == nvtripy.__spec__.origin)
    """
    assert run(code) == ["True"] * 3


# --- stack_info -------------------------------------------------------------------------------------------------------


@pytest.fixture
def original() -> Callable[..., list[Any]]:
    """nvtripy's own ``get_stack_info``, which the imported nvtripy no longer has, from its source file."""
    from nvtripy.utils import stack_info

    spec = importlib.util.spec_from_file_location("original_stack_info", stack_info.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its own module up.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert module.get_stack_info is not stack_info.get_stack_info
    return module.get_stack_info


def as_values(records: list[Any]) -> list[Any]:
    return [records.include_code_index, *map(dataclasses.asdict, records)]  # type: ignore[attr-defined]


def test_stack_records_of_nvtripys_own_calls_are_those_of_the_original(
    original: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import nvtripy as tp
    from nvtripy.frontend.module import parameter
    from nvtripy.utils import stack_info

    replacement = stack_info.get_stack_info
    assert replacement is parameter.get_stack_info
    compared = []

    def both(include_code_index: int | None = None) -> list[Any]:
        expected, records = original(include_code_index), replacement(include_code_index)
        compared.append((as_values(expected), as_values(records)))
        return records

    monkeypatch.setattr(stack_info, "get_stack_info", both)
    monkeypatch.setattr(parameter, "get_stack_info", both)

    class Net(tp.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = tp.Linear(2, 2)

        def forward(self, x: tp.Tensor) -> tp.Tensor:
            return tp.stack([f(self.linear(x)) for f in (tp.relu, lambda t: t[..., None])][:1])

    net = Net()
    net.load_state_dict({"linear.weight": tp.iota((2, 2)), "linear.bias": tp.Tensor([0.0, 1.0])})
    with pytest.raises(tp.TripyException):
        net(tp.ones((2, 3)) @ tp.Tensor(3))
    net(tp.ones((1, 2)))
    assert len(compared) > 50
    for expected, records in compared:
        assert records == expected
    records = [record for _, each in compared for record in each[1:]]
    assert {record["_dispatch_target"] for record in records} > {"", "relu", "stack"}
    assert __file__ in {record["file"] for record in records}


def test_texts_of_frames_are_those_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    import nvtripy as tp
    from nvtripy.common import exception

    replacement = exception.str_from_source_info
    compared = []

    def both(*frame: Any, **options: Any) -> str:
        text = replacement(*frame, **options)
        compared.append((text, replacement.__wrapped__(*frame, **options)))
        return text

    monkeypatch.setattr(exception, "str_from_source_info", both)
    for _ in range(2):
        tp.compile(lambda x: tp.relu(x) + tp.gelu(x) * x[0], args=[tp.InputInfo((2,), dtype=tp.float32)])
        with pytest.raises(tp.TripyException):
            tp.ones((2, 3)) @ tp.Tensor(3)
    assert len(compared) > 50
    assert [text for text, _ in compared] == [text for _, text in compared]


def test_stack_records_do_not_mix_code_that_differs_in_columns_alone(original: Callable[..., list[Any]]) -> None:
    # Such code objects compare equal in some versions of Python, and the replacement remembers by code object.
    from nvtripy.utils import stack_info

    pairs: list[tuple[list[Any], list[Any]]] = []

    def pair(function: object = None) -> None:
        pairs.append((as_values(original()), as_values(stack_info.get_stack_info())))

    for line in ("pair()", "(pair())", "pair(pair())", "@pair", "@(pair)", "@    pair", "pair(\n)"):
        ending = "\n def g(): pass" if line.startswith("@") else ""
        namespace: dict[str, Any] = {"pair": pair}
        exec(compile(f"def f():\n {line}{ending}", "same.py", "exec"), namespace)
        namespace["f"]()
    assert [records for _, records in pairs] == [expected for expected, _ in pairs]
    if sys.version_info >= (3, 11):  # a decorator's line has one range, and all others here have more
        ranges = [
            record["column_range"] for _, records in pairs for record in records[1:] if record["file"] == "same.py"
        ]
        assert {(2, 6), (3, 7), (6, 10), None} <= set(ranges)


def test_stack_records_end_at_nvtripys_limit(original: Callable[..., list[Any]]) -> None:
    from nvtripy.utils import stack_info

    def descend(depth: int) -> tuple[list[Any], list[Any]]:
        return descend(depth - 1) if depth else (original(), stack_info.get_stack_info())

    expected, records = descend(150)
    assert len(records) == len(expected) == 100
    assert as_values(records) == as_values(expected)


def test_stack_columns_are_computed_once_for_a_line() -> None:
    from nvtripy.utils import stack_info

    from nvtripy_portable.stack_info import _column_ranges

    def capture() -> int:
        return len(_column_ranges) if stack_info.get_stack_info() else 0

    sizes = [capture() for _ in range(3)]
    assert sizes[0] > 0
    assert sizes[0] == sizes[1] == sizes[2]


# --- python -m nvtripy_portable ---------------------------------------------------------------------------------------


def test_a_script_runs_as_python_would_run_it(tmp_path: Path) -> None:
    script = """
        import pickle, sys
        import neighbour
        class Thing: pass
        def show():
            print(__name__, __file__, sys.argv, neighbour.NAME)
            print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)
            print(sys.path[0])
        if __name__ == "__main__":
            show()
    """
    write(tmp_path, {"folder/script.py": script, "folder/neighbour.py": "NAME = 'neighbour'", "neighbour.py": "wrong"})
    arguments = ("folder/script.py", "--flag", "a b", "-m", "")
    ours = python("-m", "nvtripy_portable", *arguments, cwd=tmp_path)
    assert (ours.returncode, ours.stderr) == (0, "")
    plain = python(*arguments, cwd=tmp_path)
    assert plain.returncode == 0
    # The one difference: Python 3.9+ gives __file__ as an absolute path, as runpy does not.
    assert ours.stdout == plain.stdout.replace(str(tmp_path / "folder/script.py"), "folder/script.py", 1)
    assert ours.stdout.splitlines()[0].startswith(
        "__main__ folder/script.py ['folder/script.py', '--flag', 'a b', '-m', '']"
    )


def test_a_script_gets_nvtripy(tmp_path: Path) -> None:
    write(tmp_path, {"script.py": "import nvtripy as tp\nprint((tp.Tensor([1, 2]) * 2).tolist())"})
    result = python("-m", "nvtripy_portable", tmp_path / "script.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, "[2, 4]\n", "")


@pytest.mark.parametrize(
    ("last_line", "code", "message"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('so long')", 1, "so long\n"),
        ("raise SystemExit(0)", 0, ""),
        ("raise KeyError('gone')", 1, "KeyError: 'gone'\n"),
        ("x = = 1", 1, "SyntaxError: invalid syntax\n"),
    ],
)
def test_a_scripts_exit_code_is_passed_on(tmp_path: Path, last_line: str, code: int, message: str) -> None:
    write(tmp_path, {"script.py": f"import sys\n{last_line}\n"})
    result = python("-m", "nvtripy_portable", tmp_path / "script.py")
    assert result.returncode == code
    assert result.stderr.endswith(message)
    assert bool(result.stderr) == bool(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: python -m nvtripy_portable SCRIPT [ARGUMENTS]\n"),
        (
            ("absent.py", "--flag"),
            "nvtripy_portable: error: expected a Python script but there is no file absent.py\n",
        ),
        ((".",), "nvtripy_portable: error: expected a Python script but there is no file .\n"),
    ],
    ids=["none", "absent", "folder"],
)
def test_a_wrong_usage_gets_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = python("-m", "nvtripy_portable", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
