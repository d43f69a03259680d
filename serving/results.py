"""Where the answers to a file of requests go: a line of JSON for each request, in their order.

    {"index": 0, "custom_id": "b", "choices": [{"index": 0, "text": ", sir.", "finish_reason": "stop"}], "usage": …}

A file of them appears when it is complete. Until then its lines are in ``FILE.partial``, and what they answer is told
in ``FILE.partial.job``: whoever was interrupted goes on where the last whole line ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from command_line import UsageError
from generation import LogitsError
from serving.jobs import JobFile
from serving.offline import Answer


def results_of(answers: Iterable[Answer]) -> Iterator[dict[str, Any]]:
    """Of each request what its line has, once all of its answers have ended. An error of the model is a result, too."""
    for _, group in itertools.groupby(answers, key=lambda answer: answer.request.index):
        choices, tokens = [], 0
        for answer in group:
            choices.append(_choice(answer))
            tokens += answer.tokens
            request = answer.request
        usage = {"prompt_tokens": len(request.ids), "completion_tokens": tokens}
        yield {"index": request.index, "custom_id": request.custom_id, "choices": choices, "usage": usage}


def open_results(path: Path | None, jobs: JobFile, model: dict[str, Any], has_seed: bool) -> Results:
    """Where the results of jobs go. What an interrupted run has begun is gone on with, with its seed.

    Args:
        path: A file; None: standard output.
        model: What identifies the model, in what JSON has.
        has_seed: Whether the jobs' seed was asked for; else one that was begun with takes its place.

    Raises:
        UsageError: it was begun with something else, or is complete, or cannot be written.
    """
    if path is None:
        return Results()
    job = {"input": jobs.digest, **model, **asdict(jobs.usual), "n": jobs.choices}
    results = ResultFile(path, json.loads(json.dumps(job)), has_seed)
    jobs.usual = replace(jobs.usual, seed=results.seed)
    return results


def _choice(answer: Answer) -> dict[str, Any]:
    text, error = "", {}
    try:
        for piece in answer.pieces():
            text += piece
    except LogitsError as reason:
        error = {"error": str(reason)}
    score = {} if answer.score is None else {"score": answer.score}
    return {"index": answer.sample, "text": text, "finish_reason": answer.finish_reason, **score, **error}


def _has_error(result: dict[str, Any]) -> bool:
    """Whether an answer of a request ended in an error."""
    return any(choice["finish_reason"] == "error" for choice in result["choices"])


class Results:
    """Results on standard output, of which nothing is kept.

    Attributes:
        done: How many requests have their results.
        errors: How many of them ended in an error.
    """

    def __init__(self) -> None:
        self.done = self.errors = 0

    def write(self, result: dict[str, Any]) -> None:
        """The results of the next request."""
        self._put(json.dumps(result, ensure_ascii=False))
        self.done += 1
        self.errors += _has_error(result)

    def finish(self) -> None:
        """There are no more."""

    def _put(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


class ResultFile(Results):
    """Results in a file, which an interrupted run has begun, or not.

    Args:
        path: The file.
        job: All that the results depend on, as it comes out of JSON.
        has_seed: Whether the seed has to be the job's "seed"; else one that was begun with takes its place.

    Attributes:
        seed: With which it was begun.

    Raises:
        UsageError: the file is there already, or was begun with another job, or cannot be written, or another process
            writes it.
    """

    def __init__(self, path: Path, job: dict[str, Any], has_seed: bool) -> None:
        super().__init__()
        self._path, self._partial, self._job = path, Path(f"{path}.partial"), Path(f"{path}.partial.job")
        check_new(path)
        with self._errors_told():
            self._file: BinaryIO = self._partial.open("a+b")
            self._lock()
            if os.fstat(self._file.fileno()).st_size:
                job = self._begun(job, has_seed)
                self._repair()
            else:
                self._write_job(job)
        self.seed: int = job["seed"]

    def finish(self) -> None:
        """The file is complete."""
        with self._errors_told():
            os.fsync(self._file.fileno())
            check_new(self._path)
            self._partial.rename(self._path)
            self._job.unlink(missing_ok=True)
            self._file.close()

    def _put(self, line: str) -> None:
        with self._errors_told():
            self._file.write(f"{line}\n".encode())
            self._file.flush()

    def _lock(self) -> None:
        """Held as long as the process lives."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {self._partial}") from None
        except OSError:
            return  # not every file system has locks

    def _begun(self, job: dict[str, Any], has_seed: bool) -> dict[str, Any]:
        """The job of an interrupted run, which has to be this one."""
        try:
            found = json.loads(self._job.read_bytes())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("seed"), int):
            raise UsageError(f"{self._partial} is there, but not what it was begun with, {self._job}: {self._advice}")
        wanted = job if has_seed else {**job, "seed": found["seed"]}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                was, now = found.get(name), wanted.get(name)
                raise UsageError(f"{self._partial} was begun with another {name}, {was}, not {now}: {self._advice}")
        return found

    @property
    def _advice(self) -> str:
        return f"name another --output, or remove {self._partial} to begin anew"

    def _write_job(self, job: dict[str, Any]) -> None:
        """Before any result is there."""
        unfinished = Path(f"{self._job}.new")
        unfinished.write_text(json.dumps(job, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(self._job)

    def _repair(self) -> None:
        """Counts the results that are there. A line that was not finished is cut off, with whatever follows it."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                result = json.loads(line)
                has_error = _has_error(result)
                if not line.endswith(b"\n") or result["index"] != self.done:
                    break
            except (ValueError, KeyError, TypeError):
                break
            self.done += 1
            self.errors += has_error
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"cannot write {error.filename or self._partial}: {error.strerror}") from None


def check_new(path: Path) -> None:
    """Refuses to write over a file.

    Raises:
        UsageError: it is there.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(f"expected --output to name a new file, but {path} is there already")
