"""Which tokens of which sequences a step computes.

There are no phases: each sequence has tokens, of which some are computed. A step has one budget of tokens. The running
sequences come first, those that generate before those whose prompt is not finished; then waiting ones are admitted, in
the order in which they came, as far as budget and pages go. Where pages run out, the sequence that came last is put
aside: it gives up its pages and is computed again later, each token in the role that it had, so that nothing of it
changes (as vLLM does it; Kwon et al. 2023, section 4.5).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from nvtripy_portable.pages import PagesExhausted
from serving.adapters import AdapterSlots
from serving.pages import SharedPages
from serving.sequence import Sequence, State

#: Tokens whose logits are all wanted (a prompt's scores) that are computed together: each has a vocabulary of logits.
SCORED_TOKENS = 64


@dataclass
class Work:
    """Tokens of one sequence that a step computes, one behind the other, of one role.

    Attributes:
        ids: Their ids, drafted ones last.
        start: The position of the first.
        is_generated: Their role.
        rows: For which of them logits are wanted.
    """

    sequence: Sequence
    ids: list[int]
    start: int
    is_generated: bool
    rows: list[int]


class Scheduler:
    """Decides what each step computes.

    Args:
        pages: Of the decoder.
        context: How many tokens a sequence can have.
        window: How many of them one sees; None: all.
        max_sequences: That run at the same time.
        max_tokens: Of a step; at least ``max_sequences``.
        adapters: The decoder's slots.

    Attributes:
        preemptions: How often a sequence was put aside.
    """

    def __init__(
        self,
        pages: SharedPages,
        context: int,
        window: int | None,
        max_sequences: int,
        max_tokens: int,
        adapters: AdapterSlots,
    ) -> None:
        self._adapters = adapters
        self.pages, self.context, self.window = pages, context, window
        self.max_sequences, self.max_tokens = max_sequences, max(max_tokens, max_sequences)
        self.waiting: list[Sequence] = []  # by their order
        self.running: list[Sequence] = []  # by their order
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """A sequence waits for its turn."""
        sequence.state = State.WAITING
        bisect.insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence, state: State = State.FINISHED) -> None:
        """A sequence has ended, or is put aside: its pages are free for others."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        sequence.state = state

    def step(self) -> list[Work]:
        """What to compute next; nothing where there is nothing to do."""
        budget, preemptions = self.max_tokens, self.preemptions
        work: list[Work] = []
        for sequence in [each for each in self.running if each.is_decoding]:
            if sequence.state is State.RUNNING and self._decodes(sequence, work):
                budget -= len(work[-1].ids)
        for sequence in [each for each in self.running if not each.is_decoding]:
            if budget > 0 and sequence.state is State.RUNNING:
                budget -= self._continues(sequence, budget, work)
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            # Whoever was put aside just now is not taken back at once.
            if self.preemptions > preemptions or not self._admit(sequence):
                break
            budget -= self._continues(sequence, budget, work)
        # Whoever was put aside while others were given pages has no work any more.
        return [each for each in work if each.sequence.state is State.RUNNING]

    def fork(self, leader: Sequence, follower: Sequence) -> list[tuple[int, int]] | None:
        """Lets a sequence go on from another's pages, whose prompt is the same and is computed.

        Returns:
            Pages to copy, as (from, to): a page that is not full is not shared. None where there is no room: the
            follower then waits, and computes all by itself.
        """
        full = leader.computed // self.pages.page_tokens
        partial = leader.pages[full:]
        if len(self.running) >= self.max_sequences:
            self.add(follower)
            return None
        try:
            own = self.pages.take(len(partial))
        except PagesExhausted:
            self.add(follower)
            return None
        kept = leader.pages[:full]
        self.pages.hold(page for page in kept if page >= 0)
        follower.pages, follower.computed = [*kept, *own], leader.computed
        follower.slot = self._adapters.hold(follower.adapter) or 0  # the leader's, which has it
        follower.state = State.RUNNING
        bisect.insort(self.running, follower, key=_order)
        return list(zip(partial, own, strict=True))

    def computed(self, work: Work, count: int) -> None:
        """The first ``count`` tokens of a piece have their keys and values in the pages, and are the sequence's."""
        sequence = work.sequence
        before, sequence.computed = sequence.computed // self.pages.page_tokens, work.start + count
        for number in range(before, min(sequence.computed // self.pages.page_tokens, len(sequence.keys))):
            self.pages.know(sequence.pages[number], sequence.keys[number])

    def _decodes(self, sequence: Sequence, work: list[Work]) -> bool:
        drafted = sequence.drafted[: self.context - sequence.length]
        sequence.drafted = []
        if drafted and not self._hold(sequence, sequence.length + len(drafted), can_preempt=False):
            drafted = []
        if not self._hold(sequence, sequence.length):
            return False
        ids = [sequence.generated[-1], *drafted]
        work.append(Work(sequence, ids, sequence.computed, True, list(range(len(ids)))))
        return True

    def _continues(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Tokens of a prompt, or generated ones that are computed again; how many."""
        start, is_generated = sequence.computed, sequence.computed >= len(sequence.prompt)
        end = sequence.length if is_generated else len(sequence.prompt)
        scored = sequence.scores_prompt
        end = min(end, start + (min(budget, SCORED_TOKENS) if scored else budget))
        # Where tokens see a window only, a sequence was admitted with pages for that alone: its pieces are as long as
        # there are pages, and one token long where others have to be put aside for it.
        self._give_back(sequence)
        room = (len(sequence.pages) + self.pages.available) * self.pages.page_tokens
        end = min(end, max(room, start + 1))
        if not self._hold(sequence, end):
            return 0
        ahead = len(sequence.prompt)
        ids = sequence.generated[start - ahead : end - ahead] if is_generated else sequence.prompt[start:end]
        is_last = end == sequence.length
        rows = list(range(len(ids))) if scored else [len(ids) - 1] if is_last else []
        work.append(Work(sequence, ids, start, is_generated, rows))
        return len(ids)

    def _admit(self, sequence: Sequence) -> bool:
        """Lets a waiting sequence run, if there are pages for all of its tokens."""
        page_tokens = self.pages.page_tokens
        # One token at least has to be computed, for its logits; a prompt whose scores are wanted needs those of all.
        shareable = 0 if sequence.scores_prompt else min(len(sequence.prompt), sequence.length - 1) // page_tokens
        found = self.pages.find(sequence.keys[:shareable])
        last = sequence.length if self.window is None else min(sequence.length, len(found) * page_tokens + self.window)
        needed = self._pages_of(last) - len(found)
        slot = self._adapters.hold(sequence.adapter) if needed <= self.pages.available else None
        if slot is None:
            self.pages.release(found)
            return False
        sequence.slot = slot
        if sequence.cached is None:
            sequence.cached = len(found) * page_tokens
            self.pages.count_query(len(sequence.prompt), sequence.cached)
        sequence.pages, sequence.computed = found, len(found) * page_tokens
        if self.window is None:
            sequence.pages += self.pages.take(needed)
        self.waiting.pop(0)
        sequence.state = State.RUNNING
        bisect.insort(self.running, sequence, key=_order)
        return True

    def _hold(self, sequence: Sequence, length: int, can_preempt: bool = True) -> bool:
        """Sees to it that a sequence has pages for its first ``length`` tokens. False: it was put aside itself, or, if
        it cannot put others aside, there are none."""
        self._give_back(sequence)
        needed = self._pages_of(length) - len(sequence.pages)
        while needed > self.pages.available:
            if not can_preempt:
                return False
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        if needed > 0:
            sequence.pages += self.pages.take(needed)
        return True

    def _give_back(self, sequence: Sequence) -> None:
        """Pages that no further token sees."""
        if self.window is not None:
            unseen = max(sequence.computed + 1 - self.window, 0) // self.pages.page_tokens
            gone = [page for page in sequence.pages[:unseen] if page >= 0]
            if gone:
                self.pages.release(gone)
                sequence.pages[:unseen] = [-1] * unseen

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.remove(sequence)
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release([page for page in sequence.pages if page >= 0])
        sequence.pages, sequence.computed, sequence.drafted = [], 0, []
        self._adapters.release(sequence.adapter)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.pages.page_tokens)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
