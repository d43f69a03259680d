"""How many connections there may be, and how slow their clients: against an application that only says hello."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from serving.http import connections
from serving.http.connections import Patience, Server, connections_that_fit
from serving.http.server import listen

HELLO = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


class Application:
    """Says hello; below /endless it writes as fast as the client reads."""

    def __init__(self) -> None:
        self.written = 0
        self.is_writing = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/endless":
            await self._endless(receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    async def _endless(self, receive: Any, send: Any) -> None:
        await receive()
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.is_writing = True
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            self.written += 10_000
            await asyncio.sleep(0)
        self.is_writing = False


class Running:
    """A server in a thread of its own, and how to reach it."""

    def __init__(self, patience: Patience) -> None:
        self.application = Application()
        self._listener = listen("127.0.0.1", 0)
        self.address = self._listener.getsockname()
        config = uvicorn.Config(self.application, log_config=None, timeout_keep_alive=1, ws="none")
        self.server = Server(config, patience)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._listener])))

    def __enter__(self) -> Running:
        self._thread.start()
        wait_for(lambda: self.server.started and self.server.accepting is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def connect(self, content: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self.address, timeout=10)
        connection.sendall(content)
        return connection

    def asks(self) -> bytes:
        with self.connect(HELLO) as connection:
            return status_of(connection)

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def status_of(connection: socket.socket) -> bytes:
    """The status of the answer; nothing where the connection was closed without one."""
    return connection.recv(1 << 16).partition(b"\r\n")[0].removeprefix(b"HTTP/1.1 ")


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            content += piece
    return content


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running(Patience(connections=8, head_bytes=4096, head_seconds=1.5, write_seconds=2.0)) as running:
        yield running


@pytest.mark.parametrize("first", [b"", b"GET /", HELLO[:-2], b"\r\n", HELLO + HELLO[:5]])
def test_whoever_says_no_whole_request_is_sent_away(running: Running, first: bytes) -> None:
    """Whether it sends nothing more or a byte at a time: a header that never ends, or empty lines, which begin none."""
    piece = b"\r\n" if first == b"\r\n" else b"a"
    with running.connect(first) as connection:
        begun = time.monotonic()
        connection.settimeout(0.05)
        while time.monotonic() < begun + 20:
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1 << 16):
                    return
            if first:
                connection.sendall(piece)
    raise AssertionError("it may stay for ever")


def test_a_slow_but_whole_request_is_answered(running: Running) -> None:
    with running.connect() as connection:
        for place in range(0, len(HELLO), 4):
            connection.sendall(HELLO[place : place + 4])
            time.sleep(0.02)
        assert status_of(connection) == b"200 OK"
        connection.sendall(HELLO)
        assert status_of(connection) == b"200 OK"


BODY = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 9000,
        b"GET / HTTP/1.1\r\n" + b"a" * 9000,
        b"\r\n" * 5000,
    ],
    ids=["path", "headers", "value", "unfinished value", "unfinished name", "empty lines"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_head_without_end_is_refused(running: Running, request_: bytes, at_once: bool) -> None:
    with running.connect() as connection:
        with contextlib.suppress(ConnectionError):
            for place in range(0, len(request_), len(request_) if at_once else 500):
                connection.sendall(request_[place : place + (len(request_) if at_once else 500)])
        answer = rest_of(connection)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and b"connection: close" in head
    assert json.loads(content)["error"]["message"] == "expected at most 4096 bytes of headers"


@pytest.mark.parametrize("rest", [b"0\r\n" + b"a: b\r\n" * 1000, b"0\r\na: " + b"b" * 9000, b"1;" + b"a" * 9000])
def test_what_follows_a_body_has_a_bound(running: Running, rest: bytes) -> None:
    """Trailers, and what a chunk's size may be followed by."""
    with running.connect(BODY + rest) as connection:
        assert b"hello" not in rest_of(connection)


def test_garbage_is_refused_as_errors_are(running: Running) -> None:
    with running.connect(b"\x16\x03\x01 and what else TLS says\r\n\r\n") as connection:
        head, _, content = rest_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(content)["error"]["type"] == "invalid_request_error"


def test_a_connection_without_a_request_makes_room(running: Running) -> None:
    """More connections than there may be: those that say nothing go, the oldest first; whoever asks is answered."""
    silent = [running.connect() for _ in range(30)]
    assert running.asks() == b"200 OK"
    wait_for(lambda: running.open <= 8)
    assert all(rest_of(each).startswith(b"HTTP/1.1 503 ") for each in silent[:20]), "they are told why they go"
    for each in silent:
        each.close()
    wait_for(lambda: running.open == 0)


def test_where_all_connections_have_requests_others_are_turned_away(running: Running) -> None:
    asking = [running.connect(b"GET /endless HTTP/1.1\r\n\r\n") for _ in range(8)]
    for each in asking:
        assert status_of(each) == b"200 OK"
    with running.connect() as connection:
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
    for each in asking:
        assert each.recv(10), "they go on"
        each.close()
    wait_for(lambda: running.open == 0)
    assert running.asks() == b"200 OK"


def test_whoever_never_reads_is_dropped(running: Running) -> None:
    """What is written for it is bounded until then, and others do not wait."""
    before = running.application.written
    with running.connect(b"GET /endless HTTP/1.1\r\n\r\n"):
        wait_for(lambda: running.application.is_writing)
        assert running.asks() == b"200 OK"
        wait_for(lambda: not running.application.is_writing)
    assert running.application.written - before < 64 << 20, "the system's buffers, and 64 KiB"
    wait_for(lambda: running.open == 0)


def test_whoever_reads_slowly_is_not_dropped(running: Running) -> None:
    """For longer than a client may be stuck, but never stuck for as long."""
    with running.connect(b"GET /endless HTTP/1.1\r\n\r\n") as connection:
        connection.settimeout(5)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            for _ in range(8):
                assert connection.recv(1 << 20)
            time.sleep(0.1)
        assert running.application.is_writing


def test_without_descriptors_the_server_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener stays ready, but nothing can be accepted: that must neither end the server nor keep it busy."""
    with Running(Patience(connections=1000)) as running:
        calls: list[float] = []
        accept = connections.Connections._accept

        def counted(owner: connections.Connections) -> None:
            calls.append(time.monotonic())
            accept(owner)

        monkeypatch.setattr(connections.Connections, "_accept", counted)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        client = socket.socket()
        held = [socket.socket()]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
            with contextlib.suppress(OSError):
                while True:
                    held.append(socket.socket())
            client.connect(running.address)
            client.sendall(HELLO)
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert len(calls) < 50, "it tries again and again, but not all the time"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in held:
                each.close()
        client.settimeout(10)
        assert status_of(client) == b"200 OK"
        client.close()


def test_connections_fit_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 512)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert connections_that_fit(100) == 100 and limits == [(256, 512)]
    assert connections_that_fit(200) == 200 and limits[-1] == (328, 512)
    assert connections_that_fit(10_000) == 512 - 128 and limits[-1] == (512, 512)
