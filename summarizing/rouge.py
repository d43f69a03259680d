"""How much summaries have in common with those that people wrote (Lin 2004, "ROUGE: a package for automatic evaluation
of summaries")."""

from __future__ import annotations

from collections.abc import Sequence

from command_line import UsageError

REQUIREMENTS = "requirements/summarize.txt"
#: Common words, common pairs of words, the longest common subsequence: of the whole, and line by line.
MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}


class Rouge:
    """Scores summaries, without stemming.

    Raises:
        UsageError: ``rouge_score`` is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise UsageError(
                f"scores need the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
            ) from None
        self._scorer = RougeScorer(list(MEASURES))

    def scores(self, summary: str, reference: str) -> dict[str, float]:
        """The F-measures of one summary, times 100, by the names of ``MEASURES``."""
        found = self._scorer.score(reference, summary)
        return {name: 100 * found[name].fmeasure for name in MEASURES}


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of at least one summary's scores."""
    return {name: sum(each[name] for each in scores) / len(scores) for name in MEASURES}
