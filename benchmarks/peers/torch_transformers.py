"""Hugging Face transformers on PyTorch: scaled-dot-product attention, key-value cache, no gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from peers.task import SEED, TEMPERATURE, TOP_K, Prompts, Task


class Transformers:
    """The loop is written out: ``model.generate`` does the same work, and more of its own around it."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(task.threads)
        self._torch = torch
        settings = {"dtype": getattr(torch, task.variant), "attn_implementation": "sdpa"}
        if task.model.suffix == ".gguf":
            folder, name = task.model.parent, task.model.name
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(task.model, **settings)
        self._model = model.eval()

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([list(prompt)]), use_cache=False, logits_to_keep=1).logits
        result: np.ndarray = logits[0, -1].float().numpy()
        return result

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        from transformers import DynamicCache

        torch, moments, begin = self._torch, [], time.perf_counter()
        with torch.inference_mode():
            torch.manual_seed(SEED)
            cache, idx = DynamicCache(config=self._model.config), torch.tensor([list(each) for each in prompts])
            for _ in range(new):
                logits = self._model(idx, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                likeliest = torch.topk(logits.float(), TOP_K)
                drawn = torch.multinomial(torch.softmax(likeliest.values / TEMPERATURE, -1), 1)
                idx = likeliest.indices.gather(1, drawn)
                idx.tolist()  # the tokens have to be known, as with everybody else
                moments.append(time.perf_counter() - begin)
        return moments
