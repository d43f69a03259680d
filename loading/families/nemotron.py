"""Nemotron (Parmar et al. 2024), Minitron: GPT-Next as transformers has it, with a squared ReLU and Llama's names.

LayerNorm with 1 added to its weights, rotary positions of a part of each head, grouped queries.
"""

from __future__ import annotations

from dataclasses import replace

from loading import settings
from loading.config import CheckpointConfig
from loading.families import llama
from loading.families.rotary import rotary_heads
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = ("NemotronForCausalLM", "NemotronModel")

TABLE = {**llama.TABLE, "h.{}.mlp.c_fc": From("layers.{}.mlp.up_proj")}
LAYOUT = replace(llama.LAYOUT, table=TABLE)


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, with the defaults of transformers' NemotronConfig, and its layout."""
    n_embd = given.integer("hidden_size", default=6144, limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", default=48, limit=settings.HEADS)
    n_kv_head = given.optional_integer("num_key_value_heads", limit=n_head)
    head_dim, rope = rotary_heads(given, n_embd, n_head, n_kv_head or n_head, default_fraction=0.5)
    config = CheckpointConfig(
        vocab_size=given.integer("vocab_size", default=256000, limit=settings.VOCABULARY),
        n_positions=given.integer("max_position_embeddings", default=4096, limit=settings.CONTEXT),
        n_layer=given.integer("num_hidden_layers", default=32, limit=settings.LAYERS),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_embd=n_embd,
        n_inner=given.integer("intermediate_size", default=24576, limit=settings.INNER_WIDTH),
        activation_function=given.activation("hidden_act", "relu2"),
        norm="layer1p",
        layer_norm_epsilon=given.fraction("norm_eps", default=1e-5),
        attention_bias=given.switch("attention_bias", False),
        mlp_bias=given.switch("mlp_bias", False),
        tie_word_embeddings=given.switch("tie_word_embeddings", False),
        position_embedding="rotary",
        rotary_base=rope.base,
        rotary_fraction=rope.fraction,
        rotary_interpolation=rope.interpolation,
        eos_token_ids=(),
    )
    return config, LAYOUT
