"""From the engine's thread to the event loop: one wake-up a step, whatever the number of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from serving.engine import ServingEngine, Ticket
from serving.http.adapters import Named
from serving.sequence import Update
from serving.settings import SamplingSettings


class Answers:
    """What comes in of the prompts of one HTTP request. What nobody has taken yet is one update for each answer,
    however long its client takes to read what came before."""

    def __init__(self) -> None:
        self._updates: dict[int, Update] = {}
        self._has_some = asyncio.Event()

    def add(self, number: int, update: Update) -> None:
        if number in self._updates:
            self._updates[number].add(update)
        else:
            self._updates[number] = update
        self._has_some.set()

    async def some(self) -> list[tuple[int, Update]]:
        """What has come since the last time; at least one, and one for each answer at most."""
        await self._has_some.wait()
        self._has_some.clear()
        updates, self._updates = self._updates, {}
        return list(updates.items())


class Bridge:
    """Hands requests in, and their updates out, within one event loop."""

    def __init__(self) -> None:
        self._answers: dict[Ticket, tuple[Answers, int]] = {}  # and the number of its first answer
        self._loop: asyncio.AbstractEventLoop | None = None
        self.observe: Callable[[Ticket, Update], None] = lambda ticket, update: None  # of the metrics

    def open(self) -> None:
        """Within the event loop, before anything is handed in."""
        self._loop = asyncio.get_running_loop()

    def deliver(self, updates: list[tuple[Ticket, Update]]) -> None:
        """Called in the engine's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, updates)

    def _dispatch(self, updates: list[tuple[Ticket, Update]]) -> None:
        for ticket, update in updates:
            self.observe(ticket, update)
            if ticket in self._answers:
                answers, first = self._answers[ticket]
                answers.add(first + update.choice, update)

    async def updates(
        self,
        engine: ServingEngine,
        prompts: list[list[int]],
        settings: SamplingSettings,
        choices: int,
        priority: int,
        salt: bytes,
        named: Named | None,
    ) -> AsyncIterator[list[tuple[int, Update]]]:
        """Hands requests in, and yields what has come of them, as (number of the answer, update), until all have ended.
        Whoever leaves earlier has cancelled them.

        Raises:
            RequestError, QueueFull: as ``ServingEngine.submit``.
        """
        tickets: list[Ticket] = []
        answers = Answers()
        try:
            for number, prompt in enumerate(prompts):
                ticket = engine.submit(
                    prompt,
                    settings,
                    choices,
                    priority,
                    salt,
                    adapter=None if named is None else named.adapter,
                    virtual=() if named is None else named.virtual,
                )
                tickets.append(ticket)
                self._answers[ticket] = answers, number * choices
            left = len(prompts) * choices
            while left:
                some = await answers.some()
                left -= sum(update.finish_reason is not None for _, update in some)
                yield some
        finally:
            for ticket in tickets:
                self._answers.pop(ticket, None)
                if not ticket.is_finished:
                    engine.cancel(ticket)
