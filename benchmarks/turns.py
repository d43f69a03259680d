"""What every engine is asked for in a round, and what is noted of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from report import Record

DECODE_CONTEXTS = (16, 64, 256, 1000)
PREFILL_LENGTHS = (64, 256, 512, 1000)
STEPS = 24  # decoding steps at each context: from 1000 they end at GPT-2's 1024
QUICK_CONTEXTS, QUICK_LENGTHS, QUICK_STEPS = (16, 64), (64,), 8
TOGETHER_CONTEXT = 64  # of sequences that are continued together


@dataclass(frozen=True)
class Turn:
    """What one engine is asked for."""

    length: int  # of the prompt, in tokens
    steps: int  # of decoding after it
    is_prefill_wanted: bool = False
    sequences: int | None = None  # that are continued together, where that is the question

    def prompts(self, tokens: Sequence[int]) -> list[list[int]]:
        """A prompt for each sequence, out of a text that is long enough for one; each begins elsewhere in it."""
        ring = [*tokens, *tokens]
        starts = (number * 37 % len(tokens) for number in range(self.sequences or 1))
        return [ring[start : start + self.length] for start in starts]


def turns(quick: bool, context: int) -> list[Turn]:
    """Those of one sequence, for a model with a context of so many tokens."""
    prompts = {min(length, context) for length in (QUICK_LENGTHS if quick else PREFILL_LENGTHS)}
    steps = QUICK_STEPS if quick else STEPS
    contexts = {min(length, context - steps) for length in (QUICK_CONTEXTS if quick else DECODE_CONTEXTS)}
    return [Turn(n, steps if n in contexts else 0, n in prompts) for n in sorted(prompts | contexts)]


def turns_together(quick: bool, context: int, sequences: Sequence[int]) -> list[Turn]:
    """Those of several sequences, each of which has ``TOGETHER_CONTEXT`` tokens when decoding starts."""
    steps = QUICK_STEPS if quick else STEPS
    return [Turn(min(TOGETHER_CONTEXT, context - steps), steps, sequences=number) for number in sequences]


def note(record: Record, turn: Turn, responses: Sequence[Sequence[float]]) -> None:
    """Adds one turn to a record: the median of its repetitions."""
    if turn.is_prefill_wanted:
        seconds = statistics.median(moments[0] for moments in responses)
        record.prefill.setdefault(turn.length, []).append(turn.length / seconds)
    if turn.steps:
        # Some end with the context, others a token later.
        rate = statistics.median((len(moments) - 1) / (moments[-1] - moments[0]) for moments in responses)
        if turn.sequences is None:
            record.decode.setdefault(turn.length, []).append(rate)
        else:
            record.together.setdefault(turn.sequences, []).append(rate * turn.sequences)
