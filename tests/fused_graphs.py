"""Graphs of fused operations, as the passes make them of a traced model, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nvtripy_portable.dims import Symbolic
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Bounds, Graph, Input, Operation, TensorType, Value
from nvtripy_portable.packing import pack_int4

WEIGHT_DTYPES = ("f32", "f16", "bf16", "i8", "i4", "f8e4m3fn")


def constant(graph: Graph, array: np.ndarray | None) -> Value | None:
    if array is None:
        return None
    type = TensorType(DTYPE_NAMES[array.dtype], array.shape)
    return graph.add(Operation("constant", [], {"value": array}, [type])).results[0]


def add_input(graph: Graph, name: str, dtype: str, shape: tuple[Any, ...]) -> Value:
    """An input; a dimension None is dynamic, from 1 to 4096."""
    symbols = tuple(Symbolic.of(f"{name}{i}") if size is None else size for i, size in enumerate(shape))
    value = Value(TensorType(dtype, symbols))
    bounds = Bounds(*(tuple(least if size is None else size for size in shape) for least in (1, 1, 4096)))
    graph.inputs.append(Input(value, name, bounds))
    return value


def random_weight(
    random: np.random.Generator, dtype: str, rows: int, width: int, scales: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored weights (rows, width) and their scale: "none", "scalar", "rows", or the length of a block."""
    size = 0.5 / np.sqrt(width)
    if dtype == "i4":
        stored = pack_int4(random.integers(-8, 8, (rows, width)).astype(np.int8))
        size /= 4
    elif dtype == "i8":
        stored = random.integers(-128, 128, (rows, width)).astype(np.int8)
        size /= 64
    else:
        stored = random.standard_normal((rows, width)).astype(np.float32)
        if dtype == "f8e4m3fn":
            stored *= np.exp2(random.integers(-8, 7, (rows, width))).astype(np.float32)
            stored = np.clip(stored, -448, 448)
            size /= 32
        else:
            stored *= size
        stored = stored.astype(DTYPES[dtype])
    if scales == "none":
        return stored, None
    shape = {"scalar": (), "rows": (rows,)}.get(scales) if not scales.isdecimal() else (rows, width // int(scales))
    return stored, (size * random.uniform(0.5, 1.5, shape)).astype(np.float32)


def linear_attributes(
    weight_dtype: str,
    width: int,
    *,
    gate: str | None = None,
    input_dtype: str | None = None,
    activation: str | None = None,
    dtype: str = "f32",
) -> dict[str, Any]:
    return {
        "weight_dtype": weight_dtype,
        "width": width,
        "gate": gate,
        "input_dtype": input_dtype,
        "activation": activation,
        "dtype": dtype,
    }


def attention_attributes(
    heads: int,
    size: int,
    *,
    groups: int | None = None,
    layer: int = 0,
    rounding: str | None = None,
    window: int | None = None,
    dtype: str = "f32",
) -> dict[str, Any]:
    return {
        "heads": heads,
        "groups": groups or heads,
        "head_size": size,
        "scale": size**-0.5,
        "layer": layer,
        "rounding": rounding,
        "window": window,
        "dtype": dtype,
    }


def linear_graph(
    weight: np.ndarray,
    scale: np.ndarray | None,
    weight_dtype: str,
    width: int,
    *,
    bias: np.ndarray | None = None,
    has_residual: bool = False,
    pre_scale: np.ndarray | None = None,
    input_scale: np.ndarray | None = None,
    input_dtype: str | None = None,
    activation: str | None = None,
    norm: tuple[np.ndarray, ...] | None = None,
    gate: str | None = None,
    dtype: str = "f32",
) -> Graph:
    """One linear operation; ``norm`` is a layer norm's scale and bias, or an RMSNorm's scale."""
    graph = Graph()
    shape = (1, None)
    x = start = add_input(graph, "x", dtype, (*shape, width if gate is None else 2 * width))
    operands = [constant(graph, each) for each in (weight, scale, bias)]
    residual = add_input(graph, "residual", "f32", (*shape, len(weight))) if has_residual else None
    if norm is not None:
        scales = [constant(graph, each) for each in norm]
        kind = "layer_norm" if len(norm) == 2 else "rms_norm"
        x = graph.add(Operation(kind, [x, *scales], {"epsilon": 1e-5, "dtype": "f32"}, [start.type])).results[0]
    if residual is not None:
        # As in a model, a residual comes with the same rows: here through an operation that changes nothing.
        zero = np.zeros((len(weight), start.type.shape[-1]), np.float32)
        shortcut = constant(graph, zero)
        through = linear_attributes("f32", start.type.shape[-1])
        type = TensorType("f32", (*start.type.shape[:2], len(weight)))
        operation = Operation("linear", [start, shortcut, None, None, None, None, None, None], through, [type])
        graph.inputs.pop()
        residual = graph.add(operation).results[0]
    attributes = linear_attributes(weight_dtype, width, gate=gate, input_dtype=input_dtype, activation=activation)
    type = TensorType("f32", (*start.type.shape[:2], len(weight)))
    extra = [constant(graph, pre_scale), constant(graph, input_scale), None]
    graph.outputs = [graph.add(Operation("linear", [x, *operands, residual, *extra], attributes, [type])).results[0]]
    return graph


@dataclass(frozen=True)
class Shape:
    """A model's sizes. Llama's kind has RMSNorm, rotary positions and a gate."""

    layers: int = 2
    heads: int = 2
    head_size: int = 16
    context: int = 32
    vocabulary: int = 50
    batch: int = 1
    groups: int | None = None
    window: int | None = None
    is_llama: bool = False

    @property
    def kv_heads(self) -> int:
        return self.groups or self.heads

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def cache(self) -> tuple[int, ...]:
        return (self.layers, 2, self.batch, self.kv_heads, self.context, self.head_size)


def model_graph(
    shape: Shape,
    *,
    weight_dtype: str = "f32",
    scales: str = "none",
    cache_dtype: str | None = "f32",
    rounding: str | None = None,
    input_dtype: str | None = None,
    activation: str = "gelu_tanh",
    seed: int = 0,
    tables: str = "f16",
    dtype: str = "f32",
) -> Graph:
    """embedding, layers, last_rows, layer_norm, head; without ``cache_dtype`` the stateless form. ``dtype`` is that of
    activations but the logits, which are float32."""
    random = np.random.default_rng(seed)
    graph = Graph()
    idx = add_input(graph, "idx", "i32", (shape.batch, None))
    leading = idx.type.shape
    position = cache = last = None
    if cache_dtype is not None:
        position = add_input(graph, "position", "i32", (shape.batch,))
        cache = add_input(graph, "cache", cache_dtype, shape.cache)
        last = add_input(graph, "last", "i32", (shape.batch,))
    width = shape.width

    def floats(*sizes: int, around: float = 0.0) -> Value | None:
        return constant(graph, (around + 0.2 * random.standard_normal(sizes)).astype(np.float32))

    def norm(x: Value) -> Value:
        operands = [x, floats(width, around=1.0)]
        if not shape.is_llama:
            operands.append(floats(width))
        kind = "rms_norm" if shape.is_llama else "layer_norm"
        return graph.add(Operation(kind, operands, {"epsilon": 1e-5, "dtype": dtype}, [x.type])).results[0]

    def linear(
        x: Value, rows: int, residual: Value | None, act: str | None, is_head: bool = False, gate: str | None = None
    ) -> Value:
        columns = x.type.shape[-1]
        assert isinstance(columns, int)
        columns //= 1 if gate is None else 2
        weight, scale = random_weight(random, weight_dtype, rows, columns, scales)
        attributes = linear_attributes(
            weight_dtype,
            columns,
            gate=gate,
            input_dtype=input_dtype,
            activation=act,
            dtype="f32" if is_head else dtype,
        )
        input_scale = np.array(0.05, np.float32) if input_dtype else None
        operands = [
            x,
            constant(graph, weight),
            constant(graph, scale),
            None if is_head else floats(rows),
            residual,
            None,
        ]
        operands += [constant(graph, input_scale), None]
        type = TensorType("f32" if is_head else dtype, (*x.type.shape[:-1], rows))
        return graph.add(Operation("linear", operands, attributes, [type])).results[0]

    table, table_scale = random_weight(random, tables, shape.vocabulary, width, "none")
    positions = (0.3 * random.standard_normal((shape.context, width))).astype(np.float16)
    operands = [idx, position, constant(graph, (table * np.sqrt(width)).astype(table.dtype)), table_scale]
    attributes = {"weight_dtype": tables, "position_dtype": "f16", "width": width, "dtype": dtype}
    if shape.is_llama:
        operands[1], attributes["position_dtype"] = None, None
    operands += [None if shape.is_llama else constant(graph, positions), None]
    half = shape.head_size // 2
    frequencies = constant(graph, (100.0 ** (-np.arange(half) / half)).astype(np.float32)) if shape.is_llama else None
    x = graph.add(Operation("embedding", operands, attributes, [TensorType(dtype, (*leading, width))])).results[0]
    for layer in range(shape.layers):
        qkv = linear(norm(x), width + 2 * shape.kv_heads * shape.head_size, None, None)
        by = [constant(graph, np.array(each, np.float32)) for each in (0.02, 0.03)] if rounding else [None, None]
        attributes = attention_attributes(
            shape.heads,
            shape.head_size,
            groups=shape.kv_heads,
            layer=layer,
            rounding=rounding,
            window=shape.window,
            dtype=dtype,
        )
        types = [x.type] + ([cache.type] if cache is not None else [])
        results = graph.add(Operation("attention", [qkv, cache, position, *by, frequencies], attributes, types)).results
        if cache is not None:
            cache = results[1]
        x = linear(results[0], width, x, None)
        inner = linear(norm(x), 4 * width, None, None if shape.is_llama else activation)
        x = linear(inner, width, x, None, gate="silu" if shape.is_llama else None)
    if last is not None:
        type = TensorType(dtype, (shape.batch, width))
        x = graph.add(Operation("last_rows", [x, last], {}, [type])).results[0]
    logits = linear(norm(x), shape.vocabulary, None, None, is_head=True)
    graph.outputs = [logits] if cache is None else [logits, cache]
    return graph


def empty_cache(shape: Shape, dtype: str) -> np.ndarray:
    return np.zeros(shape.cache, DTYPES[dtype])


def as_float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype != ml_dtypes.int4 else array.astype(np.int8)
