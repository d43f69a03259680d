"""CTranslate2: every linear layer, the head and the embedding in int8, or everything in float32."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from peers.task import TEMPERATURE, TOP_K, Prompts, Task


class CTranslate2:
    """It takes tokens by name, and quantizes when it loads."""

    def __init__(self, task: Task) -> None:
        import ctranslate2

        self._names: list[str] = json.loads((task.model / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(task.model), compute_type=task.variant, inter_threads=1, intra_threads=task.threads
        )

    def _named(self, prompts: Prompts) -> list[list[str]]:
        return [[self._names[token] for token in prompt] for prompt in prompts]

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        result: np.ndarray = np.array(self._generator.forward_batch(self._named([prompt])))[0, -1]
        return result

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        begin, named = time.perf_counter(), self._named(prompts)
        came: dict[int, list[float]] = {}  # step → moments of its tokens

        def step(result: Any) -> bool:
            came.setdefault(result.step, []).append(time.perf_counter() - begin)
            return False

        self._generator.generate_batch(
            named,
            max_length=new,
            min_length=new,  # no early end
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
            callback=step,
        )
        return [max(came[number]) for number in sorted(came)]
