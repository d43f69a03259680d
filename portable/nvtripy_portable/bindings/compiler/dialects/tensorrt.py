"""The TensorRT dialect: each function appends one operation to the graph and returns its result.

Names and parameters are those that nvtripy calls. Where nvtripy gives a result type it is taken; elsewhere it is
inferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlir_tensorrt.compiler import ir
from nvtripy_portable import shape_inference, verify
from nvtripy_portable.graph import DTYPE_NAMES, GraphError, Operation, TensorType, Value
from nvtripy_portable.plugins import PluginError, calling


class _EnumAttr:
    """An enumeration's case, by its TensorRT name."""

    @staticmethod
    def get(name: str) -> str:
        return name


class ActivationTypeAttr(_EnumAttr):
    pass


class ElementWiseOperationAttr(_EnumAttr):
    pass


class MatrixOperationAttr(_EnumAttr):
    pass


class PoolingTypeAttr(_EnumAttr):
    pass


class ReduceOperationAttr(_EnumAttr):
    pass


class ResizeCoordinateTransformationAttr(_EnumAttr):
    pass


class ResizeRoundModeAttr(_EnumAttr):
    pass


class ResizeSelectorAttr(_EnumAttr):
    pass


class SliceModeAttr(_EnumAttr):
    pass


class TopKOperationAttr(_EnumAttr):
    pass


class UnaryOperationAttr(_EnumAttr):
    pass


# What shape inference can raise on operands and attributes that the verifier would have refused.
_NONSENSE = (AttributeError, LookupError, TypeError, ValueError)


def _reason(operation: Operation, error: Exception) -> str:
    """Why the results of an operation cannot be inferred: the rule that it breaks, or else what was stumbled over."""
    try:
        verify.check_operands(operation)
    except (GraphError, *_NONSENSE) as refusal:
        error = refusal if isinstance(refusal, GraphError) else error
    text = str(error) if isinstance(error, GraphError) else f"expected other operands or attributes ({error})"
    return text if text.startswith(operation.kind) else f"{operation.kind}: {text}"


def _emit(
    kind: str, operands: Sequence[Value | None], result_types: Sequence[TensorType] | None = None, **attributes: Any
) -> list[Value]:
    location = str(ir.Location.current())
    if result_types is None:
        types = [operand.type if operand is not None else None for operand in operands]
        try:
            result_types = shape_inference.infer(kind, types, [None] * len(types), attributes)
        except (GraphError, *_NONSENSE) as error:
            raise ir.MLIRError(
                _reason(Operation(kind, list(operands), attributes, [], location), error), location
            ) from None
    operation = Operation(kind, list(operands), attributes, list(result_types), location)
    return ir.InsertionPoint.current().block.graph.add(operation).results


def _static(values: Sequence[int]) -> Value:
    return constant(np.array(values, dtype=np.int32))


def constant(value: np.ndarray) -> Value:
    return _emit("constant", [], [TensorType(DTYPE_NAMES[value.dtype], value.shape)], value=value)[0]


def cast(result: TensorType, input: Value) -> Value:
    return _emit("cast", [input], [result], dtype=result.dtype)[0]


def concatenation(inputs: Sequence[Value], axis: int) -> Value:
    return _emit("concatenation", list(inputs), axis=axis)[0]


def top_k(input: Value, k: int, axis: int, operation: str) -> list[Value]:
    return _emit("top_k", [input], k=k, axis=axis, operation=operation)


def linspace(result: TensorType, shape: Value, start: Value, step: Value) -> Value:
    return _emit("linspace", [shape, start, step], [result], dtype=result.dtype)[0]


def reduce(input: Value, axes: Sequence[int], operation: str, keep_dimensions: bool) -> Value:
    return _emit("reduce", [input], axes=tuple(axes), operation=operation, keep_dimensions=bool(keep_dimensions))[0]


def element_wise(lhs: Value, rhs: Value, operation: str) -> Value:
    return _emit("element_wise", [lhs, rhs], operation=operation)[0]


def unary(input: Value, operation: str) -> Value:
    return _emit("unary", [input], operation=operation)[0]


def activation(input: Value, operation: str) -> Value:
    return _emit("activation", [input], operation=operation)[0]


def normalization(input: Value, scale: Value, bias: Value, axis: Sequence[int], eps: float, num_groups: int) -> Value:
    return _emit("normalization", [input, scale, bias], axis=tuple(axis), eps=float(eps), num_groups=num_groups)[0]


def shape(input: Value) -> Value:
    return _emit("shape", [input])[0]


def collapse_rank(result: TensorType, input: Value) -> Value:
    return _emit("collapse_rank", [input], [result], shape=result.shape)[0]


def slice(
    input: Value,
    start: Value | None = None,
    size: Value | None = None,
    stride: Value | None = None,
    fill: Value | None = None,
    static_start: Sequence[int] | None = None,
    static_size: Sequence[int] | None = None,
    static_stride: Sequence[int] | None = None,
    mode: str = "kDEFAULT",
) -> Value:
    parameters = [
        value if value is not None else _static(static or ())
        for value, static in ((start, static_start), (size, static_size), (stride, static_stride))
    ]
    return _emit("slice", [input, *parameters, fill], mode=mode)[0]


def reshape(result: TensorType, input: Value, shape: Value) -> Value:
    return _emit("reshape", [input, shape], [result])[0]


def transpose(input: Value, permutation: Sequence[int]) -> Value:
    return _emit("transpose", [input], permutation=tuple(permutation))[0]


def broadcast(result: TensorType, input: Value, shape: Value, broadcast_dims: Sequence[int]) -> Value:
    return _emit("broadcast", [input, shape], [result], broadcast_dims=tuple(broadcast_dims))[0]


def softmax(input: Value, axis: int) -> Value:
    return _emit("softmax", [input], axis=axis)[0]


def select(condition: Value, then_input: Value, else_input: Value) -> Value:
    return _emit("select", [condition, then_input, else_input])[0]


def gather(data: Value, indices: Value, axis: int, num_broadcast_dims: int) -> Value:
    return _emit("gather", [data, indices], axis=axis, num_broadcast_dims=num_broadcast_dims)[0]


def matrix_multiply(input0: Value, input1: Value, op0: str, op1: str) -> Value:
    return _emit("matrix_multiply", [input0, input1], op0=op0, op1=op1)[0]


def quantize(result: TensorType, input: Value, scale: Value, axis: int | None) -> Value:
    return _emit("quantize", [input, scale], [result], dtype=result.dtype, axis=axis)[0]


def dequantize(result: TensorType, input: Value, scale: Value, axis: int | None) -> Value:
    return _emit("dequantize", [input, scale], [result], dtype=result.dtype, axis=axis)[0]


def convolution(
    input: Value,
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    kernel: Value,
    bias: Value | None,
    num_groups: int,
    dilation: Sequence[int],
) -> Value:
    return _emit(
        "convolution",
        [input, kernel, bias],
        stride=tuple(stride),
        pre_padding=tuple(pre_padding),
        post_padding=tuple(post_padding),
        num_groups=num_groups,
        dilation=tuple(dilation),
    )[0]


def deconvolution(
    input: Value,
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    kernel_weights: Value,
    bias_weights: Value | None,
    num_groups: int,
    dilation: Sequence[int],
) -> Value:
    return _emit(
        "deconvolution",
        [input, kernel_weights, bias_weights],
        stride=tuple(stride),
        pre_padding=tuple(pre_padding),
        post_padding=tuple(post_padding),
        num_groups=num_groups,
        dilation=tuple(dilation),
    )[0]


def pooling(
    input: Value,
    window_size: Sequence[int],
    stride: Sequence[int],
    pre_padding: Sequence[int],
    post_padding: Sequence[int],
    pooling_type: str,
    average_count_excludes_padding: bool | None = None,
) -> Value:
    return _emit(
        "pooling",
        [input],
        window_size=tuple(window_size),
        stride=tuple(stride),
        pre_padding=tuple(pre_padding),
        post_padding=tuple(post_padding),
        pooling_type=pooling_type,
        average_count_excludes_padding=average_count_excludes_padding,
    )[0]


def resize_nearest(
    result: TensorType,
    input: Value,
    coordinate_transformation: str,
    nearest_rounding: str,
    selector: str,
    output_shape: Value | None = None,
    scales: Sequence[float] | None = None,
) -> Value:
    return _emit(
        "resize_nearest",
        [input, output_shape],
        [result],
        scales=scales,
        coordinate_transformation=coordinate_transformation,
        nearest_rounding=nearest_rounding,
        selector=selector,
    )[0]


def resize_linear(
    result: TensorType,
    input: Value,
    coordinate_transformation: str,
    selector: str,
    output_shape: Value | None = None,
    scales: Sequence[float] | None = None,
) -> Value:
    return _emit(
        "resize_linear",
        [input, output_shape],
        [result],
        scales=scales,
        coordinate_transformation=coordinate_transformation,
        selector=selector,
    )[0]


def resize_cubic(
    result: TensorType,
    input: Value,
    coordinate_transformation: str,
    selector: str,
    cubic_coeff: float,
    output_shape: Value | None = None,
    scales: Sequence[float] | None = None,
) -> Value:
    return _emit(
        "resize_cubic",
        [input, output_shape],
        [result],
        scales=scales,
        coordinate_transformation=coordinate_transformation,
        selector=selector,
        cubic_coeff=cubic_coeff,
    )[0]


def opaque_plugin(
    results: Sequence[TensorType],
    name: str,
    version: str,
    namespace: str,
    params: dict[str, Any],
    inputs: Sequence[Value],
) -> Value | list[Value]:
    """A call of a plug-in; ``params`` are the fields that are given."""
    attributes = {
        "name": name,
        "version": version,
        "namespace": namespace,
        "fields": {each: _field(value) for each, value in params.items()},
        "input_dtypes": tuple(each.type.dtype for each in inputs),
        "output_info": tuple((each.rank, each.dtype) for each in results),
    }
    try:
        plugin = calling.of(attributes)
        calling.check_counts(plugin, len(inputs), len(results))
    except PluginError as error:
        raise ir.MLIRError(str(error), str(ir.Location.current())) from None
    outputs = _emit("plugin", inputs, results, **attributes, has_effects=plugin.has_effects)
    return outputs[0] if len(outputs) == 1 else outputs


def _field(value: Any) -> Any:
    """The values of a field: nvtripy gives sizes as a list of lists, of which there is one."""
    return value[0] if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value
