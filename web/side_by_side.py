"""One prompt, answered by several models side by side: they take short turns.

While a model has its turn it has the whole machine, and its clock runs then only. So all answers grow together, and
yet each model's speed is its own. A turn is a few tokens where models are fast: after each other's single tokens they
would find cold caches and sleeping threads, and the fastest lose a third of their speed.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from command_line import UsageError
from generation import CachedModel, LogitsError, Sampler, generate
from response import Response, encode_prompt
from tokenizer import Tokenizer

TURN_SECONDS = 0.05  # of a model's own clock, or one token
REFRESH_SECONDS = 0.08  # between two states of a page whose answers grow
MAX_PROMPT_CHARACTERS = 100_000  # far more than any context holds: longer ones are not even tokenized


@dataclass(frozen=True)
class Model:
    """A compiled model for one sequence, with what makes text of its tokens."""

    name: str
    engine: CachedModel
    tokenizer: Tokenizer
    eos_ids: Collection[int]


@dataclass(frozen=True)
class Sampling:
    """How every model is sampled, as in example.py: the same settings give the same text.

    Raises:
        UsageError: a value out of its range.
    """

    seed: int
    temperature: float = 0.8
    top_k: int = 5  # 0: all tokens
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise UsageError(f"expected top-k to be at least 0 but got {self.top_k}")
        if self.max_new_tokens < 1:
            raise UsageError(f"expected the number of new tokens to be at least 1 but got {self.max_new_tokens}")
        try:
            self.sampler()
        except ValueError as error:
            raise UsageError(str(error)) from None

    def sampler(self) -> Sampler:
        return Sampler(self.seed, 0, self.temperature, self.top_k or None)


@dataclass(frozen=True)
class Answer:
    """What a model has said so far.

    Attributes:
        text: The continuation, without the prompt.
        tokens: How many the model has given.
        first_token_seconds: Until the first one, reading the prompt; None before it.
        decode_seconds: For all that followed, sampling included.
        is_done: Whether there will be no more.
        is_stopped: Whether somebody wanted no more.
        error: Why the model could not go on; None if it could.
    """

    text: str = ""
    tokens: int = 0
    first_token_seconds: float | None = None
    decode_seconds: float = 0.0
    is_done: bool = False
    is_stopped: bool = False
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """While decoding; None before there are two tokens."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else None


def answers(models: Sequence[Model], prompt: str, sampling: Sampling, stop: Event) -> Iterator[list[Answer]]:
    """Continues a prompt with every model.

    Args:
        models: Each takes part in its own turn; no other thread may use their engines meanwhile.
        prompt: Not empty, and short enough for each of them.
        sampling: The same for all; each has its own random numbers from the same seed.
        stop: Once it is set, the answers end after the token that is under way.

    Yields:
        The answers so far, in the order of ``models``, after every turn. In the last ones all are done. A model whose
        numbers are not finite is done, with an error; the others go on.

    Raises:
        UsageError: the prompt cannot be used, before anything is computed.
    """
    prompts = []
    for model in models:
        try:
            prompts.append(encode_prompt(prompt, model.tokenizer, model.engine.context))
        except (UsageError, ValueError) as error:  # ValueError: the tokenizer lacks a character of the prompt
            raise UsageError(f"{model.name}: {error}" if len(models) > 1 else str(error)) from None
    players = [_Player(model, ids, sampling) for model, ids in zip(models, prompts, strict=True)]
    while not all(player.answer.is_done for player in players):
        for player in players:
            player.play(stop)
            yield [player.answer for player in players]


class _Player:
    """A model, its answer and its clock."""

    def __init__(self, model: Model, ids: list[int], sampling: Sampling) -> None:
        self.answer = Answer()
        self._response = Response(model.tokenizer, (), model.eos_ids)
        self._done: set[int] = set()
        self._steps = generate(model.engine, [ids], [sampling.sampler()], sampling.max_new_tokens, self._done)

    def play(self, stop: Event) -> None:
        """Takes a turn, which ends the answer where there are no more tokens to come or none are wanted."""
        end = self._seconds() + TURN_SECONDS
        while not self.answer.is_done:
            if stop.is_set():
                self._finish(is_stopped=True)
                return
            self._step()
            if self._seconds() >= end:
                return

    def _seconds(self) -> float:
        return (self.answer.first_token_seconds or 0.0) + self.answer.decode_seconds

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            drawn = next(self._steps, None)
        except LogitsError as error:
            self._finish()
            self.answer = replace(self.answer, error=str(error))
            return
        seconds = time.perf_counter() - started
        if drawn is None:
            self._finish()
            return
        ((_, token),) = drawn
        answer, text = self.answer, self._response.push(token)
        if answer.first_token_seconds is None:
            answer = replace(answer, first_token_seconds=seconds)
        else:
            answer = replace(answer, decode_seconds=answer.decode_seconds + seconds)
        self.answer = replace(answer, text=answer.text + text, tokens=answer.tokens + 1)
        if self._response.is_done:
            self._finish()

    def _finish(self, is_stopped: bool = False) -> None:
        """Ends the answer with the text that was held back."""
        text = self.answer.text + self._response.finish()
        self.answer = replace(self.answer, text=text, is_done=True, is_stopped=is_stopped)


# ---- the answers to pages --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a page shows: a line that says what is going on, and the answers (None: those that it shows already)."""

    line: str
    is_error: bool = False
    answers: list[Answer] | None = None
    is_running: bool = False


class Comparison:
    """Answers one page at a time: an engine holds one sequence.

    Args:
        models: That answer.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._turn = threading.Lock()  # held while engines work: a page that was closed may be at it still
        self._running: tuple[str | None, Event] = (None, Event())

    def start(self, session: str | None, prompt: str | None, *controls: Any) -> Iterator[State]:
        """Answers.

        Args:
            session: Whose page it is.
            prompt: The text to continue.
            controls: The arguments of :func:`sampling_of`.

        Yields:
            What the page is to show, a few times a second while answers grow; then what stays. It never raises: what
            is wrong is in the last one's line.
        """
        stop = Event()
        self._running[1].set()  # whoever was here before has gone
        self._running = (session, stop)
        try:
            if not prompt:
                raise UsageError("expected a prompt but got an empty one")
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise UsageError(
                    f"expected a prompt of at most {MAX_PROMPT_CHARACTERS:,} characters but got {len(prompt):,}"
                )
            sampling = sampling_of(*controls)
            growing = answers(self._models, prompt, sampling, stop)
            is_running = True
            while is_running:
                begun = time.monotonic()
                with self._turn:
                    for found in growing:
                        is_running = not all(answer.is_done for answer in found)
                        if time.monotonic() - begun >= REFRESH_SECONDS:
                            break
                yield State(f"Seed {sampling.seed}", answers=found, is_running=is_running)
        except UsageError as error:
            yield State(str(error), is_error=True)
        except Exception as error:
            traceback.print_exc()  # for whoever runs the program; the page gets a line
            yield State(f"the models failed: {type(error).__name__}: {error}", is_error=True)

    def stop(self, session: str | None) -> None:
        """Ends the answers to that page, if they are the ones that are under way."""
        if self._running[0] == session:
            self._running[1].set()


def sampling_of(seed: Any, temperature: Any, top_k: Any, max_new_tokens: Any) -> Sampling:
    """A page's controls as settings; without a seed there is a new one each time.

    Raises:
        UsageError: one is missing, is not a number, or is out of its range.
    """
    values = {"seed": seed, "temperature": temperature, "top-k": top_k, "number of new tokens": max_new_tokens}
    if seed is None:
        values["seed"] = random.getrandbits(32)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(
                f"expected the {name} to be a number but got {'nothing' if value is None else repr(value)}"
            )
        if name != "temperature" and value % 1 != 0:  # nor is infinity whole
            raise UsageError(f"expected the {name} to be a whole number but got {value}")
    return Sampling(int(values["seed"]), float(temperature), int(top_k), int(max_new_tokens))
