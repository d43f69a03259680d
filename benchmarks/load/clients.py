"""Clients on loopback: what they ask comes as a stream, and of each piece the moment is noted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from random_weights import SEED
from workers import WorkerError

from load.requests import Asked, Material, requests_of
from load.servers import MODEL, Server

PATIENCE = 600.0  # seconds for an answer


@dataclass
class Answered:
    """An answer, as far as it came.

    Attributes:
        sent: When the request was sent; ``moments``: when each piece came. Seconds of ``time.perf_counter``.
        tokens: How many there are, by the server's own count where it has come to the end, else pieces.
        is_whole: Whether it came to its end.
    """

    asked: Asked
    sent: float
    moments: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    is_whole: bool = False


async def ask(session: aiohttp.ClientSession, server: Server, asked: Asked, answered: Answered) -> None:
    """One request; what comes of it is put into ``answered``.

    Raises:
        WorkerError: the server refused it.
    """
    body: dict[str, Any] = {"model": MODEL, "prompt": asked.prompt, "max_tokens": asked.new, "temperature": 0.0}
    body |= {"stream": True, **server.kind.body}
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise WorkerError(f"{server.name} answered {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                answered.is_whole = True
                break
            now = time.perf_counter()
            choices = json.loads(line[6:]).get("choices")
            if choices and choices[0].get("text"):
                answered.text += choices[0]["text"]
                answered.moments.append(now)
    answered.tokens = asked.new if answered.is_whole else len(answered.moments)


@dataclass
class Load:
    """What a window of time saw.

    Attributes:
        seconds: How long it was.
        answers: Those that ran in it, or began.
        http_seconds: Processor time of the server's HTTP side within it.
        begin: Its first moment.
    """

    seconds: float
    answers: list[Answered]
    http_seconds: float
    begin: float

    def tokens(self) -> float:
        """How many tokens came within the window: a piece of an answer counts as many as it has on average."""
        total = 0.0
        for each in self.answers:
            inside = sum(self.begin <= moment < self.begin + self.seconds for moment in each.moments)
            if each.moments:
                total += inside * (each.tokens or len(each.moments)) / len(each.moments)
        return total

    def first_tokens(self) -> list[float]:
        """Seconds to the first token, of requests that were sent within the window; one that has none yet counts with
        the time that it has waited."""
        end = self.begin + self.seconds
        sent = [each for each in self.answers if self.begin <= each.sent < end]
        return [(each.moments[0] if each.moments else end) - each.sent for each in sent]

    def between(self) -> list[float]:
        """Seconds between two pieces of an answer, within the window."""
        end = self.begin + self.seconds
        gaps: list[float] = []
        for each in self.answers:
            inside = [moment for moment in each.moments if self.begin <= moment < end]
            gaps += np.diff(inside).tolist()
        return gaps


async def closed_loop(server: Server, material: Material, clients: int, warm_up: float, seconds: float) -> Load:
    """So many clients, each of which asks again as soon as it has its answer. What the window ends is cancelled."""
    answers: list[Answered] = []

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        for asked in requests_of(number, material):
            await _noted(session, server, asked, answers)

    return await _window(server, [client] * clients, answers, warm_up, seconds)


async def open_loop(server: Server, material: Material, rate: float, warm_up: float, seconds: float) -> Load:
    """Requests that come by themselves, so many a second on average, whatever the server does (a Poisson process)."""
    answers: list[Answered] = []
    random = np.random.Generator(np.random.Philox(SEED))

    async def source(number: int, session: aiohttp.ClientSession) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            for asked in requests_of(number, material):
                running.add(asyncio.create_task(_noted(session, server, asked, answers)))
                await _sleep(float(random.exponential(1 / rate)), running)
                running = {task for task in running if not task.done()}
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    return await _window(server, [source], answers, warm_up, seconds)


async def _noted(session: aiohttp.ClientSession, server: Server, asked: Asked, answers: list[Answered]) -> None:
    answered = Answered(asked, time.perf_counter())
    answers.append(answered)
    await ask(session, server, asked, answered)


_Client = Callable[[int, aiohttp.ClientSession], Coroutine[Any, Any, None]]


async def _window(
    server: Server, clients: list[_Client], answers: list[Answered], warm_up: float, seconds: float
) -> Load:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(client(number, session)) for number, client in enumerate(clients)]
        try:
            await _sleep(warm_up, tasks)
            begin, used = time.perf_counter(), server.http_seconds()
            await _sleep(seconds, tasks)
            used, took = server.http_seconds() - used, time.perf_counter() - begin
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Load(took, answers, used, begin)


async def _sleep(seconds: float, tasks: Collection[asyncio.Task[None]]) -> None:
    """Sleeps, unless a task fails meanwhile: then its exception is raised."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
