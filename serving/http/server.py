"""Listening, and ending well: what runs may finish, nothing new is taken."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine

import uvicorn

import command_line
from command_line import UsageError
from serving.http.app import Limits, build_app
from serving.http.connections import Patience, Server, connections_that_fit
from serving.http.service import Service

_KEEP_ALIVE = 5  # seconds that an idle connection may stay


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
        log_level="error",  # what clients send wrongly is told to them, and fills no logs
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(options.shutdown_timeout, 1),
        ws="none",
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    connections = connections_that_fit(options.max_connections)
    if connections < options.max_connections:
        command_line.report(f"serve.py: the system lets this process have {connections} connections (ulimit -n)")
    server = Server(config, Patience(connections))
    _run(_until_signalled(server, listener))
    service.engine.stop(drain=0.0)


def _run(main: Coroutine[object, object, None]) -> None:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:  # Windows has none
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _until_signalled(server: Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, server)
    await server.serve([listener])


def _end(server: uvicorn.Server) -> None:
    server.force_exit = server.should_exit  # the second signal does not wait
    server.should_exit = True
