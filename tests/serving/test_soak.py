"""Clients of all kinds at once, for as long as NANOGPT_TRIPY_SOAK_SECONDS says: some vanish, read slowly, send garbage,
reach the limits, or are killed. Nobody gets anything but what it gets alone, and nothing is left behind.

    NANOGPT_TRIPY_SOAK_SECONDS=1200 python -m pytest -n 0 -s tests/serving/test_soak.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Server
from tiny_checkpoints import random_checkpoint

SECONDS = float(os.environ.get("NANOGPT_TRIPY_SOAK_SECONDS", "60"))
CLIENTS = 10
GROWTH = 24 << 20  # bytes of memory that may come after the first third: caches of allocators, no answers
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def bodies() -> list[tuple[str, dict[str, Any]]]:
    """What is asked again and again: each has one right answer."""
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(40):
        how = {"seed": number % 7, "temperature": [0, 0.8, 1.4][number % 3], "max_tokens": 1 + 5 * number % 25}
        how |= {"n": 1 + number % 3, "ignore_eos": number % 2 == 0, "stop": [None, "4", "AB"][number % 3]}
        if number % 4 == 0:
            message = {"role": "user", "content": "Hi " * (number % 5)}
            asked.append((CHAT, {**how, "messages": [message], "logprobs": number % 8 == 0}))
        else:
            prompt: Any = "To be, or not " + "to be" * (number % 6)
            prompt = [prompt, f"{number}"] if number % 5 == 0 else prompt
            asked.append(
                (COMPLETIONS, {**how, "prompt": prompt, "logprobs": number % 3 or None, "echo": number % 7 == 0})
            )
    return asked


Told = dict[int, tuple[str, str]]  # by the answer's number: its text, and why it ended


def whole(answer: dict[str, Any]) -> Told:
    return {
        each["index"]: (each["message"]["content"] if "message" in each else each["text"], each["finish_reason"])
        for each in answer["choices"]
    }


def streamed(lines: Iterator[str]) -> Told | None:
    """None where the stream ended without saying that it was whole."""
    told: Told = {}
    for line in lines:
        if line == "data: [DONE]":
            return told
        if line.startswith("data: "):
            for each in json.loads(line[6:])["choices"]:
                text, reason = told.get(each["index"], ("", ""))
                more = each["delta"].get("content", "") if "delta" in each else each["text"]
                told[each["index"]] = text + more, each["finish_reason"] or reason
    return None


class Soak:
    """The clients, what they have to get, and how often each thing has happened."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self.expected = [(path, body, whole(server.post(path, **body).json())) for path, body in bodies()]
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """One thing after another until it is over."""
        chance = random.Random(seed)
        actions: list[Callable[[random.Random], str]] = [self.asks, self.asks, self.streams, self.streams, self.cancels]
        actions += [self.vanishes, self.reads_slowly, self.sends_garbage, self.asks_too_much, self.connects]
        while not self.is_over.is_set():
            action = chance.choice(actions)
            try:
                done = f"{action.__name__}: {action(chance)}"
            except Exception as error:  # a client of its own must not end the others
                done = f"{action.__name__}: {error!r}"
                self.wrong.append(done)
            with self._lock:
                self.happened[done] += 1

    def _compare(self, number: int, told: Told | None) -> str:
        path, body, expected = self.expected[number]
        if told != expected:
            self.wrong.append(f"{path} {body}: {told} for {expected}")
        return "whole"

    def asks(self, chance: random.Random) -> str:
        number = chance.randrange(len(self.expected))
        path, body, _ = self.expected[number]
        answer = httpx.post(self.server.url + path, json=body, timeout=60, trust_env=False)
        return self._compare(number, whole(answer.json())) if answer.status_code == 200 else _busy(answer.status_code)

    def streams(self, chance: random.Random) -> str:
        number = chance.randrange(len(self.expected))
        path, body, _ = self.expected[number]
        asked = {**body, "stream": True}
        with httpx.stream("POST", self.server.url + path, json=asked, timeout=60, trust_env=False) as answer:
            if answer.status_code != 200:
                return _busy(answer.status_code)
            return self._compare(number, streamed(answer.iter_lines()))

    def cancels(self, chance: random.Random) -> str:
        path, body, _ = self.expected[chance.randrange(len(self.expected))]
        asked = {**body, "stream": True, "max_tokens": 25}
        with httpx.stream("POST", self.server.url + path, json=asked, timeout=60, trust_env=False) as answer:
            if answer.status_code != 200:
                return _busy(answer.status_code)
            lines = answer.iter_lines()
            for _ in range(chance.randrange(6)):
                next(lines, None)
        return "left"

    def _connected(self, content: bytes) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(self.address)
        connection.sendall(content)
        return connection

    def vanishes(self, chance: random.Random) -> str:
        """In the middle of a request or of an answer, politely or not."""
        path, body, _ = self.expected[chance.randrange(len(self.expected))]
        content = _request(path, {**body, "stream": chance.random() < 0.5, "max_tokens": 25})
        with self._connected(
            content[: chance.randrange(len(content)) if chance.random() < 0.3 else None]
        ) as connection:
            if chance.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(chance.random() * 0.05)
        return "gone"

    def reads_slowly(self, chance: random.Random) -> str:
        number = chance.randrange(len(self.expected))
        path, body, _ = self.expected[number]
        content = b""
        with self._connected(_request(path, {**body, "stream": True}, "Connection: close\r\n")) as connection:
            while piece := connection.recv(200):
                content += piece
                time.sleep(0.001)
        status = int(content[9:12])
        if status != 200:
            return _busy(status)
        text = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", content.partition(b"\r\n\r\n")[2]).decode()
        return self._compare(number, streamed(iter(text.split("\n"))))

    def sends_garbage(self, chance: random.Random) -> str:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\n"
        content = [
            chance.randbytes(200),
            head + b"a" * 40_000,
            head + b"Content-Length: 5\r\n\r\n{]]]]",
            head + b"Content-Length: 99999999\r\n\r\n{",
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"%00" * 50 + b" HTTP/1.1\r\n\r\n",
        ][chance.randrange(6)]
        with contextlib.suppress(ConnectionError), self._connected(content) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            if answer and not answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 503")):
                self.wrong.append(f"{content[:60]!r}: {answer[:60]!r}")
        return "refused"

    def asks_too_much(self, chance: random.Random) -> str:
        wrong, statuses = [
            ({"prompt": ["a"] * 200, "max_tokens": 5}, (429,)),
            ({"prompt": "a" * 100}, (400,)),
            ({"prompt": "a", "max_tokens": 1 << 40}, (400,)),
            ({"prompt": "a", "beams": 2}, (400,)),
        ][chance.randrange(4)]
        answer = httpx.post(self.server.url + COMPLETIONS, json=wrong, timeout=60, trust_env=False)
        if answer.status_code not in (*statuses, 503):
            self.wrong.append(f"{wrong}: {answer.status_code} {answer.text}")
        return "refused"

    def connects(self, chance: random.Random) -> str:
        """More connections than there may be, which say nothing."""
        with contextlib.ExitStack() as stack, contextlib.suppress(ConnectionError):
            for _ in range(chance.randrange(40)):
                stack.enter_context(self._connected(b""))
        return "gone"

    def is_killed(self) -> None:
        """A client in a process of its own, amid its answer."""
        asked = json.dumps({"prompt": ["a"] * 5, "max_tokens": 60, "ignore_eos": True, "stream": True})
        code = f"import httpx\nwith httpx.stream('POST', '{self.server.url}{COMPLETIONS}', content={asked!r},"
        code += " trust_env=False) as answer:\n    print(next(answer.iter_raw()), flush=True)\n    input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()


def _busy(status: int) -> str:
    assert status in (429, 503), status
    return "busy"


def _request(path: str, body: dict[str, Any], headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: here\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


def memory(server: Server) -> int:
    (found,) = re.findall(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    return int(found) << 10


def reasons(server: Server) -> dict[str, float]:
    """How many answers have ended, by why."""
    families = {each.name: each for each in text_string_to_metric_families(server.http.get("/metrics").text)}
    samples = families["nanogpt_tripy_request_success"].samples
    return {each.labels["finished_reason"]: each.value for each in samples if each.name.endswith("_total")}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_soak(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}a:")
    options = ["--max-num-seqs=8", "--max-queue=60", "--max-connections=40", "--speculate=prompt-lookup"]
    server = Server(random_checkpoint(tmp_path / "tiny"), f"--chat-template={template}", *options)
    soak = Soak(server)
    clients = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(CLIENTS)]
    for each in clients:
        each.start()
    begun, sizes = time.monotonic(), []
    while (passed := time.monotonic() - begun) < SECONDS:
        soak.is_killed()
        assert server.http.get("/health").status_code == 200
        if passed > SECONDS / 3:
            sizes.append(memory(server))
        time.sleep(min(5.0, SECONDS / 12))
    soak.is_over.set()
    for each in clients:
        each.join(60)
    assert not soak.wrong, soak.wrong[:5]
    print(*(f"{count:8} {what}" for what, count in sorted(soak.happened.items())), sep="\n")
    print(f"memory: {sizes[0] >> 10} to {sizes[-1] >> 10} KiB, at most {max(sizes) >> 10}")
    assert max(sizes) - sizes[0] < GROWTH
    _is_at_rest(server)
    _ends_well(server, soak)


def _is_at_rest(server: Server) -> None:
    """Nothing runs, waits or holds pages, and every answer that was accepted has ended for some reason, once."""
    end = time.monotonic() + 30
    while server.metric("num_requests_running") or server.metric("num_requests_waiting"):
        assert time.monotonic() < end, "what nobody waits for any more goes on"
        time.sleep(0.05)
    assert server.metric("kv_cache_pages_used") == 0
    ended = reasons(server)
    print(ended)
    assert set(ended) == {"stop", "length", "cancelled"} and min(ended.values()) > 0
    assert server.metric("request_accepted_total") == sum(ended.values())
    assert server.metric("spec_decode_num_accepted_tokens_total") < server.metric("spec_decode_num_draft_tokens_total")


def _ends_well(server: Server, soak: Soak) -> None:
    """SIGTERM while all clients ask: who was being answered gets all of it; then the server ends with code 0."""
    got: list[bool | None] = []

    def ask(number: int) -> None:
        path, body, expected = soak.expected[number]
        with contextlib.suppress(httpx.TransportError):  # it came too late
            answer = httpx.post(server.url + path, json=body, timeout=60, trust_env=False)
            got.append(whole(answer.json()) == expected if answer.status_code == 200 else None)

    asking = [threading.Thread(target=ask, args=(number % len(soak.expected),)) for number in range(30)]
    for each in asking:
        each.start()
    while server.metric("num_requests_running") == 0 and any(each.is_alive() for each in asking):
        pass
    server.process.send_signal(signal.SIGTERM)
    for each in asking:
        each.join(60)
    assert server.process.wait(60) == 0
    assert True in got and False not in got, got
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)
