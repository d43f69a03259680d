"""Attention, however its heads are split, its mask is made and its cache is written, becomes one operation.

The skeleton (a softmax between two products) is a pattern. All that only moves elements about, computes indices or
compares them is followed symbolically (:mod:`nvtripy_portable.elements`): what counts is which element of the queries,
keys, values and cache reaches the products, and under which condition.

With a cache, each layer's ``attention`` takes the cache that the one before it returned. That is the same where the
program returns a cache whose layers are what their attention saw; without such a value nothing is fused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nvtripy_portable.dims import Dim
from nvtripy_portable.elements import (
    FLOATS,
    Choice,
    Element,
    Elements,
    Read,
    Rounded,
    Scaled,
    Truncated,
    aligned,
    axis,
    same_index,
    within,
)
from nvtripy_portable.fused import ROUNDINGS
from nvtripy_portable.graph import Graph, Operation, Value
from nvtripy_portable.inequalities import (
    Every,
    Formula,
    Number,
    add,
    at_most,
    equivalent,
    less,
    multiply,
    negated,
    subtract,
)
from nvtripy_portable.rewrite import Any, Bound, Cast, Op, constant

_MASKED = Op("select", Any("mask"), Any("then"), Any("otherwise"), name="masked")
_WEIGHTS = Cast(Op("softmax", Cast(_MASKED), axis=3))
_WEIGHTED = Cast(Op("matrix_multiply", _WEIGHTS, Any("v"), op0="kNONE", op1="kNONE", name="weighted"))
_SKELETON = Op("reshape", Op("transpose", _WEIGHTED, permutation=(0, 2, 1, 3)))


def run(graph: Graph) -> None:
    elements = Elements()
    found = [_recognised(operation, elements) for operation in graph.operations if operation.kind == "reshape"]
    chains = defaultdict(list)
    replacements: dict[Operation, list[Operation]] = {}
    for each in filter(None, found):
        if each.keys.cache is None:
            replacements[each.root] = each.operations(None)
        else:
            chains[each.keys.cache, each.keys.position].append(each)
    new_caches: dict[Value, Value] = {}
    for (cache, _), chain in chains.items():
        if cache is None or (new_cache := _returned_cache(graph, cache, chain, elements)) is None:
            continue
        for each in chain:
            replacements[each.root] = each.operations(cache)
            cache = replacements[each.root][-1].results[1]
        new_caches[new_cache] = cache
    _replace(graph, replacements, new_caches)


def _replace(graph: Graph, replacements: dict[Operation, list[Operation]], new_values: dict[Value, Value]) -> None:
    operations: list[Operation] = []
    for operation in graph.operations:
        replacement = replacements.get(operation, [operation])
        if operation in replacements:
            replacement[-1].results[0] = operation.results[0]
            operation.results[0].producer = replacement[-1]
        for each in replacement:
            each.operands = [new_values.get(value, value) if value is not None else None for value in each.operands]
        operations.extend(replacement)
    graph.operations = operations
    graph.outputs = [new_values.get(output, output) for output in graph.outputs]


# --- one attention ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Where keys or values come from: the parts of what is common to both, and the scale at which they are rounded."""

    qkv: Value
    cache: Value | None
    position: Value | None
    layer: int
    rounding: str | None
    scale: float | None = field(compare=False)


@dataclass(frozen=True)
class _Frame:
    """Sizes and indices of an attention: sequences, heads, tokens, slots, features."""

    sizes: tuple[Dim, Dim, Dim, Dim, Dim]

    @property
    def indices(self) -> tuple[Number, Number, Number, Number, Number]:
        b, h, t, c, d = (axis(name, size) for name, size in zip("bhtcd", self.sizes, strict=True))
        return b, h, t, c, d

    @property
    def given(self) -> Formula:
        return within(self.indices, self.sizes)

    @property
    def cache_shape(self) -> tuple[Dim, ...]:
        batch, heads, _, slots, head_size = self.sizes
        return 2, batch, heads, slots, head_size


@dataclass(frozen=True)
class _Attention:
    root: Operation  # which gives the result so far
    frame: _Frame
    keys: _Rows
    values: _Rows
    scale: float

    def operations(self, cache: Value | None) -> list[Operation]:
        """The attention, on ``cache``, after the constants that it reads."""
        scales = [
            None if rows.scale is None else constant(np.array(rows.scale, np.float32))
            for rows in (self.keys, self.values)
        ]
        operands = [self.keys.qkv, cache, self.keys.position, *(each.results[0] if each else None for each in scales)]
        attributes = {
            "heads": self.frame.sizes[1],
            "head_size": self.frame.sizes[4],
            "scale": self.scale,
            "layer": self.keys.layer,
            "rounding": self.keys.rounding,
            "dtype": self.root.results[0].type.dtype,
        }
        types = [self.root.results[0].type, *([] if cache is None else [cache.type])]
        attention = Operation("attention", operands, attributes, types, self.root.location)
        return [*filter(None, scales), attention]


def _recognised(root: Operation, elements: Elements) -> _Attention | None:
    bound = Bound()
    if not _SKELETON.match_operation(root, bound) or root.results[0].type.dtype not in FLOATS:
        return None
    masked, v = bound.values["masked"], bound.values["v"]
    batch, heads, length, head_size = bound.values["weighted"].type.shape
    frame = _Frame((batch, heads, length, masked.type.shape[-1], head_size))
    b, h, t, c, d = frame.indices
    slots = frame.sizes[3]
    if None in frame.sizes or not isinstance(heads, int) or not isinstance(head_size, int):
        return None
    width = heads * head_size

    visible, scores = bound.values["then"], bound.values["otherwise"]
    is_hidden = _is_minus_infinity(visible)
    if not is_hidden:
        visible, scores = scores, visible
    if not _is_minus_infinity(visible) or scores.type.shape != (batch, heads, length, slots):
        return None
    score, factor = _unscaled(elements.element(scores, (b, h, t, c), frame.given))
    product = score.value.producer if isinstance(score, Read) and score.index == (b, h, t, c) else None
    if product is None or product.kind != "matrix_multiply" or product.attributes["op0"] != "kNONE":
        return None
    q, k = product.operands
    is_transposed = product.attributes["op1"] == "kTRANSPOSE"
    k_shape = (batch, heads, slots, head_size) if is_transposed else (batch, heads, head_size, slots)
    if q is None or k is None or q.type.shape != (batch, heads, length, head_size) or k.type.shape != k_shape:
        return None
    if v.type.shape != (batch, heads, slots, head_size) or root.results[0].type.shape != (batch, length, width):
        return None

    query, own_factor = _unscaled(elements.element(q, (b, h, t, d), frame.given))
    keys = _scaled_rows(
        elements.element(k, (b, h, c, d) if is_transposed else (b, h, d, c), frame.given), 0, frame, elements
    )
    values = _scaled_rows(elements.element(v, (b, h, c, d), frame.given), 1, frame, elements)
    if keys is None or keys != values or not isinstance(query, Read) or query.value is not keys.qkv:
        return None
    if not same_index(query.index, (b, t, add(multiply(h, head_size), d)), frame.given):
        return None
    if keys.qkv.type.shape != (batch, length, 3 * width) or keys.qkv.type.dtype not in FLOATS:
        return None

    at = aligned(bound.values["mask"], masked, (b, h, t, c))
    truth = None if at is None else elements.truth(bound.values["mask"], at, frame.given)
    own_slot = t if keys.position is None else add(elements.symbol(keys.position, (b,)), t)
    wanted = at_most(c, own_slot)
    if truth is None or not equivalent(frame.given, truth, negated(wanted) if is_hidden else wanted):
        return None
    if keys.cache is None and slots != length:
        return None
    assert values is not None  # as it equals the keys
    return _Attention(root, frame, keys, values, factor * own_factor)


def _is_minus_infinity(value: Value) -> bool:
    array = value.constant
    return array is not None and array.size == 1 and float(array.reshape(())) == -math.inf


def _unscaled(element: Element) -> tuple[Element, float]:
    factor = 1.0
    while isinstance(element, Scaled):
        factor *= element.factor
        element = element.element
    return element, factor


def _scaled_rows(element: Element, half: int, frame: _Frame, elements: Elements) -> _Rows | None:
    """Keys (half 0) or values (half 1) as attention multiplies by them: scaled back, if they are rounded."""
    element, factor = _unscaled(element)
    rows = _rows(element, half, frame, elements)
    return rows if rows is not None and factor == (1.0 if rows.scale is None else rows.scale) else None


def _rows(element: Element, half: int, frame: _Frame, elements: Elements) -> _Rows | None:
    """Keys or values at (b, h, c, d) as a cache would hold them: this call's own, or those in their slots of it."""
    b, h, _, c, d = frame.indices
    heads, length, head_size = frame.sizes[1], frame.sizes[2], frame.sizes[4]
    assert isinstance(heads, int) and isinstance(head_size, int) and length is not None  # as its caller has seen
    cache, position, layer, token, given, cache_dtype = None, None, 0, c, frame.given, None
    if isinstance(element, Choice):
        for start in elements.reads(element.condition):
            token = subtract(c, elements.symbol(start.value, (b,)))
            written = Every((at_most(0, token), less(token, length)))
            if start.value.type.shape != frame.sizes[:1]:
                continue
            if equivalent(frame.given, element.condition, written):
                new, old = element.then, element.otherwise
            elif equivalent(frame.given, element.condition, negated(written)):
                new, old = element.otherwise, element.then
            else:
                continue
            position, given = start.value, Every((frame.given, written))
            break
        else:
            return None
        if not isinstance(old, Read) or old.value.type.shape[1:] != frame.cache_shape:
            return None
        cache, cache_dtype, layer_index = old.value, element.dtype, old.index[0]
        if not isinstance(layer_index, int) or old.index != (layer_index, half, b, h, c, d):
            return None
        layer, element = layer_index, new
    rounding, scale = None, None
    if isinstance(element, Truncated) and isinstance(element.element, Rounded) and element.element.dtype == "i8":
        element = element.element  # which are integers already
    if isinstance(element, Rounded):
        rounding, scale, element = element.dtype, element.scale, element.element
        if rounding not in ROUNDINGS:
            return None
    if cache is not None and not _holds(cache.type.dtype, rounding, cache_dtype):
        return None
    feature = add((half + 1) * heads * head_size, multiply(h, head_size), d)
    if not isinstance(element, Read) or not same_index(element.index, (b, token, feature), given):
        return None
    return _Rows(element.value, cache, position, layer, rounding, scale)


def _holds(cache_dtype: str, rounding: str | None, dtype: str | None) -> bool:
    """Whether a cache can hold what attention sees of new rows: numbers rounded to 8 bits, or else its own type."""
    return cache_dtype == dtype or rounding == "i8" or (rounding == "f8e4m3fn" and cache_dtype in FLOATS)


# --- the cache --------------------------------------------------------------------------------------------------------


def _returned_cache(graph: Graph, cache: Value, chain: Sequence[_Attention], elements: Elements) -> Value | None:
    """The value that is the cache after all attentions of a chain: that of their layers, and the others untouched."""
    by_layer = {each.keys.layer: each for each in chain}
    if len(by_layer) != len(chain) or len({each.frame for each in chain}) != 1:
        return None
    places = {operation: place for place, operation in enumerate(graph.operations)}
    for operation in reversed(graph.operations):
        new = operation.results[0]
        if new.type != cache.type or operation.kind == "constant":
            continue
        readers = [place for each, place in places.items() if new in each.operands]
        is_read_later = min(readers, default=len(places)) > max(places[each.root] for each in chain)
        if is_read_later and _is_updated(new, cache, by_layer, elements):
            return new
    return None


def _is_updated(new: Value, cache: Value, by_layer: dict[int, _Attention], elements: Elements) -> bool:
    frame = next(iter(by_layer.values())).frame
    b, h, _, c, d = frame.indices
    layers = cache.type.shape[0]
    if not isinstance(layers, int):
        return False
    for layer in range(layers):
        for half in range(2):
            index = (layer, half, b, h, c, d)
            element = elements.element(new, index, frame.given)
            attention = by_layer.get(layer)
            if attention is None:
                if element != Read(cache, index):
                    return False
                continue
            wanted = attention.values if half else attention.keys
            if isinstance(element, Truncated):
                if wanted.rounding != "i8" or element.dtype != cache.type.dtype:
                    return False
                element = element.element
            found = _rows(element, half, frame, elements)
            if found != wanted or found is None or found.scale != wanted.scale:
                return False
    return True
