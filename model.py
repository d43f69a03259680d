"""NanoGPT: GPT-2 and its relatives as nvtripy Modules, read top-down in the order in which the data flows.

Half precision with float32 LayerNorm. One ``forward`` serves both uses: ``forward(idx)`` is stateless and gives the
logits of every position; ``forward(idx, position, cache)`` continues sequences whose keys and values are in ``cache``
and returns the cache with the new ones written into it. The cache is a plain input and output of static shape, so
TensorRT compiles it as it is.

Shapes: B sequences, T tokens of each in this call, C the context (slots of the cache), E the width, H heads of size
D = E / H, V the vocabulary, L layers.

Parameters are named as in HuggingFace's GPT-2; linear weights are (out_features, in_features), except that weights
quantized in blocks are (in_features, out_features): nvtripy's blocks run along the first dimension, ModelOpt's along
the input features. Quantization is declared here with nvtripy's ``quantize`` and ``dequantize``, and becomes small
weights when it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import nvtripy as tp


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a GPT-2, under the names that HuggingFace's ``config.json`` uses, and its data type.

    Raises:
        ValueError: a value that no model can have; the message says what was expected and what came.
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP; 4 * n_embd where it is not given
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True  # by 1 / sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool = False  # by 1 / (number of the layer, from 1), too
    dtype: str = "float16"  # of everything but LayerNorm: float16, bfloat16 or float32
    quant_mode: str | None = None  # how linear layers are quantized: one of QUANT_MODES
    quant_lm_head: bool = False  # the head, too: as HEAD_MODES says
    quant_embedding: bool = False  # the token embedding, too: a tied one reads the quantized head's weight
    quant_position_embedding: bool = False  # int8-weight-only: the position embedding, too
    per_channel: bool = True  # int8-smoothquant: a scale for each output feature, or one for the weight
    per_token: bool = False  # int8-smoothquant: activations scaled token by token as they come, or by calibration
    kv_cache_dtype: str | None = None  # int8 or fp8; None: as ``dtype``
    block_size: int = 128  # int4-weight-only: input features that share a scale
    float32_scales: bool = False  # scales, and what they scale, in float32: some are too small for float16
    pre_quant_scale: bool = True  # int4-weight-only: inputs are multiplied by AWQ's scales first

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"expected n_head to divide n_embd but got {self.n_head} heads and a width of {self.n_embd}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"expected activation_function to be one of {', '.join(ACTIVATIONS)} but got {self.activation_function}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)} but got {self.dtype}")
        if self.quant_mode is not None and self.quant_mode not in QUANT_MODES:
            raise ValueError(f"expected quant_mode to be one of {', '.join(QUANT_MODES)} but got {self.quant_mode}")
        if self.kv_cache_dtype is not None and self.kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"expected kv_cache_dtype to be one of {', '.join(CACHE_DTYPES)} but got {self.kv_cache_dtype}"
            )
        if self.quant_lm_head and self.quant_mode is None:
            raise ValueError("expected a quant_mode with quant_lm_head but got none")
        if self.quant_embedding and self.tie_word_embeddings and not self.quant_lm_head:
            raise ValueError("expected quant_embedding of tied embeddings only with quant_lm_head")
        has_table = self.quant_position_embedding or (self.quant_embedding and not self.tie_word_embeddings)
        if has_table and self.quant_mode != "int8-weight-only":
            raise ValueError(f"expected embeddings quantized in int8-weight-only only but got {self.quant_mode}")
        widths = (self.n_embd, self.inner_size)
        if self.block_size < 1:
            raise ValueError(f"expected block_size to be at least 1 but got {self.block_size}")
        if self.quant_mode == "int4-weight-only" and any(width % self.block_size for width in widths):
            raise ValueError(
                f"expected widths that {self.block_size}, the block of int4-weight-only, divides, but got "
                f"{' and '.join(map(str, widths))}"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def tripy_dtype(self) -> tp.dtype:
        return DTYPES[self.dtype]

    @property
    def scale_dtype(self) -> tp.dtype:
        """The type of scales, and of what is multiplied by them."""
        return tp.float32 if self.float32_scales else self.tripy_dtype

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def cache_dtype(self) -> tp.dtype:
        """The type of the cache as an input and output. nvtripy takes no float8 inputs: fp8's stands in ``dtype``."""
        return tp.int8 if self.kv_cache_dtype == "int8" else self.tripy_dtype

    @property
    def linear_mode(self) -> QuantMode | None:
        mode = None if self.quant_mode is None else QUANT_MODES[self.quant_mode]
        if mode is not None and mode.scales == "block" and not self.pre_quant_scale:
            return replace(mode, scales_input=False)
        return mode

    @property
    def head_mode(self) -> QuantMode | None:
        return HEAD_MODES[self.quant_mode] if self.quant_mode is not None and self.quant_lm_head else None

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head has no weight of its own but multiplies by the embedding's."""
        return self.tie_word_embeddings and not self.quant_lm_head

    @property
    def embedding_is_head(self) -> bool:
        """Whether the token embedding has no weight of its own but reads the rows of the head's."""
        return self.tie_word_embeddings and self.quant_embedding

    def score_scale(self, layer: int) -> float:
        """What the attention scores of a layer are multiplied by."""
        scale = 1.0 / math.sqrt(self.head_size) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def cache_shape(self, batch: int) -> tuple[int, int, int, int, int, int]:
        """Shape of the key-value cache for ``batch`` sequences: (L, 2, B, H, C, D), keys before values."""
        return (self.n_layer, 2, batch, self.n_head, self.n_positions, self.head_size)


DTYPES: dict[str, tp.dtype] = {"float16": tp.float16, "bfloat16": tp.bfloat16, "float32": tp.float32}


CACHE_DTYPES: dict[str, tp.dtype] = {"int8": tp.int8, "fp8": tp.float8}


@dataclass(frozen=True)
class QuantMode:
    """What a mode does to a linear layer."""

    weight: tp.dtype
    scales: str  # one for each "channel" (output feature), "block" of input features, or "tensor"
    quantizes_input: bool = False  # activations to the weights' type, too (W8A8)
    scales_input: bool = False  # multiplies the input by a vector first (AWQ, SmoothQuant)


QUANT_MODES: dict[str, QuantMode] = {
    "int8-weight-only": QuantMode(tp.int8, "channel"),
    "int4-weight-only": QuantMode(tp.int4, "block", scales_input=True),
    "fp8": QuantMode(tp.float8, "tensor", quantizes_input=True),
    "int8-smoothquant": QuantMode(tp.int8, "channel", quantizes_input=True, scales_input=True),
}

# The head in each mode. Its columns are never scaled: an embedding that shares the weight would have to undo it.
HEAD_MODES: dict[str, QuantMode] = {
    "int8-weight-only": QuantMode(tp.int8, "channel"),
    "int4-weight-only": QuantMode(tp.int4, "block"),
    "fp8": QuantMode(tp.float8, "tensor", quantizes_input=True),
    "int8-smoothquant": QuantMode(tp.int8, "channel"),
}


def gelu_tanh(x: tp.Tensor) -> tp.Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016), OpenAI's choice for GPT-2.

    In float32: the cube overflows float16 for inputs beyond 40.
    """
    wide = tp.cast(x, tp.float32)
    inner = (wide + wide * wide * wide * 0.044715) * math.sqrt(2.0 / math.pi)
    return tp.cast(wide * (tp.tanh(inner) + 1.0) * 0.5, x.dtype)


ACTIVATIONS: dict[str, Callable[[tp.Tensor], tp.Tensor]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": tp.gelu,
    "relu": tp.relu,
    "silu": tp.silu,
}


class GPT(tp.Module):
    """A decoder-only transformer with learned positions: GPT-2 (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if not config.embedding_is_head:
            self.wte = embedding(config.vocab_size, config, config.quant_embedding)
        self.wpe = embedding(config.n_positions, config, config.quant_position_embedding)
        self.h = [Block(config, layer) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(config)
        if not config.head_is_embedding:
            self.lm_head = Linear(config.n_embd, config.vocab_size, config, config.head_mode, bias=False)

    def forward(
        self,
        idx: tp.Tensor,
        position: tp.Tensor | None = None,
        cache: tp.Tensor | None = None,
        last: tp.Tensor | None = None,
    ) -> tp.Tensor | tuple[tp.Tensor, tp.Tensor]:
        """
        Args:
            idx: Token ids, (B, T) int32.
            position: How many tokens of each sequence are in the cache already, (B,) int32. position + T may reach C.
            cache: The key-value cache, ``config.cache_shape(B)``, in the model's type. What lies at or beyond
                ``position`` in it is never read, so rows of a batch may have different lengths, and prompts may be
                padded on the right.
            last: With it, logits are computed for one token of each sequence only: the one at this index within
                ``idx``, (B,) int32.

        Returns:
            Logits in float32, (B, T, V), or (B, V) with ``last``. With a cache: the logits and the new cache.
        """
        batch, length = idx.shape
        ahead = tp.unsqueeze(tp.iota((length,), dtype=tp.int32), 0)  # (1, T)
        positions = ahead if position is None else tp.unsqueeze(position, 1) + ahead  # (1 or B, T)
        embedded = self.lm_head.rows(idx) if self.config.embedding_is_head else self.wte(idx)
        x = embedded + self.wpe(positions)  # (B, T, E)

        if cache is None:
            slots, update = tp.iota((length,), dtype=tp.int32), None
        else:
            slots = tp.iota((self.config.n_positions,), dtype=tp.int32)
            if self.config.cache_dtype is tp.int8:
                cache = tp.cast(cache, self.config.tripy_dtype)  # the numbers as they are, not yet scaled back
            update = CacheUpdate(slots, position, batch, length)
        visible = tp.reshape(slots, (1, 1, 1, -1)) <= tp.unsqueeze(tp.unsqueeze(positions, 1), 3)  # (1 or B, 1, T, C)

        layers = []
        for i, block in enumerate(self.h):
            x, written = block(x, visible, None if cache is None else cache[i], update)
            layers.append(written)

        if last is not None:
            rows = tp.iota((batch,), dtype=tp.int32) * length + last
            x = tp.gather(tp.reshape(x, (-1, self.config.n_embd)), 0, rows)  # (B, E)
        x = self.ln_f(x)
        head = (lambda x: x @ tp.transpose(self.wte.weight, 0, 1)) if self.config.head_is_embedding else self.lm_head
        logits = tp.cast(head(x), tp.float32)
        if cache is None:
            return logits
        new_cache = tp.stack(layers)
        if self.config.cache_dtype is tp.int8:
            new_cache = tp.cast(new_cache, tp.int8)  # integers already
        return logits, new_cache


class Block(tp.Module):
    """Attention and MLP, each on the normalized residual stream (pre-LN)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: tp.Tensor, visible: tp.Tensor, cache: tp.Tensor | None, update: CacheUpdate | None
    ) -> tuple[tp.Tensor, tp.Tensor | None]:
        attended, cache = self.attn(self.ln_1(x), visible, cache, update)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class LayerNorm(tp.LayerNorm):
    """LayerNorm over the width, in float32 whatever comes in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.n_embd, dtype=tp.float32, eps=config.layer_norm_epsilon)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        return tp.cast(super().forward(tp.cast(x, tp.float32)), x.dtype)


class CausalSelfAttention(tp.Module):
    """Multi-head attention over the positions that each token may see."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_size, self.n_embd = config.n_head, config.head_size, config.n_embd
        self.score_scale, self.scale_dtype = config.score_scale(layer), config.scale_dtype
        self.cache_rounding = CACHE_DTYPES.get(config.kv_cache_dtype or "")
        if self.cache_rounding is not None:
            self.k_scale, self.v_scale = scalar_parameter(config), scalar_parameter(config)
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config, config.linear_mode)
        self.c_proj = Linear(config.n_embd, config.n_embd, config, config.linear_mode)

    def forward(
        self, x: tp.Tensor, visible: tp.Tensor, cache: tp.Tensor | None, update: CacheUpdate | None
    ) -> tuple[tp.Tensor, tp.Tensor | None]:
        q, k, v = tp.split(self.c_attn(x), 3, dim=2)  # (B, T, E) each
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)  # (B, H, T, D)
        if self.cache_rounding is not None:
            # Rounded to what the cache can hold, and not yet scaled back: the cache holds these numbers.
            k = tp.cast(tp.quantize(to(k, self.scale_dtype), self.k_scale, self.cache_rounding), x.dtype)
            v = tp.cast(tp.quantize(to(v, self.scale_dtype), self.v_scale, self.cache_rounding), x.dtype)
        if cache is not None and update is not None:
            k, v = update(cache[0], k), update(cache[1], v)  # (B, H, C, D)
            cache = tp.stack([k, v])
        if self.cache_rounding is not None:
            q, k, v = (to(each, self.scale_dtype) for each in (q, k, v))
            k, v = k * self.k_scale, v * self.v_scale
        # Scaled before the product, which keeps float16 scores within range.
        scores = (q * self.score_scale) @ tp.transpose(k, 2, 3)  # (B, H, T, C)
        weights = tp.softmax(tp.where(visible, scores, -math.inf), dim=3)
        y = tp.reshape(tp.permute(to(weights @ v, x.dtype), (0, 2, 1, 3)), x.shape)  # (B, T, E)
        return self.c_proj(y), cache

    def split_heads(self, x: tp.Tensor) -> tp.Tensor:
        batch, length, _ = x.shape
        return tp.permute(tp.reshape(x, (batch, length, self.n_head, self.head_size)), (0, 2, 1, 3))


class CacheUpdate:
    """Writes T new rows a sequence into a cache of C slots, each sequence at its own position.

    nvtripy has no scatter, so every slot selects: the new row that belongs to it, or what it holds.
    """

    def __init__(
        self, slots: tp.Tensor, position: tp.Tensor, batch: tp.DimensionSize, length: tp.DimensionSize
    ) -> None:
        begin = tp.unsqueeze(position, 1)  # (B, 1)
        slot = tp.unsqueeze(slots, 0)  # (1, C)
        # A logical "and" by De Morgan: nvtripy has "or" and "not" only.
        written = ~((slot < begin) | (slot >= begin + length))  # (B, C)
        offset = tp.where(written, slot - begin, 0)
        first_row = tp.unsqueeze(tp.iota((batch,), dtype=tp.int32) * length, 1)
        self.rows = first_row + offset  # (B, C): which of the B * T new rows each slot would take
        self.written = tp.unsqueeze(tp.unsqueeze(written, 1), 3)  # (B, 1, C, 1)

    def __call__(self, cache: tp.Tensor, new: tp.Tensor) -> tp.Tensor:
        """The cache (B, H, C, D) with the rows of ``new`` (B, H, T, D) in their slots."""
        heads, size = new.shape[1], new.shape[3]
        by_row = tp.reshape(tp.permute(new, (0, 2, 1, 3)), (-1, heads, size))  # (B * T, H, D)
        spread = tp.permute(tp.gather(by_row, 0, self.rows), (0, 2, 1, 3))  # (B, H, C, D)
        return tp.where(self.written, spread, cache)


class MLP(tp.Module):
    """Two linear layers with the checkpoint's activation between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_size, config, config.linear_mode)
        self.c_proj = Linear(config.inner_size, config.n_embd, config, config.linear_mode)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Linear(tp.Module):
    """A linear layer whose weight, and maybe input, is quantized as ``mode`` says.

    Scales are constants, as nvtripy wants them, in ``config.scale_dtype``, as are the weights that they scale:

    - ``weight_scale``: (out_features,), (in_features / config.block_size, out_features) or a scalar, by the mode.
    - ``input_scale``: a scalar, where activations are quantized and not token by token.
    - ``pre_quant_scale``: (in_features,), where the mode multiplies the input by it first.

    A weight quantized in blocks has an even number of columns, as TensorRT packs two int4 of a row into a byte: where
    out_features is odd, it and its scale end with a column more that nothing reads.
    """

    def __init__(
        self, in_features: int, out_features: int, config: GPTConfig, mode: QuantMode | None, bias: bool = True
    ) -> None:
        super().__init__()
        self.dtype = config.tripy_dtype
        self.scale_dtype = self.dtype if mode is None else config.scale_dtype
        self.mode = mode
        self.has_blocks = mode is not None and mode.scales == "block"
        self.out_features = out_features
        self.is_padded = self.has_blocks and out_features % 2 == 1
        self.per_token = config.per_token
        # nvtripy's own Linear declares the parameters: there is no other public way to declare one without a value.
        plain = tp.Linear(in_features, out_features, bias=bias, dtype=self.dtype)
        self.weight, self.bias = plain.weight, plain.bias
        if mode is None:
            return
        rows, width = out_features, in_features
        if self.has_blocks:
            rows, width = in_features, out_features + int(self.is_padded)
        self.weight = tp.Linear(width, rows, bias=False, dtype=self.scale_dtype).weight
        if self.has_blocks:
            blocks = in_features // config.block_size
            self.weight_scale = tp.Linear(width, blocks, bias=False, dtype=self.scale_dtype).weight
        elif mode.scales == "channel" and (config.per_channel or not mode.quantizes_input):
            self.weight_scale = tp.Linear(1, out_features, dtype=self.scale_dtype).bias
        else:
            self.weight_scale = scalar_parameter(config)
        if mode.quantizes_input and not self.per_token:
            self.input_scale = scalar_parameter(config)
        if mode.scales_input:
            self.pre_quant_scale = tp.Linear(1, in_features, dtype=self.scale_dtype).bias

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        """(..., in_features) → (..., out_features)."""
        x = to(x, self.scale_dtype)
        if self.mode is not None and self.mode.scales_input:
            x = x * self.pre_quant_scale
        if self.mode is not None and self.mode.quantizes_input:
            x = self.round_input(x, self.mode.weight)
        weight = self.rounded_weight()
        y = to(x @ (weight if self.has_blocks else tp.transpose(weight, 0, 1)), self.dtype)
        return y if self.bias is None else y + self.bias

    def rows(self, idx: tp.Tensor) -> tp.Tensor:
        """The weight's rows at ``idx``: the layer as an embedding, (...) → (..., in_features)."""
        weight = self.rounded_weight()
        return to(tp.gather(tp.transpose(weight, 0, 1) if self.has_blocks else weight, 0, idx), self.dtype)

    def rounded_weight(self) -> tp.Tensor:
        """What is left of the weight after quantization, (out_features, in_features), or transposed in blocks."""
        if self.mode is None:
            return self.weight
        dim = 0 if self.weight_scale.rank == 1 else None
        quantized = tp.quantize(self.weight, self.weight_scale, self.mode.weight, dim)
        rounded = tp.dequantize(quantized, self.weight_scale, self.scale_dtype, dim)
        return rounded[:, : self.out_features] if self.is_padded else rounded

    def round_input(self, x: tp.Tensor, dtype: tp.dtype) -> tp.Tensor:
        """What is left of activations that go through ``dtype``."""
        if not self.per_token:
            return tp.dequantize(tp.quantize(x, self.input_scale, dtype), self.input_scale, self.scale_dtype)
        # nvtripy takes constant scales only: scaled by hand, then rounded at a scale of one, which it takes in float32.
        wide = tp.cast(x, tp.float32)
        scale = tp.maximum(tp.max(abs(wide), dim=-1, keepdim=True) / 127.0, 1e-6)
        return tp.cast(tp.cast(tp.quantize(wide / scale, 1.0, dtype), tp.float32) * scale, self.scale_dtype)


class QuantizedEmbedding(Linear):
    """Rows looked up by number, of a table in int8 with a scale for each row: a linear layer that only gives rows."""

    def __init__(self, rows: int, config: GPTConfig) -> None:
        super().__init__(config.n_embd, rows, config, QUANT_MODES["int8-weight-only"], bias=False)

    def forward(self, idx: tp.Tensor) -> tp.Tensor:
        """(...) → (..., n_embd)."""
        return self.rows(idx)


def embedding(rows: int, config: GPTConfig, is_quantized: bool) -> tp.Embedding | QuantizedEmbedding:
    if is_quantized:
        return QuantizedEmbedding(rows, config)
    return tp.Embedding(rows, config.n_embd, dtype=config.tripy_dtype)


def scalar_parameter(config: GPTConfig) -> tp.Tensor:
    """A parameter without dimensions (a scale for a whole tensor), not set yet."""
    return tp.Linear(1, 1, dtype=config.scale_dtype, quant_dtype=tp.int8).weight_scale


def to(x: tp.Tensor, dtype: tp.dtype) -> tp.Tensor:
    """``x`` in ``dtype``; itself, where that is its type."""
    return x if x.dtype == dtype else tp.cast(x, dtype)
