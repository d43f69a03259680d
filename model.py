"""NanoGPT: GPT-2 and its relatives as nvtripy Modules, read top-down in the order in which the data flows.

One file, longer than others here, since it is one idea: a family (StarCoder, Llama's kind, ...) is a row of settings,
and there is one place where each setting shows. Half precision with float32 norms. One ``forward`` serves both uses:
``forward(idx)`` is stateless and gives the logits of every position; ``forward(idx, position, cache)`` continues
sequences whose keys and values are in ``cache`` and returns the cache with the new ones written into it. The cache is a
plain input and output of static shape, so TensorRT compiles it as it is.

Processes may share a model (tensor parallelism, Shoeybi et al. 2019): each rank has some of the heads and of the MLP,
and two sums over the ranks stand in a layer, as calls of TensorRT-LLM's plug-ins. A rank's model is a smaller one,
whose sizes are its own: H, G and F below.

Shapes: B sequences, T tokens of each in this call, C the context (slots of the cache), E the width, H heads of size D,
which read G key-value heads (G = H in GPT-2; R = H / G heads share one), F the MLP's width, V the vocabulary, L layers,
S adapters and none, P ranks.

Parameters are named as in HuggingFace's GPT-2, whatever the family; linear weights are (out_features, in_features),
except that weights quantized in blocks are (in_features, out_features): nvtripy's blocks run along the first dimension,
ModelOpt's along the input features. Quantization is declared here with nvtripy's ``quantize`` and ``dequantize``, and
becomes small weights when it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import nvtripy as tp


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, by the names of HuggingFace's ``config.json`` of a GPT-2 where it has one, and the data type.

    Raises:
        ValueError: a value that no model can have; the message says what was expected and what came.
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # heads of keys and values, each for n_head / n_kv_head queries'; None: n_head
    head_dim: int | None = None  # size of a head; None: n_embd / n_head
    n_inner: int | None = None  # width of the MLP; 4 * n_embd where it is not given
    activation_function: str = "gelu_new"
    gated_mlp: bool = False  # activation(gate) * up, both linear in the input (GLU)
    norm: str = "layer"  # one of NORMS
    layer_norm_epsilon: float = 1e-5
    norm_bias: bool = True  # which RMSNorm never has
    attention_bias: bool = True
    mlp_bias: bool = True
    position_embedding: str = "learned"  # or "rotary" (RoPE)
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0  # of each head's dimensions, from the first on, that are rotated
    rotary_interpolation: float = 1.0  # that positions are divided by
    window: int | None = None  # how many tokens one sees, itself included; None: all before it
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
    adapters: int = 0  # how many adapters (LoRA) there is room for, of which each sequence has one, or none
    adapter_ranks: tuple[int, ...] = (0, 0, 0, 0)  # their ranks for each of ADAPTED; 0: they leave it as it is
    prompt_rows: int = 0  # virtual tokens (prompt tuning), whose ids come after the vocabulary's
    tp_size: int = 1  # ranks that share the model: n_head, n_kv_head and n_inner are what one of them has
    tp_rank: int = 0  # which one this is
    embedding_sharding_dim: int | None = None  # ranks share embeddings by rows (0) or columns (1); None: each has all

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"expected n_head to divide n_embd but got {self.n_head} heads and a width of {self.n_embd}"
            )
        for name in ("n_kv_head", "head_dim", "n_inner", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"expected n_kv_head to divide n_head but got {self.kv_heads} heads of keys for {self.n_head}"
            )
        if self.norm not in NORMS:
            raise ValueError(f"expected norm to be one of {', '.join(NORMS)} but got {self.norm}")
        if self.position_embedding not in ("learned", "rotary"):
            raise ValueError(f"expected position_embedding to be learned or rotary but got {self.position_embedding}")
        for name in ("rotary_base", "rotary_fraction", "rotary_interpolation"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} to be a positive number but got {getattr(self, name)}")
        if self.is_rotary and (self.rotary_fraction > 1 or self.rotary_size < 2 or self.rotary_size % 2):
            raise ValueError(
                f"expected rotary_fraction to make an even number of a head's {self.head_size} dimensions but got "
                f"{self.rotary_fraction}"
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
        if self.adapters < 0 or len(self.adapter_ranks) != len(ADAPTED) or min(self.adapter_ranks) < 0:
            raise ValueError(
                f"expected adapters and {len(ADAPTED)} adapter_ranks of at least 0 but got {self.adapters} and "
                f"{self.adapter_ranks}"
            )
        if self.prompt_rows < 0:
            raise ValueError(f"expected prompt_rows to be at least 0 but got {self.prompt_rows}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"expected tp_rank to be from 0 to tp_size - 1 but got {self.tp_rank} of {self.tp_size}")
        if self.embedding_sharding_dim not in (None, 0, 1):
            raise ValueError(f"expected embedding_sharding_dim to be 0 or 1 but got {self.embedding_sharding_dim}")
        if self.embedding_sharding_dim == 1 and self.n_embd % self.tp_size:
            raise ValueError(f"expected tp_size to divide n_embd but got {self.tp_size} for a width of {self.n_embd}")
        if self.tp_size > 1 and (self.adapters or self.prompt_rows):
            raise ValueError("expected no adapters and no prompt_rows in a model that ranks share")
        if self.tp_size > 1 and self.embedding_is_head and self.shared_embedding != "rows":
            raise ValueError("expected embedding_sharding_dim 0 where ranks share a quantized head and embedding")
        has_table = self.quant_position_embedding or (self.quant_embedding and not self.tie_word_embeddings)
        if has_table and self.quant_mode != "int8-weight-only":
            raise ValueError(f"expected embeddings quantized in int8-weight-only only but got {self.quant_mode}")
        widths = {self.n_embd: None, self.n_head * self.head_size: None, self.inner_size: None}  # of inputs, in order
        if self.block_size < 1:
            raise ValueError(f"expected block_size to be at least 1 but got {self.block_size}")
        if self.quant_mode == "int4-weight-only" and any(width % self.block_size for width in widths):
            raise ValueError(
                f"expected widths that {self.block_size}, the block of int4-weight-only, divides, but got "
                f"{' and '.join(map(str, widths))}"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def is_rotary(self) -> bool:
        return self.position_embedding == "rotary"

    @property
    def rotary_size(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def has_norm_bias(self) -> bool:
        return self.norm_bias and self.norm != "rms"

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
        """Whether the head has no weight of its own but multiplies by the embedding's, where a rank has these rows."""
        has_rows = self.tp_size == 1 or self.shared_embedding == "rows"
        return self.tie_word_embeddings and not self.quant_lm_head and has_rows

    @property
    def embedding_is_head(self) -> bool:
        """Whether the token embedding has no weight of its own but reads the rows of the head's."""
        return self.tie_word_embeddings and self.quant_embedding

    @property
    def shared_embedding(self) -> str | None:
        """What of the embeddings the ranks share: rows or columns; None: nothing."""
        is_whole = self.tp_size == 1 or self.embedding_sharding_dim is None
        return None if is_whole else "columns" if self.embedding_sharding_dim else "rows"

    @property
    def embedding_width(self) -> int:
        """How many columns of the embeddings a rank has."""
        return self.n_embd // self.tp_size if self.shared_embedding == "columns" else self.n_embd

    def rows_of_rank(self, rows: int) -> int:
        """How many rows of an embedding a rank has; the last ranks' may be padding."""
        return -(-rows // self.tp_size) if self.shared_embedding == "rows" else rows

    @property
    def vocab_part(self) -> int:
        """How many tokens' logits a rank computes; the last ranks' may be of none."""
        return -(-self.vocab_size // self.tp_size)

    def score_scale(self, layer: int) -> float:
        """What the attention scores of a layer are multiplied by."""
        scale = 1.0 / math.sqrt(self.head_size) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def adapter_shapes(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the adapters' tables: for each of ADAPTED that has a rank the way down, (S, L, rank, in_features),
        and the way up, (S, L, rank, out_features). What slot 0 has is none: zeros."""
        attended, hidden = self.n_head * self.head_size, self.inner_size * (2 if self.gated_mlp else 1)
        widths = {
            "c_attn": (self.n_embd, attended + 2 * self.kv_heads * self.head_size),
            "attn.c_proj": (attended, self.n_embd),
            "c_fc": (self.n_embd, hidden),
            "mlp.c_proj": (self.inner_size, self.n_embd),
        }
        ranks = zip(ADAPTED, self.adapter_ranks if self.adapters else (0,) * len(ADAPTED), strict=True)
        return [
            (self.adapters + 1, self.n_layer, rank, width) for name, rank in ranks if rank for width in widths[name]
        ]

    def cache_shape(self, batch: int) -> tuple[int, int, int, int, int, int]:
        """Shape of the key-value cache for ``batch`` sequences: (L, 2, B, G, C, D), keys before values."""
        return (self.n_layer, 2, batch, self.kv_heads, self.n_positions, self.head_size)


DTYPES: dict[str, tp.dtype] = {"float16": tp.float16, "bfloat16": tp.bfloat16, "float32": tp.float32}


CACHE_DTYPES: dict[str, tp.dtype] = {"int8": tp.int8, "fp8": tp.float8}

# The linear layers of a block that adapters may add to.
ADAPTED = ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")

# Layer normalization (Ba et al. 2016), the same with 1 added to the stored weights, as NeMo has it, and RMSNorm (Zhang
# and Sennrich 2019).
NORMS = ("layer", "layer1p", "rms")


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


def squared_relu(x: tp.Tensor) -> tp.Tensor:
    """Of So et al. 2021 (Primer)."""
    positive = tp.relu(x)
    return positive * positive


ACTIVATIONS: dict[str, Callable[[tp.Tensor], tp.Tensor]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": tp.gelu,
    "relu": tp.relu,
    "relu2": squared_relu,
    "silu": tp.silu,
}


class GPT(tp.Module):
    """A decoder-only transformer: GPT-2 (Radford et al. 2019) and what came of it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if not config.embedding_is_head:
            self.wte = embedding(config.rows_of_rank(config.vocab_size), config, config.quant_embedding)
        if not config.is_rotary:
            rows = config.rows_of_rank(config.n_positions)
            self.wpe = embedding(rows, config, config.quant_position_embedding)
        self.h = [Block(config, layer) for layer in range(config.n_layer)]
        self.ln_f = Norm(config)
        if not config.head_is_embedding:
            self.lm_head = Linear(config.n_embd, config.vocab_part, config, config.head_mode, bias=False)

    def forward(
        self,
        idx: tp.Tensor,
        position: tp.Tensor | None = None,
        cache: tp.Tensor | None = None,
        last: tp.Tensor | None = None,
        slot: tp.Tensor | None = None,
        tables: Sequence[tp.Tensor] = (),
        prompts: tp.Tensor | None = None,
    ) -> tp.Tensor | tuple[tp.Tensor, tp.Tensor]:
        """
        Args:
            idx: Token ids, (B, T) int32. With ``prompts`` they go on beyond the vocabulary.
            position: How many tokens of each sequence are in the cache already, (B,) int32. position + T may reach C.
            cache: The key-value cache, ``config.cache_shape(B)``, in the model's type. What lies at or beyond
                ``position`` in it is never read, so rows of a batch may have different lengths, and prompts may be
                padded on the right.
            last: With it, logits are computed for one token of each sequence only: the one at this index within
                ``idx``, (B,) int32.
            slot: Which adapter each sequence has, (B,) int32; 0: none.
            tables: Of the adapters, in ``config.adapter_shapes`` and the model's type.
            prompts: Embeddings of the ids from V on, (P, E) in the model's type (Lester et al. 2021).

        Returns:
            Logits in float32, (B, T, V), or (B, V) with ``last``. With a cache: the logits and the new cache.
        """
        batch, length = idx.shape
        ahead = tp.unsqueeze(tp.iota((length,), dtype=tp.int32), 0)  # (1, T)
        positions = ahead if position is None else tp.unsqueeze(position, 1) + ahead  # (1 or B, T)
        x = self.embedded(idx) if prompts is None else self.prompted(idx, prompts)  # (B, T, E)
        x = x if self.config.is_rotary else x + looked_up(self.wpe, positions, self.config.n_positions, self.config)
        if self.config.shared_embedding == "rows":
            x = to(summed(x, self.config), x.dtype)  # one rank has a token's row, and one its position's
        if self.config.shared_embedding == "columns":
            x = to(gathered(x, (batch, length), self.config), x.dtype)

        if cache is None:
            slots, update = tp.iota((length,), dtype=tp.int32), None
        else:
            slots = tp.iota((self.config.n_positions,), dtype=tp.int32)
            if self.config.cache_dtype is tp.int8:
                cache = tp.cast(cache, self.config.tripy_dtype)  # the numbers as they are, not yet scaled back
            update = CacheUpdate(self.config, slots, position, batch, length)
        own = tp.unsqueeze(tp.unsqueeze(positions, 1), 3)  # (1 or B, 1, T, 1)
        others = tp.reshape(slots, (1, 1, 1, -1))
        visible = others <= own  # (1 or B, 1, T, C)
        if self.config.window is not None:
            visible = ~((others > own) | (others <= own - self.config.window))  # nvtripy has no "and"
        if self.config.kv_heads < self.config.n_head:
            visible = tp.unsqueeze(visible, 1)
        rotation = Rotation(self.config, positions) if self.config.is_rotary else None
        adapters = None if slot is None else Adapters(self.config, slot, tables)
        call = Call(batch, length, visible, rotation, update, adapters)

        layers = []
        for i, block in enumerate(self.h):
            x, written = block(x, call, None if cache is None else part(cache, i))
            layers.append(written)

        if last is not None:
            rows = tp.iota((batch,), dtype=tp.int32) * length + last
            x = tp.gather(tp.reshape(x, (-1, self.config.n_embd)), 0, rows)  # (B, E)
        x = self.ln_f(x)
        head = (lambda x: x @ tp.transpose(self.wte.weight, 0, 1)) if self.config.head_is_embedding else self.lm_head
        logits = tp.cast(head(x), tp.float32)
        if self.config.tp_size > 1:
            logits = gathered(logits, (batch, length) if last is None else (batch,), self.config)
            logits = parts(logits, 0, self.config.vocab_size, logits.rank - 1)  # of rows that pad there are none
        if cache is None:
            return logits
        shape = (1, 2, batch, *self.config.cache_shape(1)[3:])
        new_cache = tp.concatenate([tp.reshape(each, shape) for each in layers], 0)
        if self.config.cache_dtype is tp.int8:
            new_cache = tp.cast(new_cache, tp.int8)  # integers already
        return logits, new_cache

    def embedded(self, idx: tp.Tensor) -> tp.Tensor:
        """Rows of the token embedding, (B, T) → (B, T, E)."""
        table = self.lm_head.rows if self.config.embedding_is_head else self.wte
        return looked_up(table, idx, self.config.vocab_size, self.config)

    def prompted(self, idx: tp.Tensor, prompts: tp.Tensor) -> tp.Tensor:
        """The same, and of ids from V on rows of ``prompts`` (P, E)."""
        count = self.config.vocab_size
        own = self.embedded(tp.minimum(idx, count - 1))
        return tp.where(tp.unsqueeze(idx < count, 2), own, tp.gather(prompts, 0, tp.maximum(idx - count, 0)))


@dataclass(frozen=True)
class Call:
    """What all layers share of one call.

    Its sizes among it: nvtripy computes the shape of every tensor that is asked for it, with operations of their own.
    """

    batch: tp.DimensionSize
    length: tp.DimensionSize
    visible: tp.Tensor  # which slots each token sees, (1 or B, 1, T, C), or (1 or B, 1, 1, T, C) where heads share keys
    rotation: Rotation | None
    update: CacheUpdate | None
    adapters: Adapters | None

    def adapted(self, name: str, layer: int, linear: Linear, x: tp.Tensor) -> tp.Tensor:
        """One of ADAPTED, with what each sequence's adapter adds to it."""
        more = None if self.adapters is None else self.adapters(name, layer, x)
        return linear(x) if more is None else linear(x) + more


class Adapters:
    """LoRA (Hu et al. 2021): beside a linear layer's weight each sequence has two small matrices of its own."""

    def __init__(self, config: GPTConfig, slot: tp.Tensor, tables: Sequence[tp.Tensor]) -> None:
        self.slot, each = slot, iter(tables)
        self.pairs = {
            name: (next(each), next(each)) for name, r in zip(ADAPTED, config.adapter_ranks, strict=True) if r
        }

    def __call__(self, name: str, layer: int, x: tp.Tensor) -> tp.Tensor | None:
        """What is added to a layer's result, (B, T, in_features) → (B, T, out_features)."""
        if name not in self.pairs:
            return None
        down, up = (tp.gather(part(table, layer, 1), 0, self.slot) for table in self.pairs[name])  # (B, rank, ...)
        return x @ tp.transpose(down, 1, 2) @ up


def part(x: tp.Tensor, index: int, dim: int = 0) -> tp.Tensor:
    """One part along a dimension, which goes: what ``x[index]`` is, by one operation instead of forty."""
    return tp.gather(x, dim, tp.Tensor(index))


def parts(x: tp.Tensor, begin: int, end: int, dim: int) -> tp.Tensor:
    """The parts ``begin <= i < end`` along a dimension."""
    return tp.gather(x, dim, tp.Tensor(list(range(begin, end))))


# Where ranks meet: TensorRT-LLM's plug-ins, which NCCL carries out, in float32 whatever the model's type. On the
# portable runtime the sum is taken in the ranks' order.


def summed(x: tp.Tensor, config: GPTConfig) -> tp.Tensor:
    """The sum of what every rank has, in float32."""
    return across_ranks("AllReduce", x, config)


def gathered(x: tp.Tensor, leading: Sequence[tp.DimensionSize], config: GPTConfig) -> tp.Tensor:
    """What every rank has, (*leading, n) → (*leading, P * n) in float32."""
    count, ranks = len(leading), config.tp_size
    behind = across_ranks("AllGather", x, config)  # one rank's behind the other's along the first dimension
    by_rank = tp.reshape(behind, (ranks, *leading, -1))
    return tp.reshape(tp.permute(by_rank, (*range(1, count + 1), 0, count + 1)), (*leading, -1))


def looked_up(table: Callable[[tp.Tensor], tp.Tensor], idx: tp.Tensor, count: int, config: GPTConfig) -> tp.Tensor:
    """Rows of an embedding of ``count`` rows, (B, T) → (B, T, E); zeros where another rank has them."""
    if config.shared_embedding != "rows":
        return table(idx)
    last = config.rows_of_rank(count) - 1
    own = idx - config.tp_rank * (last + 1)
    rows = table(tp.minimum(tp.maximum(own, 0), last))
    return tp.where(tp.unsqueeze((own < 0) | (own > last), 2), 0.0, rows)


def across_ranks(name: str, x: tp.Tensor, config: GPTConfig) -> tp.Tensor:
    """Calls a plug-in whose fields say which ranks take part, and that numbers are float32 (TensorRT's 0)."""
    group, form = list(range(config.tp_size)), [(x.rank, tp.float32)]
    return tp.plugin(name, [to(x, tp.float32)], form, namespace="tensorrt_llm", group=group, type_id=0)


class Block(tp.Module):
    """Attention and MLP, each on the normalized residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config, layer)

    def forward(self, x: tp.Tensor, call: Call, cache: tp.Tensor | None) -> tuple[tp.Tensor, tp.Tensor | None]:
        attended, cache = self.attn(self.ln_1(x), call, cache)
        x = x + attended
        return x + self.mlp(self.ln_2(x), call), cache


class Norm(tp.Module):
    """A norm over the width, one of NORMS, in float32 whatever comes in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, self.width, self.epsilon = config.norm, config.n_embd, config.layer_norm_epsilon
        plain = self.plain()
        self.weight, self.bias = plain.weight, plain.bias if config.has_norm_bias else None

    def plain(self) -> tp.LayerNorm:
        return tp.LayerNorm(self.width, dtype=tp.float32, eps=self.epsilon)

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        wide = tp.cast(x, tp.float32)
        if self.kind == "rms":
            size = tp.rsqrt(tp.mean(wide * wide, dim=-1, keepdim=True) + self.epsilon)
            weight = tp.reshape(self.weight, (*(1,) * (x.rank - 1), self.width))
            return tp.cast(wide * size * weight, x.dtype)
        norm = self.plain()  # nvtripy has layer normalization as a Module only
        norm.weight = self.weight + 1.0 if self.kind == "layer1p" else self.weight
        norm.bias = tp.zeros((self.width,), dtype=tp.float32) if self.bias is None else self.bias
        return tp.cast(norm(wide), x.dtype)


class Rotation:
    """Rotary positions (Su et al. 2021): dimensions i and i + half of a head turn by position * frequency i."""

    def __init__(self, config: GPTConfig, positions: tp.Tensor) -> None:
        half, rest = config.rotary_size // 2, config.head_size - config.rotary_size
        steps = [config.rotary_base ** (-i / half) / config.rotary_interpolation for i in range(half)]
        angles = tp.cast(tp.unsqueeze(tp.unsqueeze(positions, 2), 3), tp.float32) * tp.reshape(
            tp.Tensor([*steps, *steps, *[0.0] * rest]), (1, 1, 1, -1)
        )  # (1 or B, T, 1, D)
        signs = tp.reshape(tp.Tensor([*[-1.0] * half, *[1.0] * half, *[0.0] * rest]), (1, 1, 1, -1))
        self.cos, self.sin = tp.cos(angles), tp.sin(angles) * signs
        self.partners = tp.Tensor([*range(half, 2 * half), *range(half), *range(2 * half, config.head_size)])

    def __call__(self, x: tp.Tensor) -> tp.Tensor:
        """(B, T, heads, D), turned, in float32 on the way."""
        wide = to(x, tp.float32)
        return to(wide * self.cos + tp.gather(wide, 3, self.partners) * self.sin, x.dtype)


class CausalSelfAttention(tp.Module):
    """Attention over the positions that each token may see. Heads may share keys and values (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.layer, self.score_scale, self.scale_dtype = layer, config.score_scale(layer), config.scale_dtype
        self.cache_rounding = CACHE_DTYPES.get(config.kv_cache_dtype or "")
        if self.cache_rounding is not None:
            self.k_scale, self.v_scale = scalar_parameter(config), scalar_parameter(config)
        width, bias = config.n_head * config.head_size, config.attention_bias
        rows = width + 2 * config.kv_heads * config.head_size
        self.c_attn = Linear(config.n_embd, rows, config, config.linear_mode, bias)
        self.c_proj = Linear(width, config.n_embd, config, config.linear_mode, bias, is_part=True)

    def forward(self, x: tp.Tensor, call: Call, cache: tp.Tensor | None) -> tuple[tp.Tensor, tp.Tensor | None]:
        heads, groups, size = self.n_head, self.kv_heads, self.head_size
        projected = call.adapted("c_attn", self.layer, self.c_attn, x)
        qkv = tp.reshape(projected, (call.batch, call.length, heads + 2 * groups, size))  # (B, T, H + 2G, D)
        if call.rotation is not None:
            qk = call.rotation(parts(qkv, 0, heads + groups, 2))
            qkv = tp.concatenate([qk, parts(qkv, heads + groups, heads + 2 * groups, 2)], 2)
        q = tp.permute(parts(qkv, 0, heads, 2), (0, 2, 1, 3))  # (B, H, T, D)
        kv = tp.reshape(parts(qkv, heads, heads + 2 * groups, 2), (call.batch, call.length, 2, groups, size))
        kv = tp.permute(kv, (2, 0, 3, 1, 4))  # (2, B, G, T, D)
        if self.cache_rounding is not None:
            # Rounded to what the cache can hold, and not yet scaled back: the cache holds these numbers.
            k = tp.cast(tp.quantize(to(part(kv, 0), self.scale_dtype), self.k_scale, self.cache_rounding), x.dtype)
            v = tp.cast(tp.quantize(to(part(kv, 1), self.scale_dtype), self.v_scale, self.cache_rounding), x.dtype)
            kv = tp.stack([k, v])
        if cache is not None and call.update is not None:
            kv = cache = call.update(cache, kv)  # (2, B, G, C, D)
        k, v = part(kv, 0), part(kv, 1)
        if self.cache_rounding is not None:
            q, k, v = (to(each, self.scale_dtype) for each in (q, k, v))
            k, v = k * self.k_scale, v * self.v_scale
        if groups < heads:  # (B, G, R, T, D) meet (B, G, 1, C, D)
            q = tp.reshape(q, (call.batch, groups, heads // groups, call.length, size))
            k, v = tp.unsqueeze(k, 2), tp.unsqueeze(v, 2)
        # Scaled before the product, which keeps float16 scores within range.
        scores = (q * self.score_scale) @ tp.transpose(k, -2, -1)  # (B, H, T, C), or (B, G, R, T, C)
        weights = tp.softmax(tp.where(call.visible, scores, -math.inf), dim=-1)
        y = to(weights @ v, x.dtype)
        y = tp.permute(y, (0, 2, 1, 3) if groups == heads else (0, 3, 1, 2, 4))  # (B, T, H, D), or (B, T, G, R, D)
        y = tp.reshape(y, (call.batch, call.length, heads * size))
        return call.adapted("attn.c_proj", self.layer, self.c_proj, y), cache


class CacheUpdate:
    """Writes T new rows a sequence into a cache of C slots, each sequence at its own position.

    nvtripy has no scatter, so every slot selects: the new row that belongs to it, or what it holds.
    """

    def __init__(
        self,
        config: GPTConfig,
        slots: tp.Tensor,
        position: tp.Tensor,
        batch: tp.DimensionSize,
        length: tp.DimensionSize,
    ) -> None:
        begin = tp.unsqueeze(position, 1)  # (B, 1)
        slot = tp.unsqueeze(slots, 0)  # (1, C)
        # A logical "and" by De Morgan: nvtripy has "or" and "not" only.
        written = ~((slot < begin) | (slot >= begin + length))  # (B, C)
        offset = tp.where(written, slot - begin, 0)
        first_row = tp.unsqueeze(tp.iota((batch,), dtype=tp.int32) * length, 1)
        self.rows = first_row + offset  # (B, C): which of the B * T new rows each slot would take
        self.written = tp.reshape(written, (1, batch, 1, config.n_positions, 1))
        self.shape = (batch * length, 2, config.kv_heads, config.head_size)

    def __call__(self, cache: tp.Tensor, new: tp.Tensor) -> tp.Tensor:
        """A layer's cache (2, B, G, C, D) with the rows of ``new`` (2, B, G, T, D) in their slots."""
        by_row = tp.reshape(tp.permute(new, (1, 3, 0, 2, 4)), self.shape)  # (B * T, 2, G, D)
        spread = tp.permute(tp.gather(by_row, 0, self.rows), (2, 0, 3, 1, 4))  # (2, B, G, C, D)
        return tp.where(self.written, spread, cache)


class MLP(tp.Module):
    """Two linear layers with the checkpoint's activation between them, maybe as a gate (Shazeer 2020)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.inner_size, self.is_gated = layer, config.inner_size, config.gated_mlp
        rows, bias = config.inner_size * (2 if config.gated_mlp else 1), config.mlp_bias
        self.c_fc = Linear(config.n_embd, rows, config, config.linear_mode, bias)
        self.c_proj = Linear(config.inner_size, config.n_embd, config, config.linear_mode, bias, is_part=True)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: tp.Tensor, call: Call) -> tp.Tensor:
        hidden = call.adapted("c_fc", self.layer, self.c_fc, x)
        if self.is_gated:
            hidden = tp.reshape(hidden, (call.batch, call.length, 2, self.inner_size))  # gate and up
            hidden = self.activation(part(hidden, 0, 2)) * part(hidden, 1, 2)
        else:
            hidden = self.activation(hidden)
        return call.adapted("mlp.c_proj", self.layer, self.c_proj, hidden)


class Linear(tp.Module):
    """A linear layer whose weight, and maybe input, is quantized as ``mode`` says.

    Scales are constants, as nvtripy wants them, in ``config.scale_dtype``, as are the weights that they scale:

    - ``weight_scale``: (out_features,), (in_features / config.block_size, out_features) or a scalar, by the mode.
    - ``input_scale``: a scalar, where activations are quantized and not token by token.
    - ``pre_quant_scale``: (in_features,), where the mode multiplies the input by it first.

    A weight quantized in blocks has an even number of columns, as TensorRT packs two int4 of a row into a byte: where
    out_features is odd, it and its scale end with a column more that nothing reads.

    Where ranks share a model, ``is_part`` says that each has some of the input features: products are summed over the
    ranks before the bias, which is whole, is added.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: GPTConfig,
        mode: QuantMode | None,
        bias: bool = True,
        is_part: bool = False,
    ) -> None:
        super().__init__()
        self.shared = config if is_part and config.tp_size > 1 else None
        self.dtype = config.tripy_dtype
        self.scale_dtype = self.dtype if mode is None else config.scale_dtype
        self.mode = mode
        self.has_blocks = mode is not None and mode.scales == "block"
        self.in_features, self.out_features = in_features, out_features
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
        weight = weight if self.has_blocks else tp.transpose(weight, 0, 1)
        # As many dimensions as x has: where they are missing, nvtripy computes the shapes of both first.
        ones = (1,) * (x.rank - 2)
        y = x @ tp.reshape(weight, (*ones, self.in_features, self.out_features))
        y = to(y if self.shared is None else summed(y, self.shared), self.dtype)
        return y if self.bias is None else y + tp.reshape(self.bias, (*ones, 1, self.out_features))

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
        super().__init__(config.embedding_width, rows, config, QUANT_MODES["int8-weight-only"], bias=False)

    def forward(self, idx: tp.Tensor) -> tp.Tensor:
        """(...) → (..., n_embd)."""
        return self.rows(idx)


def embedding(rows: int, config: GPTConfig, is_quantized: bool) -> tp.Embedding | QuantizedEmbedding:
    if is_quantized:
        return QuantizedEmbedding(rows, config)
    return tp.Embedding(rows, config.embedding_width, dtype=config.tripy_dtype)


def scalar_parameter(config: GPTConfig) -> tp.Tensor:
    """A parameter without dimensions (a scale for a whole tensor), not set yet."""
    return tp.Linear(1, 1, dtype=config.scale_dtype, quant_dtype=tp.int8).weight_scale


def to(x: tp.Tensor, dtype: tp.dtype) -> tp.Tensor:
    """``x`` in ``dtype``; itself, where that is its type."""
    return x if x.dtype == dtype else tp.cast(x, dtype)
