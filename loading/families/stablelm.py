"""StableLM (Bellagente et al. 2024) without biases: Llama with LayerNorm, and with a part of each head rotated."""

from __future__ import annotations

from loading import settings
from loading.config import CheckpointConfig
from loading.families import llama
from loading.families.rotary import rotary
from loading.settings import Settings
from loading.table import Layout

ARCHITECTURES = ("StableLmForCausalLM", "StableLmModel")


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, with the defaults of transformers' StableLmConfig, and its layout.

    Biases of queries, keys and values are refused: the model has none there without one behind the heads.
    """
    given.only(use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False)
    n_embd = given.integer("hidden_size", default=2560, limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", default=32, limit=settings.HEADS)
    n_kv_head = given.integer("num_key_value_heads", default=32, limit=n_head)
    given.divided("hidden_size", n_embd, "num_attention_heads", n_head)
    given.divided("num_attention_heads", n_head, "num_key_value_heads", n_kv_head)
    rope = rotary(given, n_embd // n_head, default_fraction=0.25)
    config = CheckpointConfig(
        vocab_size=given.integer("vocab_size", default=50304, limit=settings.VOCABULARY),
        n_positions=given.integer("max_position_embeddings", default=4096, limit=settings.CONTEXT),
        n_layer=given.integer("num_hidden_layers", default=32, limit=settings.LAYERS),
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        n_inner=given.integer("intermediate_size", default=6912, limit=settings.INNER_WIDTH),
        activation_function=given.activation("hidden_act", "silu"),
        gated_mlp=True,
        layer_norm_epsilon=given.fraction("layer_norm_eps", default=1e-5),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=given.switch("tie_word_embeddings", False),
        position_embedding="rotary",
        rotary_base=rope.base,
        rotary_fraction=rope.fraction,
        rotary_interpolation=rope.interpolation,
        eos_token_ids=(),
    )
    return config, llama.LAYOUT
