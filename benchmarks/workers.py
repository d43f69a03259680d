"""Processes that hold one engine each, and work only when they are told to.

A worker answers one command at a time. It answers only when all its threads sleep: those of OpenMP go on turning for
some milliseconds after their work, and would take the next worker's processor.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peers
from peers import Task

SHORTEST_TURN = 0.2  # seconds: a turn that is shorter is repeated, so that clocks and schedulers matter little
REST = 0.01  # seconds between two looks at the processor time
LONGEST_REST = 2.0  # seconds

_context = multiprocessing.get_context("spawn")


class WorkerError(Exception):
    """A worker could not do what it was told, or has ended; one line says why."""


class Worker:
    """A process with an object in it.

    Args:
        make: A function of a module, called there with ``arguments``, returns the object.

    Raises:
        WorkerError: ``make`` failed.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._connection, remote = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(remote, make, arguments), daemon=True)
        self._process.start()
        remote.close()
        self.receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns there."""
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise WorkerError("its process has ended") from None
        return self.receive()

    def receive(self) -> Any:
        try:
            failure, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise WorkerError(f"its process ended with exit code {self._process.exitcode}") from None
        if failure is not None:
            raise WorkerError(failure)
        return result

    def close(self) -> None:
        """Ends the process, and returns when it has ended."""
        self._connection.close()  # which ends its loop
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    _keep_stdout_clean()
    try:
        served = make(*arguments)
        _rest()
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            result = getattr(served, method)(*arguments)
            _rest()
            connection.send((None, result))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass  # nobody asks any more
    except Exception as error:
        connection.send((_one_line(error), None))


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:299] + "…"


def _keep_stdout_clean() -> None:
    """Whatever a library prints goes to standard error: standard output is the table's."""
    os.dup2(2, 1)


def _rest() -> None:
    """Returns when the process does nothing else any more."""
    end = time.perf_counter() + LONGEST_REST
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(REST)
        if time.process_time() - used < REST / 10:
            return


class Timed:
    """An engine in a worker.

    Args:
        name: One of ``peers.PEERS``.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.engine = peers.start(name, task)

    def logits(self, prompt: Sequence[int]) -> Any:
        return self.engine.logits(prompt)

    def turn(self, prompt: Sequence[int], new: int) -> list[list[float]]:
        """The moments of each token, of as many repetitions as a turn takes."""
        responses: list[list[float]] = []
        begin = time.perf_counter()
        while not responses or time.perf_counter() - begin < SHORTEST_TURN:
            responses.append(self.engine.generate(prompt, new))
        return responses


def write_model(name: str, shape: str, width: str, cache: Path) -> None:
    """For a worker: writes the file that an engine loads, in a process that ends and takes the libraries with it."""
    import model_files

    model_files.model_file(name, shape, width, cache)


def fresh_start(name: str, task: Task, prompt: Sequence[int], new: int) -> tuple[float, int]:
    """A new process that loads a model, generates, and ends: fresh.py.

    Returns:
        Seconds from its start to its first token, and its peak memory in bytes.

    Raises:
        WorkerError: it failed.
    """
    asked = {
        "name": name,
        "model": str(task.model),
        "variant": task.variant,
        "threads": task.threads,
        "engines": task.engines and str(task.engines),
        "prompt": list(prompt),
        "new": new,
    }
    program = Path(__file__).with_name("fresh.py")
    begin = time.perf_counter()
    # What a library says goes to a file: nobody would empty a pipe.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as process,
    ):
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        process.stdout.readline()
        seconds = time.perf_counter() - begin
        peak = process.stdout.readline()
        if process.wait() != 0 or not peak:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            raise WorkerError(f"a fresh process failed: {reason}")
    return seconds, int(peak)
