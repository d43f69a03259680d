"""What a request asks of its tokens: how each is chosen, and where they end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from generation import MAX_SEED

MAX_BEAMS = 64  # of a search, which are computed together


class RequestError(Exception):
    """A request that cannot be carried out as given; one line says what was expected and what came.

    Attributes:
        param: The field that is at fault, if it is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class BeamSettings:
    """A search for the likeliest answers, in the place of drawing them.

    Attributes:
        beams: How many continuations are kept; 1 is greedy search, which ends with the first ending.
        length_penalty: A continuation is worth its log-probability divided by its length to this power: above 0 longer
            ones are preferred, below 0 shorter ones.
        early_stopping: When ``beams`` continuations have ended, True: the search does, too; False: it does where the
            best that goes on would be worth no more if it ended at its present length; "never": where it would be so at
            any length that it may still have.
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def candidates(self, endings: int) -> int:
        """Of how many continuations by one token those are chosen that go on: enough, whichever end."""
        return max(2, 1 + endings) * self.beams

    def check(self) -> None:
        """Refuses what is out of its range.

        Raises:
            RequestError: naming the field.
        """
        _within("num_beams", self.beams, 1, MAX_BEAMS)
        _within("length_penalty", self.length_penalty, -10, 10)
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(
                f"expected early_stopping to be true, false or 'never' but got {self.early_stopping!r}",
                "early_stopping",
            )


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Logits pass through these in this order: bias, penalties, allowed and forbidden ids,
    temperature, min-p, top-k, top-p.

    Attributes:
        seed: With the choice's number and the token's, it determines the random number of each token.
        temperature: Divides the logits; 0 picks the largest.
        top_k: Among so many of the largest; None: all.
        top_p: Among those that together reach this probability; None: all.
        min_p: Among those with this share of the largest one's probability; None: all.
        repetition_penalty: Divides the logits of tokens that the prompt or the answer has.
        frequency_penalty, presence_penalty: Taken off the logits of tokens that the answer has, for each time, and
            once.
        logit_bias: Added to the logits of these ids.
        allowed_token_ids: No others are chosen; None: any.
        max_tokens: At most so many.
        min_tokens: No ending before so many.
        ignore_eos: The model's endings end nothing.
        stop_token_ids: Endings of the request's own.
        stop: Texts that end the answer, which does not have them unless ``include_stop``.
        logprobs: Of how many of the likeliest tokens, beside the chosen one, log-probabilities are wanted; None: of
            none at all. They are the model's own, before anything above.
        prompt_logprobs: The same for the prompt's tokens.
        beams: The likeliest answers are searched for; then nothing that changes logits or draws has a meaning.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beams: BeamSettings | None = None

    def check(self, vocabulary: int) -> None:
        """Refuses what is out of its range.

        Raises:
            RequestError: naming the field.
        """
        _within("seed", self.seed, 0, MAX_SEED)
        _within("temperature", self.temperature, 0, sys.float_info.max)
        _within("top_k", self.top_k, 1, None)
        _within("top_p", self.top_p, 0, 1, above=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 1e-4, 1e4)  # logits stay finite
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("max_tokens", self.max_tokens, 0, None)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            _within(name, getattr(self, name), 0, vocabulary)
        for id, bias in self.logit_bias.items():
            _within("logit_bias", bias, -100, 100)
            _is_token("logit_bias", id, vocabulary)
        for name in ("allowed_token_ids", "stop_token_ids"):
            for id in getattr(self, name) or ():
                _is_token(name, id, vocabulary)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("expected allowed_token_ids to have at least one id but got none", "allowed_token_ids")
        if "" in self.stop:
            raise RequestError("expected stop to be texts but got an empty one", "stop")
        if self.beams is not None:
            self.beams.check()
            self._check_alone_with_beams()

    def _check_alone_with_beams(self) -> None:
        """Refuses what a search for the likeliest answers cannot heed."""
        neutral = SamplingSettings()
        for name in (
            *("top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias"),
            *("allowed_token_ids", "min_tokens", "stop"),
        ):
            if getattr(self, name) != getattr(neutral, name):
                raise RequestError(f"{name} has no meaning with beams, which are not drawn: leave it out", name)
        if self.temperature not in (0.0, 1.0):
            raise RequestError(
                f"temperature has no meaning with beams: expected 0, 1 or none but got {self.temperature}",
                "temperature",
            )


def _within(name: str, value: float | None, least: float, most: float | None, above: bool = False) -> None:
    if value is None:
        return
    if not (value > least if above else value >= least) or (most is not None and not value <= most):  # of NaN, too
        bound = f"above {least}" if above else f"at least {least}"
        limit = "" if most is None else f" and at most {most}"
        raise RequestError(f"expected {name} to be {bound}{limit} but got {value}", name)


def _is_token(name: str, id: int, vocabulary: int) -> None:
    if not 0 <= id < vocabulary:
        raise RequestError(f"expected {name} to have token ids from 0 to {vocabulary - 1} but got {id}", name)
