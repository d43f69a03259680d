"""One answer in the making: its tokens, the pages they lie in, and how far the model has come with them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import numpy as np

from serving.adapters import Adapter
from serving.beams import BeamSearch
from serving.drawing import Drawer, TokenScores
from serving.settings import SamplingSettings
from serving.text import AnswerText


class State(enum.Enum):
    """Where an answer stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FOLLOWING = "following"  # of a request with several answers: the first one computes the prompt for all
    # Of a search: one of its answers until it is over, or a beam for which another one computes the prompt again.
    FINISHED = "finished"


@dataclass
class Update:
    """What one step has brought an answer.

    Attributes:
        choice: Which of the request's answers.
        text: What is certain now.
        ids: Tokens of it, as far as the text goes.
        offsets: Where in the answer's text each of them begins.
        scores: Of each of them, where log-probabilities are wanted.
        prompt_scores: Of the prompt's tokens, once, where they are wanted; None for the first.
        finish_reason: "stop", "length", "cancelled" or "error" with the last update, else None.
        stop_reason: The text or the id that ended the answer, if it was one of the request's own.
        error: Why there is no more of it; ``cause``: the exception that says so.
        cached: How many of the prompt's tokens were found in pages; with the first update.
        search_score: What the answer is worth, where it was searched for; with the last update.
    """

    choice: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    prompt_scores: list[TokenScores | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    cause: Exception | None = None
    cached: int = 0
    search_score: float | None = None

    def add(self, later: Update) -> None:
        """Becomes what both have brought, one after the other."""
        self.text += later.text
        self.ids += later.ids
        self.offsets += later.offsets
        self.scores += later.scores
        self.prompt_scores = self.prompt_scores or later.prompt_scores
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.error = self.error or later.error
        self.cached = max(self.cached, later.cached)
        self.search_score = later.search_score


@dataclass(eq=False)
class Sequence:
    """One of a request's answers.

    Attributes:
        order: Whose turn it is first: the smaller.
        choice: Its number among the request's answers.
        prompt: The prompt's ids; ``generated``: the answer's.
        endings: Ids that end the answer.
        keys: What the prompt's full pages are known by.
        virtual: How many of the prompt's tokens, its first, are virtual ones, which no vocabulary has.
        adapter: That it has, if it has one; ``slot``: where the decoder has it while the sequence runs.
        pages: Where its tokens lie; -1 for one that was given back, as no token sees it any more.
        computed: How many tokens have their keys and values in the pages.
        drafted: Ids that are guessed to come next.
        cached: How many of the prompt's tokens were found in pages when it was first admitted; None before.
        prompt_scores: Of the prompt's tokens so far, where they are wanted.
        has_told_prompt: Whether an update had them.
        waiting_scores: Of tokens whose text is not certain yet.
        followers: Other answers to the same prompt, which go on from its pages.
        group: The search that it belongs to, as a beam or as an answer.
        logits: Of a beam's next token, float32 (V,), until all beams have them.
    """

    order: tuple[int, int, int]
    choice: int
    prompt: list[int]
    settings: SamplingSettings
    endings: frozenset[int]
    drawer: Drawer
    text: AnswerText
    keys: list[bytes] = field(default_factory=list)
    adapter: Adapter | None = None
    slot: int = 0
    virtual: int = 0
    state: State = State.WAITING
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    drafted: list[int] = field(default_factory=list)
    cached: int | None = None
    prompt_scores: list[TokenScores | None] = field(default_factory=lambda: [None])
    has_told_prompt: bool = False
    waiting_scores: list[TokenScores] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)
    group: BeamGroup | None = None
    logits: np.ndarray | None = None

    @property
    def length(self) -> int:
        """How many tokens there are, the prompt's and the answer's."""
        return len(self.prompt) + len(self.generated)

    @property
    def known(self) -> list[int]:
        """The prompt's ids that the vocabulary has."""
        return self.prompt[self.virtual :]

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to compute is the last generated token."""
        return bool(self.generated) and self.computed == self.length - 1

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are still to be found."""
        return self.settings.prompt_logprobs is not None and len(self.prompt_scores) < len(self.prompt)

    def branch(self, number: int) -> Sequence:
        """Another beam with the same tokens, which has no pages yet.

        Args:
            number: Of the beams of its search that are there, none other has it.
        """
        order = (*self.order[:2], number)
        fresh = {"pages": [], "computed": 0, "followers": [], "logits": None, "state": State.FOLLOWING}
        return replace(self, order=order, generated=[*self.generated], **fresh)  # type: ignore[arg-type]


@dataclass(eq=False)
class BeamGroup:
    """A search for the likeliest answers to a prompt.

    Attributes:
        answers: What is told of it, the best first, once it is over.
        beams: What is computed for it: one sequence for the prompt, then one for each continuation that is live, in the
            order of ``search.live``. They run together or not at all.
        width: How many of them there can be.
    """

    search: BeamSearch
    answers: list[Sequence]
    beams: list[Sequence]
    width: int

    @staticmethod
    def of(search: BeamSearch, answers: list[Sequence], width: int) -> BeamGroup:
        """The group that a search begins with: all that it computes is the prompt."""
        group = BeamGroup(search, answers, [answers[0].branch(0)], width)
        for each in (*answers, *group.beams):
            each.group = group
        return group
