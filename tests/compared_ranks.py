"""Run by ranks: models that they share, and on rank 0 the same models whole. Prints how far their logits are apart.

mpirun -np 2 python compared_ranks.py gpt2 multi-query
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from small_configs import GPT2

from engine import Engine, compile_model, config_of, load_model
from loading.config import CheckpointConfig, parameter_shapes
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.decoder import Decoder, Piece
from parallelism.launcher import launch
from parallelism.mapping import Mapping
from parallelism.splitting import part_of
from parallelism.team import Team, guarded, team_of

LLAMA = replace(
    GPT2,
    n_kv_head=2,
    head_dim=20,
    n_inner=96,
    gated_mlp=True,
    activation_function="silu",
    position_embedding="rotary",
    norm="rms",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
)
WIDE = replace(GPT2, n_embd=512, n_inner=512)  # int4's blocks have 128 input features

#: Name → the model's settings, and along which dimension its embeddings are shared.
CASES: dict[str, tuple[CheckpointConfig, int | None]] = {
    "gpt2": (GPT2, None),
    "gpt2, embeddings by rows": (GPT2, 0),
    "gpt2, embeddings by columns": (GPT2, 1),
    "untied": (replace(GPT2, tie_word_embeddings=False), 0),
    "multi-query": (replace(GPT2, n_kv_head=1), None),
    "llama": (LLAMA, None),
    "llama, embeddings by rows": (LLAMA, 0),
    "llama, embeddings by columns": (LLAMA, 1),
    "starcoder2": (replace(LLAMA, gated_mlp=False, norm="layer", attention_bias=True, mlp_bias=True, window=6), None),
    "nemotron": (
        replace(LLAMA, gated_mlp=False, norm="layer1p", activation_function="relu2", rotary_fraction=0.5),
        None,
    ),
    "five words": (replace(GPT2, vocab_size=5), 0),
    "int8": (replace(GPT2, quant_mode="int8-weight-only"), None),
    "int8, head": (replace(GPT2, quant_mode="int8-weight-only", quant_lm_head=True), 1),
    "int8, head and embeddings": (
        replace(GPT2, quant_mode="int8-weight-only", quant_lm_head=True, quant_embedding=True),
        None,
    ),
    "int4": (replace(WIDE, quant_mode="int4-weight-only", quant_lm_head=True), None),
    "fp8": (replace(GPT2, quant_mode="fp8", quant_lm_head=True), None),
    "smoothquant": (replace(GPT2, quant_mode="int8-smoothquant"), 0),
    "int8 cache": (replace(GPT2, kv_cache_dtype="int8"), None),
}


@dataclass
class RandomCheckpoint:
    """A model's random parameters and scales, as `Checkpoint` gives them, whole and in parts."""

    config: CheckpointConfig
    path: str = "random"

    def needs_float32_scales(self, dtype: str) -> bool:
        return False

    def parameters(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        random, config = np.random.default_rng(0), self.config
        shapes = parameter_shapes(config)
        if config.tie_word_embeddings and config.quant_lm_head:
            shapes["lm_head.weight"] = shapes["wte.weight"]
            if config.quant_embedding:
                del shapes["wte.weight"]
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            is_linear = ".attn." in name or ".mlp." in name
            is_quantized = {"wte": config.quant_embedding, "lm_head": config.quant_lm_head}.get(module, is_linear)
            array = random.normal(size=shape)
            if kind == "weight" and len(shape) == 2:
                array *= 1.0 if module == "wte" else 2.0 * shape[1] ** -0.5
            if config.quant_mode is None or kind != "weight" or not is_quantized:
                yield name, array.astype(np.float32)
                continue
            mode, (size_out, size_in) = config.quant_mode, shape
            if mode == "int4-weight-only":
                scales: dict[str, tuple[int, ...]] = {"weight_scale": (size_in // config.block_size, size_out)}
                array = array.T
            else:
                scales = {"weight_scale": () if mode == "fp8" else (size_out,)}
            if mode == "fp8" or (mode == "int8-smoothquant" and is_linear):
                scales["input_scale"] = ()
            if mode in ("int4-weight-only", "int8-smoothquant") and is_linear:
                scales["pre_quant_scale"] = (size_in,)
            yield name, np.ascontiguousarray(array, np.float32)
            for scale, shape in scales.items():
                low, high = (0.5, 2.0) if scale == "pre_quant_scale" else (0.02, 0.04)
                yield f"{module}.{scale}", np.asarray(random.uniform(low, high, shape), np.float32)
        if config.kv_cache_dtype is not None:
            for layer in range(config.n_layer):
                yield from ((f"h.{layer}.attn.{which}_scale", np.asarray(0.02, np.float32)) for which in "kv")

    def rank_parameters(self, dtype: str, mapping: Mapping) -> Iterator[tuple[str, np.ndarray]]:
        config, whole = self.config, dict(self.parameters(dtype))
        for name, array in whole.items():
            yield name, np.asarray(part_of(name, array, config, mapping), order="C")
        if config.tie_word_embeddings and not config.quant_lm_head and not mapping.shares_embedding(config):
            yield "lm_head.weight", part_of("lm_head.weight", whole["wte.weight"], config, mapping)


def decoder_of(config: CheckpointConfig, mapping: Mapping | None) -> Decoder:
    """Of a model, or of a rank's part."""
    checkpoint: Any = RandomCheckpoint(config)
    shared = config_of(checkpoint, "float32", mapping)
    executable = compile_model(load_model(checkpoint, shared), 1)
    assert isinstance(executable._executable.portable.runner(), Executor), "it is not one native program"
    decoder = Engine(executable, shared, 1).paged(8, 12)
    assert decoder is not None
    return decoder


def logits_of(decoder: Decoder, vocabulary: int) -> np.ndarray:
    """Of prompts and generated tokens of two sequences, mixed."""
    ids = np.random.default_rng(1).integers(0, vocabulary, 40).tolist()
    first, second = decoder.pool.take(3), decoder.pool.take(3)
    steps = [
        [Piece(ids[:11], 0, first)],
        [Piece(ids[11:12], 11, first, generated=True), Piece(ids[20:27], 0, second)],
        [Piece(ids[12:13], 12, first, generated=True), Piece(ids[27:28], 7, second, generated=True)],
        [Piece(ids[28:33], 8, second, rows=[0, 3])],
    ]
    return np.concatenate([decoder.step(pieces) for pieces in steps])


def compare(team: Team, name: str) -> None:
    config, dimension = CASES[name]
    mapping = replace(team.mapping, embedding_sharding_dim=dimension)
    decoder = decoder_of(config, mapping)
    if not team.is_leader:
        team.follow(decoder)
        return
    team.lead(decoder)
    found = logits_of(decoder, config.vocab_size)
    team.dismiss()
    wanted = logits_of(decoder_of(config, None), config.vocab_size)
    assert found.shape == wanted.shape == (7, config.vocab_size)
    apart = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    print(json.dumps({"case": name, "apart": apart}), flush=True)


if __name__ == "__main__":
    found = launch()
    shared_by = team_of(1 if found is None else found.size, None, 60, "compared_ranks.py")
    with guarded(shared_by):
        for case in sys.argv[1:]:
            compare(shared_by, case)
