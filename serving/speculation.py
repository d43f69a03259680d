"""Guessing an answer's next tokens, so that one step may bring several.

A guess is computed beside the last token, as more generated tokens of the same sequence. What is drawn at each position
is what would have been drawn without it, from the same logits with the same random number; a guess only decides whether
the next position's logits are there already. So the tokens are those of a run without guesses, at any temperature
(stronger than Leviathan et al. 2022, whose accepted tokens have the right distribution).
"""

from __future__ import annotations

from typing import Protocol

from serving.sequence import Sequence


class Guesser(Protocol):
    """Guesses what comes next."""

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        """At most ``count`` ids that may follow the sequence's tokens."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""


class PromptLookup:
    """What followed the last time that the text's last tokens came (Saxena 2023, "Prompt lookup decoding").

    Args:
        longest: So many of the last tokens are looked for; then fewer, down to ``shortest``.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._known: dict[Sequence, _Occurrences] = {}

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        known = self._known.setdefault(sequence, _Occurrences(self._sizes))
        return known.after_last(sequence, count)

    def forget(self, sequence: Sequence) -> None:
        self._known.pop(sequence, None)


class _Occurrences:
    """Where in a text each run of a few tokens was followed by more, the last time."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def after_last(self, sequence: Sequence, count: int) -> list[int]:
        tokens = self._tokens
        if not tokens:
            tokens += sequence.known
            self._learn(0)
        start = len(tokens)
        tokens += sequence.generated[start - (len(sequence.prompt) - sequence.virtual) :]
        self._learn(start)
        for size in self._sizes:
            end = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end is not None:
                # What repeats itself goes on repeating itself: a guess may run into its own beginning, as in LZ77.
                period = len(tokens) - end
                return [tokens[end + number % period] for number in range(count)]
        return []

    def _learn(self, start: int) -> None:
        """Takes in the runs that end before each token from ``start`` on: a token follows them now."""
        for end in range(max(start, 1), len(self._tokens)):
            for size in self._sizes:
                if end >= size:
                    self._ends[tuple(self._tokens[end - size : end])] = end


class Speculation:
    """When to guess, and how many tokens.

    Args:
        most: Tokens of a guess.
        max_sequences: That run at the same time. With more, a step has enough to do: a guess costs what the token of
            another sequence costs, and is right less often.
    """

    MAX_SEQUENCES = 4

    def __init__(self, guesser: Guesser, most: int = 10, max_sequences: int = MAX_SEQUENCES) -> None:
        self._guesser, self._most, self._max_sequences = guesser, most, max_sequences
        self._lengths: dict[Sequence, int] = {}

    def draft(self, running: list[Sequence]) -> None:
        """Puts guesses into ``Sequence.drafted`` of those that generate."""
        if len(running) > self._max_sequences:
            return
        for sequence in running:
            if sequence.is_decoding and sequence.group is None:
                left = sequence.settings.max_tokens - len(sequence.generated) - 1
                count = min(self._lengths.get(sequence, self._most), left)
                sequence.drafted = self._guesser.guess(sequence, count) if count > 0 else []

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Guesses that were right make the next one longer, wrong ones shorter."""
        length = self._lengths.get(sequence, self._most)
        self._lengths[sequence] = min(2 * length, self._most) if accepted == drafted else max(accepted + 1, 2)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._lengths.pop(sequence, None)
        self._guesser.forget(sequence)
