"""The loop that serves: what the scheduler chooses is computed, tokens are drawn, and requests are told.

It runs in a thread of its own and never waits for whoever asked: requests and cancellations come through an inbox, and
what a step has brought everyone goes out in one call.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from generation import LogitsError
from nvtripy_portable.decoder import Piece
from nvtripy_portable.pages import PagePool
from serving.adapters import Adapter, AdapterSlots
from serving.beams import BeamSearch
from serving.drawing import Drawer, scores
from serving.pages import SharedPages
from serving.scheduler import Scheduler, Work
from serving.sequence import BeamGroup, Sequence, State, Update
from serving.settings import RequestError, SamplingSettings
from serving.speculation import Speculation
from serving.text import AnswerText, Certain
from tokenizer import Tokenizer


class BatchedDecoder(Protocol):
    """What serving needs of a model: ``nvtripy_portable.decoder.Decoder`` has it, and ``serving.slots.SlotDecoder``."""

    pool: PagePool
    page_tokens: int
    context: int
    vocabulary: int
    window: int | None
    slots: int

    def step(self, pieces: Sequence_[Piece]) -> np.ndarray:
        """Float32 logits (rows, V) of the rows that the pieces ask for."""

    def set_adapter(self, slot: int, matrices: Sequence_[np.ndarray | None] | None) -> None:
        """Puts an adapter into a slot, from 1 to ``slots``."""

    def set_prompts(self, rows: np.ndarray) -> None:
        """Gives the embeddings of virtual tokens, whose ids come after the vocabulary's."""

    def copy(self, source: int, target: int) -> None:
        """Makes page ``target`` what ``source`` is."""


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Ticket:
    """A request that was handed in.

    Attributes:
        sequences: Its answers.
        arrived, started, first_token, finished: Moments, in seconds of ``time.perf_counter``; 0 for what has not been.
    """

    sequences: list[Sequence] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def is_finished(self) -> bool:
        return all(each.state is State.FINISHED for each in self.sequences)


@dataclass
class Counters:
    """What an engine has done since it began, for metrics."""

    steps: int = 0
    accepted: int = 0  # answers
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


Deliver = Callable[[list[tuple[Ticket, Update]]], None]


class ServingEngine:
    """Serves requests on a decoder.

    Args:
        decoder: The model, which nobody else uses meanwhile.
        endings: Token ids that end an answer.
        deliver: Is called in the engine's thread, once a step, with what it has brought.
        max_sequences: That are computed at the same time.
        max_tokens: Of one step.
        max_queue: Answers that may wait; None: any number.
        sharing: Whether prompts that begin alike share pages.
        branching: Whether the decoder's sequences can go on from each other's pages, which beams do.
        speculation: Guesses tokens, if anything does.
    """

    def __init__(
        self,
        decoder: BatchedDecoder,
        tokenizer: Tokenizer,
        endings: frozenset[int],
        deliver: Deliver,
        max_sequences: int = 64,
        max_tokens: int = 512,
        max_queue: int | None = None,
        sharing: bool = True,
        branching: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.endings = decoder, tokenizer, endings
        self.pages = SharedPages(decoder.pool, decoder.page_tokens, sharing)
        slots = AdapterSlots(decoder)
        self.scheduler = Scheduler(self.pages, decoder.context, decoder.window, max_sequences, max_tokens, slots)
        self.counters = Counters()
        self.max_queue = max_queue
        self._sharing, self._branching, self._speculation = sharing, branching, speculation
        self._deliver = deliver
        self._numbers = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._incoming = 0  # answers in the inbox
        self._wake = threading.Condition()
        self._is_ending = self._is_draining = False
        self._outbox: list[tuple[Ticket, Update]] = []
        self._ticket_of: dict[Sequence | BeamGroup, Ticket] = {}
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="serving engine", daemon=True)

    # --- called by anyone ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        """Ends the thread: after what is running has finished, or ``drain`` seconds. What is left then is cancelled."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()
        self._thread.join(drain)
        with self._wake:
            self._is_ending = True
            self._wake.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many answers wait for their first step."""
        return len(self.scheduler.waiting) + self._incoming

    @property
    def stuck_for(self) -> float:
        """For how many seconds the step has taken that is being computed; infinity where the thread has ended."""
        if not self._thread.is_alive():
            return float("inf")
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(
        self,
        prompt: list[int],
        settings: SamplingSettings,
        choices: int = 1,
        priority: int = 0,
        salt: bytes = b"",
        first: int = 0,
        adapter: Adapter | None = None,
        virtual: Sequence_[int] = (),
    ) -> Ticket:
        """Hands in a request; its updates are delivered.

        Args:
            choices: How many answers, numbered from 0; each draws with a number of its own. Of a search they are the
                best ones.
            priority: Smaller ones come first.
            salt: Only prompts with the same one share pages.
            first: The number with which the first of them draws, the next with the next one: more answers to a prompt
                that has some already.
            adapter: That its answers have; None: none.
            virtual: Ids of virtual tokens before the prompt.

        Raises:
            RequestError: it cannot be carried out.
            QueueFull: too many wait already, or the engine is ending.
        """
        settings.check(self.decoder.vocabulary)
        if not prompt:
            raise RequestError("expected a prompt of at least one token but got none", "prompt")
        if virtual and settings.prompt_logprobs is not None:
            raise RequestError("virtual tokens have no probabilities: leave prompt_logprobs out", "prompt_logprobs")
        known, prompt = prompt, [*virtual, *prompt]
        room = self.decoder.context - len(prompt)
        if room < 0 or (settings.max_tokens > 0 and room + 1 < settings.max_tokens):
            own = f", {len(virtual)} of them virtual," if virtual else ""
            raise RequestError(
                f"the prompt has {len(prompt)} tokens{own} and max_tokens is {settings.max_tokens}: expected at most "
                f"{self.decoder.context + 1} together, the model's context and one more",
                "prompt" if room < 0 else "max_tokens",
            )
        endings = frozenset(settings.stop_token_ids) | (frozenset() if settings.ignore_eos else self.endings)
        if (
            settings.allowed_token_ids is not None
            and settings.min_tokens > 0
            and endings.issuperset(settings.allowed_token_ids)
        ):
            raise RequestError(
                f"expected allowed_token_ids to have ids that end nothing, for the first {settings.min_tokens} tokens",
                "allowed_token_ids",
            )
        if settings.beams is not None:
            settings = self._searchable(settings, prompt, len(endings), choices)
        ticket = Ticket()
        number = next(self._numbers)
        keys = self.pages.keys(prompt, salt if adapter is None else adapter.salted(salt))
        for choice in range(choices):
            drawer = Drawer(settings, first + choice, known, endings)
            text = AnswerText(self.tokenizer, settings.stop, settings.include_stop)
            order = (priority, number, choice)
            sequence = Sequence(order, choice, prompt, settings, endings, drawer, text, keys, adapter)
            sequence.virtual = len(virtual)
            ticket.sequences.append(sequence)
        if settings.beams is not None:
            search = BeamSearch(settings.beams, endings, settings.max_tokens, settings.logprobs)
            BeamGroup.of(search, ticket.sequences, settings.beams.beams)
        with self._wake:
            waiting = self.waiting
            if self._is_draining or (self.max_queue is not None and waiting + choices > self.max_queue):
                raise QueueFull(f"{waiting} answers wait already")
            self._incoming += choices
            self._inbox.append(lambda: self._accept(ticket))
            self._wake.notify()
        return ticket

    def _searchable(
        self, settings: SamplingSettings, prompt: list[int], endings: int, choices: int
    ) -> SamplingSettings:
        """The settings of a search that can be carried out. One beam is greedy search.

        Raises:
            RequestError: there are fewer beams than answers, or no room for the beams.
        """
        assert settings.beams is not None
        beams, vocabulary = settings.beams.beams, self.decoder.vocabulary
        if choices > beams:
            raise RequestError(f"expected at most {beams} answers, one of each beam, but got {choices}", "n")
        if beams == 1 or settings.max_tokens == 0:
            return replace(settings, beams=None, temperature=0.0)
        if not self._branching:
            raise RequestError("beams need pages, which this runtime does not have: leave num_beams out", "num_beams")
        if settings.beams.candidates(endings) > vocabulary:
            most = vocabulary // (settings.beams.candidates(endings) // beams)
            raise RequestError(
                f"expected at most {most} beams, for {vocabulary} tokens and {endings} endings, but got {beams}",
                "num_beams",
            )
        self.scheduler.check_room(beams, len(prompt), settings.max_tokens)
        return settings

    def cancel(self, ticket: Ticket, choice: int | None = None) -> None:
        """Ends a request, or one of its answers, wherever it is. Nothing more is delivered of it from the next step on,
        but a last update whose reason is "cancelled"."""
        with self._wake:
            self._inbox.append(lambda: self._cancel(ticket, choice))
            self._wake.notify()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self.has_work or self._is_draining or self._is_ending):
                    self._wake.wait()
                is_over = self._is_ending or (self._is_draining and not self.has_work)
            if is_over:
                for ticket in set(self._ticket_of.values()):
                    self._cancel(ticket, None)
            self.turn()
            if is_over:
                return

    def turn(self) -> None:
        """One step: for whoever runs the loop, which is the engine's own thread once it is started."""
        with self._wake:
            inbox = list(self._inbox)
            self._inbox.clear()
        for action in inbox:
            action()
        self._busy_since = time.monotonic()
        self._step()
        self._busy_since = None
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)

    @property
    def has_work(self) -> bool:
        """Whether a request is neither finished nor cancelled, or has just come."""
        return bool(self._inbox or self.scheduler.running or self.scheduler.waiting)

    def _accept(self, ticket: Ticket) -> None:
        with self._wake:
            self._incoming -= len(ticket.sequences)
        self.counters.accepted += len(ticket.sequences)
        leader, *followers = [each for each in ticket.sequences if each.state is not State.FINISHED]
        for sequence in ticket.sequences:
            self._ticket_of[sequence] = ticket
        for follower in followers:
            follower.state = State.FOLLOWING
        if leader.group is not None:
            leader.state, self._ticket_of[leader.group] = State.FOLLOWING, ticket
            self.scheduler.add(leader.group.beams[0])
        else:
            leader.followers = followers
            self.scheduler.add(leader)

    def _cancel(self, ticket: Ticket, choice: int | None) -> None:
        for sequence in ticket.sequences:
            if sequence.state is not State.FINISHED and choice in (None, sequence.choice):
                self._end(sequence, "cancelled", Certain(""))

    def _step(self) -> None:
        if self._speculation is not None:
            self._speculation.draft(self.scheduler.running)
        work = self.scheduler.step()
        if not work:
            return
        self.counters.steps += 1
        now = time.perf_counter()
        for each in work:
            ticket = self._ticket_of[each.sequence.group or each.sequence]
            ticket.started = ticket.started or now
        try:
            logits = self.decoder.step(
                [Piece(w.ids, w.start, w.sequence.pages, w.is_generated, w.rows, w.sequence.slot) for w in work]
            )
        except Exception as error:  # whatever it is, it ends these requests and no others
            for each in work:
                self._fail(each.sequence, error)
            return
        row = 0
        for each in work:
            if each.sequence.state is State.RUNNING:  # beams may have put it aside meanwhile
                self._take(each, logits[row : row + len(each.rows)])
            row += len(each.rows)

    def _take(self, work: Work, logits: np.ndarray) -> None:
        """What a step has brought one sequence: its logits are those of the rows that it wanted."""
        sequence = work.sequence
        kept = 1 if sequence.is_decoding else len(work.ids)
        if not work.is_generated:
            self.counters.prompt_tokens += len(work.ids)
        try:
            if sequence.scores_prompt and not work.is_generated:
                self._score_prompt(work, logits)
            self.scheduler.computed(work, kept)
            if sequence.group is not None and sequence.followers and sequence.computed == len(sequence.prompt):
                self._copy(self.scheduler.rejoin(sequence))
            if sequence.computed < sequence.length or not len(logits):
                return  # there is more of it to compute
            if sequence.group is not None:
                sequence.logits = logits[-1]
                self._advance(sequence.group)
            elif kept == 1 and work.is_generated:
                self._verify(work, logits)
            else:
                self._draw(sequence, logits[-1])
                self._start_followers(sequence, logits[-1])
        except LogitsError as error:
            self._fail(sequence, error)

    def _verify(self, work: Work, logits: np.ndarray) -> None:
        """Draws a token, and as long as it is the one that was guessed, the next: they are those of a run without
        guesses, each with its own random number."""
        sequence, drafted = work.sequence, work.ids[1:]
        self.counters.drafted_tokens += len(drafted)
        accepted = 0
        for number, row in enumerate(logits):
            self._draw(sequence, row)
            is_over = sequence.state is State.FINISHED or number == len(drafted)
            if is_over or sequence.generated[-1] != drafted[number]:
                break
            accepted += 1
            self.scheduler.computed(work, accepted + 1)
        self.counters.accepted_tokens += accepted
        if drafted and self._speculation is not None and sequence.state is not State.FINISHED:
            self._speculation.learn(sequence, len(drafted), accepted)

    def _draw(self, sequence: Sequence, logits: np.ndarray) -> None:
        settings = sequence.settings
        if settings.max_tokens == 0:
            self._end(sequence, "length", Certain(""))
            return
        token = sequence.drawer(logits, sequence.generated)
        ticket = self._ticket_of[sequence]
        ticket.first_token = ticket.first_token or time.perf_counter()
        self.counters.generated_tokens += 1
        sequence.generated.append(token)
        if settings.logprobs is not None:
            sequence.waiting_scores.append(scores(logits, token, settings.logprobs))
        count = len(sequence.generated)
        if count > settings.min_tokens and token in sequence.endings:
            is_own = token in settings.stop_token_ids
            self._end(sequence, "stop", sequence.text.finish(token), token if is_own else None)
            return
        certain = sequence.text.push(token, looks=count > settings.min_tokens)
        if sequence.text.stop is not None:
            self._end(sequence, "stop", certain, sequence.text.stop)
        elif count >= settings.max_tokens or sequence.length > self.decoder.context:
            whole = certain + sequence.text.finish()
            found = sequence.text.stop
            self._end(sequence, "length" if found is None else "stop", whole, found)
        else:
            self._tell(sequence, certain)

    def _start_followers(self, leader: Sequence, logits: np.ndarray) -> None:
        """The other answers to the same prompt go on from the pages of the first."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            if follower.state is not State.FOLLOWING:
                continue
            follower.cached, follower.prompt_scores = leader.cached, leader.prompt_scores
            if leader.state is not State.RUNNING or not self._sharing:  # it may have ended with its first token
                self.scheduler.add(follower)
                continue
            copies = self.scheduler.fork(leader, follower)
            if copies is not None:
                self._copy(copies)
                try:
                    self._draw(follower, logits)
                except LogitsError as error:
                    self._fail(follower, error)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.decoder.copy(source, target)

    def _advance(self, group: BeamGroup) -> None:
        """Takes a search one token further, once the logits of all its beams are there."""
        rows = [beam.logits for beam in group.beams if beam.logits is not None]
        if len(rows) < len(group.beams):
            return
        parents = group.search.advance(rows)
        ticket = self._ticket_of[group]
        ticket.first_token = ticket.first_token or time.perf_counter()
        if not group.search.is_over:
            self._copy(self.scheduler.regroup(group, parents))
            return
        computed = group.beams[0]
        for answer, found in zip(group.answers, group.search.found, strict=False):
            if answer.state is not State.FINISHED:
                answer.generated, answer.waiting_scores = found.hypothesis.ids, found.hypothesis.scores
                answer.cached, answer.prompt_scores = computed.cached, computed.prompt_scores
                self.counters.generated_tokens += len(answer.generated)
                last = answer.generated[-1]
                is_ended, is_own = last in answer.endings, last in answer.settings.stop_token_ids
                certain = answer.text.whole(answer.generated, is_ended)
                self._end(answer, "stop" if is_ended else "length", certain, last if is_own else None)
                self._outbox[-1][1].search_score = found.score

    def _score_prompt(self, work: Work, logits: np.ndarray) -> None:
        sequence = work.sequence
        count = sequence.settings.prompt_logprobs or 0
        for position, row in enumerate(logits, work.start):
            if position + 1 == len(sequence.prompt_scores) < len(sequence.prompt):
                sequence.prompt_scores.append(scores(row, sequence.prompt[position + 1], count))

    def _tell(
        self, sequence: Sequence, certain: Certain, reason: str | None = None, stop_reason: str | int | None = None
    ) -> None:
        update = Update(sequence.choice, certain.text, certain.ids, certain.offsets)
        if sequence.settings.logprobs is not None:
            update.scores = sequence.waiting_scores[: len(certain.ids)]
            sequence.waiting_scores = sequence.waiting_scores[len(certain.ids) :]
        if sequence.settings.prompt_logprobs is not None and not sequence.has_told_prompt:
            update.prompt_scores, sequence.has_told_prompt = sequence.prompt_scores, True
        update.cached = sequence.cached or 0
        update.finish_reason, update.stop_reason = reason, stop_reason
        self._outbox.append((self._ticket_of[sequence], update))

    def _end(self, sequence: Sequence, reason: str, certain: Certain, stop_reason: str | int | None = None) -> None:
        self.scheduler.remove(sequence)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        ticket = self._ticket_of[sequence]
        if ticket.is_finished:
            ticket.finished = time.perf_counter()
        self._tell(sequence, certain, reason, stop_reason)
        del self._ticket_of[sequence]
        if self._speculation is not None:
            self._speculation.forget(sequence)
        if sequence.group is not None and ticket.is_finished:
            self.scheduler.disband(sequence.group)
            del self._ticket_of[sequence.group]
        elif reason in ("cancelled", "error"):
            self._succeed(sequence)

    def _succeed(self, leader: Sequence) -> None:
        """Where the first of several answers has ended before the prompt was computed, another one computes it."""
        followers = [each for each in leader.followers if each.state is State.FOLLOWING]
        leader.followers = []
        if followers:
            followers[0].followers = followers[1:]
            self.scheduler.add(followers[0])

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """Ends an answer, or those of a beam's search."""
        for answer in [sequence] if sequence.group is None else sequence.group.answers:
            if answer.state is not State.FINISHED:
                self._end(answer, "error", Certain(""))
                update = self._outbox[-1][1]
                update.error, update.cause = str(error) or type(error).__name__, error
