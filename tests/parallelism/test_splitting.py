"""parallelism/splitting.py: parts and what is joined of them, and that the parts compute what the whole does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_configs import GPT2

from loading.config import CheckpointConfig, parameter_shapes
from parallelism.mapping import Mapping
from parallelism.splitting import joined, part_of

UNTIED = replace(GPT2, n_layer=3, n_head=8, n_embd=32, n_inner=64, tie_word_embeddings=False)
GROUPED = replace(UNTIED, n_kv_head=2, head_dim=6, n_inner=48, gated_mlp=True, position_embedding="rotary")
CONFIGS = {
    "gpt2": UNTIED,
    "multi-query": replace(UNTIED, n_kv_head=1),
    "grouped, gated": GROUPED,
    "grouped, gated, no biases": replace(GROUPED, attention_bias=False, mlp_bias=False, norm="rms", vocab_size=101),
    "four ranks of five rows": replace(UNTIED, vocab_size=5, n_positions=9),
}
MODES: dict[str | None, dict[str, Any]] = {
    None: {},
    "int8-weight-only": {"quant_lm_head": True, "quant_embedding": True},
    "int4-weight-only": {"block_size": 4, "quant_lm_head": True},
    "fp8": {"quant_lm_head": True},
    "int8-smoothquant": {},
}


def tensors(config: CheckpointConfig) -> dict[str, NDArray[np.float32]]:
    """Random parameters and scales of a model, as `Checkpoint.parameters` gives them."""
    random = np.random.default_rng(0)
    found = {}
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        is_linear = ".attn." in name or ".mlp." in name
        is_quantized = {"wte": config.quant_embedding, "lm_head": config.quant_lm_head}.get(module, is_linear)
        if config.quant_mode is None or kind != "weight" or not is_quantized:
            found[name] = random.normal(size=shape)
            continue
        size_out, size_in = shape
        has_blocks = config.quant_mode == "int4-weight-only"
        found[name] = random.normal(size=shape[::-1] if has_blocks else shape)
        per_weight = config.quant_mode == "fp8"
        by_block = (size_in // config.block_size, size_out)
        found[f"{module}.weight_scale"] = random.normal(size=by_block if has_blocks else () if per_weight else size_out)
        if config.has_pre_quant_scale and is_linear:
            found[f"{module}.pre_quant_scale"] = random.normal(size=size_in)
        if config.quant_mode in ("fp8", "int8-smoothquant"):
            found[f"{module}.input_scale"] = random.normal(size=())
    return {name: np.asarray(values, np.float32) for name, values in found.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_joined_are_the_whole(name: str, mode: str | None) -> None:
    config = replace(CONFIGS[name], quant_mode=mode, **MODES[mode])
    for tp_size in (1, 2, 4):
        for dimension in (None, 0, 1):
            mapping = Mapping(tp_size, embedding_sharding_dim=dimension)
            for parameter, whole in tensors(config).items():
                parts = [part_of(parameter, whole, config, mapping.of_rank(rank)) for rank in range(tp_size)]
                assert len({part.shape for part in parts}) == 1
                assert np.array_equal(joined(parameter, parts, config, mapping), whole), (parameter, tp_size)


class Watched:
    """An array that remembers how many of its numbers were asked for."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values, self.shape, self.count = values, values.shape, 0

    def __getitem__(self, index: Any) -> Any:
        found = self.values[index]
        self.count += found.size
        return found


def test_a_rank_reads_its_part_and_no_more() -> None:
    for rank in range(4):
        mapping = Mapping(4, rank=rank, embedding_sharding_dim=0)
        for name, whole in tensors(UNTIED).items():
            watched = Watched(whole)
            part = part_of(name, watched, UNTIED, mapping)
            padding = part.shape[0] - min(25, 97 - 25 * rank) if name in ("wte.weight", "lm_head.weight") else 0
            if name == "wpe.weight":
                padding = part.shape[0] - min(8, 30 - 8 * rank)
            assert watched.count == part.size - padding * part[0].size


def test_copies_that_differ_are_refused() -> None:
    mapping, config = Mapping(4), CONFIGS["multi-query"]
    whole = tensors(config)
    for name in ("h.0.ln_1.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.bias", "wte.weight"):
        parts = [part_of(name, whole[name], config, mapping.of_rank(rank)).copy() for rank in range(4)]
        parts[2][-1] += 1
        with pytest.raises(ValueError, match=f"expected the copies of {name} to be equal, but rank 2 of the stage has"):
            joined(name, parts, config, mapping)


# ---- what the parts compute ------------------------------------------------------------------------------------------

Parameters = dict[str, NDArray[np.float64]]


def layer_norm(x: NDArray[np.float64], p: Parameters, name: str) -> NDArray[np.float64]:
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(x: NDArray[np.float64], p: Parameters, config: CheckpointConfig) -> NDArray[np.float64]:
    """Of a rank or the whole, without the last bias: (tokens, width)."""
    heads, groups, size = config.n_head, config.kv_heads, config.head_size
    qkv = x @ p["attn.c_attn.weight"].T + p["attn.c_attn.bias"]
    q, k, v = np.split(qkv.reshape(len(x), -1, size).transpose(1, 0, 2), [heads, heads + groups])
    k, v = (np.repeat(each, heads // groups, 0) for each in (k, v))
    scores = np.where(np.tri(len(x), dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(size), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    return y.transpose(1, 0, 2).reshape(len(x), -1) @ p["attn.c_proj.weight"].T


def mlp(x: NDArray[np.float64], p: Parameters) -> NDArray[np.float64]:
    hidden = x @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ p["mlp.c_proj.weight"].T


@pytest.mark.parametrize(("family", "heads"), [("gpt2", 4), ("gpt_bigcode", 1)])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_sum_up_to_transformers_model(family: str, heads: int, tp_size: int, tmp_path: Any) -> None:
    """A whole forward in NumPy: one sum over the ranks after attention and one after the MLP, stage by stage."""
    from random_models import logits_of, random_model

    from weight_loader import open_checkpoint

    model = random_model(family, n_layer=3)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.kv_heads == heads
    idx = np.random.default_rng(0).integers(0, 97, 20)
    config, mapping = checkpoint.config, Mapping(tp_size, 2, embedding_sharding_dim=0)
    ranks = [
        {name: values.astype(np.float64) for name, values in checkpoint.rank_parameters("float32", each)}
        for each in (mapping.of_rank(rank) for rank in range(mapping.world_size))
    ]
    rows = -(-config.vocab_size // tp_size)
    x = sum(
        np.where((idx // rows == number)[:, None], ranks[number]["wte.weight"][idx % rows], 0)
        for number in range(tp_size)
    )
    x = x + np.concatenate([ranks[number]["wpe.weight"] for number in range(tp_size)])[: len(idx)]
    for layer in range(config.n_layer):
        stage = mapping.stage_of(f"h.{layer}", config.n_layer)
        parts = [
            {name.removeprefix(f"h.{layer}."): values for name, values in ranks[each.rank].items()}
            for each in mapping.stage_ranks(stage)
        ]
        local = mapping.local(config)
        normed = layer_norm(x, parts[0], "ln_1")
        x = x + sum(attention(normed, part, local) for part in parts) + parts[0]["attn.c_proj.bias"]
        normed = layer_norm(x, parts[0], "ln_2")
        x = x + sum(mlp(normed, part) for part in parts) + parts[0]["mlp.c_proj.bias"]
    last = [ranks[each.rank] for each in mapping.stage_ranks(1)]
    x = layer_norm(x, last[0], "ln_f")
    logits = np.concatenate([x @ rank["lm_head.weight"].T for rank in last], 1)
    assert (logits[:, config.vocab_size :] == 0).all()  # of rows of padding, which nobody may choose
    expected = logits_of(model, idx[None].astype(np.int32))[0]
    error = np.linalg.norm(logits[:, : config.vocab_size] - expected) / np.linalg.norm(expected)
    assert error <= 1e-5
