"""Guesses of a smaller model with the same vocabulary."""

from __future__ import annotations

from generation import LogitsError
from nvtripy_portable.decoder import Piece
from nvtripy_portable.pages import PagesExhausted
from serving.engine import BatchedDecoder
from serving.sequence import Sequence


class DraftModel:
    """Guesses what another model would draw with the same random numbers: the closer it is to the one that is served,
    the more often that is the same token.

    Args:
        decoder: The smaller model. Its context may be shorter: then it guesses no further.
    """

    def __init__(self, decoder: BatchedDecoder) -> None:
        self._decoder = decoder
        self._states: dict[Sequence, _State] = {}

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        state = self._states.setdefault(sequence, _State())
        count = min(count, self._decoder.context - (sequence.length - sequence.virtual))
        if count < 1:
            return []
        tokens = sequence.known + sequence.generated
        state.keep(tokens)
        try:
            needed = -(-(len(tokens) + count) // self._decoder.page_tokens) - len(state.pages)
            state.pages += self._decoder.pool.take(max(needed, 0))
        except PagesExhausted:
            return []
        guesses: list[int] = []
        for _ in range(count):
            new = tokens[len(state.tokens) :]
            piece = Piece(new, len(state.tokens), state.pages, generated=len(new) == 1 and len(state.tokens) > 0)
            logits = self._decoder.step([piece])
            state.tokens += new
            try:
                drawn = sequence.drawer(logits[0], sequence.generated + guesses)
            except LogitsError:  # of the smaller model, whose numbers nobody has asked for
                return guesses
            guesses.append(drawn)
            tokens.append(drawn)
        return guesses

    def forget(self, sequence: Sequence) -> None:
        state = self._states.pop(sequence, None)
        if state is not None:
            self._decoder.pool.release(state.pages)


class _State:
    """Tokens of a sequence whose keys and values the smaller model has, and where."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pages: list[int] = []

    def keep(self, tokens: list[int]) -> None:
        """Forgets the guesses that were wrong, and at least the last token, whose logits are wanted again."""
        same = 0
        most = min(len(self.tokens), len(tokens) - 1)
        while same < most and self.tokens[same] == tokens[same]:
            same += 1
        del self.tokens[same:]
