"""Handing requests to the engine and waiting for what comes: all at once, or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serving.engine import QueueFull
from serving.http.adapters import Named
from serving.http.errors import ApiError, as_api_error, error_body
from serving.http.schemas import PromptTokensDetails, Usage
from serving.http.service import Service
from serving.sequence import Update
from serving.settings import RequestError, SamplingSettings

_Updates = AsyncIterator[list[tuple[int, Update]]]


@dataclass
class Plan:
    """What is handed to the engine: ``choices`` answers to each prompt."""

    prompts: list[list[int]]
    settings: SamplingSettings
    choices: int
    priority: int
    salt: bytes
    named: Named | None = None


@dataclass
class Answer:
    """One answer to one prompt, as far as it has come."""

    choice: int
    update: Update = field(default_factory=lambda: Update(0))

    @property
    def mean_logprob(self) -> float:
        """By which the best of several is found."""
        scores = self.update.scores
        return sum(each.logprob for each in scores) / len(scores) if scores else float("-inf")


def usage_of(prompts: list[list[int]], answers: list[Answer]) -> Usage:
    """How many tokens there were."""
    asked, told = sum(map(len, prompts)), sum(len(each.update.ids) for each in answers)
    cached = sum(each.update.cached for each in answers if each.choice == 0)
    return Usage(asked, told, asked + told, PromptTokensDetails(cached))


async def answer(service: Service, plan: Plan, request: Request) -> list[Answer]:
    """All answers, when they have ended; cancelled where the client has gone meanwhile.

    Raises:
        ApiError: they cannot be had.
    """
    work = asyncio.ensure_future(_collect(service, plan))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client has gone")
        return work.result()
    except (RequestError, QueueFull) as error:
        raise as_api_error(error) from None
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def stream(
    service: Service,
    plan: Plan,
    shape: Callable[[int, Update], object],
    usage: Callable[[list[Answer]], object] | None,
    opening: Callable[[int], object] | None = None,
) -> Response:
    """A stream of server-sent events, each of what has come meanwhile of one answer; then ``[DONE]``. Where an answer
    fails, the stream ends with an error, and without it.

    Raises:
        ApiError: it cannot begin.
    """
    updates = _updates(service, plan)
    try:
        first = await anext(updates)
    except (RequestError, QueueFull) as error:
        raise as_api_error(error) from None
    events = _events(plan, first, updates, shape, usage, opening)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _events(
    plan: Plan,
    first: list[tuple[int, Update]],
    updates: _Updates,
    shape: Callable[[int, Update], object],
    usage: Callable[[list[Answer]], object] | None,
    opening: Callable[[int], object] | None,
) -> AsyncIterator[bytes]:
    answers = [Answer(number % plan.choices) for number in range(len(plan.prompts) * plan.choices)]
    opened = set[int]()
    try:
        some: list[tuple[int, Update]] | None = first
        while some is not None:
            events: list[bytes] = []
            for number, update in some:
                if update.error is not None:
                    yield b"".join(events) + _event(error_body(500, update.error))
                    return
                answers[number].update.add(update)
                if opening is not None and number not in opened:
                    opened.add(number)
                    events.append(_event(opening(number)))
                if update.text or update.ids or update.finish_reason is not None:
                    events.append(_event(shape(number, update)))
            if events:
                yield b"".join(events)
            some = await anext(updates, None)
        if usage is not None:
            yield _event(usage(answers))
        yield b"data: [DONE]\n\n"
    finally:
        await updates.aclose()  # type: ignore[attr-defined]


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def _updates(service: Service, plan: Plan) -> _Updates:
    async for some in service.bridge.updates(
        service.engine, plan.prompts, plan.settings, plan.choices, plan.priority, plan.salt, plan.named
    ):
        yield some


async def _collect(service: Service, plan: Plan) -> list[Answer]:
    answers = [Answer(number % plan.choices) for number in range(len(plan.prompts) * plan.choices)]
    updates = _updates(service, plan)
    try:
        async for some in updates:
            for number, update in some:
                if update.error is not None:
                    raise ApiError(500, update.error)
                answers[number].update.add(update)
    finally:
        await updates.aclose()  # type: ignore[attr-defined]
    return answers


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
