"""Any number of prompts, answered on the scheduler that serves: an answer that has ended makes room for the next one.

Answers are handed out in the order of the prompts, whichever ends first. They are computed while they are asked for, in
the caller's thread: whoever asks for no more gets no more computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from serving.adapters import Adapter
from serving.engine import ServingEngine, Ticket
from serving.jobs import NO_ADAPTER, Request
from serving.opening import OpenedModel
from serving.sequence import Update
from serving.speculation import Speculation
from tokenizer import Tokenizer

MAX_SEQUENCES = 64  # answers that are computed together
MAX_AHEAD = 1024  # answers that are computed, or wait to be, behind the one that is to be handed out next


class Answer:
    """One answer to a request, as it grows.

    Attributes:
        request: What it answers.
        sample: Its number among the request's answers.
        tokens: How many it has so far, the one that ended it included.
        finish_reason: "stop", "length" or "error" once it has ended, else None.
        score: What it is worth, where it was searched for.
    """

    def __init__(self, request: Request, sample: int, engine: OfflineEngine) -> None:
        self.request, self.sample = request, sample
        self.tokens = 0
        self.finish_reason: str | None = None
        self.score: float | None = None
        self._error: Exception | None = None
        self._text = ""  # that was not handed out yet
        self._engine = engine

    def pieces(self) -> Iterator[str]:
        """Its text, as soon as it is certain; the model computes on meanwhile, this answer and others.

        Raises:
            LogitsError: it has none, or no more.
            Exception: whatever else ended it, as the model has raised it.
        """
        while self._text or self.finish_reason is None:
            if self._text:
                piece, self._text = self._text, ""
                yield piece
            else:
                self._engine.turn()
        if self._error is not None:
            raise self._error

    def take(self, update: Update, tokens: int) -> None:
        """Is told what a step has brought it."""
        self._text += update.text
        self.score = update.search_score
        self.tokens, self.finish_reason, self._error = tokens, update.finish_reason, update.cause


class OfflineEngine:
    """Answers requests on a model.

    Args:
        opened: The model, which nobody else uses meanwhile.
        endings: Token ids that end an answer.
        max_sequences: Answers that are computed together.
        speculation: Guesses tokens, if anything does.
        adapters: Of requests, by their numbers.

    Attributes:
        first_token: The moment of the first token of all, in seconds of ``time.perf_counter``; 0 before.
    """

    def __init__(
        self,
        opened: OpenedModel,
        tokenizer: Tokenizer,
        endings: Iterable[int],
        max_sequences: int = MAX_SEQUENCES,
        speculation: Speculation | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._adapters = adapters
        self._engine = ServingEngine(
            opened.decoder,
            tokenizer,
            frozenset(endings),
            self._take,
            max_sequences=max_sequences,
            sharing=opened.can_share,
            branching=opened.can_share,
            speculation=speculation,
        )
        self.counters = self._engine.counters
        self.first_token = 0.0
        self._max_sequences = max_sequences
        self._coming: Iterator[tuple[Request, range]] = iter(())
        self._ahead: deque[Answer] = deque()
        self._answers_of: dict[Ticket, list[Answer]] = {}

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers to requests, in their order; the text of each has to be asked for before the next one.

        Args:
            requests: They are asked for as far as there is work for them: at most ``MAX_AHEAD`` answers are in memory,
                and those to one request that are computed together.
        """
        self._coming = _parts(requests, self._max_sequences)
        while True:
            self._admit()
            if not self._ahead:
                return
            yield self._ahead.popleft()

    def turn(self) -> None:
        """One step of the model."""
        self._admit()
        self._engine.turn()

    def _admit(self) -> None:
        """Hands in as many requests as the scheduler can choose from."""
        while len(self._ahead) < MAX_AHEAD and self._engine.waiting < self._max_sequences:
            part = next(self._coming, None)
            if part is None:
                return
            request, samples = part
            adapter = None if request.adapter == NO_ADAPTER else self._adapters[request.adapter]
            ticket = self._engine.submit(
                request.ids,
                request.settings,
                len(samples),
                first=samples.start,
                adapter=adapter,
                virtual=request.virtual,
            )
            answers = [Answer(request, sample, self) for sample in samples]
            self._answers_of[ticket] = answers
            self._ahead += answers

    def _take(self, updates: list[tuple[Ticket, Update]]) -> None:
        # What is searched for is told at the end only.
        first = (ticket.first_token for ticket, _ in updates if ticket.first_token)
        self.first_token = self.first_token or min(first, default=0.0)
        for ticket, update in updates:
            answers = self._answers_of[ticket]
            answers[update.choice].take(update, len(ticket.sequences[update.choice].generated))
            if update.finish_reason is not None and all(each.finish_reason is not None for each in answers):
                del self._answers_of[ticket]


def _parts(requests: Iterable[Request], most: int) -> Iterator[tuple[Request, range]]:
    """Of each request the numbers of its answers, ``most`` at a time: their number has no limit."""
    for request in requests:
        for first in range(0, request.choices, most):
            yield request, range(first, min(first + most, request.choices))
