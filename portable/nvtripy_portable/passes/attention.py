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
    AtLeastZero,
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
_WEIGHTS = Cast(Op("softmax", Cast(_MASKED)))
_WEIGHTED = Cast(Op("matrix_multiply", _WEIGHTS, Any("v"), op0="kNONE", op1="kNONE", name="weighted"))
_SKELETON = Op("reshape", Op("transpose", _WEIGHTED))


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
class _Turn:
    """By which queries and keys are turned: the operands of ``rotary``."""

    position: Value | None
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class _Rows:
    """Where keys or values come from: the parts of what is common to both, the scale at which they are rounded, and
    whether they are turned."""

    qkv: Value
    cache: Value | None
    position: Value | None
    layer: int
    rounding: str | None
    scale: float | None = field(compare=False)
    turn: _Turn | None = field(compare=False)


@dataclass(frozen=True)
class _Frame:
    """Sizes and indices of an attention: sequences, groups of heads that share keys, heads of a group, tokens, slots,
    features. Heads that share nothing are groups of one, which have no dimension of their own (``rank`` 4, not 5)."""

    sizes: tuple[Dim, int, int, Dim, Dim, int]
    rank: int

    @staticmethod
    def of(weighted: Sequence[Dim], slots: Dim) -> _Frame | None:
        """From the shape of weighted values, (B, H, T, D) or (B, G, R, T, D)."""
        if len(weighted) not in (4, 5):
            return None
        batch, groups, *repeats, length, head_size = weighted
        (repeat,) = repeats or (1,)
        if None in (batch, length, slots):
            return None
        if not isinstance(groups, int) or not isinstance(repeat, int) or not isinstance(head_size, int):
            return None
        return _Frame((batch, groups, repeat, length, slots, head_size), len(weighted))

    @property
    def indices(self) -> tuple[Number, Number, Number, Number, Number, Number]:
        b, g, r, t, c, d = (axis(name, size) for name, size in zip("bgrtcd", self.sizes, strict=True))
        return b, g, r, t, c, d

    @property
    def given(self) -> Formula:
        return within(self.indices, self.sizes)

    @property
    def cache_shape(self) -> tuple[Dim, ...]:
        batch, groups, _, _, slots, head_size = self.sizes
        return 2, batch, groups, slots, head_size

    @property
    def head(self) -> Number:
        """The number of a head among all."""
        return add(multiply(self.indices[1], self.sizes[2]), self.indices[2])

    @property
    def heads(self) -> int:
        return self.sizes[1] * self.sizes[2]

    def shape(self, *names: str) -> tuple[Dim, ...]:
        """Sizes of the dimensions of that name, without the one of a group's heads where there is none."""
        sizes = dict(zip("bgrtcd", self.sizes, strict=True)) | {"1": 1}
        return tuple(sizes[name] for name in names if self.rank == 5 or name not in "r1")

    def index(self, *names: str) -> tuple[Number, ...]:
        indices: dict[str, Number] = dict(zip("bgrtcd", self.indices, strict=True)) | {"1": 0}
        return tuple(indices[name] for name in names if self.rank == 5 or name not in "r1")


@dataclass(frozen=True)
class _Attention:
    root: Operation  # which gives the result so far
    frame: _Frame
    keys: _Rows
    values: _Rows
    scale: float
    window: int | None

    def operations(self, cache: Value | None) -> list[Operation]:
        """The attention, on ``cache``, after the constants that it reads."""
        turn = self.keys.turn
        numbers = [self.keys.scale, self.values.scale, None if turn is None else turn.frequencies]
        constants = [None if each is None else constant(np.array(each, np.float32)) for each in numbers]
        operands = [
            self.keys.qkv,
            cache,
            self.keys.position,
            *(each.results[0] if each else None for each in constants),
        ]
        attributes = {
            "heads": self.frame.heads,
            "groups": self.frame.sizes[1],
            "head_size": self.frame.sizes[5],
            "scale": self.scale,
            "layer": self.keys.layer,
            "rounding": self.keys.rounding,
            "window": self.window,
            "dtype": self.root.results[0].type.dtype,
        }
        types = [self.root.results[0].type, *([] if cache is None else [cache.type])]
        attention = Operation("attention", operands, attributes, types, self.root.location)
        return [*filter(None, constants), attention]


def _recognised(root: Operation, elements: Elements) -> _Attention | None:
    bound = Bound()
    if not _SKELETON.match_operation(root, bound) or root.results[0].type.dtype not in FLOATS:
        return None
    masked, v, weighted = bound.values["masked"], bound.values["v"], bound.values["weighted"]
    frame = _Frame.of(weighted.type.shape, masked.type.shape[-1])
    if frame is None or bound.operations["softmax"].attributes["axis"] != frame.rank - 1:
        return None
    b, _, _, t, c, d = frame.indices
    batch, groups, _, length, slots, head_size = frame.sizes
    feature = add(multiply(frame.head, head_size), d)
    if root.results[0].type.shape != (batch, length, frame.heads * head_size):
        return None
    if elements.element(root.results[0], (b, t, feature), frame.given) != Read(weighted, frame.index(*"bgrtd")):
        return None

    visible, scores = bound.values["then"], bound.values["otherwise"]
    is_hidden = _is_minus_infinity(visible)
    if not is_hidden:
        visible, scores = scores, visible
    if not _is_minus_infinity(visible) or scores.type.shape != frame.shape(*"bgrtc"):
        return None
    score, factor = _unscaled(elements.element(scores, frame.index(*"bgrtc"), frame.given))
    is_product = isinstance(score, Read) and score.index == frame.index(*"bgrtc")
    product = score.value.producer if isinstance(score, Read) and is_product else None
    if product is None or product.kind != "matrix_multiply" or product.attributes["op0"] != "kNONE":
        return None
    q, k = product.operands
    features_and_slots = "cd" if product.attributes["op1"] == "kTRANSPOSE" else "dc"
    if q is None or k is None or q.type.shape != frame.shape(*"bgrtd"):
        return None
    if k.type.shape != frame.shape(*"bg1", *features_and_slots) or v.type.shape != frame.shape(*"bg1cd"):
        return None

    query, own_factor = _unscaled(elements.element(q, frame.index(*"bgrtd"), frame.given))
    keys = _scaled_rows(elements.element(k, frame.index(*"bg1", *features_and_slots), frame.given), 0, frame, elements)
    values = _scaled_rows(elements.element(v, frame.index(*"bg1cd"), frame.given), 1, frame, elements)
    if keys is None or values is None or keys != values or values.turn is not None:
        return None
    query, turn = _unturned(query, (b, t, frame.head, d), frame.given, elements)
    if not isinstance(query, Read) or query.value is not keys.qkv or turn != keys.turn:
        return None
    if turn is not None and turn.position is not keys.position:
        return None
    if not same_index(query.index, (b, t, feature), frame.given):
        return None
    if keys.qkv.type.shape != (batch, length, (frame.heads + 2 * groups) * head_size):
        return None
    if keys.qkv.type.dtype not in FLOATS:
        return None

    at = aligned(bound.values["mask"], masked, frame.index(*"bgrtc"))
    truth = None if at is None else elements.truth(bound.values["mask"], at, frame.given)
    own_slot = t if keys.position is None else add(elements.symbol(keys.position, (b,)), t)
    if truth is None or (keys.cache is None and slots != length):
        return None
    truth = negated(truth) if is_hidden else truth
    for window in (None, *_windows(truth, c, own_slot)):
        wanted = at_most(c, own_slot)
        if window is not None:
            wanted = Every((wanted, less(subtract(own_slot, window), c)))
        if equivalent(frame.given, truth, wanted):
            return _Attention(root, frame, keys, values, factor * own_factor, window)
    return None


def _windows(truth: Formula, slot: Number, own_slot: Number) -> list[int]:
    """Numbers of slots that a token may see by a condition: those by which it tells slots apart."""
    if not isinstance(truth, AtLeastZero):
        return [window for part in truth.parts for window in _windows(part, slot, own_slot)]
    distances = (
        subtract(truth.number, subtract(slot, own_slot)),
        subtract(subtract(-1, truth.number), subtract(slot, own_slot)),
    )
    return [each + 1 for each in distances if isinstance(each, int) and each >= 0]


def _unturned(
    element: Element, index: tuple[Number, ...], given: Formula, elements: Elements
) -> tuple[Element, _Turn | None]:
    """What is turned, and by what, where a query or a key is an element (b, token, head, d) of turned heads."""
    operation = element.value.producer if isinstance(element, Read) else None
    if not isinstance(element, Read) or operation is None or operation.kind != "rotary":
        return element, None
    x, position, frequencies = operation.operands
    if x is None or frequencies is None or frequencies.constant is None:
        return element, None
    if not same_index((*element.index[:2], element.index[3]), (*index[:2], index[3]), given):
        return element, None
    turn = _Turn(position, tuple(frequencies.constant.tolist()))
    return elements.element(x, element.index, given), turn


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
    """Keys or values at (b, g, c, d) as a cache would hold them: this call's own, or those in their slots of it."""
    b, g, _, _, c, d = frame.indices
    _, groups, _, length, _, head_size = frame.sizes
    assert length is not None  # as its caller has seen
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
        if not isinstance(layer_index, int) or old.index != (layer_index, half, b, g, c, d):
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
    head = add(frame.heads + half * groups, g)
    element, turn = _unturned(element, (b, token, head, d), given, elements)
    feature = add(multiply(head, head_size), d)
    if not isinstance(element, Read) or not same_index(element.index, (b, token, feature), given):
        return None
    return _Rows(element.value, cache, position, layer, rounding, scale, turn)


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
    b, g, _, _, c, d = frame.indices
    layers = cache.type.shape[0]
    if not isinstance(layers, int):
        return False
    for layer in range(layers):
        for half in range(2):
            index = (layer, half, b, g, c, d)
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
            if found != wanted or found is None or (found.scale, found.turn) != (wanted.scale, wanted.turn):
                return False
    return True
