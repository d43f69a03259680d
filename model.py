"""NanoGPT: GPT-2 and its relatives as nvtripy Modules, read top-down in the order in which the data flows.

Half precision with float32 LayerNorm. One ``forward`` serves both uses: ``forward(idx)`` is stateless and gives the
logits of every position; ``forward(idx, position, cache)`` continues sequences whose keys and values are in ``cache``
and returns the cache with the new ones written into it. The cache is a plain input and output of static shape, so
TensorRT compiles it as it is.

Shapes: B sequences, T tokens of each in this call, C the context (slots of the cache), E the width, H heads of size D =
E / H, V the vocabulary, L layers.

Parameters are named as in HuggingFace's GPT-2; linear weights are (out_features, in_features).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    dtype: str = "float16"  # of everything but LayerNorm: float16, bfloat16 or float32

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

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def tripy_dtype(self) -> tp.dtype:
        return DTYPES[self.dtype]

    def cache_shape(self, batch: int) -> tuple[int, int, int, int, int, int]:
        """Shape of the key-value cache for ``batch`` sequences: (L, 2, B, H, C, D), keys before values."""
        return (self.n_layer, 2, batch, self.n_head, self.n_positions, self.head_size)


DTYPES: dict[str, tp.dtype] = {"float16": tp.float16, "bfloat16": tp.bfloat16, "float32": tp.float32}


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
        dtype = config.tripy_dtype
        self.wte = tp.Embedding(config.vocab_size, config.n_embd, dtype=dtype)
        self.wpe = tp.Embedding(config.n_positions, config.n_embd, dtype=dtype)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = tp.Linear(config.n_embd, config.vocab_size, bias=False, dtype=dtype)

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
        x = self.wte(idx) + self.wpe(positions)  # (B, T, E)

        if cache is None:
            slots, update = tp.iota((length,), dtype=tp.int32), None
        else:
            slots = tp.iota((self.config.n_positions,), dtype=tp.int32)
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
        head = self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = tp.cast(x @ tp.transpose(head, 0, 1), tp.float32)
        return logits if cache is None else (logits, tp.stack(layers))


class Block(tp.Module):
    """Attention and MLP, each on the normalized residual stream (pre-LN)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
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

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.head_size, self.n_embd = config.n_head, config.head_size, config.n_embd
        self.c_attn = tp.Linear(config.n_embd, 3 * config.n_embd, dtype=config.tripy_dtype)
        self.c_proj = tp.Linear(config.n_embd, config.n_embd, dtype=config.tripy_dtype)

    def forward(
        self, x: tp.Tensor, visible: tp.Tensor, cache: tp.Tensor | None, update: CacheUpdate | None
    ) -> tuple[tp.Tensor, tp.Tensor | None]:
        q, k, v = tp.split(self.c_attn(x), 3, dim=2)  # (B, T, E) each
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)  # (B, H, T, D)
        if cache is not None and update is not None:
            k, v = update(cache[0], k), update(cache[1], v)  # (B, H, C, D)
            cache = tp.stack([k, v])
        # Scaled before the product, which keeps float16 scores within range.
        scores = (q * (1.0 / math.sqrt(self.head_size))) @ tp.transpose(k, 2, 3)  # (B, H, T, C)
        weights = tp.softmax(tp.where(visible, scores, -math.inf), dim=3)
        y = tp.reshape(tp.permute(weights @ v, (0, 2, 1, 3)), x.shape)  # (B, T, E)
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
        width = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = tp.Linear(config.n_embd, width, dtype=config.tripy_dtype)
        self.c_proj = tp.Linear(width, config.n_embd, dtype=config.tripy_dtype)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: tp.Tensor) -> tp.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))
