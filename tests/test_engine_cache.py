"""engine_cache.py: the cache stays small, shares with other processes, and never fails a run."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import edit_config, random_checkpoint

import command_line
import engine_cache
from engine import open_engine
from engine_cache import EngineCache, EngineError, EngineFolder
from nvtripy_portable import engine_file
from weight_loader import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SIZE = 1000  # bytes of an engine in the tests of what is kept


class Bytes:
    """In the place of an executable: what is saved of it are so many bytes."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving writes bytes, as many as the executable says."""
    monkeypatch.setattr(engine_file, "save", lambda executable, path: Path(path).write_bytes(bytes(executable.size)))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, plain: None, warnings: list[str]) -> EngineCache:
    """With room for three engines of the usual size."""
    return EngineCache(warnings.append, tmp_path / "engines", limit=3 * SIZE + SIZE // 2)


def file(cache: EngineFolder, checkpoint: str | Path, key: str = "0", use: str = "float16-batch1") -> Path:
    return cache.file(Path(checkpoint), use, key * 16)


def keep(cache: EngineFolder, path: Path, size: int = SIZE) -> list[str]:
    """Saves an engine, and gives what was reported."""
    reports: list[str] = []
    executable: Any = Bytes(size)
    cache.save(executable, path, reports.append)
    cache.save_pending()
    return reports


def kept(cache: EngineFolder) -> set[str]:
    """The checkpoints of which there are engines, and the names of whatever else is in the folder."""
    return {path.name.split("-")[0] for path in cache.path.iterdir()} if cache.path.exists() else set()


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- how much is kept ------------------------------------------------------------------------------------------------


def test_the_engine_that_was_used_longest_ago_makes_room(cache: EngineCache, warnings: list[str]) -> None:
    for number, name in enumerate("abc"):
        path = file(cache, name)
        assert keep(cache, path) == [f"saved {path}"]
        age(path, 1000 - number)
    cache.used(file(cache, "a"))
    keep(cache, file(cache, "d"))
    assert kept(cache) == {"a", "c", "d"}
    age(file(cache, "a"), 500)
    keep(cache, file(cache, "e"), 2 * SIZE)  # takes the room of two
    assert kept(cache) == {"d", "e"} and warnings == []


def test_an_engine_that_is_saved_again_needs_no_second_room(cache: EngineCache) -> None:
    for name in "abcabc":
        keep(cache, file(cache, name))
    assert kept(cache) == {"a", "b", "c"}


def test_an_engine_larger_than_the_limit(cache: EngineCache, warnings: list[str]) -> None:
    """It is not kept, and costs the others nothing."""
    keep(cache, file(cache, "a"))
    assert keep(cache, file(cache, "b"), 4 * SIZE) == []
    assert kept(cache) == {"a"}
    assert warnings == [
        f"compiled engines are not kept in {cache.path}: this one takes 4,000 bytes, and all together may take 3,500"
    ]


def test_a_folder_that_the_user_named_has_no_limit(tmp_path: Path, plain: None) -> None:
    folder = EngineFolder(tmp_path)
    for number in range(10):
        keep(folder, file(folder, f"m{number}"))
    assert len(kept(folder)) == 10


def test_what_is_not_an_engine_stays(cache: EngineCache) -> None:
    cache.path.mkdir()
    others = [cache.path / "notes", cache.path / ".hidden.engine.notes"]
    for path in others:
        path.write_bytes(bytes(10 * SIZE))
        age(path, 1e6)
    for name in "abcde":
        keep(cache, file(cache, name))
    assert all(path.exists() for path in others) and {"c", "d", "e"} <= kept(cache)


# --- what takes whose place ------------------------------------------------------------------------------------------


def test_a_new_version_takes_the_old_ones_place(cache: EngineCache, tmp_path: Path) -> None:
    keep(cache, old := file(cache, tmp_path / "model", "0"))
    keep(cache, other := file(cache, tmp_path / "elsewhere" / "model", "0"))
    keep(cache, larger := file(cache, tmp_path / "model", "2", "float16-batch2"))
    keep(cache, new := file(cache, tmp_path / "model", "1"))
    assert not old.exists() and other.exists() and larger.exists() and new.exists()


def test_revisions_at_the_hub_do_not_pile_up(cache: EngineCache) -> None:
    hub = Path("hub")
    gpt2, other = (hub / f"models--{name}" / "snapshots" for name in ("openai--gpt2", "you--other"))
    keep(cache, old := file(cache, gpt2 / "0123", "0"))
    keep(cache, another := file(cache, other / "0123", "0"))
    keep(cache, new := file(cache, gpt2 / "4567", "1"))
    assert not old.exists() and another.exists() and new.exists()
    assert new.name.startswith("models--openai--gpt2-float16-batch1-")


def test_a_checkpoint_that_changes_leaves_one_engine(tmp_path: Path, warnings: list[str]) -> None:
    """With real engines: the one of the new weights is used, the one of the old is gone."""
    cache = EngineCache(warnings.append, tmp_path / "engines")
    model = random_checkpoint(tmp_path / "model")
    found: list[str] = []
    for change in (None, None, 1e-3):
        if change is not None:
            edit_config(model, layer_norm_epsilon=change)
        open_engine(open_checkpoint(model), "float32", 1, cache, found.append)
        cache.save_pending()
    assert [text.split()[0] for text in found] == ["saved", "opened", "saved"]
    (path,) = cache.path.iterdir()
    assert found[2] == f"saved {path}" and warnings == []


# --- what must not fail a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "proc", "no home"])
def test_an_unusable_cache_is_said_once(
    tmp_path: Path, plain: None, warnings: list[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    path = {"file": tmp_path / "file" / "engines", "proc": Path("/proc/engines"), "no home": Path("~/.cache")}[place]
    if place == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))
    cache = EngineCache(warnings.append, path)
    cache.check()
    for name in "ab":
        assert not cache.has(file(cache, name))
        assert keep(cache, file(cache, name)) == []
    reason = {"file": "Not a directory", "proc": "No such file or directory", "no home": "there is no home folder"}
    assert warnings == [f"compiled engines are not kept in {path}: {reason[place]}"]
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("of\nnvtripy"), MemoryError()]
)
def test_a_failing_save_is_said_once(
    cache: EngineCache, warnings: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(executable: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(engine_file, "save", fail)
    for name in "ab":
        assert keep(cache, file(cache, name)) == []
    reason = {OSError: "No space left on device", RuntimeError: "of nvtripy", MemoryError: "MemoryError"}[type(error)]
    assert warnings == [f"compiled engines are not kept in {cache.path}: {reason}"]
    assert not list(cache.path.iterdir()), "it left something behind"


def test_a_cache_that_can_only_be_read(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is used."""
    keep(cache, path := file(cache, "a"))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    cache.used(path)
    assert cache.has(path)


def test_a_damaged_engine_is_built_again(tmp_path: Path, warnings: list[str]) -> None:
    cache = EngineCache(warnings.append, tmp_path / "engines")
    checkpoint = open_checkpoint(random_checkpoint(tmp_path / "model"))
    found: list[str] = []
    for damaged in (False, True, False):
        if damaged:
            (path,) = cache.path.iterdir()
            os.truncate(path, path.stat().st_size // 2)
        open_engine(checkpoint, "float32", 1, cache, found.append)
        cache.save_pending()
    assert found[1].startswith(f"{path} cannot be used (") and found[2:] == [f"saved {path}", f"opened {path}"]
    assert warnings == []


# --- when it is written ----------------------------------------------------------------------------------------------


def test_an_engine_waits_for_its_moment(cache: EngineCache) -> None:
    path = file(cache, "a")
    executable: Any = Bytes()
    reports: list[str] = []
    cache.save(executable, path, reports.append)
    assert not cache.path.exists() and reports == []
    cache.save_pending()
    assert path.exists() and reports == [f"saved {path}"]
    cache.save_pending()
    assert reports == [f"saved {path}"]


def test_saving_goes_on_beside_the_work(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def save(executable: object, path: str) -> None:
        assert may_write.wait(60)
        Path(path).write_bytes(b"engine")

    monkeypatch.setattr(engine_file, "save", save)
    executable: Any = Bytes()
    path = file(cache, "a")
    cache.save(executable, path, lambda message: None)
    for _ in range(3):  # with every token
        cache.save_pending(wait=False)
    assert not path.exists()
    may_write.set()
    cache.save_pending()
    assert path.read_bytes() == b"engine"


# --- other processes -------------------------------------------------------------------------------------------------

#: Saves the engines of many checkpoints, or begins one and waits.
PROCESS = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
from engine_cache import EngineCache
from nvtripy_portable import engine_file

folder, names = Path(sys.argv[2]), sys.argv[3:]
def save(executable, path):
    Path(path).write_bytes(bytes(1000))
    if not names:
        print("writing", flush=True)
        time.sleep(600)
engine_file.save = save
cache = EngineCache(lambda message: sys.exit(f"warned: {message}"), folder, limit=3500)
for name in names or ["a"]:
    path = cache.file(Path(name), "float16-batch1", "0" * 16)
    cache.save(None, path, lambda message: None)
    cache.save_pending()
    cache.has(path) and cache.used(path)
print("done")
"""


def process(folder: Path, *names: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(ROOT), str(folder), *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache(cache: EngineCache, warnings: list[str]) -> None:
    """They save, use and evict at the same time; in the end there is no more than there may be."""
    processes = [process(cache.path, *(f"m{(number + at) % 7}" for at in range(60))) for number in range(4)]
    for each in processes:
        with each:
            assert each.communicate() == ("done\n", "")
    keep(cache, file(cache, "last"))
    names = kept(cache)
    assert "last" in names and 1 <= len(names) <= 3 and "" not in names and warnings == []
    assert all(path.suffix == ".engine" for path in cache.path.iterdir()), "an unfinished file was left"


def test_what_a_killed_process_left_is_removed(cache: EngineCache) -> None:
    """And what one that lives has not finished stays, however old it looks."""
    with process(cache.path) as dying, process(cache.path) as living:
        try:
            for each in (dying, living):
                assert each.stdout is not None and each.stdout.readline() == "writing\n"
            partials = set(cache.path.iterdir())
            assert len(partials) == 2
            keep(cache, file(cache, "b"))
            assert partials < set(cache.path.iterdir()), "it may be another process's, at work"
            for path in partials:
                age(path, engine_cache._SETTLED_AFTER + 1)
            dying.send_signal(signal.SIGKILL)
            dying.wait()
            keep(cache, file(cache, "b"))
            (partial,) = partials & set(cache.path.iterdir())
        finally:
            living.kill()
            living.wait()
    keep(cache, path := file(cache, "b"))
    assert list(cache.path.iterdir()) == [path] and not partial.exists()


@pytest.mark.parametrize(("seconds", "stays"), [(600, True), (7200, False)])
def test_a_file_system_without_locks(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, seconds: float, stays: bool
) -> None:
    """Only time can tell there."""

    def refuse(handle: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(engine_cache.fcntl, "flock", refuse)
    cache.path.mkdir()
    partial = cache.path / f".{file(cache, 'a').name}.abcd1234"
    partial.touch()
    age(partial, seconds)
    keep(cache, file(cache, "b"))
    assert partial.exists() == stays


# --- options ---------------------------------------------------------------------------------------------------------


def options(*arguments: str) -> argparse.Namespace:
    parser = command_line.Parser("program", "A program.")
    command_line.add_engine_arguments(parser)
    return parser.parse_args(arguments)


def test_options_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warnings: list[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def choose(*given: str) -> EngineFolder | None:
        return engine_cache.chosen(options(*given), warnings.append)

    usual = choose()
    assert isinstance(usual, EngineCache) and usual.path == tmp_path / "xdg" / "nanogpt-tripy" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    usual = choose()
    assert usual is not None and usual.path == tmp_path / "home" / ".cache" / "nanogpt-tripy" / "engines"
    assert choose("--no-engine-cache") is None
    named = choose("--engine-dir=~/engines")
    assert type(named) is EngineFolder and named.path == tmp_path / "home" / "engines"
    assert EngineFolder(Path("~/engines")).path == named.path
    with pytest.raises(command_line.UsageError, match="not allowed with"):
        options("--engine-dir=engines", "--no-engine-cache")
    assert not list(tmp_path.iterdir()), "choosing writes nothing"


def test_a_named_folder_has_to_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="expected a writable engine folder"):
        EngineFolder(tmp_path / "file").check()


def test_example_uses_the_cache(tmp_path: Path) -> None:
    """As a program: the second run opens what the first one kept, in either is nothing but the text."""
    model = random_checkpoint(tmp_path / "model")
    command = [sys.executable, str(ROOT / "example.py"), f"--model-type={model}", "--input-text=To be", "--seed=1"]
    command += ["--max-new-tokens=3"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder = tmp_path / "cache" / "nanogpt-tripy" / "engines"

    def run(*more: str, **changes: str) -> tuple[str, str]:
        done = subprocess.run([*command, *more], env=environment | changes, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    without, said = run("--no-engine-cache")
    assert said == "" and not folder.exists()
    first, said = run()
    (path,) = folder.iterdir()
    assert (first, said) == (without, "")
    before = path.stat().st_mtime_ns
    second, said = run("--verbose")
    assert second == without and said.startswith(f"opened {path}\n")
    assert path.stat().st_mtime_ns > before, "its use is not noted"
    (tmp_path / "file").touch()
    third, said = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert third == without
    where = tmp_path / "file" / "nanogpt-tripy" / "engines"
    assert said == f"example.py: compiled engines are not kept in {where}: Not a directory\n"
