"""Every operation of the dialect, as nvtripy emits it, against torch: evaluated, and compiled for dynamic shapes.

A case is a program in nvtripy and the same in torch, on inputs that depend on a size: their dimensions that change with
it are dynamic in the compiled program, which then runs at two sizes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nvtripy as tp
import pytest

import nvtripy_portable
from nvtripy_portable import compiler
from nvtripy_portable.graph import Graph

torch = pytest.importorskip("torch", reason="results are compared with torch")
functional = torch.nn.functional

DIALECT = Path(nvtripy_portable.__file__).parent / "bindings/compiler/dialects/tensorrt.py"
TP_DTYPES = {
    np.dtype(np.float32): tp.float32,
    np.dtype(np.float16): tp.float16,
    np.dtype(np.int8): tp.int8,
    np.dtype(np.int32): tp.int32,
    np.dtype(np.int64): tp.int64,
    np.dtype(np.bool_): tp.bool,
}


@dataclass(frozen=True)
class Case:
    """A program: ``tripy`` and ``expected`` take as many tensors as ``inputs(n)`` gives arrays."""

    name: str
    kinds: str  # operations that the program is here for
    inputs: Callable[[int], Sequence[np.ndarray]]
    tripy: Callable[..., Any]
    expected: Callable[..., Any]
    tolerance: float = 1e-5  # relative and absolute; 0 where no arithmetic is done, or only exact


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def floats(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(dtype)


def integers(*shape: int, dtype: Any = np.int32, low: int = -9, high: int = 10, seed: int = 0) -> np.ndarray:
    return rng(seed).integers(low, high, shape).astype(dtype)


def matrix(n: int) -> list[np.ndarray]:
    return [floats(n, 4)]


def pair(n: int) -> list[np.ndarray]:
    return [floats(n, 4), floats(n, 4, seed=1)]


def images(n: int) -> list[np.ndarray]:
    return [floats(n, 4, 7, 6)]


def as_torch(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array))


def shape_as_tensor(x: tp.Tensor) -> tp.Tensor:
    """(rank, 1): the dimensions, which are plain numbers where they are known."""
    return tp.stack([tp.Tensor([each]) if isinstance(each, int) else tp.reshape(each, (1,)) for each in x.shape])


# --- modules ----------------------------------------------------------------------------------------------------------


def convolution(
    name: str,
    spatial: int,
    kernel: tuple[int, ...],
    *,
    transposed: bool = False,
    channels: tuple[int, int] = (4, 6),
    bias: bool = True,
    groups: int = 1,
    stride: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | None = None,
) -> Case:
    one, none = (1,) * spatial, (0,) * spatial
    stride, dilation, padding = stride or one, dilation or one, padding or none
    first, second = channels if transposed else channels[::-1]
    weight, added = floats(first, second // groups, *kernel, seed=1), floats(channels[1], seed=2)

    def tripy(x: tp.Tensor) -> tp.Tensor:
        layer = (tp.ConvTranspose if transposed else tp.Conv)(
            *channels,
            kernel,
            stride=stride,
            padding=[(p, p) for p in padding],
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        layer.weight = tp.Tensor(weight)
        if bias:
            layer.bias = tp.Tensor(added)
        return layer(x)

    def expected(x: Any) -> Any:
        function = getattr(functional, f"conv{'_transpose' if transposed else ''}{spatial}d")
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return function(x, as_torch(weight), as_torch(added) if bias else None, **options)

    def inputs(n: int) -> list[np.ndarray]:
        return [floats(n, channels[0], *(9, 8, 5)[:spatial])]

    return Case(name, "deconvolution" if transposed else "convolution", inputs, tripy, expected, 1e-4)


def normalization(
    name: str, module: Callable[[], Any], inputs: Callable[[int], Any], expected: Callable[..., Any]
) -> Case:
    """``expected(x, weight, bias)``; the parameters are random."""
    size = {"layer": (4,), "instance": (4,), "group": (4,)}[name.split()[0]]
    weight, bias = floats(*size, seed=1), floats(*size, seed=2)

    def tripy(x: tp.Tensor) -> tp.Tensor:
        layer = module()
        layer.weight, layer.bias = tp.Tensor(weight), tp.Tensor(bias)
        return layer(x)

    return Case(name, "normalization", inputs, tripy, lambda x: expected(x, as_torch(weight), as_torch(bias)), 1e-4)


def batch_norm(x: tp.Tensor) -> tp.Tensor:
    layer = tp.BatchNorm(4)
    for seed, name in enumerate(("weight", "bias", "running_mean", "running_var")):
        setattr(layer, name, tp.Tensor(abs(floats(4, seed=seed)) + np.float32(0.5)))
    return layer(x)


def torch_batch_norm(x: Any) -> Any:
    weight, bias, mean, variance = (as_torch(abs(floats(4, seed=seed)) + np.float32(0.5)) for seed in range(4))
    return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-5)


# --- resizing ---------------------------------------------------------------------------------------------------------

TORCH_MODES = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}


def resize(mode: str, align_corners: bool, scales: tuple[float, float] | None = None) -> Case:
    options = {} if mode == "nearest" else {"align_corners": align_corners}

    def tripy(x: tp.Tensor) -> tp.Tensor:
        if scales is not None:
            return tp.resize(x, scales=(1, 1, *scales), mode=mode, align_corners=align_corners)
        shape = (x.shape[0], x.shape[1], x.shape[2] * 2 - 1, 5)
        return tp.resize(x, output_shape=shape, mode=mode, align_corners=align_corners)

    def expected(x: Any) -> Any:
        size = None if scales is not None else (x.shape[2] * 2 - 1, 5)
        return functional.interpolate(x, size, scales, TORCH_MODES[mode], **options)

    by = "by scales" if scales is not None else "to a shape"
    name = f"resize {mode} {by}{' aligned' if align_corners else ''}"
    return Case(name, f"resize_{mode}", lambda n: [floats(2, 3, n + 1, 7)], tripy, expected, 1e-4)


# --- quantization -----------------------------------------------------------------------------------------------------


def quantized(
    name: str, dtype: Any, scale: np.ndarray, dim: int | None = None, shape: tuple[int, int] | None = None
) -> Case:
    """To ``dtype`` and back: the quotient is rounded to the nearest, a half to the even, and saturates."""
    largest = {tp.int8: 127, tp.int4: 7, tp.float8: 448}[dtype]

    def tripy(x: tp.Tensor) -> tp.Tensor:
        return tp.dequantize(tp.quantize(x, tp.Tensor(scale), dtype, dim), tp.Tensor(scale), tp.float32, dim)

    def expected(x: Any) -> Any:
        if dim is not None:
            factor = as_torch(scale).reshape(*(-1 if index == dim else 1 for index in range(x.ndim)))
        elif scale.ndim == 2:
            factor = as_torch(scale).repeat_interleave(x.shape[0] // scale.shape[0], dim=0)
        else:
            factor = torch.tensor(float(scale))
        if dtype == tp.float8:
            return (x / factor).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * factor
        return (x / factor).round().clamp(-largest - 1, largest) * factor

    return Case(
        f"quantize to {name}", "quantize dequantize", lambda n: [floats(*(shape or (n, 4)))], tripy, expected, 1e-6
    )


def weight_only(dtype: Any, scale: np.ndarray) -> Case:
    """A matrix product with a constant that is kept quantized."""
    weight, as_tensor = floats(4, 6, seed=3), tp.Tensor(scale)

    def tripy(x: tp.Tensor) -> tp.Tensor:
        return x @ tp.dequantize(tp.quantize(tp.Tensor(weight), as_tensor, dtype), as_tensor, tp.float32)

    def expected(x: Any) -> Any:
        factor = np.repeat(scale, 4 // scale.shape[0], axis=0) if scale.ndim else scale
        low, high = (-128, 127) if dtype == tp.int8 else (-8, 7)
        return x @ as_torch((np.clip(np.rint(weight / factor), low, high) * factor).astype(np.float32))

    return Case(f"weight-only {dtype}", "quantize dequantize matrix_multiply", matrix, tripy, expected, 1e-5)


# --- the cases --------------------------------------------------------------------------------------------------------


def binary(
    name: str, function: Callable[..., Any], expected: Callable[..., Any] | None = None, *, tolerance: float = 0
) -> Case:
    return Case(name, "element_wise", pair, function, expected or function, tolerance)


def unary(
    name: str, kind: str, tripy: Callable[..., Any], expected: Callable[..., Any], tolerance: float = 1e-6
) -> Case:
    return Case(name, kind, lambda n: [abs(floats(n, 4)) + np.float32(0.1)], tripy, expected, tolerance)


def sliced(name: str, index: Callable[[Any], Any], expected: Callable[[Any], Any] | None = None) -> Case:
    return Case(name, "slice", matrix, index, expected or index, 0)


CASES = [
    # Constants, casts and shapes
    Case(
        "constant",
        "constant",
        matrix,
        lambda x: x * tp.Tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x * torch.arange(1, 5),
        0,
    ),
    Case(
        "constant of bools",
        "constant cast select",
        matrix,
        lambda x: tp.where(tp.Tensor([True, False, True, True]), x, 0.0),
        lambda x: torch.where(torch.tensor([True, False, True, True]), x, 0.0),
        0,
    ),
    Case("cast to float16", "cast", matrix, lambda x: tp.cast(x, tp.float16), lambda x: x.half(), 0),
    Case(
        "cast to bfloat16 and back",
        "cast",
        matrix,
        lambda x: tp.cast(tp.cast(x, tp.bfloat16), tp.float32),
        lambda x: x.bfloat16().float(),
        0,
    ),
    Case(
        "cast to integers", "cast", lambda n: [floats(n, 4) * 9], lambda x: tp.cast(x, tp.int32), lambda x: x.int(), 0
    ),
    Case(
        "cast to bool",
        "cast",
        lambda n: [integers(n, 4, low=-1, high=2)],
        lambda x: tp.cast(x, tp.bool),
        lambda x: x.bool(),
        0,
    ),
    Case("cast to int64", "cast", lambda n: [integers(n)], lambda x: tp.cast(x, tp.int64), lambda x: x.long(), 0),
    Case(
        "shape",
        "shape slice collapse_rank concatenation reshape",
        matrix,
        shape_as_tensor,
        lambda x: torch.tensor([[d] for d in x.shape], dtype=torch.int32),
        0,
    ),
    Case(
        "shape arithmetic",
        "shape element_wise collapse_rank reshape",
        lambda n: [floats(n, 4, 6)],
        lambda x: tp.reshape(x, (x.shape[0] * 2, x.shape[1] // 2, -1)),
        lambda x: x.reshape(x.shape[0] * 2, 2, -1),
        0,
    ),
    Case("reshape", "reshape", matrix, lambda x: tp.reshape(x, (-1, 2)), lambda x: x.reshape(-1, 2), 0),
    Case("flatten", "reshape", lambda n: [floats(2, n, 3)], lambda x: tp.flatten(x, 1), lambda x: x.flatten(1), 0),
    Case("squeeze", "reshape", lambda n: [floats(1, n, 1)], lambda x: tp.squeeze(x, (0, 2)), lambda x: x[0, :, 0], 0),
    Case(
        "permute",
        "transpose",
        lambda n: [floats(2, n, 3)],
        lambda x: tp.permute(x, (2, 0, 1)),
        lambda x: x.permute(2, 0, 1),
        0,
    ),
    Case(
        "expand",
        "broadcast",
        lambda n: [floats(n, 1)],
        lambda x: tp.expand(x, (2, x.shape[0], 3)),
        lambda x: x.expand(2, -1, 3),
        0,
    ),
    Case("repeat", "broadcast reshape", matrix, lambda x: tp.repeat(x, 3, 1), lambda x: x.repeat_interleave(3, 1), 0),
    Case(
        "concatenate",
        "concatenation",
        pair,
        lambda x, y: tp.concatenate([x, y, x], dim=0),
        lambda x, y: torch.cat([x, y, x]),
        0,
    ),
    Case(
        "concatenate along the last",
        "concatenation",
        pair,
        lambda x, y: tp.concatenate([x, y], dim=-1),
        lambda x, y: torch.cat([x, y], -1),
        0,
    ),
    Case("split", "slice", lambda n: [floats(n, 6)], lambda x: tp.split(x, 3, dim=1)[1], lambda x: x[:, 2:4], 0),
    Case(
        "full",
        "broadcast",
        matrix,
        lambda x: tp.full((x.shape[0], 2), 3.5),
        lambda x: torch.full((x.shape[0], 2), 3.5),
        0,
    ),
    # Slices
    sliced("slice", lambda x: x[1:-1, 1:3]),
    sliced("slice of one", lambda x: x[-1, 2]),
    sliced("slice with steps", lambda x: x[::2, 1::3]),
    sliced("slice backward", lambda x: x[::-1, 2:0:-1], lambda x: x.flip(0)[:, [2, 1]]),
    sliced("slice to nothing", lambda x: x[:0]),
    sliced("slice over the end", lambda x: x[1:99]),
    sliced("new dimensions", lambda x: x[None, :, None, 0]),
    sliced("flip", lambda x: tp.flip(x) if isinstance(x, tp.Tensor) else x.flip(0, 1)),
    sliced(
        "pad", lambda x: tp.pad(x, [(2, 1), (0, 3)], value=1.5), lambda x: functional.pad(x, (0, 3, 2, 1), value=1.5)
    ),
    sliced(
        "pad by reflection",
        lambda x: tp.pad(x, [(2, 1), (0, 3)], mode="reflect"),
        lambda x: functional.pad(functional.pad(x[None], (0, 3), "reflect").mT, (2, 1), "reflect").mT[0],
    ),
    Case(
        "pad integers",
        "slice",
        lambda n: [integers(n)],
        lambda x: tp.pad(x, [(1, 1)], value=-7),
        lambda x: functional.pad(x, (1, 1), value=-7),
        0,
    ),
    # Element by element
    binary("add", lambda x, y: x + y),
    binary("subtract", lambda x, y: x - y),
    binary("multiply", lambda x, y: x * y),
    binary("divide", lambda x, y: x / y),
    binary("divide and round down", lambda x, y: x // y),
    binary("remainder", lambda x, y: x % y, torch.remainder, tolerance=1e-5),
    binary("power", lambda x, y: abs(x) ** y, tolerance=1e-5),
    binary("maximum", tp.maximum, torch.maximum),
    binary("minimum", tp.minimum, torch.minimum),
    binary("less", lambda x, y: x < y),
    binary("less or equal", lambda x, y: x <= y),
    binary("greater", lambda x, y: x > y),
    binary("greater or equal", lambda x, y: x >= y),
    binary("equal", lambda x, y: x == x),
    binary("not equal", lambda x, y: x != y),
    binary("or", lambda x, y: (x > 0.0) | (y > 0.0), lambda x, y: (x > 0) | (y > 0)),
    binary("broadcast rows", lambda x, y: x + y[:1]),
    Case(
        "integers",
        "element_wise",
        lambda n: [integers(n, 4), integers(n, 4, low=1, seed=1)],
        lambda x, y: (x * y - x) // y + x / y,
        lambda x, y: torch.div(x * y - x, y, rounding_mode="floor") + torch.div(x, y, rounding_mode="trunc"),
        0,
    ),
    Case(
        "int8",
        "element_wise",
        lambda n: [integers(n, 4, dtype=np.int8, low=-128, high=128), integers(n, 4, dtype=np.int8, seed=1)],
        lambda x, y: x + y,
        lambda x, y: x + y,
        0,
    ),
    Case(
        "float16",
        "element_wise",
        lambda n: [floats(n, 4, dtype=np.float16), floats(n, 4, dtype=np.float16, seed=1)],
        lambda x, y: x * y + x,
        lambda x, y: x * y + x,
        0,
    ),
    Case("where", "select", pair, lambda x, y: tp.where(x > y, x, y), torch.maximum, 0),
    Case(
        "masked fill",
        "select",
        pair,
        lambda x, y: tp.masked_fill(x, y > 0.0, -1.0),
        lambda x, y: x.masked_fill(y > 0, -1.0),
        0,
    ),
    Case(
        "tril",
        "linspace select",
        lambda n: [floats(n, n)],
        lambda x: tp.tril(x, 1) + tp.triu(x),
        lambda x: x.tril(1) + x.triu(),
        0,
    ),
    unary("exp", "unary", tp.exp, torch.exp),
    unary("log", "unary", tp.log, torch.log),
    unary("sqrt", "unary", tp.sqrt, torch.sqrt),
    unary("rsqrt", "unary", tp.rsqrt, torch.rsqrt),
    unary("sin and cos", "unary", lambda x: tp.sin(x) * tp.cos(x), lambda x: torch.sin(x) * torch.cos(x)),
    unary("abs and neg", "unary", lambda x: abs(-x), lambda x: x, 0),
    Case("not", "unary", lambda n: [integers(n, 4, low=0, high=2).astype(bool)], lambda x: ~x, lambda x: ~x, 0),
    Case("relu", "activation", matrix, tp.relu, torch.relu, 0),
    Case("sigmoid", "activation", matrix, tp.sigmoid, torch.sigmoid),
    Case("tanh", "activation", matrix, tp.tanh, torch.tanh),
    Case("gelu", "activation", matrix, tp.gelu, functional.gelu),
    Case("silu", "activation", matrix, tp.silu, functional.silu),
    # Along dimensions
    Case("sum", "reduce", matrix, lambda x: tp.sum(x, dim=0), lambda x: x.sum(0)),
    Case("sum of all", "reduce", matrix, lambda x: tp.sum(x), lambda x: x.sum()),
    Case("prod", "reduce", matrix, lambda x: tp.prod(x, dim=1, keepdim=True), lambda x: x.prod(1, keepdim=True)),
    Case("mean", "reduce", matrix, lambda x: tp.mean(x, dim=(0, 1)), lambda x: x.mean()),
    Case(
        "max and min",
        "reduce",
        matrix,
        lambda x: tp.max(x, dim=0) - tp.min(x, dim=1, keepdim=True),
        lambda x: x.amax(0) - x.amin(1, keepdim=True),
        0,
    ),
    Case("var", "reduce", matrix, lambda x: tp.var(x, dim=0), lambda x: x.var(0)),
    Case(
        "all",
        "reduce",
        lambda n: [integers(n, 4, low=0, high=2).astype(bool)],
        lambda x: tp.all(x, dim=0),
        lambda x: x.all(0),
        0,
    ),
    Case(
        "any",
        "reduce",
        lambda n: [integers(n, 4, low=0, high=2).astype(bool)],
        lambda x: tp.any(x, dim=1),
        lambda x: x.any(1),
        0,
    ),
    Case(
        "sum of integers",
        "reduce",
        lambda n: [integers(n, 4)],
        lambda x: tp.sum(x, dim=0),
        lambda x: x.sum(0, dtype=torch.int32),
        0,
    ),
    Case(
        "topk",
        "top_k",
        lambda n: [floats(n, 9)],
        lambda x: tp.topk(x, 3, dim=1),
        lambda x: [(t := x.topk(3))[0], t[1].int()],
        0,
    ),
    Case("argmax", "top_k", matrix, lambda x: tp.argmax(x, dim=0), lambda x: x.argmax(0).int(), 0),
    Case("argmax of all", "top_k", matrix, lambda x: tp.argmax(x), lambda x: x.argmax().int(), 0),
    Case(
        "argmin",
        "top_k",
        matrix,
        lambda x: tp.argmin(x, dim=1, keepdim=True),
        lambda x: x.argmin(1, keepdim=True).int(),
        0,
    ),
    Case("softmax", "softmax", matrix, lambda x: tp.softmax(x, dim=0), lambda x: x.softmax(0)),
    Case(
        "cumsum",
        "matrix_multiply transpose",
        lambda n: [floats(2, n, 3)],
        lambda x: tp.cumsum(x, dim=1),
        lambda x: x.cumsum(1),
    ),
    Case(
        "gather",
        "gather",
        lambda n: [floats(n, 4), integers(2, n, low=0, high=3)],
        lambda x, i: tp.gather(x, 1, i),
        lambda x, i: x[:, i],
    ),
    Case(
        "embedding",
        "gather",
        lambda n: [integers(2, n, low=0, high=6)],
        lambda i: tp.gather(tp.Tensor(floats(6, 4)), 0, i),
        lambda i: as_torch(floats(6, 4))[i],
        0,
    ),
    Case(
        "iota",
        "linspace",
        matrix,
        lambda x: tp.iota_like(x, dim=0) - tp.iota((x.shape[0], 4), dim=1),
        lambda x: torch.arange(x.shape[0])[:, None] - torch.arange(4.0),
        0,
    ),
    Case(
        "arange",
        "linspace",
        matrix,
        lambda x: x * tp.arange(5, 1, -1, dtype=tp.float32),
        lambda x: x * torch.tensor([5.0, 4.0, 3.0, 2.0]),
        0,
    ),
    # Matrix products
    Case(
        "matrix by matrix",
        "matrix_multiply",
        lambda n: [floats(n, 4), floats(4, n)],
        lambda x, y: x @ y,
        lambda x, y: x @ y,
    ),
    Case(
        "batches",
        "matrix_multiply",
        lambda n: [floats(2, 1, n, 4), floats(3, 4, 5)],
        lambda x, y: x @ y,
        lambda x, y: x @ y,
    ),
    Case(
        "matrix by vector",
        "matrix_multiply",
        lambda n: [floats(n, 4), floats(4)],
        lambda x, y: x @ y,
        lambda x, y: x @ y,
    ),
    Case(
        "vector by matrix",
        "matrix_multiply",
        lambda n: [floats(n), floats(n, 4)],
        lambda x, y: x @ y,
        lambda x, y: x @ y,
    ),
    Case(
        "vector by vector",
        "matrix_multiply",
        lambda n: [floats(n), floats(n, seed=1)],
        lambda x, y: x @ y,
        lambda x, y: x @ y,
    ),
    Case("outer", "matrix_multiply", lambda n: [floats(n), floats(4)], tp.outer, torch.outer, 0),
    Case(
        "half-precision product",
        "matrix_multiply",
        lambda n: [floats(n, 64, dtype=np.float16)],
        lambda x: x @ tp.Tensor(floats(64, 8, dtype=np.float16)),
        lambda x: (x.float() @ as_torch(floats(64, 8, dtype=np.float16)).float()).half(),
        2e-3,
    ),
    # Normalizations
    normalization("layer norm", lambda: tp.LayerNorm(4), matrix, lambda x, w, b: functional.layer_norm(x, (4,), w, b)),
    normalization(
        "instance norm",
        lambda: tp.InstanceNorm(4),
        images,
        lambda x, w, b: functional.instance_norm(x, weight=w, bias=b),
    ),
    normalization("group norm", lambda: tp.GroupNorm(2, 4), images, lambda x, w, b: functional.group_norm(x, 2, w, b)),
    Case("batch norm", "unary element_wise", images, batch_norm, torch_batch_norm),
    # Convolutions
    convolution("conv 1d", 1, (3,)),
    convolution("conv 2d", 2, (3, 2), padding=(1, 0), stride=(2, 1)),
    convolution("conv 2d in groups", 2, (3, 3), groups=2, bias=False),
    convolution("conv 2d depthwise", 2, (3, 3), channels=(4, 4), groups=4, padding=(1, 1)),
    convolution("conv 2d dilated", 2, (2, 3), dilation=(3, 2), padding=(2, 1)),
    convolution("conv 3d", 3, (2, 3, 2), stride=(1, 2, 1)),
    convolution("transposed conv 1d", 1, (3,), transposed=True),
    convolution("transposed conv 2d", 2, (3, 2), transposed=True, padding=(1, 0), stride=(2, 3)),
    convolution("transposed conv 2d in groups", 2, (3, 3), transposed=True, groups=2, bias=False),
    convolution("transposed conv 2d dilated", 2, (2, 3), transposed=True, dilation=(3, 2)),
    convolution("transposed conv 3d", 3, (2, 2, 2), transposed=True),
    # Pooling
    Case(
        "max pool",
        "pooling",
        images,
        lambda x: tp.maxpool(x, (3, 2), stride=(2, 1), padding=[(1, 1), (0, 0)]),
        lambda x: functional.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
        0,
    ),
    Case(
        "max pool 3d",
        "pooling",
        lambda n: [floats(n, 2, 5, 4, 3)],
        lambda x: tp.maxpool(x, (2, 2, 2)),
        lambda x: functional.max_pool3d(x, 2, 1),
        0,
    ),
    Case(
        "average pool",
        "pooling",
        images,
        lambda x: tp.avgpool(x, (3, 2), stride=(2, 1), padding=[(1, 1), (1, 1)]),
        lambda x: functional.avg_pool2d(x, (3, 2), (2, 1), 1),
    ),
    Case(
        "average pool without padding",
        "pooling",
        images,
        lambda x: tp.avgpool(x, (3, 3), padding=[(1, 1), (1, 1)], count_include_pad=False),
        lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
    Case(
        "average pool 3d",
        "pooling",
        lambda n: [floats(n, 2, 5, 4, 3)],
        lambda x: tp.avgpool(x, (2, 2, 3), stride=(2, 1, 1)),
        lambda x: functional.avg_pool3d(x, (2, 2, 3), (2, 1, 1)),
    ),
    # Resizing
    *(resize(mode, False) for mode in TORCH_MODES),
    *(resize(mode, False, (1.5, 2.0)) for mode in TORCH_MODES),
    *(resize(mode, True) for mode in ("linear", "cubic")),
    # Quantization
    quantized("int8", tp.int8, np.array(0.02, np.float32)),
    quantized("int8 by row", tp.int8, np.float32([0.01, 0.02, 0.005, 0.1]), 0, (4, 6)),
    quantized("int8 by column", tp.int8, np.float32([0.01, 0.02, 0.005, 0.1]), 1),
    quantized("float8", tp.float8, np.array(0.01, np.float32)),
    quantized("float8 by column", tp.float8, np.float32([0.01, 0.001, 0.5, 1.0]), 1),
    quantized("int4", tp.int4, np.array(0.25, np.float32)),
    quantized("int4 by block", tp.int4, abs(floats(2, 6, seed=5)) + np.float32(0.1), None, (8, 6)),
    weight_only(tp.int8, np.array(0.02, np.float32)),
    weight_only(tp.int4, abs(floats(2, 6, seed=5)) + np.float32(0.1)),
]


#: What TensorRT refuses, and why: it runs here with the verifier off, as the reference functions can do it.
REFUSED = {
    "quantize to float8 by column": "float8 has no scales along an axis",
    "quantize to int4": "only constants are quantized to int4",
    "quantize to int4 by block": "only constants are quantized to int4",
}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kinds of operations that come from nvtripy, before any pass."""
    kinds: set[str] = set()
    original = compiler.optimize

    def optimize(graph: Graph) -> None:
        kinds.update(operation.kind for operation in graph.operations)
        original(graph)

    monkeypatch.setattr(compiler, "optimize", optimize)
    return kinds


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def memory(tensor: tp.Tensor) -> np.ndarray:
    return tensor.eval().trace_tensor.producer.data.array


def check(case: Case, results: Any, arrays: Sequence[np.ndarray]) -> None:
    expected = as_tuple(case.expected(*map(as_torch, arrays)))
    results = as_tuple(results)
    assert len(results) == len(expected)
    for result, reference in zip(map(memory, results), expected, strict=True):
        reference = reference.numpy()
        assert (result.dtype, result.shape) == (reference.dtype, reference.shape)
        if case.tolerance:
            np.testing.assert_allclose(result, reference, rtol=case.tolerance, atol=case.tolerance)
        else:
            np.testing.assert_array_equal(result, reference)


def by_name(case: Case) -> str:
    return case.name


@pytest.fixture
def verified(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name in REFUSED:
        monkeypatch.setenv("NVTRIPY_PORTABLE_VERIFY", "0")


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_evaluated(case: Case) -> None:
    arrays = case.inputs(3)
    check(case, case.tripy(*map(tp.Tensor, map(np.ascontiguousarray, arrays))), arrays)


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_compiled_with_dynamic_dimensions(case: Case, emitted: set[str]) -> None:
    small, large = case.inputs(3), case.inputs(5)
    infos = [
        tp.InputInfo(
            [a if a == b else (1, a, b) for a, b in zip(first.shape, second.shape, strict=True)], TP_DTYPES[first.dtype]
        )
        for first, second in zip(small, large, strict=True)
    ]
    compiled = tp.compile(case.tripy, args=infos)
    assert emitted >= set(case.kinds.split())
    for arrays in (small, large, small):
        on_device = [tp.copy(tp.Tensor(np.ascontiguousarray(array)), tp.device("gpu")) for array in arrays]
        check(case, compiled(*on_device), arrays)
        for tensor, array in zip(on_device, arrays, strict=True):
            np.testing.assert_array_equal(memory(tensor), array)  # no operation writes to its operands


def test_every_operation_of_the_dialect_is_covered() -> None:
    functions = {node.name for node in ast.parse(DIALECT.read_text()).body if isinstance(node, ast.FunctionDef)}
    operations = {name for name in functions if not name.startswith("_")} - {"opaque_plugin"}
    assert len(operations) == 28
    assert {kind for case in CASES for kind in case.kinds.split()} == operations


@pytest.mark.parametrize("name", REFUSED)
def test_what_tensorrt_refuses_is_refused(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    infos = [tp.InputInfo(array.shape, TP_DTYPES[array.dtype]) for array in case.inputs(4)]
    with pytest.raises(tp.TripyException, match=r"expected (scale|input) to be a (scalar|constant)"):
        tp.compile(case.tripy, args=infos)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
