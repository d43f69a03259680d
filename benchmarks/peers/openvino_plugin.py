"""OpenVINO's CPU plug-in with a stateful model: openvino_gpt2.py says how that is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from peers.task import SEED, Prompts, Task, likeliest


class OpenVINO:
    """The sequences are the rows of a batch."""

    def __init__(self, task: Task) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": task.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "KV_CACHE_PRECISION": "f16",  # as everybody else's; its default is u8
        }
        self._request = openvino.Core().compile_model(task.model, "CPU", settings).create_infer_request()
        self._random = np.random.default_rng(SEED)

    def _step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Logits (B, V) after tokens (B, T)."""
        rows, count = tokens.shape
        inputs = {
            "idx": tokens,
            "position": np.tile(np.arange(position, position + count, dtype=np.int64), (rows, 1)),
            "beam": np.arange(rows, dtype=np.int32),
        }
        self._request.infer(inputs, share_inputs=True)
        result: np.ndarray = self._request.get_output_tensor(0).data
        return result.reshape(rows, -1)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        self._request.reset_state()
        return self._step(np.array([prompt], np.int64), 0)[0].astype(np.float32)

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        begin, moments = time.perf_counter(), []
        self._request.reset_state()
        tokens, position = np.array(prompts, np.int64), 0
        for _ in range(new):
            logits = self._step(tokens, position)
            position += tokens.shape[1]
            tokens = np.array([[likeliest(row, self._random)] for row in logits], np.int64)
            moments.append(time.perf_counter() - begin)
        return moments
