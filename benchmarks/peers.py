"""The engines that are measured, each behind the same two questions: what are the next token's logits, and when does
each token of a response come.

Every class loads in its constructor and imports its package there: a process holds one engine, nothing of the others.
All sample alike, temperature 0.8 among the 5 likeliest tokens, each with its own sampler.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TEMPERATURE, TOP_K, SEED = 0.8, 5, 1
OURS = "ours"


@dataclass(frozen=True)
class Task:
    """Which model to load, and how."""

    model: Path  # what model_files.model_file gave
    variant: str  # one of the peer's variants for the width
    threads: int
    engines: Path | None = None  # ours only: where the compiled engine is saved


class Engine(Protocol):
    """A loaded model."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Float32 logits (V,) of the token after the prompt."""

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        """Continues the prompt by ``new`` sampled tokens; when each was known, in seconds since the call."""


class Ours:
    """This project, as example.py runs it."""

    def __init__(self, task: Task) -> None:
        from engine import open_engine
        from weight_loader import open_checkpoint

        self._engine = open_engine(open_checkpoint(task.model), "float16", 1, task.engines)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        last = np.array([len(prompt) - 1], np.int32)
        return self._engine.step(np.array([prompt], np.int32), np.zeros(1, np.int32), last)[0]

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        import generation

        begin = time.perf_counter()
        samplers = [generation.Sampler(SEED, temperature=TEMPERATURE, top_k=TOP_K)]
        steps = generation.generate(self._engine, [prompt], samplers, new, set())
        return [time.perf_counter() - begin for _ in steps]


class Transformers:
    """Hugging Face transformers on PyTorch: scaled-dot-product attention, key-value cache, no gradients.

    The loop is written out: ``model.generate`` does the same work, and more of its own around it.
    """

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(task.threads)
        self._torch = torch
        dtype = getattr(torch, task.variant)
        self._model = GPT2LMHeadModel.from_pretrained(task.model, dtype=dtype, attn_implementation="sdpa").eval()

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([list(prompt)]), use_cache=False, logits_to_keep=1).logits
        result: np.ndarray = logits[0, -1].float().numpy()
        return result

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        from transformers import DynamicCache

        torch, moments, begin = self._torch, [], time.perf_counter()
        with torch.inference_mode():
            torch.manual_seed(SEED)
            cache, idx = DynamicCache(config=self._model.config), torch.tensor([list(prompt)])
            for _ in range(new):
                logits = self._model(idx, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                likeliest = torch.topk(logits.float(), TOP_K)
                drawn = torch.multinomial(torch.softmax(likeliest.values / TEMPERATURE, -1), 1)
                idx = likeliest.indices.gather(1, drawn)
                int(idx)  # the token has to be known, as with everybody else
                moments.append(time.perf_counter() - begin)
        return moments


class LlamaCpp:
    """llama.cpp by its C interface, sampler included: the ``Llama`` class of its Python package adds time of its own.

    Its defaults otherwise: a key-value cache in float16, flash attention where it deems it better.
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
        context = api.llama_model_n_ctx_train(self._model)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = task.threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for link in (
            api.llama_sampler_init_top_k(TOP_K),
            api.llama_sampler_init_temp(TEMPERATURE),
            api.llama_sampler_init_dist(SEED),
        ):
            api.llama_sampler_chain_add(self._sampler, link)

    def _decode(self, tokens: Any, count: int) -> None:
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")

    def _start(self, prompt: Sequence[int]) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        self._decode((self._api.llama_token * len(prompt))(*prompt), len(prompt))

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        self._start(prompt)
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        begin = time.perf_counter()
        self._start(prompt)
        token, moments = (self._api.llama_token * 1)(), []
        for left in range(new, 0, -1):
            token[0] = self._api.llama_sampler_sample(self._sampler, self._context, -1)
            moments.append(time.perf_counter() - begin)
            if left > 1:
                self._decode(token, 1)
        return moments


class CTranslate2:
    """CTranslate2: every linear layer, the head and the embedding in int8, or everything in float32."""

    def __init__(self, task: Task) -> None:
        import ctranslate2

        self._package = ctranslate2
        # It takes tokens by name, and has a list of them.
        self._names: list[str] = json.loads((task.model / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(task.model), compute_type=task.variant, inter_threads=1, intra_threads=task.threads
        )

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        view = self._generator.forward_batch([[self._names[token] for token in prompt]])
        result: np.ndarray = np.array(view)[0, -1]
        return result

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        begin, moments = time.perf_counter(), []

        def step(result: Any) -> bool:
            moments.append(time.perf_counter() - begin)
            return False

        self._generator.generate_batch(
            [[self._names[token] for token in prompt]],
            max_length=new,
            min_length=new,  # no early end
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
            callback=step,
        )
        return moments


class OpenVINO:
    """OpenVINO's CPU plug-in with a stateful model: openvino_gpt2.py says how that is made."""

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
        inputs = {
            "idx": tokens,
            "position": np.arange(position, position + tokens.shape[1], dtype=np.int64)[None],
            "beam": np.zeros(1, np.int32),
        }
        self._request.infer(inputs, share_inputs=True)
        result: np.ndarray = self._request.get_output_tensor(0).data
        return result.reshape(-1)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        self._request.reset_state()
        return self._step(np.array([prompt], np.int64), 0).astype(np.float32)

    def generate(self, prompt: Sequence[int], new: int) -> list[float]:
        begin, moments = time.perf_counter(), []
        self._request.reset_state()
        tokens, position = np.array([prompt], np.int64), 0
        for _ in range(new):
            logits = self._step(tokens, position)
            position += tokens.shape[1]
            likeliest = np.argpartition(logits, -TOP_K)[-TOP_K:]
            weights = np.exp((logits[likeliest] - logits[likeliest].max()).astype(np.float64) / TEMPERATURE)
            tokens = np.array([[self._random.choice(likeliest, p=weights / weights.sum())]], np.int64)
            moments.append(time.perf_counter() - begin)
        return moments


@dataclass(frozen=True)
class Peer:
    """What there is to know about an engine before it is started."""

    make: Callable[[Task], Engine]
    packages: tuple[str, ...]  # distributions, the one that carries the version first
    modules: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]  # by width; the fastest of several is reported
    weights: dict[str, str]  # by variant: what is quantized, for the table's notes


PEERS: dict[str, Peer] = {
    OURS: Peer(
        Ours,
        ("nvtripy",),
        ("nvtripy",),
        {"fp16": ("fp16",), "int8": ("int8",), "int4": ("int4",)},
        {
            "fp16": "float16 throughout, LayerNorm float32",
            "int8": "layers, head and embedding int8, a scale for each row",
            "int4": "layers, head and embedding int4, a scale for 128 weights (4.125 bits), input scales",
        },
    ),
    "llama.cpp": Peer(
        LlamaCpp,
        ("llama-cpp-python", "gguf"),
        ("llama_cpp", "gguf"),
        {"fp16": ("F16",), "int8": ("Q8_0",), "int4": ("Q4_0",)},
        {
            "F16": "layers, head and embedding float16",
            "Q8_0": "layers, head and embedding int8, a scale for 32 weights (8.5 bits)",
            "Q4_0": "layers, head and embedding int4, a scale for 32 weights (4.5 bits)",
        },
    ),
    "transformers": Peer(
        Transformers,
        ("transformers", "torch"),
        ("transformers", "torch"),
        {"fp16": ("float32", "bfloat16")},
        {"float32": "float32", "bfloat16": "bfloat16"},
    ),
    "ctranslate2": Peer(
        CTranslate2,
        ("ctranslate2",),
        ("ctranslate2", "transformers"),
        {"fp16": ("float32",), "int8": ("int8",)},
        {"float32": "float32 (it has no float16 on CPUs)", "int8": "layers, head and embedding int8"},
    ),
    "openvino": Peer(
        OpenVINO,
        ("openvino",),
        ("openvino",),
        {"fp16": ("fp16",), "int8": ("int8",), "int4": ("int4",)},
        {
            "fp16": "float16 weights, computed in bfloat16 where the processor can, else in float32",
            "int8": "layers and head int8, a scale for each row; inputs quantized too",
            "int4": "layers and head int4, a scale for 128 weights; inputs quantized too",
        },
    ),
}


def missing(name: str) -> str | None:
    """The module that a peer lacks, or None."""
    return next((module for module in PEERS[name].modules if util.find_spec(module) is None), None)


def version(name: str) -> str:
    """The versions of the packages that a peer is made of."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in PEERS[name].packages)


def start(name: str, task: Task) -> Engine:
    """Loads a model.

    Args:
        name: One of ``PEERS``.
    """
    return PEERS[name].make(task)
