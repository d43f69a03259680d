"""The settings of a checkpoint, and the parameters that they imply: what every family is brought to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BLOCK = 128  # input features that share a scale in W4A16_AWQ, unless the folder says otherwise


@dataclass(frozen=True)
class CheckpointConfig:
    """The settings that determine the computation, by HuggingFace's names for GPT-2, and the tokens that end a text.

    `activation_function` is one of "gelu_new" (tanh approximation), "gelu" (erf), "relu", "relu2", "silu"; their
    aliases are resolved. `eos_token_ids` are in rising order, without ids that the vocabulary lacks (the default of
    50256 in small models).

    Those from `n_kv_head` on say what distinguishes GPT-2's relatives, those from `quant_mode` on how a quantized
    checkpoint is quantized; all by the names of model.py's GPTConfig.
    """

    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    n_kv_head: int | None = None
    head_dim: int | None = None
    gated_mlp: bool = False
    norm: str = "layer"
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    position_embedding: str = "learned"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_interpolation: float = 1.0
    window: int | None = None
    quant_mode: str | None = None
    quant_lm_head: bool = False
    quant_embedding: bool = False
    quant_position_embedding: bool = False
    per_channel: bool = True
    per_token: bool = False
    kv_cache_dtype: str | None = None
    block_size: int = BLOCK
    pre_quant_scale: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The settings as a plain dict."""
        return asdict(self)

    @property
    def has_pre_quant_scale(self) -> bool:
        """Whether quantized layers multiply their input by a vector first."""
        return self.quant_mode == "int8-smoothquant" or (self.quant_mode == "int4-weight-only" and self.pre_quant_scale)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def query_width(self) -> int:
        return self.n_head * self.head_size

    @property
    def key_width(self) -> int:
        """Of the keys, and of the values."""
        return self.kv_heads * self.head_size


def parameter_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model before quantization, in `Checkpoint.parameters`' order; linear weights (out, in)."""
    embd, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, embd)}
    if config.position_embedding == "learned":
        shapes["wpe.weight"] = (config.n_positions, embd)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (embd,)
        if config.norm_bias and config.norm != "rms":
            shapes[f"{name}.bias"] = (embd,)

    def linear(name: str, size_out: int, size_in: int, has_bias: bool) -> None:
        shapes[f"{name}.weight"] = (size_out, size_in)
        if has_bias:
            shapes[f"{name}.bias"] = (size_out,)

    for layer in range(config.n_layer):
        block = f"h.{layer}"
        norm(f"{block}.ln_1")
        linear(f"{block}.attn.c_attn", config.query_width + 2 * config.key_width, embd, config.attention_bias)
        linear(f"{block}.attn.c_proj", embd, config.query_width, config.attention_bias)
        norm(f"{block}.ln_2")
        linear(f"{block}.mlp.c_fc", inner * (2 if config.gated_mlp else 1), embd, config.mlp_bias)
        linear(f"{block}.mlp.c_proj", embd, inner, config.mlp_bias)
    norm("ln_f")
    if not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, embd, has_bias=False)
    return shapes
