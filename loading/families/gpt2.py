"""GPT-2 (Radford et al. 2019), as transformers, nanoGPT and llama.cpp store it."""

from __future__ import annotations

from dataclasses import replace

from loading import settings
from loading.config import CheckpointConfig
from loading.families import gguf_settings
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

TABLE = {
    "wte": From("wte"),
    "wpe": From("wpe"),
    "h.{}.ln_1": From("h.{}.ln_1"),
    "h.{}.attn.c_attn": From("h.{}.attn.c_attn", is_conv1d=True),
    "h.{}.attn.c_proj": From("h.{}.attn.c_proj", is_conv1d=True),
    "h.{}.ln_2": From("h.{}.ln_2"),
    "h.{}.mlp.c_fc": From("h.{}.mlp.c_fc", is_conv1d=True),
    "h.{}.mlp.c_proj": From("h.{}.mlp.c_proj", is_conv1d=True),
    "ln_f": From("ln_f"),
    "lm_head": From("lm_head"),
}

#: The token of GPT-2's own vocabulary that ends a text.
END_OF_TEXT = 50256

#: Causal masks, which old versions of transformers saved with the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias")

LAYOUT = Layout(TABLE, prefix="transformer.", ignored=BUFFERS)

#: nanoGPT's layers are plain linear ones: (out, in).
NANOGPT = replace(LAYOUT, table={name: replace(source, is_conv1d=False) for name, source in TABLE.items()})

GGUF = {
    "wte": From("token_embd"),
    "wpe": From("position_embd"),
    "h.{}.ln_1": From("blk.{}.attn_norm"),
    "h.{}.attn.c_attn": From("blk.{}.attn_qkv"),
    "h.{}.attn.c_proj": From("blk.{}.attn_output"),
    "h.{}.ln_2": From("blk.{}.ffn_norm"),
    "h.{}.mlp.c_fc": From("blk.{}.ffn_up"),
    "h.{}.mlp.c_proj": From("blk.{}.ffn_down"),
    "ln_f": From("output_norm"),
    "lm_head": From("output"),
}


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, and how the tensors beside it are named."""
    given.only(add_cross_attention=False, is_encoder_decoder=False)
    if given.values.get("pruned_heads"):
        raise given.refuse("a checkpoint with pruned_heads is not supported")
    return read_config(given), LAYOUT


def read_config(given: Settings) -> CheckpointConfig:
    """The settings that GPT-2 shares with GPTBigCode, with the defaults of transformers' GPT2Config."""
    vocab_size = given.integer("vocab_size", default=50257, limit=settings.VOCABULARY)
    n_positions = given.integer("n_positions", "max_position_embeddings", default=1024, limit=settings.CONTEXT)
    n_layer = given.integer("n_layer", "num_hidden_layers", default=12, limit=settings.LAYERS)
    n_head = given.integer("n_head", "num_attention_heads", default=12, limit=settings.HEADS)
    n_embd = given.integer("n_embd", "hidden_size", default=768, limit=settings.WIDTH)
    n_inner = given.optional_integer("n_inner", limit=settings.INNER_WIDTH)
    given.divided("n_embd", n_embd, "n_head", n_head)
    return CheckpointConfig(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_inner=4 * n_embd if n_inner is None else n_inner,
        activation_function=given.activation("activation_function", "gelu_new"),
        layer_norm_epsilon=given.fraction("layer_norm_epsilon", default=1e-5),
        tie_word_embeddings=given.switch("tie_word_embeddings", True),
        eos_token_ids=(),
        scale_attn_weights=given.switch("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=given.switch("scale_attn_by_inverse_layer_idx", False),
    )


def from_nanogpt(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a ckpt.pt's model_args, and how its tensors are named.

    The vocabulary is the embedding's rows, padding to a multiple of 64 among them. nanoGPT's GELU is the exact one.
    """
    n_embd = given.integer("n_embd", limit=settings.WIDTH)
    n_head = given.integer("n_head", limit=settings.HEADS)
    given.divided("n_embd", n_embd, "n_head", n_head)
    has_bias = given.switch("bias", True)
    config = CheckpointConfig(
        vocab_size=given.integer("vocab_size", limit=settings.VOCABULARY),
        n_positions=given.integer("block_size", limit=settings.CONTEXT),
        n_layer=given.integer("n_layer", limit=settings.LAYERS),
        n_head=n_head,
        n_embd=n_embd,
        n_inner=4 * n_embd,
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        eos_token_ids=(),
        norm_bias=has_bias,
        attention_bias=has_bias,
        mlp_bias=has_bias,
    )
    return config, NANOGPT


def from_gguf(metadata: gguf_settings.Metadata, kind: str = "gpt2") -> tuple[CheckpointConfig, Layout]:
    """The configuration in a GGUF file's metadata, and how its tensors are named. llama.cpp's GELU is the tanh form."""
    return CheckpointConfig(**gguf_settings.sizes(metadata, kind), activation_function="gelu_new"), Layout(GGUF)
