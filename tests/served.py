"""serve.py in a process of its own, as its clients see it."""

from __future__ import annotations

import atexit
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]


class Server:
    """A server's process, and where it listens."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "serve.py", f"--model-type={folder}", "--port=0", "--no-engine-cache", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)  # where a test has failed before it came to close()
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True).start()
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        for _ in range(100):
            try:
                self.http.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.05)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def metric(self, name: str) -> float:
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"nanogpt_tripy_{name}":
                    return float(sample.value)
        raise AssertionError(name)

    def close(self) -> int:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
