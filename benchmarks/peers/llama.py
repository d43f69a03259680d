"""llama.cpp by its C interface, sampler included: the ``Llama`` class of its Python package adds time of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from peers.task import SEED, TEMPERATURE, TOP_K, Prompts, Task


class LlamaCpp:
    """Its defaults otherwise: a key-value cache in float16, a part of it for each sequence, flash attention where it
    deems it better.
    """

    def __init__(self, task: Task) -> None:
        import llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(lambda level, text, user_data: None)  # kept alive: C holds a pointer to it
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        model_settings = api.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(task.model).encode(), model_settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {task.model}")
        context = task.context or api.llama_model_n_ctx_train(self._model)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = task.sequences * -(-context // 256) * 256  # a sequence has multiples of 256
        settings.n_seq_max = task.sequences
        settings.n_threads = settings.n_threads_batch = task.threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._samplers = [self._sampler(SEED + number) for number in range(task.sequences)]
        self._batch = api.llama_batch_init(settings.n_batch, 0, 1)

    def _sampler(self, seed: int) -> object:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for link in (
            api.llama_sampler_init_top_k(TOP_K),
            api.llama_sampler_init_temp(TEMPERATURE),
            api.llama_sampler_init_dist(seed),
        ):
            api.llama_sampler_chain_add(chain, link)
        return chain

    def _decode(self, rows: Prompts, position: int) -> list[int]:
        """Appends tokens to the sequences. Returns the numbers by which their last logits are asked for."""
        if len(rows) == 1:
            tokens = (self._api.llama_token * len(rows[0]))(*rows[0])
            self._run(self._api.llama_batch_get_one(tokens, len(rows[0])))
            return [-1]
        batch, count, wanted = self._batch, 0, []
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, position + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = offset == len(row) - 1
                count += 1
            wanted.append(count - 1)
        batch.n_tokens = count
        self._run(batch)
        return wanted

    def _run(self, batch: object) -> None:
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _start(self, prompts: Prompts) -> list[int]:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        return self._decode(prompts, 0)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        pointer = self._api.llama_get_logits_ith(self._context, self._start([prompt])[0])
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()

    def generate(self, prompts: Prompts, new: int) -> list[float]:
        begin, moments, position = time.perf_counter(), [], len(prompts[0])
        wanted = self._start(prompts)
        for left in range(new, 0, -1):
            tokens = [
                [self._api.llama_sampler_sample(sampler, self._context, number)]
                for sampler, number in zip(self._samplers, wanted, strict=False)
            ]
            moments.append(time.perf_counter() - begin)
            if left > 1:
                wanted = self._decode(tokens, position)
                position += 1
        return moments
