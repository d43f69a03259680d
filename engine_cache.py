"""Where compiled engines are kept: a folder that the user named, or one in the user's cache that looks after itself.

    engines = engine_cache.chosen(options, report)       # by --engine-dir and --no-engine-cache; None: nowhere
    engine = open_engine(checkpoint, "float16", 1, engines)
    ...                                                  # the first tokens
    engines.save_pending()

In a folder that the user named an engine is saved at once, and what goes wrong is an error. In the cache it waits until
the program has nothing more urgent to do, and what goes wrong is said once: no run fails for it. The engines in the
cache take a limited number of bytes, and those that were not used for the longest time make room.

Any number of processes may share a folder. Who reads an engine that another process removes goes on reading it: its
memory is mapped. Who writes one holds a lock on the unfinished file for as long as the process lives, so that what a
killed process left is known, and removed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import machine

if TYPE_CHECKING:
    import nvtripy as tp

LIMIT = 8 << 30  # bytes of engines in the cache: GPT-2 XL in float16 takes 3.1 GB of them
_SETTLED_AFTER = 60  # seconds without a change, after which an unfinished file is locked, if its process lives
_ABANDONED_AFTER = 3600  # seconds, where the file system knows no locks
_UNFINISHED = re.compile(r"\..+-[0-9a-f]{16}\.engine\.\w+")

Report = Callable[[str], None]


class EngineError(Exception):
    """An engine folder cannot be used; one line says why."""


def chosen(options: argparse.Namespace, warn: Report) -> EngineFolder | None:
    """Where the options of ``command_line.add_engine_arguments`` want engines to be kept; None: nowhere.

    Args:
        warn: Is told, once, if the cache cannot be used.
    """
    if options.engine_dir is not None:
        return EngineFolder(options.engine_dir)
    return None if options.no_engine_cache else EngineCache(warn)


class EngineFolder:
    """A folder for engines, one a file, that has to work: it is the user's wish."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.expanduser(path))

    def check(self) -> None:
        """Creates the folder and proves, before any long work, that a file can be written there.

        Raises:
            EngineError: it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise EngineError(f"expected a writable engine folder but {self.path} is not: {error.strerror}") from None

    def file(self, checkpoint: Path, use: str, key: str) -> Path:
        """The file of an engine.

        Args:
            checkpoint: The folder that it is made from. Its name goes into the file's.
            use: What it is made for: with another one, engines from a checkpoint live side by side.
            key: 16 hexadecimal digits of all that it is made from: with another one, it takes an older engine's place.
        """
        return self.path / f"{_file_name(checkpoint.name)}-{use}-{key}.engine"

    def has(self, file: Path) -> bool:
        return file.exists()

    def used(self, file: Path) -> None:
        """Is told that an engine was opened."""

    def save(self, executable: tp.Executable, file: Path, report: Report) -> None:
        """Keeps an engine, in the place of those that it makes stale, and says so.

        Raises:
            EngineError: it cannot be written.
        """
        try:
            self._write(executable, file)
        except OSError as error:
            raise EngineError(f"cannot save the engine to {file}: {error.strerror}") from None
        report(f"saved {file}")
        self._tidy(file)

    def save_pending(self, wait: bool = True) -> None:
        """The moment to write what could wait, if anything."""

    def _write(self, executable: tp.Executable, file: Path) -> None:
        """Writes beside the target and renames, so that an interrupted run leaves nothing half-written."""
        from nvtripy_portable import engine_file

        with _unfinished(file) as partial:
            engine_file.save(executable, partial)
            self._make_room(os.path.getsize(partial), file)
            os.replace(partial, file)

    def _make_room(self, size: int, file: Path) -> None:
        """For an engine of so many bytes. Here there is room as long as the disk has some.

        Raises:
            OSError: it is too large.
        """

    def _tidy(self, file: Path) -> None:
        """Removes what a new engine makes stale, and what processes left that were killed while saving."""
        name = file.name.rpartition("-")[0]
        for other in self._files():
            is_stale = other.suffix == ".engine" and other.name.rpartition("-")[0] == name and other != file
            if is_stale or (_UNFINISHED.fullmatch(other.name) and _is_abandoned(other)):
                with contextlib.suppress(OSError):  # another process has removed it
                    other.unlink()

    def _files(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(self.path.iterdir())
        return []


class EngineCache(EngineFolder):
    """The folder in the user's cache, which no run fails for.

    Args:
        warn: Is told, once, if engines cannot be kept.
        path: The folder; by default the user's.
        limit: Bytes that the engines may take together.
    """

    def __init__(self, warn: Report, path: Path | None = None, limit: int = LIMIT) -> None:
        super().__init__(machine.cache_folder() / "engines" if path is None else path)
        self._warn: Report | None = warn
        self._limit = limit
        self._pending: list[tuple[tp.Executable, Path, Report]] = []
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Nothing: whether it can be written matters only once there is something to write."""

    def file(self, checkpoint: Path, use: str, key: str) -> Path:
        """Checkpoints of one name that lie in different folders do not take each other's places.

        The revisions of a repository at the hub do, as do a folder's contents at different times.
        """
        if checkpoint.parent.name == "snapshots":  # in the hub's cache: its folder's own name is the commit
            checkpoint = checkpoint.parent.parent
        origin = hashlib.sha256(os.fsencode(os.path.realpath(checkpoint))).hexdigest()[:8]
        return super().file(checkpoint, f"{use}-{origin}", key)

    def has(self, file: Path) -> bool:
        with contextlib.suppress(OSError):
            return super().has(file)
        return False

    def used(self, file: Path) -> None:
        with contextlib.suppress(OSError):  # it may be read here, if not written
            os.utime(file)  # a file's time of access is not kept everywhere

    def save(self, executable: tp.Executable, file: Path, report: Report) -> None:
        """Remembers the engine for :meth:`save_pending`."""
        self._pending.append((executable, file, report))

    def save_pending(self, wait: bool = True) -> None:
        """Writes what was to be saved. Without ``wait`` a thread does that, which the process's end waits for."""
        if self._thread is None and self._pending:
            self._thread = threading.Thread(target=self._save_all, name="saves engines")
            self._thread.start()
        if wait and self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save_all(self) -> None:
        while self._pending:
            executable, file, report = self._pending.pop()
            try:
                if not self.path.is_absolute() and self.path.parts[0].startswith("~"):
                    raise OSError(0, "there is no home folder")
                self.path.mkdir(parents=True, exist_ok=True)
                self._write(executable, file)
                self._tidy(file)
            except Exception as error:  # of nvtripy's, too: whatever it is, the run goes on
                reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
                if self._warn is not None:
                    self._warn(f"compiled engines are not kept in {self.path}: {' '.join(reason.split())}")
                self._warn = None
            else:
                report(f"saved {file}")

    def _make_room(self, size: int, file: Path) -> None:
        if size > self._limit:
            raise OSError(0, f"this one takes {size:,} bytes, and all together may take {self._limit:,}")
        engines = []
        for path in self._files():
            if path.suffix == ".engine" and path != file:
                with contextlib.suppress(OSError):  # another process has removed it
                    status = path.stat()
                    engines.append((status.st_mtime_ns, path, status.st_size))
        excess = size + sum(each for _, _, each in engines) - self._limit
        for _, path, each in sorted(engines):
            if excess <= 0:
                return
            with contextlib.suppress(FileNotFoundError):  # so another process makes room, too
                path.unlink()
            excess -= each


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "model"


@contextlib.contextmanager
def _unfinished(file: Path) -> Iterator[str]:
    """A new file beside another, to be written and renamed; its lock says that its process lives."""
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    finally:
        os.close(handle)
        Path(partial).unlink(missing_ok=True)


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that was writing a file has ended."""
    with contextlib.suppress(OSError):  # it has been renamed, or removed
        age = time.time() - partial.stat().st_mtime
        if age < _SETTLED_AFTER:  # it may not be locked yet
            return False
        with partial.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                return age > _ABANDONED_AFTER
        return True
    return False
