"""How each parameter of model.py's GPT is shared by the ranks of tensor parallelism, there and back.

Megatron's way (Shoeybi et al. 2019, arXiv:1909.08053), as TensorRT-LLM lays it out: of a pair of linear layers the
first is split by its outputs (column parallel), the second by its inputs (row parallel), so that one sum over the ranks
follows them, and nothing stands between them.

    ================  =========================================================================================
    c_attn            outputs: heads of queries, of keys and of values, each by themselves; fewer key-value heads
                      than ranks: each for several ranks
    mlp.c_fc          outputs: of the gate and of what it multiplies, each by themselves
    attn.c_proj       inputs: heads; the bias is whole, and is added once, after the sum
    mlp.c_proj        inputs; the bias as above
    wte, wpe          whole, or rows, with rows of zeros to a multiple of the ranks, or columns
    lm_head           outputs, with rows of zeros to a multiple of the ranks: their logits are not the vocabulary's
    ln_1, ln_2, ln_f  whole
    ================  =========================================================================================

A layer's scales go with what they scale: those of output features with the outputs, those of blocks of input features,
and `pre_quant_scale`, with the inputs, too; one scale for all (of a tensor, of an input, of the cache) is every rank's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from loading.config import CheckpointConfig
from loading.modelopt_layout import is_quantized
from parallelism.mapping import Mapping

OUT, IN = 0, 1  # a linear layer's dimensions; of an embedding, rows are its "outputs"

#: Along which axis of a tensor the layer's outputs lie, and along which its inputs, by the last part of its name.
_AXES: dict[str, tuple[int | None, int | None]] = {
    "weight": (0, 1),
    "weight_scale": (0, 1),
    "bias": (0, None),
    "pre_quant_scale": (None, 0),
}


class ArrayLike(Protocol):
    """An array, or what reads parts of one when it is indexed with slices: a memory map, a slice of safetensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Cut:
    """What of a dimension a rank holds.

    Attributes:
        dimension: `OUT` or `IN`.
        size: Of the whole dimension.
        spans: What the rank holds, (begin, end), one after the other.
        padding: Zeros that follow them.
    """

    dimension: int
    size: int
    spans: tuple[tuple[int, int], ...]
    padding: int = 0

    @property
    def length(self) -> int:
        """How much the rank holds, padding included."""
        return sum(end - begin for begin, end in self.spans) + self.padding

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """The spans, and where each begins in what the rank holds."""
        at = 0
        for begin, end in self.spans:
            yield begin, end, at
            at += end - begin

    def scaled(self, size: int) -> Cut:
        """The same of a dimension that is shorter by a whole factor: of blocks, or of rows in pairs."""
        unit = self.size // size
        return Cut(self.dimension, size, tuple((begin // unit, end // unit) for begin, end in self.spans), self.padding)

    def within(self, begin: int, end: int) -> Cut:
        """The spans that lie in a part of the dimension, from its beginning: of one of several tensors in a row."""
        spans = tuple((first - begin, last - begin) for first, last in self.spans if begin <= first and last <= end)
        return Cut(self.dimension, end - begin, spans, self.padding)


def cut_of(module: str, config: CheckpointConfig, mapping: Mapping) -> Cut | None:
    """What a rank holds of a module ("h.3.attn.c_attn", "wte"); None: all of it."""
    kind = module.split(".", 2)[2] if module.startswith("h.") else module
    if mapping.tp_size == 1:
        return None
    if kind == "attn.c_attn":
        keys = _key_heads(config, mapping)
        queries = _share(config.n_head, mapping)
        first_key, first_value = config.n_head, config.n_head + config.kv_heads
        heads = (queries, _moved(keys, first_key), _moved(keys, first_value))
        size = config.head_size
        spans = tuple((begin * size, end * size) for begin, end in heads)
        return Cut(OUT, config.query_width + 2 * config.key_width, spans)
    if kind == "attn.c_proj":
        begin, end = _share(config.n_head, mapping)
        return Cut(IN, config.query_width, ((begin * config.head_size, end * config.head_size),))
    if kind == "mlp.c_fc":
        span = _share(config.n_inner, mapping)
        spans = (span, _moved(span, config.n_inner)) if config.gated_mlp else (span,)
        return Cut(OUT, len(spans) * config.n_inner, spans)
    if kind == "mlp.c_proj":
        return Cut(IN, config.n_inner, (_share(config.n_inner, mapping),))
    if kind == "lm_head":
        return _padded_rows(config.vocab_size, mapping)
    if kind in ("wte", "wpe") and mapping.embedding_sharding_dim is not None:
        if mapping.embedding_sharding_dim == 0:
            return _padded_rows(config.vocab_size if kind == "wte" else config.n_positions, mapping)
        return Cut(IN, config.n_embd, (_share(config.n_embd, mapping),))
    return None


def part_of(name: str, array: ArrayLike, config: CheckpointConfig, mapping: Mapping) -> np.ndarray:
    """A rank's part of a parameter or a scale, read from the whole: nothing else of it is touched.

    Args:
        name: By model.py's names: "h.0.attn.c_attn.weight".
        array: As `Checkpoint.parameters` gives it: linear weights (out, in), those quantized in blocks (in, out).
        mapping: Which rank; that its stage has the parameter is the caller's affair.

    Returns:
        An array of its own, or a view of `array` where the rank holds one span, or all of it.
    """
    axis, cut = _axis_and_cut(name, array.shape, config, mapping)
    return np.asarray(array[...]) if cut is None else cut_out(array, axis, cut)


def cut_out(array: ArrayLike, axis: int, cut: Cut) -> np.ndarray:
    """A rank's part of an array along an axis, with zeros behind it where the cut is padded."""
    before = (slice(None),) * axis
    parts = [np.asarray(array[(*before, slice(begin, end))]) for begin, end in cut.spans]
    if cut.padding:
        shape = list(parts[0].shape)
        shape[axis] = cut.padding
        parts.append(np.zeros(shape, parts[0].dtype))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def joined(name: str, parts: Sequence[ArrayLike], config: CheckpointConfig, mapping: Mapping) -> np.ndarray:
    """The whole of a parameter or a scale: what `part_of` was given, from what it gave each rank.

    Args:
        name: By model.py's names.
        parts: By tp_rank.
        mapping: Of any of the ranks.

    Raises:
        ValueError: the copies that several ranks have of the same numbers differ.
    """
    shape = parts[0].shape
    ranks = mapping.stage_ranks(mapping.pp_rank)
    axis, cut = _axis_and_cut(name, shape, config, mapping, is_part=True)
    if cut is None:
        return put_together(name, parts, None, [])
    cuts = [cut_of(name.rpartition(".")[0], config, rank) for rank in ranks]
    return put_together(name, parts, axis, [_fitting(each, shape[axis]) for each in cuts if each is not None])


def put_together(
    name: str, parts: Sequence[ArrayLike], axis: int | None, cuts: Sequence[Cut], rows: slice = slice(None)
) -> np.ndarray:
    """What `cut_out` was given, from what it gave each rank: by `cuts` along `axis`, or whole where that is None.

    Args:
        rows: Which rows are wanted: no others are read.

    Raises:
        ValueError: the copies that several ranks have of the same numbers differ.
    """
    if axis is None:
        first = np.asarray(parts[0][rows] if parts[0].shape else parts[0][...])
        for rank, part in enumerate(parts[1:], 1):
            _check_copy(name, rank, first, np.asarray(part[rows] if part.shape else part[...]))
        return first
    shape = list(parts[0].shape)
    shape[axis] = cuts[0].size
    first_row, last_row, _ = rows.indices(shape[0])
    whole = np.empty((last_row - first_row, *shape[1:]), np.asarray(parts[0][:0]).dtype)
    filled: set[tuple[int, int]] = set()
    for rank, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        for begin, end, at in cut.runs():
            if axis == 0:
                begin, end, at = clipped((begin, end, at), first_row, last_row)
                values, target = part[at : at + end - begin], whole[begin - first_row : end - first_row]
            else:
                values, target = part[rows, at : at + end - begin], whole[:, begin:end]
            if (begin, end) in filled:
                _check_copy(name, rank, target, np.asarray(values))
            else:
                target[...] = values
                filled.add((begin, end))
    return whole


def clipped(run: tuple[int, int, int], first: int, last: int) -> tuple[int, int, int]:
    """What of a run lies from `first` to `last`: (begin, end, where it begins in the rank's part); maybe nothing."""
    begin, end, at = run
    low = min(max(begin, first), last)
    high = max(low, min(end, last))
    return low, high, at + low - begin


def _check_copy(name: str, rank: int, first: np.ndarray, copy: np.ndarray) -> None:
    if not np.array_equal(first, copy) and not np.array_equal(first, copy, equal_nan=True):
        raise ValueError(f"expected the copies of {name} to be equal, but rank {rank} of the stage has another")


def _axis_and_cut(
    name: str, shape: tuple[int, ...], config: CheckpointConfig, mapping: Mapping, is_part: bool = False
) -> tuple[int, Cut | None]:
    """Along which axis of a tensor a rank has a part, and which; None: it has all of the tensor."""
    module, _, kind = name.rpartition(".")
    cut = cut_of(module, config, mapping)
    axis = None if cut is None else axis_of(kind, cut.dimension, len(shape), _is_transposed(module, config))
    if cut is None or axis is None:
        return 0, None
    return axis, _fitting(cut, shape[axis]) if is_part else cut.scaled(shape[axis])


def _fitting(cut: Cut, length: int) -> Cut:
    """A cut in the units in which a rank's part is so long."""
    return cut if cut.length == length else cut.scaled(cut.size * length // cut.length)


def axis_of(kind: str, dimension: int, rank: int, is_transposed: bool = False) -> int | None:
    """The axis of a tensor, by the last part of its name, along a layer's dimension; None: it has no such axis.

    Args:
        rank: How many dimensions the tensor has.
        is_transposed: Whether weight and scales are (in, out).
    """
    out_axis, in_axis = _AXES.get(kind, (None, None))
    if is_transposed and rank == 2:
        out_axis, in_axis = in_axis, out_axis
    axis = out_axis if dimension == OUT else in_axis
    return axis if axis is not None and axis < rank else None


def _is_transposed(module: str, config: CheckpointConfig) -> bool:
    """Whether model.py keeps a layer's weight as (in, out): quantized in blocks."""
    return config.quant_mode == "int4-weight-only" and is_quantized(config, f"{module}.weight")


def _share(size: int, mapping: Mapping) -> tuple[int, int]:
    """A rank's share of what its stage's ranks have equal shares of."""
    each = size // mapping.tp_size
    return mapping.tp_rank * each, (mapping.tp_rank + 1) * each


def _key_heads(config: CheckpointConfig, mapping: Mapping) -> tuple[int, int]:
    """The key-value heads that a rank's heads read: a share of them, or one that other ranks have, too."""
    if config.kv_heads >= mapping.tp_size:
        return _share(config.kv_heads, mapping)
    head = mapping.tp_rank * config.kv_heads // mapping.tp_size
    return head, head + 1


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _padded_rows(rows: int, mapping: Mapping) -> Cut:
    """A rank's share of rows, with rows of zeros to a multiple of the ranks: the last ranks may have nothing else."""
    each = -(-rows // mapping.tp_size)
    begin, end = (min(rows, number * each) for number in (mapping.tp_rank, mapping.tp_rank + 1))
    return Cut(OUT, rows, ((begin, end),), each - (end - begin))
