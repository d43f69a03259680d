"""The scores and the times side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from summarizing.rouge import MEASURES


@dataclass(frozen=True)
class Result:
    """What one program has made of all articles.

    Attributes:
        by: Which.
        scores: Of each beam, the best first: the means of all articles.
        seconds: For all of them.
        tokens: Of all summaries.
    """

    by: str
    scores: list[dict[str, float]]
    seconds: float
    tokens: int
    articles: int


def table(results: Sequence[Result]) -> str:
    """A row for each beam of each program; what it took is beside the first one, for all of them."""
    rows = [["", "beam", *MEASURES.values(), "s/article", "tokens/s"]]
    for result in results:
        speed = [f"{result.seconds / result.articles:.2f}", f"{result.tokens / result.seconds:.1f}"]
        for beam, scores in enumerate(result.scores):
            rows.append([result.by, str(beam), *(f"{scores[name]:.2f}" for name in MEASURES), *speed])
            speed = ["", ""]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()
