"""What the operations mean that the passes make of several: one plain NumPy function per operation.

Like :mod:`reference`, this is the oracle of every faster version, and what runs where there is none. Each function is
called as ``function(*operands, **attributes)``; an absent optional operand is None. They compute in float32 from end to
end and round once, to ``dtype``: never less precise than the operations that they replace, which round in between.

Weights are rows, one an output feature: (N, width) in ``weight_dtype``, int4 packed two a byte along the row. Their
scale is a scalar, (N,), or (N, width / block) for blocks along each row.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nvtripy_portable import reference
from nvtripy_portable.reference import FLOAT8, INT8, Array

_ROWS_AT_ONCE = 1024  # rows of weights that are widened together: a few megabytes of float32

ROUNDINGS: dict[str, np.dtype[Any]] = {"i8": INT8, "f8e4m3fn": FLOAT8}

#: Between a linear operation's bias and its residual, by name: TensorRT's activations.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": lambda x: reference.activation(x, operation="kGELU_TANH"),
    "gelu_erf": lambda x: reference.activation(x, operation="kGELU_ERF"),
    "relu": lambda x: reference.activation(x, operation="kRELU"),
    "relu2": lambda x: np.square(reference.activation(x, operation="kRELU")),
    "silu": lambda x: x * reference.activation(x, operation="kSIGMOID"),
}


def _wide(array: Array) -> NDArray[np.float32]:
    return array.astype(np.float32, copy=False)


def layer_norm(x: Array, scale: Array, bias: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """Layer normalization over the last dimension (Ba et al. 2016): (..., E) with scale and bias (E,)."""
    wide = _wide(x)
    centered = wide - wide.mean(axis=-1, keepdims=True, dtype=np.float32)
    variance = np.square(centered).mean(axis=-1, keepdims=True, dtype=np.float32)
    result = centered / np.sqrt(variance + np.float32(epsilon)) * _wide(scale) + _wide(bias)
    return reference.cast(result, dtype=dtype)


def rms_norm(x: Array, scale: Array, *, epsilon: float, dtype: DTypeLike) -> Array:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019): (..., E) with scale (E,)."""
    wide = _wide(x)
    mean = np.square(wide).mean(axis=-1, keepdims=True, dtype=np.float32)
    return reference.cast(wide / np.sqrt(mean + np.float32(epsilon)) * _wide(scale), dtype=dtype)


def linear(
    x: Array,
    weight: Array,
    weight_scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    pre_scale: Array | None,
    input_scale: Array | None,
    addend: Array | None = None,
    *,
    weight_dtype: str,
    width: int,
    gate: str | None,
    input_dtype: str | None,
    activation: str | None,
    dtype: DTypeLike,
) -> Array:
    """``activation(round(x * pre_scale) @ rows.T + bias + addend) + residual``: (..., width) → (..., N).

    Args:
        x: (..., width), or with a gate (..., 2 * width): the input is then ``gate(first half) * second half``.
        weight_scale: None where the weights are floats already.
        bias: (N,).
        residual, addend: As the result.
        pre_scale: (width,).
        input_scale: A scalar by which inputs are rounded to ``input_dtype`` and scaled back; with ``input_dtype`` and
            without it, inputs are scaled token by token, by the largest magnitude of each over 127.
        weight_dtype: "f32", "f16", "bf16", "i8", "i4" or "f8e4m3fn".
        gate: A key of ``ACTIVATIONS``, or None.
        input_dtype: "i8", "f8e4m3fn", or None where inputs are taken as they are.
        activation: A key of ``ACTIVATIONS``, or None.
    """
    wanted = width if gate is None else 2 * width
    if x.shape[-1] != wanted:
        raise ValueError(f"linear expects a last dimension of {wanted}, but got {x.shape}.")
    wide = _gated(_wide(x).reshape(-1, wanted), gate)
    if pre_scale is not None:
        wide = wide * _wide(pre_scale)
    if input_dtype is not None:
        wide = round_trip(wide, ROUNDINGS[input_dtype], input_scale)
    result = np.empty((len(wide), len(weight)), np.float32)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part = builtins.slice(start, start + _ROWS_AT_ONCE)
        scale = weight_scale[part] if weight_scale is not None and weight_scale.ndim else weight_scale
        np.matmul(wide, reference.widened_rows(weight[part], scale, weight_dtype, width).T, out=result[:, part])
    if bias is not None:
        result += _wide(bias)
    if addend is not None:
        result += _wide(addend).reshape(result.shape)
    if activation is not None:
        result = ACTIVATIONS[activation](result)
    result = result.reshape(*x.shape[:-1], len(weight))
    if residual is not None:
        result = result + _wide(residual)
    return reference.cast(result, dtype=dtype)


def finish(
    x: Array,
    bias: Array | None,
    residual: Array | None,
    addend: Array | None,
    *,
    activation: str | None,
    dtype: DTypeLike,
) -> Array:
    """``activation(x + bias + addend) + residual``: of (..., N), what follows a linear operation's product, and a
    plug-in.

    Args:
        bias: (N,).
        residual, addend: As ``x``.
        activation: A key of ``ACTIVATIONS``, or None.
    """
    result = _wide(x)
    for each in (bias, addend):
        if each is not None:
            result = result + _wide(each)
    if activation is not None:
        result = ACTIVATIONS[activation](result)
    if residual is not None:
        result = result + _wide(residual)
    return reference.cast(result, dtype=dtype)


def _gated(wide: NDArray[np.float32], gate: str | None) -> NDArray[np.float32]:
    """``gate(first half) * second half`` of the last dimension; without a gate the same again."""
    width = wide.shape[-1] // 2
    return wide if gate is None else ACTIVATIONS[gate](wide[..., :width]) * wide[..., width:]


def low_rank(x: Array, slot: Array, down: Array, up: Array, *, layer: int, gate: str | None, dtype: DTypeLike) -> Array:
    """``x @ down.T @ up`` of small matrices that each sequence chooses (LoRA; Hu et al. 2021): (B, T, width) →
    (B, T, N).

    Args:
        x: With a gate (B, T, 2 * width): the input is then ``gate(first half) * second half``.
        slot: Which of the adapters, (B,).
        down: (adapters, layers, rank, width).
        up: (adapters, layers, rank, N).
        layer: Which of their layers.
        gate: A key of ``ACTIVATIONS``, or None.
    """
    wide = _gated(_wide(x), gate)
    chosen = [_wide(reference.gather(each[:, layer], slot, axis=0)) for each in (down, up)]  # (B, rank, ...)
    return reference.cast(wide @ np.swapaxes(chosen[0], 1, 2) @ chosen[1], dtype=dtype)


def round_trip(wide: NDArray[np.float32], dtype: np.dtype[Any], scale: Array | None) -> NDArray[np.float32]:
    """What is left of float32 rows after rounding to ``dtype`` at a scale, or int8 at one scale a row."""
    if scale is None:
        scale = np.maximum(np.abs(wide).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-6))
        rounded = reference.quantize(wide / scale, np.ones((), np.float32), dtype=dtype)
        return rounded.astype(np.float32) * scale
    scale = np.asarray(scale, np.float32)
    return reference.dequantize(reference.quantize(wide, scale, dtype=dtype), scale, dtype=np.float32)


def embedding(
    idx: Array,
    position: Array | None,
    table: Array,
    table_scale: Array | None,
    position_table: Array | None,
    position_scale: Array | None,
    prompts: Array | None = None,
    *,
    weight_dtype: str,
    position_dtype: str | None,
    width: int,
    dtype: DTypeLike,
) -> Array:
    """``table[idx] + position_table[position + t]``: token ids (B, T) → (B, T, width).

    Args:
        position: Of each sequence's first token, (B,); None for 0.
        table: Rows (V, ...) in ``weight_dtype``, as a linear operation's weight, with ``table_scale``.
        position_table: Rows (C, ...) in ``position_dtype``, likewise, with ``position_scale``; None: nothing is added.
        prompts: Rows (P, width) of ids V to V + P - 1.
    """
    steps = np.arange(idx.shape[1], dtype=np.int64)[None]
    positions = steps if position is None else position.astype(np.int64)[:, None] + steps

    def rows(table: Array, scale: Array | None, indices: Array, weight_dtype: str) -> Array:
        wide = np.dtype(np.float32)
        return reference.quantized_rows(table, scale, indices, weight_dtype=weight_dtype, width=width, dtype=wide)

    if prompts is None:
        tokens = rows(table, table_scale, idx, weight_dtype)
    else:
        wide = np.dtype(np.float32)
        tokens = token_rows(idx, prompts, table, table_scale, weight_dtype=weight_dtype, width=width, dtype=wide)
    if position_table is None or position_dtype is None:
        return reference.cast(tokens, dtype=dtype)
    return reference.cast(tokens + rows(position_table, position_scale, positions, position_dtype), dtype=dtype)


def token_rows(
    idx: Array,
    prompts: Array,
    table: Array,
    table_scale: Array | None,
    *,
    weight_dtype: str,
    width: int,
    dtype: DTypeLike,
) -> Array:
    """Rows of a table by ids (B, T) → (B, T, width), and of a second one, ``prompts`` (P, width), by those that are
    beyond the first."""
    own = np.minimum(idx, len(table) - 1)
    rows = reference.quantized_rows(table, table_scale, own, weight_dtype=weight_dtype, width=width, dtype=dtype)
    beyond = reference.gather(prompts, np.maximum(idx - len(table), 0), axis=0)
    return np.where((idx < len(table))[..., None], rows, reference.cast(beyond, dtype=dtype))


def last_rows(x: Array, last: Array) -> Array:
    """For each sequence the row at ``last`` (B,): (B, T, E) → (B, E)."""
    batch, length, width = x.shape
    rows = np.arange(batch, dtype=np.int64) * length + last
    return reference.gather(x.reshape(-1, width), rows, axis=0)


def rotary(x: Array, position: Array | None, frequencies: Array, *, dtype: DTypeLike) -> Array:
    """Rotary positions (Su et al. 2021): dimensions i and i + half of each head turn by position times frequency i.

    Args:
        x: (B, T, heads, D).
        position: Of each sequence's first token, (B,); None for 0.
        frequencies: (half,), in radians a token. Dimensions from 2 * half on stay as they are.
    """
    start = np.zeros((1, 1), np.int64) if position is None else position.astype(np.int64)[:, None]
    wide = _wide(x)
    turned = _turned(wide, start + np.arange(x.shape[1]), frequencies)
    return reference.cast(turned, dtype=dtype)


def _turned(wide: NDArray[np.float32], positions: Array, frequencies: Array) -> NDArray[np.float32]:
    """(B, T, heads, D) float32 at positions (B or 1, T)."""
    half = len(frequencies)
    angles = positions[:, :, None, None].astype(np.float32) * frequencies  # in float32, as the models have learned them
    cos, sin = np.cos(angles), np.sin(angles)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(
    qkv: Array,
    cache: Array | None,
    position: Array | None,
    k_scale: Array | None,
    v_scale: Array | None,
    frequencies: Array | None,
    *,
    heads: int,
    groups: int,
    head_size: int,
    scale: float,
    layer: int,
    rounding: str | None,
    window: int | None,
    dtype: DTypeLike,
) -> Array | tuple[Array, Array]:
    """Causal attention (Vaswani et al. 2017), over this call's tokens or over a key-value cache.

    Args:
        qkv: Queries of all heads, keys of all groups and values of all groups beside each other,
            (B, T, (heads + 2 * groups) * head_size). ``heads / groups`` heads, one behind the other, share a group's.
        cache: (L, 2, B, groups, C, head_size), keys before values, or None: then a token sees those of this call up to
            itself. With it, token t of a sequence stands at slot ``position + t`` and sees the slots up to its own.
        position: (B,), with a cache.
        k_scale, v_scale: Scalars; keys and values are rounded to ``rounding`` at these scales. The cache holds the
            numbers before scaling back.
        frequencies: Queries and keys are turned as by ``rotary``; None: they are not.
        scale: Of the queries.
        layer: Which of the cache's layers is read and written.
        rounding: "i8", "f8e4m3fn" or None.
        window: How many slots a token sees at most, its own included; None: all.

    Returns:
        (B, T, heads * head_size), and with a cache the cache with this layer's new rows in their slots. A token whose
        slot the cache does not have is not written, and sees all slots of its window.
    """
    batch, length, _ = qkv.shape
    start = np.zeros(batch, np.int64) if position is None else position.astype(np.int64)
    slots = start[:, None] + np.arange(length)  # (B, T)
    wide = _wide(qkv).reshape(batch, length, heads + 2 * groups, head_size)
    qk, v = wide[:, :, : heads + groups], np.swapaxes(wide[:, :, heads + groups :], 1, 2)  # (B, G, T, D)
    if frequencies is not None:
        qk = _turned(qk, slots, frequencies)
    q, k = (np.swapaxes(each, 1, 2) for each in (qk[:, :, :heads], qk[:, :, heads:]))  # (B, H or G, T, D)
    if rounding is not None:
        k, v = (
            reference.quantize(each, np.asarray(by, np.float32), dtype=ROUNDINGS[rounding]).astype(np.float32)
            for each, by in ((k, k_scale), (v, v_scale))
        )
    if cache is not None:
        cache = cache.copy()
        for row in range(batch):
            inside = (slots[row] >= 0) & (slots[row] < cache.shape[4])
            for half, new in enumerate((k, v)):
                cache[layer, half, row][:, slots[row, inside]] = reference.cast(new[row][:, inside], dtype=cache.dtype)
        k, v = _wide(cache[layer, 0]), _wide(cache[layer, 1])
    if rounding is not None:
        k, v = k * _wide(np.asarray(k_scale)), v * _wide(np.asarray(v_scale))
    q = (q * np.float32(scale)).reshape(batch, groups, heads // groups, length, head_size)
    scores = q @ np.swapaxes(k, 2, 3)[:, :, None]  # (B, G, R, T, C)
    at, own = np.arange(scores.shape[4]), slots[:, :, None]
    visible: NDArray[np.bool_] = np.less_equal(at, own)  # (B, T, C)
    if window is not None:
        visible = visible & (at > own - window)
    scores = np.where(visible[:, None, None], scores, np.float32(-np.inf))
    # What lies beyond the filled part of a cache may be anything, NaN too: it is left out, not multiplied by zero.
    seen = np.any(visible, axis=1)[:, None, :, None]
    y = reference.softmax(scores, axis=4) @ np.where(seen, v, np.float32(0))[:, :, None]
    y = np.moveaxis(y, 3, 1).reshape(batch, length, heads * head_size)
    result = reference.cast(y, dtype=dtype)
    return result if cache is None else (result, cache)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "linear": linear,
    "finish": finish,
    "low_rank": low_rank,
    "embedding": embedding,
    "token_rows": token_rows,
    "last_rows": last_rows,
    "rotary": rotary,
    "attention": attention,
}
