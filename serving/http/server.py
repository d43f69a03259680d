"""Listening, and ending well: what runs may finish, nothing new is taken."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from command_line import UsageError
from serving.http.app import Limits, build_app
from serving.http.service import Service

_KEEP_ALIVE = 5  # seconds that an idle connection may stay
_HEADER_BYTES = 32 << 10


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port that cannot be had is known before any long work.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on --host {host} and --port {port}: {reason}") from None
    return listener


def serve(service: Service, listener: socket.socket, key: str | None, options: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C; then finishes what runs, within ``options.shutdown_timeout`` seconds."""
    app = build_app(service, key, Limits(body_bytes=options.max_body << 20))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(options.shutdown_timeout, 1),
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ws="none",
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    server = _Server(config)
    asyncio.run(_until_signalled(server, listener))
    service.engine.stop(drain=0.0)


class _Server(uvicorn.Server):
    """Ends by a signal like a program that has done its work: uvicorn's own would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to :func:`_until_signalled`."""
        yield


async def _until_signalled(server: uvicorn.Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, server)
    await server.serve([listener])


def _end(server: uvicorn.Server) -> None:
    server.force_exit = server.should_exit  # the second signal does not wait
    server.should_exit = True
