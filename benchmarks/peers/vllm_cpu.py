"""vLLM for CPUs, in bfloat16, in a process of its own Python: it wants other versions of transformers than the rest.

Whatever it does besides computing is left out where it can be: no tokenizer, no process between its scheduler and the
model, no prefix cache (the same prompts come again and again), no statistics. Its model is compiled by torch, as by
default, which takes a minute or two, once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from peers.task import TEMPERATURE, TOP_K, Prompts, Task

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_MOST_TOKENS = 2048  # of a step: its own default; prompts that are longer together come in several


class VLLM:
    """Its engine, stepped from here."""

    def __init__(self, task: Task) -> None:
        cores = sorted(os.sched_getaffinity(0))[: task.threads]
        os.environ.update(_ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)))
        import vllm

        self._vllm = vllm
        self._context = task.context
        self._llm = vllm.LLM(
            str(task.model),
            skip_tokenizer_init=True,
            dtype=task.variant,
            max_model_len=task.context,
            max_num_seqs=task.sequences,
            max_num_batched_tokens=max(_MOST_TOKENS, task.context or 0),
            enable_prefix_caching=False,
            disable_log_stats=True,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        )
        self._requests = 0

    def _sampling(self, new: int, **settings: Any) -> Any:
        return self._vllm.SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False, **settings)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        greedy = self._sampling(1, temperature=0.0, logprobs=-1)
        [response] = self._llm.generate([{"prompt_token_ids": list(prompt)}], greedy, use_tqdm=False)
        found = response.outputs[0].logprobs[0]
        result = np.zeros(len(found), np.float32)
        result[list(found)] = [each.logprob for each in found.values()]
        return result

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        engine, most = self._llm.llm_engine, self._llm.model_config.max_model_len
        new = min(new, most - len(prompts[0]))
        sampling = self._sampling(new, temperature=TEMPERATURE, top_k=TOP_K)
        begin, moments, counts = time.perf_counter(), [0.0] * new, dict[str, int]()
        for prompt in prompts:
            self._requests += 1
            engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                known, count = counts.get(output.request_id, 0), len(output.outputs[0].token_ids)
                moments[known:count] = [now] * (count - known)  # the last sequence's is the one that stays
                counts[output.request_id] = count
        return moments
