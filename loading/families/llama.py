"""Llama's kind (Touvron et al. 2023): Granite code 3B, SmolLM2, TinyLlama, and Mistral and Granite within its bounds.

RMSNorm, rotary positions, grouped queries, a gated MLP; each linear layer stored by itself. What these families can
also have and the model has not (multipliers, other scalings of positions, layers that differ) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from loading import settings
from loading.config import CheckpointConfig
from loading.families import gguf_settings
from loading.families.rotary import rotary_heads, window
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "granite": ("GraniteForCausalLM", "GraniteModel"),
}

_ATTENTION, _MLP = "layers.{}.self_attn", "layers.{}.mlp"
TABLE = {
    "wte": From("embed_tokens"),
    "h.{}.ln_1": From("layers.{}.input_layernorm"),
    "h.{}.attn.c_attn": From((f"{_ATTENTION}.q_proj", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"), ("q", "k", "v")),
    "h.{}.attn.c_proj": From(f"{_ATTENTION}.o_proj"),
    "h.{}.ln_2": From("layers.{}.post_attention_layernorm"),
    "h.{}.mlp.c_fc": From((f"{_MLP}.gate_proj", f"{_MLP}.up_proj"), ("gate", "up")),
    "h.{}.mlp.c_proj": From(f"{_MLP}.down_proj"),
    "ln_f": From("norm"),
    "lm_head": From("lm_head"),
}
LAYOUT = Layout(
    TABLE,
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),  # which old versions of transformers saved with the weights
    cache_scale="layers.{0}.self_attn.{1}_proj.{1}_scale",
)


def paired(config: CheckpointConfig) -> np.ndarray:
    """Where the rows [q | k | v] are among llama.cpp's, which rotates neighbours: halves of a head are interleaved."""
    heads = config.n_head + config.kv_heads
    rotated = np.arange(heads * config.head_size).reshape(heads, config.head_size // 2, 2).transpose(0, 2, 1)
    values = np.arange(config.key_width) + rotated.size
    return np.concatenate([rotated.reshape(-1), values])


GGUF = {
    "wte": From("token_embd"),
    "h.{}.ln_1": From("blk.{}.attn_norm"),
    "h.{}.attn.c_attn": From(("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"), parts=("q", "k", "v"), order=paired),
    "h.{}.attn.c_proj": From("blk.{}.attn_output"),
    "h.{}.ln_2": From("blk.{}.ffn_norm"),
    "h.{}.mlp.c_fc": From(("blk.{}.ffn_gate", "blk.{}.ffn_up"), ("gate", "up")),
    "h.{}.mlp.c_proj": From("blk.{}.ffn_down"),
    "ln_f": From("output_norm"),
    "lm_head": From("output"),
}

#: Where transformers' configurations have other defaults than LlamaConfig.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"heads_of_keys": None, "inner": 11008, "context": 2048},
    "mistral": {"heads_of_keys": 8, "inner": 14336, "context": 4096 * 32},
    "granite": {"heads_of_keys": None, "inner": 11008, "context": 2048},
}
#: What others of this kind switch on, by the names of their settings.
_NOT_THERE = ("num_local_experts", "num_experts", "use_qk_norm", "qk_norm", "qk_layernorm", "attn_logit_softcapping")


def from_huggingface(kind: str) -> Callable[[Settings], tuple[CheckpointConfig, Layout]]:
    """What reads a config.json of this model_type, with transformers' defaults for it."""

    def read(given: Settings) -> tuple[CheckpointConfig, Layout]:
        return _read_config(given, kind), LAYOUT

    return read


def _read_config(given: Settings, kind: str) -> CheckpointConfig:
    defaults = _DEFAULTS[kind]
    given.absent(*_NOT_THERE)
    n_embd = given.integer("hidden_size", default=4096, limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", default=32, limit=settings.HEADS)
    n_positions = given.integer("max_position_embeddings", default=defaults["context"], limit=settings.CONTEXT)
    has_groups = "num_key_value_heads" in given.values
    n_kv_head = given.optional_integer("num_key_value_heads", limit=n_head) if has_groups else defaults["heads_of_keys"]
    head_dim, rope = rotary_heads(given, n_embd, n_head, n_kv_head or n_head)
    return CheckpointConfig(
        vocab_size=given.integer("vocab_size", default=32000, limit=settings.VOCABULARY),
        n_positions=n_positions,
        n_layer=given.integer("num_hidden_layers", default=32, limit=settings.LAYERS),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_embd=n_embd,
        n_inner=given.integer("intermediate_size", default=defaults["inner"], limit=settings.INNER_WIDTH),
        activation_function=given.activation("hidden_act", "silu"),
        gated_mlp=True,
        norm="rms",
        norm_bias=False,
        layer_norm_epsilon=given.fraction("rms_norm_eps", default=1e-6),
        attention_bias=kind != "mistral" and given.switch("attention_bias", False),
        mlp_bias=kind != "mistral" and given.switch("mlp_bias", False),
        tie_word_embeddings=given.switch("tie_word_embeddings", False),
        scale_attn_weights=kind != "granite" or _is_scaled(given, head_dim or n_embd // n_head),
        position_embedding="rotary",
        rotary_base=rope.base,
        rotary_interpolation=rope.interpolation,
        window=window(given, n_positions, 4096) if kind == "mistral" else None,
        eos_token_ids=(),
    )


def _is_scaled(given: Settings, head_size: int) -> bool:
    """Whether Granite's scores are scaled by the root of the head's size, as Llama's are, or not at all."""
    given.neutral(embedding_multiplier=1, residual_multiplier=1, logits_scaling=1)
    scale = given.positive("attention_multiplier", default=1.0)
    if math.isclose(scale, head_size**-0.5, rel_tol=1e-6):
        return True
    given.neutral(attention_multiplier=1)
    return False


def from_gguf(metadata: gguf_settings.Metadata) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a GGUF file's metadata, and how its tensors are named."""
    sizes = gguf_settings.sizes(metadata, "llama", "layer_norm_rms_epsilon")
    head_size = sizes["head_dim"] or sizes["n_embd"] // sizes["n_head"]
    config = CheckpointConfig(
        **sizes,
        **gguf_settings.rotary(metadata, "llama", head_size, sizes["n_positions"]),
        activation_function="silu",
        gated_mlp=True,
        norm="rms",
        norm_bias=False,
    )
    return config, Layout(GGUF)
