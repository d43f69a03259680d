"""The whole model: after the passes, fused operations and nothing else, with the same results."""

from __future__ import annotations

import io
import sys
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest
from graphs import assert_close, both, operations, run
from random_gpt import random_model

from engine import _inputs
from model import ACTIVATIONS, GPT, GPTConfig
from nvtripy_portable import compiler
from nvtripy_portable.executable import Executable, deserialize
from nvtripy_portable.graph import Graph

ARCHITECTURE: dict[str, Any] = {"vocab_size": 50, "n_positions": 12, "n_layer": 2, "n_head": 2, "n_embd": 128}
BLOCK = ["layer_norm", "linear", "attention", "linear", "layer_norm", "linear", "linear"]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
#: The unfused graph rounds at every operation, the fused one at the end of each: some roundings of the type apart.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


Pair = tuple[Graph, Graph]
TOKENS = (1, 3, 12)


def cached(gpt: GPT, batch: int = 2) -> Pair:
    return both(gpt, *_inputs(gpt.config, batch))


def stateless(gpt: GPT, tokens: Any = TOKENS, batch: Any = 2) -> Pair:
    return both(gpt, tp.InputInfo((batch, tokens), dtype=tp.int32))


def kinds_in_order(graph: Graph) -> list[str]:
    return [operation.kind for operation in operations(graph)]


def expected(config: GPTConfig, *, has_last: bool) -> list[str]:
    kinds = ["embedding", *BLOCK * config.n_layer, *["last_rows"] * has_last, "layer_norm", "linear"]
    return [config.norm + "_norm" if kind == "layer_norm" and config.norm == "rms" else kind for kind in kinds]


FULL_INT8: dict[str, Any] = {
    "quant_mode": "int8-weight-only",
    "quant_lm_head": True,
    "quant_embedding": True,
    "quant_position_embedding": True,
}
#: What GPT-2's relatives have: key-value heads, rotary positions, windows, norms, gates, biases.
LLAMA: dict[str, Any] = {
    "n_head": 4,
    "n_kv_head": 2,
    "position_embedding": "rotary",
    "norm": "rms",
    "gated_mlp": True,
    "activation_function": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
STARCODER2: dict[str, Any] = {
    "n_head": 4,
    "n_kv_head": 2,
    "position_embedding": "rotary",
    "rotary_base": 1e5,
    "window": 3,
    "activation_function": "gelu_pytorch_tanh",
}
GPT_NEXT: dict[str, Any] = {
    "position_embedding": "rotary",
    "rotary_fraction": 0.5,
    "rotary_interpolation": 2.0,
    "norm": "layer1p",
    "gated_mlp": True,
    "activation_function": "silu",
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MULTI_QUERY: dict[str, Any] = {"n_head": 4, "n_kv_head": 1}
RELATIVES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "starcoder2": STARCODER2,
    "gpt-next": GPT_NEXT,
    "gpt-next, relu2": GPT_NEXT | {"gated_mlp": False, "activation_function": "relu2", "norm_bias": False},
    "multi-query": MULTI_QUERY,
    "wider heads": LLAMA | {"n_kv_head": 1, "head_dim": 48, "window": 20, "rotary_fraction": 0.25},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation_function": "relu", "dtype": "float16"},
    {"tie_word_embeddings": False, "dtype": "bfloat16"},
    {"quant_mode": "int8-weight-only", "kv_cache_dtype": "int8", "dtype": "float16"},
    FULL_INT8 | {"dtype": "float16"},
    {"quant_mode": "int4-weight-only", "quant_lm_head": True, "quant_embedding": True, "dtype": "float16"},
    {"quant_mode": "fp8", "quant_lm_head": True, "quant_embedding": True, "kv_cache_dtype": "fp8"},
    {"quant_mode": "int8-smoothquant", "per_channel": False},
    {"quant_mode": "int8-smoothquant", "per_token": True, "dtype": "float16"},
]
MORE_VARIANTS: list[dict[str, Any]] = [
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"tie_word_embeddings": False},
    *({"activation_function": name, "dtype": "float16"} for name in ACTIVATIONS if name != "relu"),
    *({"kv_cache_dtype": name, "dtype": dtype} for name in ("int8", "fp8") for dtype in NUMPY),
    *({"quant_mode": mode} for mode in ("int8-weight-only", "int4-weight-only", "fp8", "int8-smoothquant")),
    {"quant_mode": "int8-weight-only", "quant_lm_head": True, "dtype": "float16"},
    {"quant_mode": "int8-weight-only", "quant_lm_head": True, "quant_embedding": True, "kv_cache_dtype": "int8"},
    {"quant_mode": "int8-weight-only", "quant_position_embedding": True},
    FULL_INT8 | {"tie_word_embeddings": False, "dtype": "bfloat16"},
    {"quant_mode": "int4-weight-only", "quant_lm_head": True, "dtype": "bfloat16"},
    {"quant_mode": "fp8", "per_token": True, "dtype": "float16"},
    {"quant_mode": "int8-smoothquant", "per_channel": False, "dtype": "bfloat16"},
    {"quant_mode": "int8-smoothquant", "per_token": True, "per_channel": False, "quant_lm_head": True},
    {"quant_mode": "int8-smoothquant", "quant_lm_head": True, "quant_embedding": True, "activation_function": "silu"},
]


def prompts(config: GPTConfig, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (2, length)).astype(np.int32)


def tolerance(config: GPTConfig) -> float:
    """Where inputs or the cache are rounded to 8 bits, a last bit before that can become a whole step after it.

    In float32 few elements are so near to the middle between two steps; in half precision many are, and the unfused
    graph itself is as far from float32's result as this.
    """
    rounds = (config.linear_mode is not None and config.linear_mode.quantizes_input) or config.kv_cache_dtype
    return max(TOLERANCES[config.dtype], (2e-2 if config.dtype == "float32" else 1e-1) if rounds else 0.0)


@pytest.mark.parametrize(
    "options",
    [*VARIANTS, *(pytest.param(options, marks=pytest.mark.slow) for options in MORE_VARIANTS)],
    ids=lambda options: "-".join(map(str, options.values())) or "float32",
)
def test_every_variant_becomes_fused_operations(options: dict[str, Any]) -> None:
    config = GPTConfig(**ARCHITECTURE | {"dtype": "float32"} | options)
    gpt = random_model(config)
    fused, plain = cached(gpt)
    assert kinds_in_order(fused) == expected(config, has_last=True), fused
    attentions = [each for each in operations(fused) if each.kind == "attention"]
    assert [each.attributes["layer"] for each in attentions] == [0, 1]
    assert attentions[0].operands[1] is fused.inputs[2].value
    assert attentions[1].operands[1] is attentions[0].results[1] and fused.outputs[1] is attentions[1].results[1]
    check_generation(config, fused, plain)

    fused, plain = stateless(gpt)
    assert kinds_in_order(fused) == expected(config, has_last=False), fused
    assert_close(fused, plain, [prompts(config, 5)], tolerance(config))


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=() if number < 1 else pytest.mark.slow)
        for number, options in enumerate(
            (
                {},
                {"dtype": "float16", "kv_cache_dtype": "int8"},
                {"quant_mode": "int4-weight-only", "quant_lm_head": True, "block_size": 32, "dtype": "float16"},
                {"quant_mode": "fp8", "kv_cache_dtype": "fp8"},
                {"quant_mode": "int8-smoothquant", "per_token": True, "dtype": "bfloat16"},
                {"quant_mode": "int8-weight-only", "quant_lm_head": True, "quant_embedding": True},
            )
        )
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "float32",
)
def test_relatives(relative: str, options: dict[str, Any]) -> None:
    test_every_variant_becomes_fused_operations(RELATIVES[relative] | options)


def check_generation(config: GPTConfig, fused: Graph, plain: Graph) -> None:
    """A padded prompt, then tokens at each row's own position. Both continue from the unfused graph's cache."""
    cache = np.zeros(config.cache_shape(2), np.int8 if config.cache_dtype is tp.int8 else NUMPY[config.dtype])
    position, lengths = np.zeros(2, np.int32), np.array([5, 2], np.int32)
    idx, last = prompts(config, 5), lengths - 1
    for step in range(4):
        inputs = [idx, position, cache, last]
        for found, wanted in zip(run(fused, inputs), results := run(plain, inputs), strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            difference = np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64))
            assert difference <= tolerance(config) * np.linalg.norm(wanted.astype(np.float64))
        cache, position = results[1], position + (lengths if step == 0 else 1)
        idx, last = prompts(config, 1, seed=step), np.zeros(2, np.int32)


@cache
def small() -> GPT:
    return random_model(GPTConfig(**ARCHITECTURE, dtype="float32"))


@pytest.mark.parametrize(
    ("model", "batch", "tokens"),
    [
        ("gpt2", 1, 1),
        ("int8", 2, 4),
        ("llama", 2, 5),
        *(pytest.param("gpt2", *case, marks=pytest.mark.slow) for case in [(1, 4), (2, 1), (2, 4)]),
        *(pytest.param("int8", *case, marks=pytest.mark.slow) for case in [(1, 1), (1, 4), (2, 1)]),
        *(
            pytest.param(relative, *case, marks=pytest.mark.slow)
            for relative in RELATIVES
            for case in [(1, 1), (1, 5), (2, 2)]
        ),
    ],
)
def test_a_fixed_number_of_tokens(model: str, batch: int, tokens: int) -> None:
    """Positions are constants then, and what is computed of nothing else."""
    options = {"gpt2": {}, "int8": FULL_INT8, **RELATIVES}[model]
    gpt = random_model(GPTConfig(**ARCHITECTURE | {"dtype": "float32"} | options)) if options else small()
    idx = prompts(gpt.config, tokens)[:batch]
    fused, plain = stateless(gpt, tokens, batch)
    assert kinds_in_order(fused) == expected(gpt.config, has_last=False), fused
    assert_close(fused, plain, [idx])

    infos = [tp.InputInfo((batch, tokens), dtype=tp.int32), *_inputs(gpt.config, batch)[1:]]
    fused, plain = both(gpt, *infos)
    assert kinds_in_order(fused) == expected(gpt.config, has_last=True), fused
    cache = np.random.default_rng(2).standard_normal(gpt.config.cache_shape(batch)).astype(np.float32)
    position, last = np.array([7, 3], np.int32)[:batch], np.full(batch, tokens - 1, np.int32)
    assert_close(fused, plain, [idx, position, cache, last])


def test_more_tokens_than_angles_are_folded_for() -> None:
    gpt = random_model(GPTConfig(**ARCHITECTURE | LLAMA | {"n_layer": 1, "n_embd": 512, "dtype": "float32"}))
    fused, _ = stateless(gpt, 3000, 1)  # 3000 x 128 angles take 1.5 MB
    assert "attention" in kinds_in_order(fused) and "unary" not in kinds_in_order(fused), fused


def test_any_number_of_sequences() -> None:
    gpt = small()
    fused, plain = stateless(gpt, batch=(1, 2, 4))
    assert kinds_in_order(fused) == expected(gpt.config, has_last=False), fused
    assert_close(fused, plain, [prompts(gpt.config, 5)])


def test_the_cached_form_without_last() -> None:
    gpt = small()
    fused, plain = both(gpt, *_inputs(gpt.config, 2)[:3])
    assert kinds_in_order(fused) == expected(gpt.config, has_last=False), fused
    cache = np.random.default_rng(2).standard_normal(gpt.config.cache_shape(2)).astype(np.float32)
    assert_close(fused, plain, [prompts(gpt.config, 3), np.array([9, 0], np.int32), cache])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tied_head_is_held_once(quantized: bool) -> None:
    options = {"quant_mode": "int8-weight-only", "quant_lm_head": True, "quant_embedding": True} if quantized else {}
    fused, _ = cached(random_model(GPTConfig(**ARCHITECTURE, **options)))
    embedding, head = operations(fused)[0], operations(fused)[-1]
    assert embedding.operands[2:4] == head.operands[1:3]
    sizes = [each.attributes["value"].shape for each in fused.operations if each.kind == "constant"]
    assert sizes.count((50, 128)) == 1 and (128, 50) not in sizes


def test_a_saved_engine_is_small_and_computes_the_same() -> None:
    gpt = small()
    fused, _ = cached(gpt)
    data = Executable(fused).serialize()
    weights = sum(each.attributes["value"].nbytes for each in fused.operations if each.kind == "constant")
    assert len(data) - weights < 500 * len(fused.operations)  # of which most are a name, shapes and lines of code
    inputs = [prompts(gpt.config, 3), np.zeros(2, np.int32), np.zeros(gpt.config.cache_shape(2), np.float32)]
    inputs.append(np.array([2, 1], np.int32))
    for found, wanted in zip(run(deserialize(data).graph, inputs), run(fused, inputs), strict=True):
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(("wanted", "printed"), [("1", len(compiler.PASSES)), ("attention", 1), ("", 0)])
def test_the_graph_is_printed_after_each_pass(wanted: str, printed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = both(lambda x: x + 1.0, tp.InputInfo((2,), dtype=tp.float32))
    monkeypatch.setenv("NVTRIPY_PORTABLE_PRINT_GRAPH", wanted)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    compiler.optimize(graph)
    assert sys.stderr.getvalue().count("graph(%arg0: f32[2])") == printed
