"""Stored tensors → the arrays of a parameter: joined, in the model's order of rows, of the type asked for.

Of a quantized layer (modelopt_layout.py says what is stored of one), the values that its integers stand for and its
scales. What is wrong with a number raises `ValueError` with a text that names the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import EllipsisType
from typing import Any

import numpy as np

from conversion import convert, scaled
from loading.config import CheckpointConfig
from loading.modelopt_layout import SCALES
from loading.table import Parameter, Piece

#: Gives a stored tensor, whole, by its name without the layout's prefix.
Read = Callable[[str], np.ndarray]


def plain(parameter: Parameter, read: Read, dtype: np.dtype[Any]) -> np.ndarray:
    """A parameter that is not quantized: C-contiguous, with memory of its own."""
    parts = [convert(piece.name, read(piece.name), dtype, piece.is_transposed) for piece in parameter.pieces]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, parameter.axis)
    return joined if parameter.order is None else joined[parameter.order]


class Unread:
    """A parameter that is not quantized, as stored numbers: an index of slices reads those rows and columns alone."""

    def __init__(self, parameter: Parameter, read: Read) -> None:
        self.shape = parameter.shape
        self._parameter, self._read = parameter, read

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> np.ndarray:
        axis, order = self._parameter.axis, self._parameter.order
        given = () if index is ... else index if isinstance(index, tuple) else (index,)
        wanted: list[Any] = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        first, last, _ = wanted[axis].indices(self.shape[axis])
        if order is None:
            parts = [values for _, values in self._pieces(wanted, np.arange(first, last))]
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
        found = list(self._pieces(wanted, order[first:last]))
        result = np.empty((last - first, *found[0][1].shape[1:]), found[0][1].dtype)
        for are_here, values in found:
            result[are_here] = values
        return result

    def _pieces(self, wanted: list[Any], places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What each stored tensor has of these places along their common axis: which of them, and their values."""
        axis, begin = self._parameter.axis, 0
        for number, piece in enumerate(self._parameter.pieces):
            are_here = (places >= begin) & (places < begin + piece.shape[axis])
            if are_here.any() or (number == 0 and not len(places)):
                rows: Any = places[are_here] - begin
                if (np.diff(rows) == 1).all():  # one after the other: a view
                    rows = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0)
                stored = self._read(piece.name)
                values = stored.T if piece.is_transposed else stored
                yield are_here, values[(*wanted[:axis], rows, *wanted[axis + 1 :])]
            begin += piece.shape[axis]


def taken_apart(parameter: Parameter, values: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
    """The stored tensors of which `plain` makes these values: views of them, or of a copy in the order of rows."""
    if parameter.order is not None:
        joined = np.empty_like(values)
        joined[parameter.order] = values
        values = joined
    ends = np.cumsum([piece.shape[parameter.axis] for piece in parameter.pieces])
    parts = np.split(values, ends[:-1], parameter.axis)
    for piece, part in zip(parameter.pieces, parts, strict=True):
        yield piece, part.T if piece.is_transposed else part


def quantized(
    parameter: Parameter, config: CheckpointConfig, head: str, read: Read, stored: Collection[str], dtype: np.dtype[Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of one quantized linear layer, without its bias, or of a quantized embedding.

    Args:
        head: The stored head's name; beside it is the scale of its input, even if its weight is the embedding's.
        stored: The names of all tensors.

    Yields:
        (name, array) as `Checkpoint.parameters` does.
    """
    layer = parameter.name.removesuffix(".weight")
    name = "lm_head" if layer == "wte" and config.tie_word_embeddings else layer
    numbers, scales = _joined(parameter, config, read, dtype)
    transpose = scales.ndim == 2
    weight = scaled(f"{name}.weight", numbers, scales, dtype, transpose)
    if transpose:
        scales = np.ascontiguousarray(scales.T)
    yield f"{name}.weight", weight
    # Of zeros, whose scale is zero or nearly so, any scale gives zeros back.
    yield f"{name}.weight_scale", np.where(scales == 0, np.ones_like(scales), scales)
    modules = [head] if name == "lm_head" else [piece.module for piece in parameter.pieces]
    for suffix in ("input_scale", "pre_quant_scale"):
        if f"{modules[0]}.{suffix}" in stored:
            scale = _shared_scale([f"{module}.{suffix}" for module in modules], read, dtype)
            yield f"{name}.{suffix}", rounding_scale(scale, config.quant_mode) if suffix == "input_scale" else scale
        elif suffix == "pre_quant_scale" and len(modules) > 1 and config.has_pre_quant_scale:
            yield f"{name}.{suffix}", np.ones(parameter.shape[1], dtype)  # the norm has been multiplied by it


def _joined(
    parameter: Parameter, config: CheckpointConfig, read: Read, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a weight before scaling, (rows, in), and its scales: (), (rows,) or (rows, blocks)."""
    rows_have_scales = config.quant_mode == "int8-smoothquant" and config.per_channel and parameter.is_of_layer
    parts = []
    for piece in parameter.pieces:
        scales, rows = read_scale(f"{piece.module}.weight_scale", read, dtype), piece.shape[0]
        if scales.size == 1 and rows_have_scales:
            scales = np.repeat(scales.reshape(1), rows)
        parts.append((unpacked(read(piece.name), rows), scales[:rows] if scales.ndim == 2 else scales))
    if len(parts) > 1 and config.quant_mode == "fp8":
        parts = _by_one_scale([piece.module for piece in parameter.pieces], parts)
    numbers, scales = parts[0]
    if len(parts) > 1:
        numbers = np.concatenate([part for part, _ in parts])
        scales = np.concatenate([each for _, each in parts]) if scales.ndim else scales
    if scales.size == 1 and parameter.shape[0] > 1:
        scales = scales.reshape(())
    if parameter.order is not None:
        numbers, scales = numbers[parameter.order], scales[parameter.order] if scales.ndim else scales
    return numbers, scales


def cache_scale(name: str, config: CheckpointConfig, read: Read, dtype: np.dtype[Any]) -> np.ndarray:
    """The scale of a layer's keys or values in a quantized cache, of shape ()."""
    return rounding_scale(read_scale(name, read, dtype), config.kv_cache_dtype)


def read_scale(name: str, read: Read, dtype: np.dtype[Any]) -> np.ndarray:
    """Scales, after a look at them. Zero is possible: it belongs to a row or a block of zeros."""
    scales = read(name)
    bad = ~np.isfinite(scales) | (scales < 0)
    if bad.any():
        raise ValueError(f"expected {name} to hold finite numbers that are not negative but got {scales[bad][0]:g}")
    return convert(name, scales, dtype)


def rounding_scale(scale: np.ndarray, kind: str | None) -> np.ndarray:
    """A scale, one number, by which activations are rounded to int8 or fp8, with shape (); never zero.

    Zero means that calibration has met nothing but zeros. They are zeros at any scale, and ModelOpt's own model gives
    for what else comes later: in int8 zero, as a scale that is large enough does; in fp8 its rounding at 1 / 448.
    """
    if scale.reshape(()) == 0:
        return np.array(1 / 448 if kind == "fp8" else 2.0**15, scale.dtype)
    return scale.reshape(())


def unpacked(stored: np.ndarray, rows: int) -> np.ndarray:
    """A stored weight's numbers before scaling, (rows, in): int8, or float8 as it is."""
    if stored.dtype != np.uint8:
        return stored
    numbers = np.empty((2 * len(stored), stored.shape[1]), np.int8)
    numbers[0::2] = (stored << 4).view(np.int8) >> 4
    numbers[1::2] = stored.view(np.int8) >> 4
    return numbers[:rows]


def packed(numbers: np.ndarray) -> np.ndarray:
    """What `unpacked` gives back: (rows, in) int8 from -8 to 7 → (rows / 2, in) uint8, an odd row with zeros."""
    numbers = np.pad(numbers, ((0, len(numbers) % 2), (0, 0)))
    return (numbers[0::2].view(np.uint8) & 0x0F) | (numbers[1::2].view(np.uint8) << 4)


def has_small_scales(names: Collection[str], read: Read, dtype: np.dtype[Any]) -> bool:
    """Whether one of the stored scales is below the normal numbers of `dtype`.

    Those of weights that are zero do not count: any other scale does as well.
    """
    import ml_dtypes

    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    for name in names:
        if not name.endswith(SCALES):
            continue
        scales = read(name)
        is_small = (scales > 0) & (scales < smallest)
        if not is_small.any():
            continue
        layer, _, kind = name.rpartition(".")
        if kind != "weight_scale":
            return True
        numbers = unpacked(read(f"{layer}.weight"), len(np.atleast_1d(scales)))
        by_scale = (numbers != 0).reshape(*scales.shape, -1)  # those that share a scale, along the last dimension
        if (by_scale.any(axis=-1) & is_small).any():
            return True
    return False


def _by_one_scale(
    modules: list[str], parts: list[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Several weights, each of which has one scale, by the largest of these scales: the model has one for all of them.

    Raises:
        ValueError: their numbers are not of their type by that scale.
    """
    largest = max((scales.reshape(()) for _, scales in parts), key=float)
    changed = []
    for module, (numbers, scales) in zip(modules, parts, strict=True):
        if scales.reshape(()) != largest:
            wanted = numbers.astype(np.float64) * (float(scales.reshape(())) / float(largest))
            other = wanted.astype(numbers.dtype)
            if not np.array_equal(other.astype(np.float64), wanted):
                found = " and ".join(f"{each.reshape(()):g}" for _, each in parts)
                raise ValueError(
                    f"expected the weight_scale of {', '.join(modules)} to be one, as they are one layer here, or to "
                    f"differ by powers of two, but got {found} ({module} cannot be brought to the largest exactly)"
                )
            numbers = other
        changed.append((numbers, largest))
    return changed


def _shared_scale(names: list[str], read: Read, dtype: np.dtype[Any]) -> np.ndarray:
    """The scale of an input that several layers share: each has it stored."""
    scales = [read_scale(name, read, dtype) for name in names]
    for name, scale in zip(names[1:], scales[1:], strict=True):
        if not np.array_equal(scale.reshape(-1), scales[0].reshape(-1)):
            raise ValueError(f"expected {name} to be equal to {names[0]}, as both scale the same input, but it differs")
    return scales[0]
