"""Processes that hold one engine each, and work only when they are told to.

A worker answers one command at a time. It answers only when all its threads sleep: those of OpenMP go on turning for
some milliseconds after their work, and would take the next worker's processor.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.task import Engine, Prompts, Task

SHORTEST_TURN = 0.2  # seconds: a turn that is shorter is repeated, so that clocks and schedulers matter little
LONGEST_ANSWER = 1200.0  # seconds: who needs more has got stuck

_SERVER = Path(__file__).with_name("served.py")


class WorkerError(Exception):
    """A worker could not do what it was told, or has ended; one line says why."""


class Worker:
    """A process with an object in it.

    Args:
        make: A function of a module, called there with ``arguments``, returns the object.
        python: The Python to run there; None for this one, with the same places to look for modules.

    Raises:
        WorkerError: ``make`` failed.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, python: Path | None = None) -> None:
        self._connection, remote = multiprocessing.Pipe()
        command = [str(python or sys.executable), str(_SERVER), str(remote.fileno())]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[remote.fileno()])
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            remote.close()
        weakref.finalize(self, self._process.kill)  # when this process ends, too
        self._send((None if python else sys.path, pickle.dumps((make, arguments))))
        self.receive()

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise WorkerError("its process has ended") from None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns there."""
        self._send((method, arguments))
        return self.receive()

    def receive(self) -> Any:
        """Its answer."""
        try:
            if not self._connection.poll(LONGEST_ANSWER):
                self._process.kill()
                raise WorkerError(f"it gave no answer for {LONGEST_ANSWER:.0f} seconds")
            failure, result = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(f"its process ended with exit code {self._exit_code(5)}") from None
        if failure is not None:
            raise WorkerError(failure)
        return result

    def _exit_code(self, patience: float) -> int | None:
        """None if it does not end."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Ends the process, and returns when it has ended."""
        self._connection.close()  # which ends its loop
        if self._exit_code(10) is None:
            self._process.kill()
            self._process.wait()


class Timed:
    """An engine in a worker.

    Args:
        make: Loads it.
    """

    def __init__(self, make: Callable[[Task], Engine], task: Task) -> None:
        self.engine = make(task)

    def logits(self, prompt: Sequence[int]) -> Any:
        return self.engine.logits(prompt)

    def turn(self, prompts: Prompts, new: int) -> list[list[float]]:
        """The moments of each step's tokens, of as many repetitions as a turn takes."""
        responses: list[list[float]] = []
        begin = time.perf_counter()
        while not responses or time.perf_counter() - begin < SHORTEST_TURN:
            responses.append(self.engine.generate(prompts, new))
        return responses


def write_model(name: str, shape: str, width: str, cache: Path) -> None:
    """For a worker: writes the file that an engine loads, in a process that ends and takes the libraries with it."""
    import model_files

    model_files.model_file(name, shape, width, cache)


def fresh_start(
    name: str, task: Task, prompt: Sequence[int], new: int, python: Path | None = None
) -> tuple[float, int]:
    """A new process that loads a model, generates, and ends: fresh.py.

    Args:
        python: The Python that it runs in; None for this one.

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
            [python or sys.executable, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        ) as process,
    ):
        assert process.stdin and process.stdout
        patience = threading.Timer(LONGEST_ANSWER, process.kill)
        patience.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
        process.stdout.readline()
        seconds = time.perf_counter() - begin
        peak = process.stdout.readline()
        process.wait()
        patience.cancel()
        if process.returncode != 0 or not peak:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines()
            reason = lines[-1] if lines and process.returncode > 0 else f"exit code {process.returncode}"
            raise WorkerError(f"a fresh process failed: {reason}")
    return seconds, int(peak)
