"""Ranks that watch each other, so that a job ends when one of them does, and says which.

MPI waits forever for a rank that has raised, or that was stopped. So each rank has a connection to rank 0 of its own,
beside MPI's, and a thread that sends a sign of life over it, whatever the others compute or wait for. Who has not been
heard of for too long, whose connection breaks, or who says that it has failed ends the job: rank 0 prints one line that
names it and its host, and all processes leave at once. Leaving without MPI_Finalize, which would wait for the others,
is also what launchers take for the sign to end those that cannot leave by themselves.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_CONNECT = 30.0  # seconds in which all ranks have to connect
_PRINTED = 0.3  # seconds that a launcher needs to pass on the line that a rank has printed
_TOLD = 2.0  # seconds that rank 0 has to say what another rank has told it


class Watch:
    """One rank's connection to the others: to rank 0, or of rank 0 to all.

    Args:
        rank: This one's number.
        hosts: Every rank's host.
        share: Hands rank 0's value to all ranks.
        timeout: Seconds of silence after which a rank is given up.
        program: For the line that is printed.

    Raises:
        OSError: a rank cannot be reached.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], share: Callable[[Any], Any], timeout: float, program: str
    ) -> None:
        self._rank, self._hosts, self._timeout, self._program = rank, hosts, timeout, program
        self._ending, self._sending = threading.Lock(), threading.Lock()
        self._peers: dict[socket.socket, int] = {}
        self._goodbyes: set[int] = set()
        if rank == 0:
            self._accept(share)
        else:
            host, port, token = share(None)
            connection = socket.create_connection((host, port), _CONNECT)
            self._peers[connection] = 0
            connection.sendall(_hello(token, rank))
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _accept(self, share: Callable[[Any], Any]) -> None:
        is_local = len(set(self._hosts)) == 1
        with socket.create_server(("127.0.0.1" if is_local else "", 0), backlog=len(self._hosts)) as server:
            token = secrets.token_hex(16)
            share(("127.0.0.1" if is_local else self._hosts[0], server.getsockname()[1], token))
            server.settimeout(_CONNECT)
            while len(self._peers) < len(self._hosts) - 1:
                connection, _ = server.accept()
                connection.settimeout(_CONNECT)
                # No more than this: what a rank says next may be here already.
                hello = connection.recv(len(_hello(token, 0)), socket.MSG_WAITALL)
                rank = next((rank for rank in range(len(self._hosts)) if hello == _hello(token, rank)), None)
                if rank is None:  # somebody else's
                    connection.close()
                else:
                    self._peers[connection] = rank

    def leave(self) -> None:
        """Says that this rank has done its part: from now on nobody waits for it."""
        self._send({"goodbye": True})
        self._goodbyes.update(self._peers.values())

    def fail(self, code: int, reason: str) -> NoReturn:
        """Ends the job for what has happened on this rank."""
        if self._rank:
            self._send({"code": code, "reason": reason})
            time.sleep(_TOLD)  # rank 0 says it, and the thread ends this process
        self._end(code, self._rank, reason)

    def _run(self) -> None:
        interval = min(1.0, self._timeout / 4)
        heard = dict.fromkeys(self._peers, time.monotonic())
        texts = dict.fromkeys(self._peers, b"")
        for connection in self._peers:
            connection.setblocking(False)
        sent = looked = time.monotonic()
        while heard:
            ready, _, _ = select.select(list(heard), [], [], interval)
            now = time.monotonic()
            if now - looked > 2 * interval + 1:  # the job was stopped, and goes on: the others were not heard either
                heard = dict.fromkeys(heard, now)
            looked = now
            for connection in ready:
                try:
                    received = connection.recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    received = b""
                peer = self._peers[connection]
                if not received:
                    del heard[connection]
                    if peer not in self._goodbyes:
                        self._end(1, peer, "has ended")
                    continue
                heard[connection] = now
                *lines, texts[connection] = (texts[connection] + received).split(b"\n")
                for line in filter(None, lines):
                    self._take(peer, json.loads(line))
            if now - sent >= interval:
                self._send(None)
                sent = now
            for connection, last in heard.items():
                if now - last > self._timeout and self._peers[connection] not in self._goodbyes:
                    self._end(1, self._peers[connection], f"has not answered for {self._timeout:g} s")

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        if "goodbye" in message:
            self._goodbyes.add(peer)
        elif self._rank == 0:
            self._end(message["code"], peer, message["reason"])
        else:  # rank 0 has said it
            _exit_at(message["moment"], message["code"])

    def _send(self, message: dict[str, Any] | None) -> None:
        """To everyone; None is a sign of life and no more. Whom it does not reach is noticed as nothing comes back."""
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        with self._sending:
            for connection in self._peers:
                try:
                    connection.sendall(line)
                except OSError:
                    continue

    def _end(self, code: int, rank: int, reason: str) -> NoReturn:
        """Ends the job for what has happened on a rank; whoever calls it first says why."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        if self._rank == 0 or rank == self._rank or self._rank == 1:
            line = " ".join(f"rank {rank} on {self._hosts[rank]}: {reason}".split())
            print(f"{self._program}: error: {line}", file=sys.stderr, flush=True)
        # If rank 0 is lost, one of those that notice says it.
        moment = time.time() + _PRINTED
        if self._rank == 0:
            self._send({"code": code, "moment": moment})
        _exit_at(moment, code)


def _hello(token: str, rank: int) -> bytes:
    """By which rank 0 knows who has connected, always of one length."""
    return f"{token}{rank:08}".encode()


def _exit_at(moment: float, code: int) -> NoReturn:
    """Ends this process when all others end, too. A launcher ends those that are left when one has gone: its own exit
    code is then theirs, and what they have printed may be lost."""
    time.sleep(min(max(moment - time.time(), 0.0), _PRINTED))
    os._exit(code)
