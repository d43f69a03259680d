"""What is asked of every engine, and what each gives: the next token's logits, and when each token of a response came.

All sample alike: temperature 0.8, among the 5 likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

TEMPERATURE, TOP_K, SEED = 0.8, 5, 1

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """Which model to load, and how."""

    model: Path  # what model_files.model_file gave
    variant: str  # one of the peer's variants for the width
    threads: int
    engines: Path | None = None  # ours only: where the compiled engine is saved
    sequences: int = 1  # that are continued together, at most
    context: int | None = None  # tokens that each of them has at most; None for as many as the model takes


class Engine(Protocol):
    """A loaded model."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Float32 logits (V,) of the token after the prompt."""

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        """Continues prompts of one length together, each by ``new`` sampled tokens, or fewer where the context ends.

        Returns:
            When the first, the second, ... token of all of them was known, in seconds since the call.
        """


def likeliest(logits: np.ndarray, random: np.random.Generator) -> int:
    """A token of the ``TOP_K`` likeliest, for engines without a sampler; logits (V,)."""
    kept = np.argpartition(logits, -TOP_K)[-TOP_K:]
    weights = np.exp((logits[kept] - logits[kept].max()).astype(np.float64) / TEMPERATURE)
    return int(random.choice(kept, p=weights / weights.sum()))
