"""Quantized weights stay small: a product with dequantized constants becomes one operation on their packed form.

What nvtripy declares as ``quantize`` → ``dequantize`` → (``transpose``, ``reshape``) → ``matrix_multiply`` has its
first step folded already: the weights are constants of int8, int4 or float8. Here they become rows, one an output
feature, int4 packed two a byte, and the product or the embedding look-up reads them as they are. Constants that a
product and a look-up share (a tied head) stay shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nvtripy_portable.graph import DTYPE_NAMES, Graph, Operation, TensorType, Value
from nvtripy_portable.packing import pack_int4
from nvtripy_portable.rewrite import Any, Bound, Constant, Op, Pattern, Rule, apply

_DEQUANTIZED = Op("dequantize", Constant("weight"), Constant("scale"))
_TRANSPOSED = Op("transpose", _DEQUANTIZED)


def run(graph: Graph) -> None:
    packer = _Packer()
    apply(graph, list(_rules(packer)))
    graph.operations = packer.constants() + graph.operations


def _rules(packer: _Packer) -> Iterator[Rule]:
    def product(is_transposed: bool) -> Callable[[Bound], list[Operation] | None]:
        return lambda bound: _product(bound, packer, is_transposed)

    def look_up(is_transposed: bool) -> Callable[[Bound], list[Operation] | None]:
        return lambda bound: _look_up(bound, packer, is_transposed)

    for name, matrix, is_transposed in (("", _DEQUANTIZED, False), (" of transposed", _TRANSPOSED, True)):
        # nvtripy gives a matrix leading dimensions of size one where the other operand has more dimensions.
        shapes: tuple[Pattern, ...] = (matrix, Op("reshape", matrix, Constant("shape")))
        for pattern in shapes:
            yield Rule(f"product{name} weights", Op("matrix_multiply", Any("x"), pattern), product(is_transposed))
        yield Rule(f"rows{name} weights", Op("gather", matrix, Any("indices")), look_up(is_transposed))


@dataclass(frozen=True)
class _Packed:
    weight: Value
    scale: Value
    dtype: str
    width: int


class _Packer:
    """Weights as rows (N, K), one packed pair of constants for each pair of source constants."""

    def __init__(self) -> None:
        self._packed: dict[tuple[Value, Value, bool], _Packed] = {}
        self._operations: list[Operation] = []

    def constants(self) -> list[Operation]:
        return self._operations

    def pack(self, bound: Bound, columns_are_rows: bool) -> _Packed | None:
        """The packed form; ``columns_are_rows`` where the source is (K, N). None for scales that it cannot hold."""
        weight_value, scale_value = bound.values["weight"], bound.values["scale"]
        weight, scale = weight_value.constant, scale_value.constant
        if weight is None or scale is None or weight.ndim != 2:
            return None
        row_axis = 1 if columns_are_rows else 0
        axis = bound.operations["dequantize"].attributes["axis"]
        if (scale.ndim == 1 and axis != row_axis) or (scale.ndim == 2 and not columns_are_rows):
            return None
        key = (weight_value, scale_value, columns_are_rows)
        if key not in self._packed:
            rows = weight.T if columns_are_rows else weight
            scales = scale.T if scale.ndim == 2 else scale
            stored = pack_int4(rows) if DTYPE_NAMES[weight.dtype] == "i4" else np.ascontiguousarray(rows)
            self._packed[key] = _Packed(
                self._constant(stored),
                self._constant(np.ascontiguousarray(scales, np.float32).reshape(scales.shape)),
                DTYPE_NAMES[weight.dtype],
                rows.shape[1],
            )
        return self._packed[key]

    def _constant(self, value: np.ndarray) -> Value:
        type = TensorType(DTYPE_NAMES[value.dtype], value.shape)
        self._operations.append(Operation("constant", [], {"value": value}, [type]))
        return self._operations[-1].results[0]


def _product(bound: Bound, packer: _Packer, is_transposed: bool) -> list[Operation] | None:
    root = bound.operations["matrix_multiply"]
    if root.attributes != {"op0": "kNONE", "op1": "kNONE"} or not _is_plain(bound, is_transposed):
        return None
    if any(dim != 1 for dim in root.operands[1].type.shape[:-2]):  # type: ignore[union-attr]
        return None
    packed = packer.pack(bound, columns_are_rows=not is_transposed)
    if packed is None:
        return None
    attributes = {"weight_dtype": packed.dtype, "width": packed.width}
    return [Operation("quantized_product", [bound.values["x"], packed.weight, packed.scale], attributes, [])]


def _look_up(bound: Bound, packer: _Packer, is_transposed: bool) -> list[Operation] | None:
    root = bound.operations["gather"]
    if root.attributes != {"axis": 0, "num_broadcast_dims": 0} or not _is_plain(bound, is_transposed):
        return None
    packed = packer.pack(bound, columns_are_rows=is_transposed)
    if packed is None:
        return None
    attributes = {"weight_dtype": packed.dtype, "width": packed.width, "dtype": root.results[0].type.dtype}
    return [Operation("quantized_rows", [packed.weight, packed.scale, bound.values["indices"]], attributes, [])]


def _is_plain(bound: Bound, is_transposed: bool) -> bool:
    return not is_transposed or bound.operations["transpose"].attributes["permutation"] == (1, 0)
