"""StarCoder2 (Lozhkov et al. 2024): GPT-2's norms, biases and MLP, Llama's names, rotary positions, grouped queries."""

from __future__ import annotations

from dataclasses import replace

from loading import settings
from loading.config import CheckpointConfig
from loading.families import gguf_settings, llama
from loading.families.rotary import rotary_heads, window
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = ("Starcoder2ForCausalLM", "Starcoder2Model")

TABLE = {
    **llama.TABLE,
    "h.{}.mlp.c_fc": From("layers.{}.mlp.c_fc"),
    "h.{}.mlp.c_proj": From("layers.{}.mlp.c_proj"),
}
LAYOUT = replace(llama.LAYOUT, table=TABLE)
GGUF = {
    **llama.GGUF,
    "h.{}.attn.c_attn": replace(llama.GGUF["h.{}.attn.c_attn"], order=None),
    "h.{}.mlp.c_fc": From("blk.{}.ffn_up"),
}


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, with the defaults of transformers' Starcoder2Config, and its layout.

    The activation is `hidden_act`: published files also carry an `activation_function` that is not in force.
    """
    n_embd = given.integer("hidden_size", default=3072, limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", default=24, limit=settings.HEADS)
    n_kv_head = given.integer("num_key_value_heads", default=2, limit=n_head)
    n_positions = given.integer("max_position_embeddings", default=4096, limit=settings.CONTEXT)
    head_dim, rope = rotary_heads(given, n_embd, n_head, n_kv_head)
    has_bias = given.switch("use_bias", True)
    return (
        CheckpointConfig(
            vocab_size=given.integer("vocab_size", default=49152, limit=settings.VOCABULARY),
            n_positions=n_positions,
            n_layer=given.integer("num_hidden_layers", default=30, limit=settings.LAYERS),
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            n_embd=n_embd,
            n_inner=given.integer("intermediate_size", default=12288, limit=settings.INNER_WIDTH),
            activation_function=given.activation("hidden_act", "gelu_pytorch_tanh"),
            layer_norm_epsilon=given.fraction("norm_epsilon", default=1e-5),
            attention_bias=has_bias,
            mlp_bias=has_bias,
            tie_word_embeddings=given.switch("tie_word_embeddings", True),
            position_embedding="rotary",
            rotary_base=rope.base,
            rotary_interpolation=rope.interpolation,
            window=window(given, n_positions),
            eos_token_ids=(),
        ),
        LAYOUT,
    )


def from_gguf(metadata: gguf_settings.Metadata) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a GGUF file's metadata, and how its tensors are named."""
    sizes = gguf_settings.sizes(metadata, "starcoder2")
    head_size = sizes["head_dim"] or sizes["n_embd"] // sizes["n_head"]
    rope = gguf_settings.rotary(metadata, "starcoder2", head_size, sizes["n_positions"])
    return CheckpointConfig(**sizes, **rope, activation_function="gelu_new"), Layout(GGUF)
