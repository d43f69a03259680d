"""engine.py's saved engines: opened when they are current, built again in every other case, never half-written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CONTEXT, edit_config, random_checkpoint

import engine as engine_module
from engine import Engine, EngineError, open_engine
from model import GPT
from nvtripy_portable import engine_file
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and, made from it for float32 and one sequence, an engine."""
    folder = tmp_path_factory.mktemp("saved")
    random_checkpoint(folder / "model")
    open_engine(open_checkpoint(folder / "model"), "float32", 1, folder / "engines")
    return folder


@pytest.fixture(scope="session")
def logits(saved: Path) -> np.ndarray:
    """What the model gives, without an engine folder."""
    return first_logits(open_engine(open_checkpoint(saved / "model"), "float32", 1))


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to change."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def first_logits(engine: Engine) -> np.ndarray:
    tokens = np.arange(engine.batch * 5, dtype=np.int32).reshape(engine.batch, 5)
    return engine.step(tokens, np.zeros(engine.batch, np.int32), np.full(engine.batch, 4, np.int32))


def assert_gives(engine: Engine, logits: np.ndarray) -> None:
    """Up to rounding: NumPy sums in an order that depends on how a matrix lies in memory, which saving may change."""
    np.testing.assert_allclose(first_logits(engine), logits, rtol=1e-4, atol=1e-4)


class Compilations:
    """Counts them, or forbids them, or has their result at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.allowed = True
        self.result: tp.Executable | None = None
        real = engine_module.compile_model

        def compile_model(gpt: GPT, batch: int) -> tp.Executable:
            assert self.allowed, "it compiled"
            self.count += 1
            return self.result or real(gpt, batch)

        monkeypatch.setattr(engine_module, "compile_model", compile_model)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    return Compilations(monkeypatch)


@pytest.fixture
def instant(compilations: Compilations, saved: Path) -> Compilations:
    """For tests of when an engine is built, not of what it gives: compiling would only take time."""
    (path,) = engines(saved)
    compilations.result = engine_file.load(path)
    return compilations


def engines(place: Path) -> list[Path]:
    return sorted((place / "engines").glob("*.engine"))


def open_in(place: Path, dtype: str = "float32", batch: int = 1) -> tuple[Engine, list[str]]:
    """The engine, and what was reported."""
    reports: list[str] = []
    return open_engine(open_checkpoint(place / "model"), dtype, batch, place / "engines", reports.append), reports


# --- when an engine is current ---------------------------------------------------------------------------------------


def test_current_engine_is_opened(place: Path, compilations: Compilations, logits: np.ndarray) -> None:
    compilations.allowed = False
    (path,) = engines(place)
    before = path.read_bytes()
    engine, reports = open_in(place)
    assert reports == [f"opened {path}"]
    assert_gives(engine, logits)
    assert path.read_bytes() == before and list((place / "engines").iterdir()) == [path]


def test_moved_checkpoint_keeps_its_engine(place: Path, tmp_path: Path, compilations: Compilations) -> None:
    """Where the checkpoint lies and when it was written does not matter, only what is in it."""
    compilations.allowed = False
    (tmp_path / "elsewhere").mkdir()
    os.rename(place / "model", tmp_path / "elsewhere" / "model")
    os.utime(tmp_path / "elsewhere" / "model" / WEIGHTS, (0, 0))
    (path,) = engines(place)
    reports: list[str] = []
    open_engine(open_checkpoint(tmp_path / "elsewhere" / "model"), "float32", 1, place / "engines", reports.append)
    assert reports == [f"opened {path}"]


def other_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(place / "model" / WEIGHTS)
    tensors["transformer.ln_f.bias"][0] += 1
    save_file(tensors, place / "model" / WEIGHTS)


def other_config(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(place / "model", layer_norm_epsilon=1e-3)


def other_model_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "model.py"
    source.write_bytes((ROOT / "model.py").read_bytes() + b"# edited\n")
    monkeypatch.setattr(engine_module.model_module, "__file__", str(source))


def other_engine_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "engine.py"
    source.write_bytes((ROOT / "engine.py").read_bytes() + b"# edited\n")
    monkeypatch.setattr(engine_module, "__file__", str(source))


def other_nvtripy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "__version__", "0.1.8")


@pytest.mark.parametrize(
    "change", [other_weights, other_config, other_model_source, other_engine_source, other_nvtripy]
)
def test_stale_engine_is_replaced(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    instant: Compilations,
    change: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    (stale,) = engines(place)
    change(place, monkeypatch)
    _, reports = open_in(place)
    (path,) = engines(place)
    assert path != stale and reports == [f"saved {path}"] and instant.count == 1
    assert open_in(place)[1] == [f"opened {path}"] and instant.count == 1


@pytest.mark.parametrize(("dtype", "batch"), [("float16", 1), ("float32", 2)])
def test_engines_for_other_uses_live_side_by_side(
    place: Path, compilations: Compilations, dtype: str, batch: int
) -> None:
    (first,) = engines(place)
    stderr = sys.stderr
    engine, reports = open_in(place, dtype, batch)
    assert sys.stderr is stderr, "nvtripy replaces it when it compiles"
    (second,) = set(engines(place)) - {first}
    assert reports == [f"saved {second}"] and compilations.count == 1 and first.exists()
    assert first_logits(engine).shape[0] == batch
    assert open_in(place)[1] == [f"opened {first}"] and open_in(place, dtype, batch)[1] == [f"opened {second}"]


def test_another_checkpoint_of_the_same_name(place: Path, logits: np.ndarray) -> None:
    """They take turns in the folder, and neither ever gets the other's engine."""
    other = random_checkpoint(place / "other" / "model", seed=1)
    others = first_logits(open_engine(open_checkpoint(other), "float32", 1, place / "engines"))
    assert not np.allclose(others, logits)
    assert_gives(open_in(place)[0], logits)


def test_name_of_any_checkpoint_makes_a_file_name(place: Path, instant: Compilations) -> None:
    os.rename(place / "model", place / "ünï *[cöde]")
    reports: list[str] = []
    for expected in ("saved", "opened"):
        open_engine(open_checkpoint(place / "ünï *[cöde]"), "float32", 1, place / "engines", reports.append)
        assert reports[-1].startswith(f"{expected} {place / 'engines' / '-n-c-de--float32'}")


# --- damaged files ---------------------------------------------------------------------------------------------------


def executable_of_another_function(path: Path) -> None:
    tp.compile(lambda x: x + x, args=[tp.InputInfo((2,), dtype=tp.float32)]).save(str(path))


def in_nvtripys_format(path: Path) -> dict[str, Any]:
    """What nvtripy itself would have written, as JSON."""
    plain = path.with_suffix(".json")
    engine_file.load(path).save(str(plain))
    content = json.loads(plain.read_text())
    plain.unlink()
    return content


def flip(share: float) -> Callable[[Path], None]:
    """Changes one character, so far into the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 1
        path.write_bytes(content)

    return damage


def pickle_that_leaves_a_trace(path: Path) -> None:
    """What a program that unpickles its cache would run."""
    path.write_bytes(b"cposix\nsystem\n(S'touch " + str(path.parent / "executed").encode() + b"'\ntR.")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 2),
    "cut to a few bytes": lambda path: os.truncate(path, 10),
    "grown": lambda path: path.write_bytes(path.read_bytes() * 2),
    "one bit of the header": flip(0.001),
    "a million random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(10**6)),
    "a million zeros": lambda path: path.write_bytes(bytes(10**6)),
    "a million brackets": lambda path: path.write_bytes(b"[" * 10**6),
    "JSON number": lambda path: path.write_text("42"),
    "JSON null": lambda path: path.write_text("null"),
    "JSON list": lambda path: path.write_text("[1, 2]"),
    "JSON object": lambda path: path.write_text("{}"),
    "unknown class": lambda path: path.write_text('{"tripy_class": "os.system"}'),
    "another class": lambda path: path.write_text('{"tripy_class": "Tensor", "data": 1}'),
    "executable without a body": lambda path: path.write_text('{"tripy_class": "Executable"}'),
    "executable of nothing": lambda path: path.write_text(json.dumps({**in_nvtripys_format(path), "executable": ""})),
    "executable of text": lambda path: path.write_text(
        json.dumps({**in_nvtripys_format(path), "executable": "nothing that base64 knows"})
    ),
    "constants cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "constants cut off": lambda path: os.truncate(path, path.read_bytes().rindex(b"}") + 1),
    "executable of another function": executable_of_another_function,
    "pickle": pickle_that_leaves_a_trace,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_engine_is_built_again(place: Path, instant: Compilations, logits: np.ndarray, damage: str) -> None:
    """Without a crash, and without anything in it being run."""
    (path,) = engines(place)
    DAMAGES[damage](path)
    engine, reports = open_in(place)
    assert len(reports) == 2 and reports[1] == f"saved {path}" and instant.count == 1
    assert reports[0].startswith(f"{path} cannot be used (") and reports[0].endswith("): building it again")
    assert reports[0].isprintable() and "()" not in reports[0]
    assert "(it holds something else)" in reports[0] or not damage.startswith("JSON")
    assert_gives(engine, logits)
    assert list((place / "engines").iterdir()) == [path]
    instant.allowed = False
    assert open_in(place)[1] == [f"opened {path}"]


def test_engine_for_another_batch_under_this_name(place: Path, instant: Compilations, logits: np.ndarray) -> None:
    one_sequence, instant.result = instant.result, None
    (path,) = engines(place)
    open_in(place, batch=2)
    (other,) = set(engines(place)) - {path}
    os.replace(other, path)
    instant.result = one_sequence
    engine, reports = open_in(place)
    assert reports[0] == f"{path} cannot be used (it holds something else): building it again"
    assert_gives(engine, logits)


def test_error_without_a_text(place: Path, monkeypatch: pytest.MonkeyPatch, instant: Compilations) -> None:
    def load(path: str) -> tp.Executable:
        raise MemoryError

    monkeypatch.setattr(tp.Executable, "load", load)
    assert "cannot be used (MemoryError)" in open_in(place)[1][0]


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("moment", ["write", "rename"])
def test_failed_save_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, instant: Compilations, error: BaseException, moment: str
) -> None:
    (path,) = engines(place)
    path.unlink()

    def half(self: tp.Executable, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise error

    def fail(source: str, target: Path) -> None:
        raise error

    if moment == "write":
        monkeypatch.setattr(tp.Executable, "save", half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EngineError
    with pytest.raises(expected) as raised:
        open_in(place)
    if expected is EngineError:
        assert str(raised.value) == f"cannot save the engine to {path}: Input/output error"
    assert not list((place / "engines").iterdir())


#: Builds the engine of a folder. Where a moment is named, the process dies there, as at a power cut.
BUILD = """
import os, signal, sys
from pathlib import Path
from typing import Any
sys.path.insert(0, sys.argv[1])
place, moment = Path(sys.argv[2]), sys.argv[3]
import nvtripy as tp
from engine import open_engine
from weight_loader import open_checkpoint

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(self, path):
    save(self, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

if moment == "write":
    save, tp.Executable.save = tp.Executable.save, write_half
elif moment == "rename":
    os.replace = die
reports = []
open_engine(open_checkpoint(place / "model"), "float32", 1, place / "engines", reports.append)
print(reports[0].split()[0])
"""


def build(place: Path, moment: str = "never") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(ROOT), str(place), moment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_killed_while_saving(place: Path, instant: Compilations, moment: str) -> None:
    (path,) = engines(place)
    path.unlink()
    with build(place, moment) as process:
        assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGKILL
    assert engines(place) == []
    (partial,) = path.parent.glob(".*")
    assert open_in(place)[1] == [f"saved {path}"]
    assert partial.exists(), "it may be another process's, at work"
    instant.allowed = False
    assert open_in(place)[1] == [f"opened {path}"]
    # Some hours later, at the next save:
    os.utime(partial, (time.time() - 7200,) * 2)
    path.unlink()
    instant.allowed = True
    open_in(place)
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_at_once(place: Path, compilations: Compilations, logits: np.ndarray) -> None:
    (path,) = engines(place)
    path.unlink()
    processes = [build(place), build(place)]
    for process in processes:
        with process:
            out, err = process.communicate()
        assert (process.returncode, err) == (0, "") and out in ("saved\n", "opened\n")
    assert list((place / "engines").iterdir()) == [path]
    compilations.allowed = False
    assert_gives(open_in(place)[0], logits)


def test_saved_by_another_process_in_the_meantime(
    place: Path, monkeypatch: pytest.MonkeyPatch, instant: Compilations, logits: np.ndarray
) -> None:
    """Both find no engine, and both save one."""
    (path,) = engines(place)
    path.unlink()
    real = engine_module.compile_model
    others = []

    def compile_model(gpt: GPT, batch: int) -> tp.Executable:
        monkeypatch.setattr(engine_module, "compile_model", real)
        others.append(open_in(place))
        return real(gpt, batch)

    monkeypatch.setattr(engine_module, "compile_model", compile_model)
    engine, reports = open_in(place)
    ((other, other_reports),) = others
    assert reports == other_reports == [f"saved {path}"]
    assert_gives(engine, logits)
    assert_gives(other, logits)


def test_removed_by_another_process_in_the_meantime(
    place: Path, monkeypatch: pytest.MonkeyPatch, instant: Compilations, logits: np.ndarray
) -> None:
    """An engine that is found and then gone is like one that was never there."""
    real = tp.Executable.load

    def load(path: str) -> tp.Executable:
        os.unlink(path)
        return real(path)

    monkeypatch.setattr(tp.Executable, "load", load)
    engine, reports = open_in(place)
    assert reports[1].startswith("saved ")
    assert_gives(engine, logits)


def test_unusable_folder_is_refused_before_any_work(place: Path, compilations: Compilations) -> None:
    compilations.allowed = False
    (place / "file").touch()
    for folder in (place / "file", place / "file" / "engines", Path("/proc/engines")):
        with pytest.raises(EngineError, match=f"expected a writable engine folder but {folder} is not: "):
            open_engine(open_checkpoint(place / "model"), "float32", 1, folder)


# --- the rest of the engine ------------------------------------------------------------------------------------------


def test_start_forgets(place: Path, logits: np.ndarray) -> None:
    engine, _ = open_in(place)
    assert_gives(engine, logits)
    assert_gives(engine, logits)
    assert engine.context == CONTEXT and engine.batch == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_nvtripys_own_call_gives_the_same(place: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """As NVIDIA's runtime is called, and ours where it interprets."""
    checkpoint = open_checkpoint(place / "model")
    direct = open_engine(checkpoint, "float32", batch)
    monkeypatch.setattr(engine_module.Decoder, "of", lambda executable: None)
    public = Engine(direct.executable, engine_module.config_of(checkpoint, "float32"), batch)
    position = np.zeros(batch, np.int32)
    for length in (4, 1, 1, 2, 1):
        tokens = (np.arange(batch * length, dtype=np.int32).reshape(batch, length) * 7 + position[:, None]) % 11
        last = np.full(batch, length - 1, np.int32)
        np.testing.assert_array_equal(public.step(tokens, position, last), direct.step(tokens, position, last))
        position = position + np.int32(length)


def test_a_compiled_model_can_be_freed(place: Path) -> None:
    checkpoint = open_checkpoint(place / "model")
    gpt = engine_module.load_model(checkpoint, engine_module.config_of(checkpoint, "float32"))
    executable, model = engine_module.compile_model(gpt, 1), weakref.ref(gpt)
    del gpt
    gc.collect()
    assert model() is None and executable is not None


def test_an_environment_that_asks_for_what_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and no engine is built again for it."""
    pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")
    reports: list[str] = []
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", "sse9")
    with pytest.raises(EngineError, match=r"^expected NVTRIPY_PORTABLE_ISA to be one of .* but got 'sse9'$"):
        open_engine(open_checkpoint(place / "model"), "float32", 1, place / "engines", reports.append)
    assert reports == []
