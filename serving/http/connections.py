"""Connections: how many there may be, and how slow their clients. uvicorn bounds neither.

A connection that has sent no request yet may be closed at any time to make room for a new one, the oldest first. So
whoever opens thousands and sends nothing displaces his own, and a client that sends its request at once is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.http.errors import error_body

_TOGETHER = 64  # connections that are accepted before others get their turn
_BACKLOG = 1024  # that the system holds until then
_PAUSE = 0.1  # seconds without accepting, where the process has no descriptor left
_OTHERS = 64  # descriptors for anything else: files, libraries, connections that are about to be closed
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class Patience:
    """Of what clients may take.

    Attributes:
        connections: That may be open at the same time.
        head_bytes: Of a request's line and headers, and of what follows a body.
        head_seconds: From the connection, or from the end of the last answer, to the end of a request's headers.
        write_seconds: In which a client has to read what is in the buffers once they are full, or the connection ends.
    """

    connections: int = 1024
    head_bytes: int = 32 << 10
    head_seconds: float = 10.0
    write_seconds: float = 60.0


class HeadTooLarge(Exception):
    """A request's line and headers are more than they may be."""


class Connection(HttpToolsProtocol):
    """A connection that ends where its client is too slow, or sends headers without end."""

    def __init__(
        self, config: uvicorn.Config, state: uvicorn.server.ServerState, app_state: dict[str, Any], owner: Connections
    ) -> None:
        super().__init__(config, state, app_state)
        self._owner, self._patience = owner, owner.patience
        self._head = 0  # bytes of the request's line and headers, as far as they are known
        self._unknown = 0  # bytes that have come since the parser has last made something of any
        self._blocked_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio has it."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._owner.idle[self] = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        super().connection_lost(exc)
        self._owner.lost(self)

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        most = self._patience.head_bytes
        for start in range(0, len(data), most):  # in pieces, so that what is unknown is known to a piece
            if self.transport.is_closing():
                return
            piece = data[start : start + most]
            self._unknown += len(piece)
            super().data_received(piece)
            if self._unknown > most and not self.transport.is_closing():
                self._refuse(431)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head = self._unknown = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a line of the same kind behind the body."""
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request can be answered."""
        self._unknown = 0
        self._owner.idle.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, which has bounds of its own."""
        self._unknown = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """The next request may come."""
        if not self.pipeline and not self.transport.is_closing():
            self._owner.idle[self] = time.monotonic()
        super().on_response_complete()

    def _count(self, size: int) -> None:
        self._unknown = 0
        self._head += size
        if self._head > self._patience.head_bytes:
            raise HeadTooLarge  # ends the parser, which ends in send_400_response

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers where the parser has ended."""
        self._refuse(431 if self._head > self._patience.head_bytes else 400)

    def _refuse(self, status: int) -> None:
        """The last that is sent; not amid another answer, which would be mistaken for a piece of it."""
        if self.cycle is None or self.cycle.response_complete:
            limit = self._patience.head_bytes
            message = "expected an HTTP request" if status == 400 else f"expected at most {limit} bytes of headers"
            self.transport.write(_answer(status, message))
        self.transport.close()

    def resume_writing(self) -> None:
        """The client has read most of what was to be read."""
        self._blocked_since = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Ends the connection where its client is too slow."""
        since = self._owner.idle.get(self)
        if since is not None and now - since > self._patience.head_seconds:
            self.transport.close()
        if not (self.flow.write_paused or self.transport.is_closing()):
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = now
        elif now - self._blocked_since > self._patience.write_seconds:
            self.transport.abort()


class Connections:
    """Accepts connections, as many as there may be.

    Args:
        create: Makes what handles one.

    Attributes:
        idle: Those that have sent no request yet, or none since the last answer, and since when; the oldest first.
    """

    def __init__(
        self, listener: socket.socket, patience: Patience, create: Callable[[Connections], Connection]
    ) -> None:
        self.patience = patience
        self.idle: dict[Connection, float] = {}
        self._open: set[Connection] = set()
        self._listener, self._create = listener, create
        self._starting = set[asyncio.Future[Any]]()
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accepts no more."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """As ``asyncio.Server`` has it."""

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        self.idle.pop(connection, None)
        self._open.discard(connection)

    def check(self) -> None:
        """Ends connections whose clients are too slow. Called once a second."""
        now = time.monotonic()
        for connection in [each for each in self._open if each.transport is not None]:
            connection.check(now)

    @property
    def _is_full(self) -> bool:
        return len(self._open) >= self.patience.connections

    def _accept(self) -> None:
        for _ in range(_TOGETHER):
            if self._is_full and self._starting:
                return  # which of them can make room is known in the next turn
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                self._make_room(_TOGETHER)
                self._pause()
                return
            if self._is_full and not self._make_room(1):
                _turn_away(accepted)
                continue
            accepted.setblocking(False)
            connection = self._create(self)
            self._open.add(connection)
            begun = asyncio.ensure_future(self._begin(connection, accepted))
            self._starting.add(begun)
            begun.add_done_callback(self._starting.discard)

    async def _begin(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:  # it has gone already
            self.lost(connection)
            accepted.close()

    def _make_room(self, count: int) -> bool:
        """Ends connections that wait for a request, and owe no part of an answer; with an answer, for one whose client
        is about to send its request. Whether there were any."""
        waiting = (connection for connection in self.idle if connection.transport.get_write_buffer_size() == 0)
        oldest = list(itertools.islice(waiting, count))
        for connection in oldest:
            del self.idle[connection]
            connection.transport.write(_FULL)
            connection.transport.abort()  # at once: it is out, or the client has stopped reading
        return bool(oldest)

    def _pause(self) -> None:
        """The listener stays ready while nothing can be accepted: without a pause the loop would do nothing else."""
        self._loop.remove_reader(self._listener)
        self._loop.call_later(_PAUSE, self._go_on)

    def _go_on(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept)


class Server(uvicorn.Server):
    """uvicorn's, with connections that have bounds; and it ends by a signal like a program that has done its work,
    where uvicorn's own would raise the signal again at the end."""

    def __init__(self, config: uvicorn.Config, patience: Patience) -> None:
        super().__init__(config)
        self._patience = patience
        self.accepting: Connections | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Leaves signals to whoever runs it."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections at the one socket."""
        await super().startup(sockets=[])
        (listener,) = sockets or []
        self.accepting = Connections(listener, self._patience, self._connection)
        self.servers.append(self.accepting)  # type: ignore[arg-type]

    def _connection(self, owner: Connections) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, owner)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0 and self.accepting is not None:
            self.accepting.check()
        return await super().on_tick(counter)


def connections_that_fit(wanted: int) -> int:
    """How many connections the process can have open, at most ``wanted``, after its limit of descriptors has been
    raised as far as it is necessary and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHERS + _TOGETHER
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(min(wanted, soft - _OTHERS - _TOGETHER), 1)


def _turn_away(accepted: socket.socket) -> None:
    """As cheaply as it can be done: nothing is kept of the connection."""
    with contextlib.suppress(OSError):
        accepted.setblocking(False)
        accepted.send(_FULL)
        accepted.recv(1 << 16)  # what is left unread would end the connection before the answer has been read
    accepted.close()


def _answer(status: int, message: str, *headers: bytes) -> bytes:
    """A whole answer without the application, in the shape that its own errors have."""
    content = msgspec.json.encode(error_body(status, message))
    size = b"content-length: %d" % len(content)
    return STATUS_LINE[status] + b"\r\n".join(
        (b"content-type: application/json", size, b"connection: close", *headers, b"", content)
    )


_FULL = _answer(503, "too many connections", b"retry-after: 1")
