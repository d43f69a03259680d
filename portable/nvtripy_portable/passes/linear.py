"""A ``linear`` operation takes in what stands around its product: a gate, scaling and rounding of the input, bias, an
adapter's product, activation, residual and casts.

``activation(round(gated(x) * pre_scale) @ rows.T + bias + addend) + residual``: what comes after the product is
absorbed from the inside out, what comes before it from the outside in, so that nothing changes places. A ``finish``,
which follows a plug-in, takes in what comes after it likewise.
"""

from __future__ import annotations

import functools
import math
from typing import Any as Anything

import numpy as np

from nvtripy_portable.elements import FLOATS, Elements, Read, axis, same_index, within
from nvtripy_portable.fused import ROUNDINGS
from nvtripy_portable.graph import Graph, Operation
from nvtripy_portable.inequalities import add
from nvtripy_portable.rewrite import (
    Any,
    Bound,
    Cast,
    Constant,
    Either,
    Number,
    Op,
    Pattern,
    Rule,
    apply,
    as_vector,
    binary,
    constant,
    is_float_cast,
)

_BEFORE_PRODUCT = ("pre_scale", "input_dtype", "gate")  # what an input has gone through already
_OPERANDS = {
    "linear": ("x", "weight", "weight_scale", "bias", "residual", "pre_scale", "input_scale", "addend"),
    "finish": ("x", "bias", "residual", "addend"),
}


def run(graph: Graph) -> None:
    elements = Elements()
    gates = [
        Rule(f"{name} gate", Op(kind, Cast(pattern)), functools.partial(_gate, name.partition(",")[0], elements))
        for name, pattern in _GATES.items()
        for kind in ("linear", "low_rank")
    ]
    after = [rule for kind in _OPERANDS for rule in _after(Op(kind, name="linear"))]
    apply(graph, [*_BEFORE, *gates, *after])


def _with(linear: Operation, **changes: Anything) -> Operation:
    """A linear operation, or a ``finish``, with other operands or attributes."""
    names = _OPERANDS[linear.kind]
    operands = [changes.pop(name, operand) for name, operand in zip(names, linear.operands, strict=True)]
    return Operation(linear.kind, operands, {**linear.attributes, **changes}, [])


def _has(linear: Operation, *names: str) -> bool:
    present = dict(zip(_OPERANDS[linear.kind], linear.operands, strict=True)) | linear.attributes
    return any(present[name] is not None for name in names)


# --- before the product -----------------------------------------------------------------------------------------------

_WIDE, _SCALE = Any("x"), Any("scale")
_LARGEST = Op("reduce", Op("unary", _WIDE, operation="kABS"), operation="kMAX", keep_dimensions=True)
_SCALE_OF_TOKEN = binary("kMAX", binary("kDIV", _LARGEST, Number(127.0)), Number(1e-6), name="scale")
_ROUNDED_BY_TOKEN = Op("quantize", binary("kDIV", _WIDE, _SCALE), Number(1.0), axis=None)
_ROUNDED_BACK = Either(
    Op("cast", _ROUNDED_BY_TOKEN, name="back"), Op("dequantize", _ROUNDED_BY_TOKEN, Number(1.0), name="back")
)
_BY_TOKEN = Cast(binary("kPROD", _ROUNDED_BACK, _SCALE_OF_TOKEN))


def _input_cast(bound: Bound) -> list[Operation] | None:
    linear = bound.operations["linear"]
    return [_with(linear, x=bound.values["x"])] if is_float_cast(bound.operations["cast"], only_widening=True) else None


def _rounding(bound: Bound) -> list[Operation] | None:
    linear, dtype = bound.operations["linear"], bound.operations["quantize"].attributes["dtype"]
    scale, back = bound.constant("scale"), bound.constant("back")
    if _has(linear, *_BEFORE_PRODUCT) or dtype not in ROUNDINGS or scale.size != 1 or scale != back:
        return None
    number = constant(scale.astype(np.float32).reshape(()))
    return [number, _with(linear, x=bound.values["x"], input_dtype=dtype, input_scale=number.results[0])]


def _rounding_by_token(bound: Bound) -> list[Operation] | None:
    linear, dtype = bound.operations["linear"], bound.operations["quantize"].attributes["dtype"]
    x, back = bound.values["x"], bound.operations["back"]
    if _has(linear, *_BEFORE_PRODUCT) or dtype not in ROUNDINGS or back.attributes["dtype"] != "f32":
        return None
    if bound.operations["reduce"].attributes["axes"] != (x.type.rank - 1,) or x.type.dtype != "f32":
        return None
    return [_with(linear, x=x, input_dtype=dtype)]


def _pre_scale(bound: Bound) -> list[Operation] | None:
    linear, x = bound.operations["linear"], bound.values["x"]
    vector = as_vector(bound.values["by"], linear.attributes["width"])
    if vector is None or _has(linear, "pre_scale", "gate") or x.type.shape != bound.values["scaled"].type.shape:
        return None
    by = constant(vector)
    return [by, _with(linear, x=x, pre_scale=by.results[0])]


def _gate(name: str, elements: Elements, bound: Bound) -> list[Operation] | None:
    """``gate(first half) * second half`` of one value's last dimension."""
    root = bound.operations.get("linear") or bound.operations["low_rank"]
    product, parts = bound.values["gated"], (bound.values["gate"], bound.values["up"])
    shape = product.type.shape
    width = shape[-1]
    if not isinstance(width, int) or None in shape or root.attributes["gate"] is not None:
        return None
    if any(part.type.shape != shape for part in parts):
        return None
    index = tuple(axis(f"x{place}", size) for place, size in enumerate(shape))
    given = within(index, shape)
    first, second = (elements.element(part, index, given) for part in parts)
    if not isinstance(first, Read) or not isinstance(second, Read) or first.value is not second.value:
        return None
    x = first.value
    if x.type.shape != (*shape[:-1], 2 * width) or x.type.dtype not in FLOATS:
        return None
    up = (*index[:-1], add(width, index[-1]))
    if not same_index(first.index, index, given) or not same_index(second.index, up, given):
        return None
    return [Operation(root.kind, [x, *root.operands[1:]], {**root.attributes, "gate": name}, [])]


# --- after the product ------------------------------------------------------------------------------------------------


def _bias(bound: Bound) -> list[Operation] | None:
    linear = bound.operations["linear"]
    vector = as_vector(bound.values["bias"], linear.results[0].type.shape[-1])
    if vector is None or _has(linear, "bias", "addend", "activation", "residual"):
        return None
    bias = constant(vector)
    return [bias, _with(linear, bias=bias.results[0])]


def _addend(bound: Bound) -> list[Operation] | None:
    linear, addend = bound.operations["linear"], bound.values["addend"]
    shape = linear.results[0].type.shape
    if _has(linear, "addend", "activation", "residual") or addend.type.shape != shape or None in shape:
        return None
    return [_with(linear, addend=addend)]


def _activation(name: str, bound: Bound) -> list[Operation] | None:
    linear = bound.operations["linear"]
    return None if _has(linear, "activation", "residual") else [_with(linear, activation=name)]


def _squared_relu(bound: Bound) -> list[Operation] | None:
    linear = bound.operations["linear"]
    is_square = bound.operations["element_wise"].operands[0] is bound.operations["element_wise"].operands[1]
    if linear.attributes["activation"] != "relu" or _has(linear, "residual") or not is_square:
        return None
    return [_with(linear, activation="relu2")]


def _residual(bound: Bound) -> list[Operation] | None:
    linear, residual = bound.operations["linear"], bound.values["residual"]
    shape = linear.results[0].type.shape
    if _has(linear, "residual") or residual.type.shape != shape or None in shape:
        return None
    return [_with(linear, residual=residual)]


def _output_cast(bound: Bound) -> list[Operation] | None:
    cast = bound.operations["cast"]
    return [_with(bound.operations["linear"], dtype=cast.attributes["dtype"])] if is_float_cast(cast) else None


# --- the table --------------------------------------------------------------------------------------------------------

_QUANTIZED = Op("quantize", Any("x"), Constant("scale"), axis=None)
_SCALED = binary("kPROD", Any("x"), Constant("by"), name="scaled")

_BEFORE = (
    Rule("input as it is", Op("linear", Op("cast", Any("x"))), _input_cast),
    Rule("rounded input", Op("linear", Cast(Op("dequantize", _QUANTIZED, Constant("back"), axis=None))), _rounding),
    Rule("input rounded token by token", Op("linear", _BY_TOKEN), _rounding_by_token),
    Rule("scaled input", Op("linear", Cast(_SCALED)), _pre_scale),
)


def _activations(x: Pattern) -> dict[str, Op]:
    """The activations of ``x`` that are one step, as programs spell them. What stands behind a comma tells spellings
    apart."""
    wide = Cast(x)
    cube = binary("kPROD", binary("kPROD", wide, wide), wide)
    inner = binary(
        "kPROD", binary("kSUM", binary("kPROD", cube, Number(0.044715)), wide), Number(math.sqrt(2 / math.pi))
    )
    tanh = Op("activation", inner, operation="kTANH")
    return {
        "relu": _relu(x),
        "gelu_erf": Op("activation", x, operation="kGELU_ERF"),
        "gelu_tanh": Op("activation", x, operation="kGELU_TANH"),
        "gelu_tanh, spelled out": binary(
            "kPROD", binary("kPROD", binary("kSUM", tanh, Number(1.0)), wide), Number(0.5)
        ),
        "silu": binary("kPROD", Op("activation", x, operation="kSIGMOID"), x),
    }


def _relu(x: Pattern) -> Op:
    return Op("activation", x, operation="kRELU")


_RELU = _relu(Any("gate"))
_GATES = {
    name: binary("kPROD", Cast(pattern), Any("up"), name="gated")
    for name, pattern in {**_activations(Any("gate")), "relu2": binary("kPROD", _RELU, _RELU)}.items()
}


def _after(linear: Op) -> tuple[Rule, ...]:
    """What follows a linear operation or a ``finish``."""
    return (
        Rule("bias", binary("kSUM", linear, Constant("bias")), _bias, exclusive=True),
        Rule("an adapter's product", binary("kSUM", linear, Op("low_rank", name="addend")), _addend),
        *(
            Rule(name, pattern, functools.partial(_activation, name.partition(",")[0]), exclusive=True)
            for name, pattern in _activations(linear).items()
        ),
        Rule("square of a relu", binary("kPROD", linear, linear), _squared_relu, exclusive=True),
        Rule("residual", Op("element_wise", linear, Any("residual"), operation="kSUM"), _residual, exclusive=True),
        Rule(
            "residual before", Op("element_wise", Any("residual"), linear, operation="kSUM"), _residual, exclusive=True
        ),
        Rule("result in another type", Op("cast", linear), _output_cast, exclusive=True),
    )
