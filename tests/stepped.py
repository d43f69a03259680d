"""A serving engine whose steps are taken by hand: for tests of what it tells of each request."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tiny_checkpoints import EOS

from serving.engine import ServingEngine, Ticket
from serving.sequence import Update


class Bench:
    """An engine whose steps are taken by hand, and what it has told of each request."""

    def __init__(
        self, decoder: Any, tokenizer: Any, endings: frozenset[int] = frozenset({EOS}), **settings: Any
    ) -> None:
        self.told: dict[Ticket, dict[int, Update]] = defaultdict(dict)
        self.scores: dict[tuple[Ticket, int], float | None] = {}  # of searches
        self.engine = ServingEngine(decoder, tokenizer, endings, self._take, **settings)

    def _take(self, updates: list[tuple[Ticket, Update]]) -> None:
        for ticket, update in updates:
            whole = self.told[ticket].setdefault(update.choice, Update(update.choice))
            assert whole.finish_reason is None, "something came after the end"
            whole.text += update.text
            whole.ids += update.ids
            whole.offsets += update.offsets
            whole.scores += update.scores
            whole.prompt_scores = whole.prompt_scores or update.prompt_scores
            whole.finish_reason, whole.stop_reason = update.finish_reason, update.stop_reason
            whole.error = update.error
            self.scores[ticket, update.choice] = update.search_score

    def turn(self) -> None:
        self.engine.turn()

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.engine.has_work:
                return
            self.engine.turn()
        raise AssertionError("it does not end")


def results(updates: dict[int, Update]) -> list[tuple[Any, ...]]:
    return [
        (each.text, each.ids, each.offsets, each.scores, each.prompt_scores, each.finish_reason, each.stop_reason)
        for _, each in sorted(updates.items())
    ]
