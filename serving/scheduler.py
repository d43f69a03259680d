"""Which tokens of which sequences a step computes.

There are no phases: each sequence has tokens, of which some are computed. A step has one budget of tokens. The running
sequences come first, those that generate before those whose prompt is not finished; then waiting ones are admitted, in
the order in which they came, as far as budget and pages go. Where pages run out, the sequence that came last is put
aside: it gives up its pages and is computed again later, each token in the role that it had, so that nothing of it
changes (as vLLM does it; Kwon et al. 2023, section 4.5).

The beams of a search are sequences that have pages in common: those that are full. They are put aside together; then
one of them computes the prompt again for all.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from nvtripy_portable.pages import PagesExhausted
from serving.adapters import AdapterSlots
from serving.pages import SharedPages
from serving.sequence import BeamGroup, Sequence, State
from serving.settings import RequestError

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

    def check_room(self, beams: int, prompt: int, tokens: int) -> None:
        """Refuses a search that would not fit if it were alone.

        Args:
            beams: Of it; ``prompt``: tokens of the prompt; ``tokens``: that may be generated.

        Raises:
            RequestError: there are too few places or pages.
        """
        if beams > self.max_sequences:
            raise RequestError(
                f"expected at most {self.max_sequences} beams, as many as are computed together, but got {beams}",
                "num_beams",
            )
        # The beams share the pages that are full of the prompt's tokens, and at worst no others. What is generated last
        # needs no place.
        shared = prompt // self.pages.page_tokens
        needed = shared + beams * (self._pages_of(prompt + tokens - 1) - shared)
        if needed > self.pages.count:
            raise RequestError(
                f"{beams} beams of {prompt} and {tokens} tokens may need {needed} pages of {self.pages.page_tokens} "
                f"tokens, but there are {self.pages.count}: expected fewer beams or tokens",
                "num_beams",
            )

    def step(self) -> list[Work]:
        """What to compute next; nothing where there is nothing to do."""
        budget, preemptions = self.max_tokens, self.preemptions
        work: list[Work] = []
        for sequence in [each for each in self.running if each.is_decoding]:
            if sequence.state is State.RUNNING and self._decodes(sequence, work):
                budget -= len(work[-1].ids)
        # A beam whose tokens are all computed waits for the others.
        for sequence in [each for each in self.running if each.computed < each.length and not each.is_decoding]:
            if budget > 0 and sequence.state is State.RUNNING:
                budget -= self._continues(sequence, budget, work)
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            # Whoever was put aside just now is not taken back at once.
            if self.preemptions > preemptions or not self._has_place(sequence) or not self._admit(sequence):
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
        if self._places(self.running) >= self.max_sequences:
            self.add(follower)
            return None
        try:
            return self._share(leader, follower)
        except PagesExhausted:
            self.add(follower)
            return None

    def regroup(self, group: BeamGroup, parents: list[int]) -> list[tuple[int, int]]:
        """Lets a search go on: its live continuations have beams from now on.

        Args:
            parents: From which beam each of them goes on.

        Returns:
            Pages to copy, as (from, to). None of them where there was no room: then the search is put aside.
        """
        before = group.beams
        for index, beam in enumerate(before):
            if index not in parents:
                self.remove(beam)
        taken = {beam.order[2] for beam in before if beam.state is State.RUNNING}
        free = (number for number in range(group.width) if number not in taken)
        beams, sources = [], []
        for place, parent in enumerate(parents):
            is_first = parent not in parents[:place]
            beams.append(before[parent] if is_first else before[parent].branch(next(free)))
            sources.append(before[parent])
        for beam, hypothesis in zip(beams, group.search.live, strict=True):
            beam.generated, beam.logits = hypothesis.ids, None
        group.beams = beams
        return self._branch(group, sources)

    def rejoin(self, leader: Sequence) -> list[tuple[int, int]]:
        """Lets the beams of a search that was put aside go on from the prompt, which one of them has computed; as
        :meth:`regroup`."""
        leader.followers, group = [], leader.group
        assert group is not None
        return self._branch(group, [leader] * len(group.beams))

    def disband(self, group: BeamGroup) -> None:
        """A search is over."""
        for beam in group.beams:
            self.remove(beam)

    def _branch(self, group: BeamGroup, sources: list[Sequence]) -> list[tuple[int, int]]:
        """Gives pages to those beams of a group that have none, each from its source."""
        copies = []
        for beam, source in zip(group.beams, sources, strict=True):
            if beam is source:
                continue
            while source.computed % self.pages.page_tokens and not self.pages.available:
                self._preempt(self.running[-1])
                if source.state is not State.RUNNING:
                    return []
            copies += self._share(source, beam)
        return copies

    def _share(self, leader: Sequence, follower: Sequence) -> list[tuple[int, int]]:
        """Gives a sequence the pages of another's computed tokens, a page of its own for that which is not full.

        Returns:
            Pages to copy, as (from, to).

        Raises:
            PagesExhausted: there is none.
        """
        full = leader.computed // self.pages.page_tokens
        kept, partial = leader.pages[:full], leader.pages[full : self._pages_of(leader.computed)]
        own = self.pages.take(len(partial))
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
        beside = [] if sequence.group is None else sequence.followers  # beams that will go on from its pages
        # One token at least has to be computed, for its logits, and one of the prompt where others go on from there; a
        # prompt whose scores are wanted needs those of all.
        last = len(sequence.prompt) - 1 if beside else min(len(sequence.prompt), sequence.length - 1)
        shareable = 0 if sequence.scores_prompt else last // page_tokens
        found = self.pages.find(sequence.keys[:shareable])
        last = sequence.length if self.window is None else min(sequence.length, len(found) * page_tokens + self.window)
        needed = self._pages_of(last) - len(found)
        own = [self._pages_of(each.length) - len(each.prompt) // page_tokens for each in beside]
        has_pages = needed + sum(own) <= self.pages.available
        slot = self._adapters.hold(sequence.adapter) if has_pages else None
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
            self._preempt(self.running[-1])
            if sequence.state is not State.RUNNING:
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
        if sequence.group is None:
            self.remove(sequence)
            self.add(sequence)
            return
        leader, *others = sequence.group.beams
        for beam in (leader, *others):
            self.remove(beam, State.FOLLOWING)
        leader.followers = others
        self.add(leader)

    def _has_place(self, sequence: Sequence) -> bool:
        return self._places(self.running) + self._places([sequence]) <= self.max_sequences

    def _places(self, sequences: list[Sequence]) -> int:
        """How many sequences these count as: a search keeps places for all of its beams."""
        groups = {each.group for each in sequences if each.group is not None}
        return sum(each.group is None for each in sequences) + sum(group.width for group in groups)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release([page for page in sequence.pages if page >= 0])
        sequence.pages, sequence.computed, sequence.drafted, sequence.logits = [], 0, [], None
        self._adapters.release(sequence.adapter)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.pages.page_tokens)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
