"""Products with constants become ``linear`` operations, on rows of weights, one an output feature.

What nvtripy declares as ``quantize`` → ``dequantize`` → (``transpose``, ``reshape``) → ``matrix_multiply`` has its
first step folded already: the weights are constants of int8, int4 or float8. They stay as small as that, int4 packed
two a byte, and the product or the embedding look-up reads them as they are. Constants that a product and a look-up
share (a tied head) stay shared. Float weights are taken as rows without a copy: a transpose is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nvtripy_portable.graph import DTYPE_NAMES, Graph, Operation, Value
from nvtripy_portable.packing import pack_int4
from nvtripy_portable.rewrite import FLOATS, Any, Bound, Constant, Op, Pattern, Rule, apply, constant

_DEQUANTIZED = Op("dequantize", Constant("weight"), Constant("scale"))
_TRANSPOSED = Op("transpose", _DEQUANTIZED, permutation=(1, 0))


def run(graph: Graph) -> None:
    packer = _Packer()
    apply(graph, list(_rules(packer)))
    graph.operations = packer.constants() + graph.operations


def _rules(packer: _Packer) -> Iterator[Rule]:
    def product(is_transposed: bool) -> Callable[[Bound], list[Operation] | None]:
        return lambda bound: _product(bound, packer, is_transposed)

    def look_up(is_transposed: bool) -> Callable[[Bound], list[Operation] | None]:
        return lambda bound: _look_up(bound, packer, is_transposed)

    yield Rule(
        "columns of dequantized weights",
        Op("slice", _DEQUANTIZED, Constant("start"), Constant("size"), Constant("stride"), mode="kDEFAULT"),
        _columns,
    )
    yield Rule(
        "product with floats",
        Op("matrix_multiply", Any("x"), Constant("weight"), op0="kNONE"),
        lambda bound: _float_product(bound, packer),
    )
    for name, matrix, is_transposed in (("", _DEQUANTIZED, False), (" of transposed", _TRANSPOSED, True)):
        # nvtripy gives a matrix leading dimensions of size one where the other operand has more dimensions.
        shapes: tuple[Pattern, ...] = (matrix, Op("reshape", matrix, Constant("shape")))
        for pattern in shapes:
            root = Op("matrix_multiply", Any("x"), pattern, op0="kNONE", op1="kNONE")
            yield Rule(f"product{name} weights", root, product(is_transposed))
        root = Op("gather", matrix, Any("indices"), axis=0, num_broadcast_dims=0)
        yield Rule(f"rows{name} weights", root, look_up(is_transposed))


@dataclass(frozen=True)
class _Packed:
    weight: Value
    scale: Value | None
    dtype: str
    width: int


class _Packer:
    """Weights as rows (N, K), one packed form for each weight and scale."""

    def __init__(self) -> None:
        self._packed: dict[tuple[Value, Value | None, bool], _Packed] = {}
        self._operations: list[Operation] = []

    def constants(self) -> list[Operation]:
        return self._operations

    def floats(self, value: Value, columns_are_rows: bool) -> _Packed | None:
        """Rows of float weights; ``columns_are_rows`` where the source is (K, N)."""
        weight = value.constant
        if weight is None or value.type.dtype not in FLOATS or any(size != 1 for size in weight.shape[:-2]):
            return None
        key = (value, None, columns_are_rows)
        if key not in self._packed:
            matrix = weight.reshape(weight.shape[-2], weight.shape[-1])
            rows = matrix.T if columns_are_rows else matrix
            self._packed[key] = _Packed(self._constant(rows), None, value.type.dtype, rows.shape[1])
        return self._packed[key]

    def pack(self, bound: Bound, columns_are_rows: bool) -> _Packed | None:
        """The packed form of dequantized weights. None for scales that it cannot hold."""
        weight, scale = bound.constant("weight"), bound.constant("scale")
        if weight.ndim != 2:
            return None
        row_axis = 1 if columns_are_rows else 0
        axis = bound.operations["dequantize"].attributes["axis"]
        if (scale.ndim == 1 and axis != row_axis) or (scale.ndim == 2 and not columns_are_rows):
            return None
        key = (bound.values["weight"], bound.values["scale"], columns_are_rows)
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
        self._operations.append(constant(value))
        return self._operations[-1].results[0]


def _columns(bound: Bound) -> list[Operation] | None:
    """The first columns of dequantized weights, as weights of their own."""
    weight, scale, size = bound.constant("weight"), bound.constant("scale"), bound.constant("size")
    attributes = bound.operations["dequantize"].attributes
    if (
        weight.ndim != 2
        or size[0] != len(weight)
        or bound.constant("start").any()
        or (bound.constant("stride") != 1).any()
    ):
        return None
    if scale.ndim == 2 or (scale.ndim == 1 and attributes["axis"] == 1):
        scale = scale[..., : size[1]]
    parts = [constant(weight[:, : size[1]]), constant(scale)]
    return [*parts, Operation("dequantize", [each.results[0] for each in parts], attributes, [])]


def _linear(bound: Bound, packed: _Packed | None) -> list[Operation] | None:
    """``x @ weight`` and nothing else yet; the passes after this one fill in the rest."""
    x, result = bound.values["x"], bound.operations["matrix_multiply"].results[0]
    if packed is None or x.type.dtype not in FLOATS or x.type.rank < 2 or x.type.rank != result.type.rank:
        return None
    attributes = {
        "weight_dtype": packed.dtype,
        "width": packed.width,
        "gate": None,
        "input_dtype": None,
        "activation": None,
        "dtype": result.type.dtype,
    }
    return [Operation("linear", [x, packed.weight, packed.scale, None, None, None, None, None], attributes, [])]


def _float_product(bound: Bound, packer: _Packer) -> list[Operation] | None:
    order = bound.operations["matrix_multiply"].attributes["op1"]
    if order not in ("kNONE", "kTRANSPOSE"):
        return None
    return _linear(bound, packer.floats(bound.values["weight"], columns_are_rows=order == "kNONE"))


def _product(bound: Bound, packer: _Packer, is_transposed: bool) -> list[Operation] | None:
    right = bound.operations["matrix_multiply"].operands[1]
    if right is None or any(dim != 1 for dim in right.type.shape[:-2]):
        return None
    return _linear(bound, packer.pack(bound, columns_are_rows=not is_transposed))


def _look_up(bound: Bound, packer: _Packer, is_transposed: bool) -> list[Operation] | None:
    packed = packer.pack(bound, columns_are_rows=is_transposed)
    if packed is None:
        return None
    dtype = bound.operations["gather"].results[0].type.dtype
    attributes = {"weight_dtype": packed.dtype, "width": packed.width, "dtype": dtype}
    return [Operation("quantized_rows", [packed.weight, packed.scale, bound.values["indices"]], attributes, [])]
