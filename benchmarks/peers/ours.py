"""This project: one sequence as example.py runs it, many on the decoder's pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from peers.task import SEED, TEMPERATURE, TOP_K, Prompts, Task


class _Together:
    """So many sequences on one compiled model, packed and paged, as ``generation.generate`` takes them.

    What they cost does not depend on how many it was compiled for.
    """

    def __init__(self, executable: Any, sequences: int, context: int) -> None:
        from nvtripy_portable.decoder import PAGE_TOKENS, Decoder, Rows

        pages = sequences * -(-context // PAGE_TOKENS)
        decoder = Decoder.of(executable, pages=pages)
        if decoder is None:
            raise RuntimeError("the portable runtime's decoder does not run this model: no batches")
        self.batch, self.context = sequences, context
        self.step = Rows(decoder, sequences).step


class Ours:
    """An engine of one sequence, and its model for more."""

    def __init__(self, task: Task) -> None:
        from engine import open_engine
        from weight_loader import open_checkpoint

        checkpoint: Any = open_checkpoint(task.model)
        if task.model.suffix == ".gguf" and task.variant != "fp16":
            from rounded_checkpoint import RoundedCheckpoint

            checkpoint = RoundedCheckpoint(checkpoint, task.variant)
        self._engine = open_engine(checkpoint, "float16", 1, task.engines)
        self._context = task.context or self._engine.context
        self._together: _Together | None = None  # of the last batch that was asked for

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        last = np.array([len(prompt) - 1], np.int32)
        return self._engine.step(np.array([prompt], np.int32), np.zeros(1, np.int32), last)[0]

    def _model(self, sequences: int) -> Any:
        if sequences == 1:
            return self._engine
        if self._together is None or self._together.batch != sequences:
            self._together = _Together(self._engine.executable, sequences, self._context)
        return self._together

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        import generation

        model = self._model(len(prompts))
        begin = time.perf_counter()
        samplers = [
            generation.Sampler(SEED, sample, temperature=TEMPERATURE, top_k=TOP_K) for sample in range(len(prompts))
        ]
        steps = generation.generate(model, prompts, samplers, new, set())
        return [time.perf_counter() - begin for _ in steps]
