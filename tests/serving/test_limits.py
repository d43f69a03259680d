"""The limits of a whole server: thousands of connections, clients that do not read, descriptors that run out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Server
from tiny_checkpoints import CONTEXT, random_checkpoint

from serving.http.bridge import Answers
from serving.sequence import Update

STREAM = {"prompt": "a", "max_tokens": CONTEXT, "stream": True, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("limited") / "tiny")


def address_of(server: Server) -> tuple[str, int]:
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)", server.url).groups()  # type: ignore[union-attr]
    return host, int(port)


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def memory(server: Server) -> int:
    """Bytes of the server's process."""
    (found,) = re.findall(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    return int(found) << 10


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def many_descriptors(wanted: int) -> Iterator[int]:
    """How many more this process can have, of those that are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + 256 if hard == resource.RLIM_INFINITY else min(wanted + 256, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, soft), hard))
    try:
        yield min(wanted, max(most, soft) - 256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_ten_thousand_connections(folder: Path) -> None:
    """All of them at once, a third silent, a third that send half a request, a third garbage: whoever asks something is
    answered meanwhile, streams go on, memory and descriptors are bounded, and all is free when they have gone."""
    server = Server(folder, "--max-connections=500", "--max-num-seqs=8")
    expected = server.http.post("/v1/completions", json={**STREAM, "stream": False}).json()["choices"][0]["text"]
    begun, free = memory(server), descriptors(server)
    with many_descriptors(10_000) as count, contextlib.ExitStack() as stack:
        stream = stack.enter_context(server.http.stream("POST", "/v1/completions", json={**STREAM, "n": 60}))
        lines = stream.iter_lines()
        next(lines)
        first = [b"", b"POST /v1/completions HT", b"\x16\x03\x01\x00garbage\r\n\r\n"]
        most_memory = most_descriptors = 0
        for number in range(count):
            connection = stack.enter_context(socket.socket())
            connection.settimeout(10)
            with contextlib.suppress(ConnectionError):
                connection.connect(address_of(server))
                connection.sendall(first[number % 3])
            if number % 500 == 0:
                assert server.http.get("/health").status_code == 200
                with socket.create_connection(address_of(server), timeout=10) as fresh:
                    fresh.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
                    assert fresh.recv(1000).startswith(b"HTTP/1.1 200 OK"), "of a new client"
                most_memory, most_descriptors = (
                    max(memory(server), most_memory),
                    max(descriptors(server), most_descriptors),
                )
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        texts = dict.fromkeys(range(60), "")
        for chunk in told:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts[0].endswith(expected[-10:]), "the stream went on to its end"
        print(
            f"{count} connections: {(most_memory - begun) >> 20} MiB more, {most_descriptors - free} descriptors more"
        )
        assert most_descriptors - free < 500 + 200
        assert most_memory - begun < 100 << 20
    wait_for(lambda: descriptors(server) <= free + 4)
    assert server.http.get("/health").status_code == 200
    assert server.metric("kv_cache_pages_used") == 0
    assert server.close() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_few_descriptors(folder: Path) -> None:
    """A server that may have few descriptors has fewer connections, says so, and never runs out."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = Server(folder)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (descriptors(server) + 20, hard))
    held = []
    for _ in range(200):  # more than there are descriptors, and fewer than connections that it believes it may have
        held.append(socket.create_connection(address_of(server), timeout=10))
    time.sleep(0.3)
    assert server.process.poll() is None
    assert server.http.get("/health").status_code == 200, "the silent ones made room"
    for each in held:
        each.close()
    assert server.post("/v1/completions", prompt="a").status_code == 200
    assert server.close() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_what_nobody_reads_is_kept_once() -> None:
    answers = Answers()
    for number in range(1000):
        answers.add(
            number % 3, Update(number % 3, "ab", [number], [number], finish_reason="stop" if number > 996 else None)
        )
    assert len(answers._updates) == 3
    found = dict(asyncio.run(answers.some()))
    assert found[1].ids == [*range(1, 1000, 3)] and len(found[1].text) == 2 * 333
    assert [each.finish_reason for each in found.values()] == ["stop"] * 3


@pytest.mark.slow
def test_clients_that_do_not_read_hold_nobody_up(folder: Path) -> None:
    """Answers with many log-probabilities, of which nothing is read: they are computed and wait for their
    readers, while others are served; and whoever reads at last has all of them."""
    server = Server(folder, "--max-num-seqs=8", "--max-queue=2000")
    body = {**STREAM, "n": 32, "logprobs": 200, "max_tokens": CONTEXT - 1}
    silent = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(address_of(server))
        connection.sendall(request_of(body))
        silent.append(connection)
    assert server.post("/v1/completions", prompt="b", priority=-1).status_code == 200
    wait_for(lambda: server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0)
    assert server.metric("kv_cache_pages_used") == 0
    content = b""
    while b"[DONE]" not in content[-100:]:
        piece = silent[0].recv(1 << 20)
        assert piece, content[-300:]
        content += piece
    assert content.count(b'"finish_reason":"length"') == 32
    for each in silent:
        each.close()
    assert server.close() == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)
