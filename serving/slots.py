"""Serving where NVIDIA's runtime runs the model: a static batch, whose rows are pages, a whole sequence each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nvtripy_portable.decoder import Piece
from nvtripy_portable.pages import PagePool

if TYPE_CHECKING:
    from engine import Engine


class SlotDecoder:
    """The interface of ``nvtripy_portable.decoder.Decoder`` on an engine with a fixed number of rows.

    A step costs what the whole batch costs. Rows that have nothing to do are computed behind their last token, where
    nobody looks. Of several tokens of a piece only the last one's logits can be had at once, so a piece that wants
    others is computed token by token. Sequences cannot share what they have in common.
    """

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        self._engine = engine
        self.page_tokens = self.context = engine.context
        self.vocabulary = vocabulary
        self.window: int | None = None
        self.pool = PagePool(engine.batch)
        self.slots = engine.room.count
        self._chosen = [0] * engine.batch  # the adapter of each row
        self._lengths = np.zeros(engine.batch, np.int32)  # tokens of each row

    def copy(self, source: int, target: int) -> None:
        """Rows cannot be copied, and whoever does not share asks for no copies."""
        raise NotImplementedError("rows of a static batch cannot be copied")

    def set_adapter(self, slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        """As ``Decoder.set_adapter``."""
        self._engine.set_adapter(slot, matrices)

    def set_prompts(self, rows: np.ndarray) -> None:
        """As ``Decoder.set_prompts``."""
        self._engine.set_prompts(rows)

    def step(self, pieces: Sequence[Piece]) -> np.ndarray:
        """As ``Decoder.step``."""
        for row in range(self._engine.batch):
            if self.pool.is_free(row):
                self._lengths[row] = 0
        for piece in pieces:
            self._lengths[piece.pages[0]] = piece.position
            self._chosen[piece.pages[0]] = piece.slot
        if self.slots:
            self._engine.choose(self._chosen)
        done = [0] * len(pieces)
        logits: dict[tuple[int, int], np.ndarray] = {}
        while spans := [
            (number, done[number], self._end(piece, done[number]))
            for number, piece in enumerate(pieces)
            if done[number] < len(piece.tokens)
        ]:
            self._call(pieces, spans, done, logits)
        rows = [logits[number, row] for number, piece in enumerate(pieces) for row in piece.wanted()]
        return np.stack(rows) if rows else np.empty((0, self.vocabulary), np.float32)

    def _end(self, piece: Piece, start: int) -> int:
        """Behind the last token that can be computed with the one at ``start``: that of which logits are wanted first,
        and the one itself where it was generated."""
        if piece.generated:
            return start + 1
        return min((row + 1 for row in piece.wanted() if row >= start), default=len(piece.tokens))

    def _call(
        self,
        pieces: Sequence[Piece],
        spans: list[tuple[int, int, int]],
        done: list[int],
        logits: dict[tuple[int, int], np.ndarray],
    ) -> None:
        """One step of the engine: some tokens of some pieces. Each row has a place for as many behind its last token,
        but for one that is full, which is never continued."""
        room = self.context - max((length for length in self._lengths.tolist() if length < self.context), default=0)
        longest = min(max(end - start for _, start, end in spans), room)
        idx = np.zeros((self._engine.batch, longest), np.int32)
        position, last = np.minimum(self._lengths, self.context - longest), np.full(self._engine.batch, -1, np.int32)
        for number, start, end in spans:
            row, count = pieces[number].pages[0], min(end - start, longest)
            idx[row, :count] = pieces[number].tokens[start : start + count]
            position[row], last[row] = pieces[number].position + start, count - 1
        found = self._engine.step(idx, position, last)
        for number, start, end in spans:
            row, count = pieces[number].pages[0], min(end - start, longest)
            self._lengths[row] += count
            done[number] = start + count
            if done[number] == end:
                logits[number, end - 1] = found[row].copy()
