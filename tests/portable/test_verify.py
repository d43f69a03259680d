"""The verifier: a legal operation of each kind passes, and whatever breaks one of its rules is refused by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest

from nvtripy_portable import compiler, verify
from nvtripy_portable.dims import Symbolic
from nvtripy_portable.graph import DTYPES, Graph, GraphError, Input, Operation, TensorType, Value

HERE = Path(__file__).name
WINDOW = {"stride": (1, 1), "pre_padding": (0, 0), "post_padding": (0, 0)}
CONVOLUTION = {**WINDOW, "num_groups": 1, "dilation": (1, 1)}
NEAREST = {"coordinate_transformation": "kASYMMETRIC", "nearest_rounding": "kFLOOR", "selector": "kFORMULA"}


def parsed(text: str) -> TensorType:
    """``f32[2, ?, n]`` as a type."""
    dtype, _, dims = text.rstrip("]").partition("[")
    shape = [dim.strip() for dim in dims.split(",") if dim.strip()]
    known = {"?": None}
    return TensorType(
        dtype, tuple(int(dim) if dim.isdigit() else known[dim] if dim in known else Symbolic.of(dim) for dim in shape)
    )


@dataclass(frozen=True)
class Case:
    """An operation: types of operands ("none" for one that is absent, with a ``=`` before it for a constant) and
    results."""

    kind: str
    operands: str
    results: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def but(self, operands: str | None = None, results: str | None = None, **attributes: Any) -> Case:
        return Case(
            self.kind,
            self.operands if operands is None else operands,
            self.results if results is None else results,
            {**self.attributes, **attributes},
        )

    def graph(self) -> Graph:
        graph = Graph()
        operands: list[Value | None] = []
        for text in filter(None, self.operands.split("; ")):
            type = parsed(text.lstrip("="))
            if text == "none":
                operands.append(None)
            elif text.startswith("="):
                value = np.ones(type.shape, DTYPES[type.dtype])  # type: ignore[arg-type]
                operands += graph.add(Operation("constant", [], {"value": value}, [type])).results
            else:
                graph.inputs.append(Input(Value(type), f"arg{len(graph.inputs)}"))
                operands.append(graph.inputs[-1].value)
        results = [parsed(text) for text in self.results.split("; ")]
        graph.outputs = graph.add(Operation(self.kind, operands, self.attributes, results, "the location")).results
        return graph


def refused(case: Case) -> str:
    with pytest.raises(GraphError) as error:
        verify.run(case.graph())
    assert error.value.location == "the location"
    return str(error.value)


RELU = Case("activation", "f16[2, 3]", "f16[2, 3]", {"operation": "kRELU"})
BROADCAST = Case("broadcast", "i4[1, 3]; i32[3]", "i4[2, 2, 3]", {"broadcast_dims": (1, 2)})
CAST = Case("cast", "i1[2]", "bf16[2]", {"dtype": "bf16"})
COLLAPSE = Case("collapse_rank", "f8e4m3fn[1, 3, 1]", "f8e4m3fn[3]", {"shape": (3,)})
CONCATENATION = Case("concatenation", "f8e4m3fn[2, 3]; f8e4m3fn[2, 1]", "f8e4m3fn[2, 4]", {"axis": 1})
CONSTANT = Case("constant", "", "f32[2]", {"value": np.ones(2, np.float32)})
CONV = Case(
    "convolution", "bf16[1, 4, 8, 8]; bf16[6, 2, 3, 3]; bf16[6]", "bf16[1, 6, 6, 6]", CONVOLUTION | {"num_groups": 2}
)
DECONV = Case("deconvolution", "i8[1, 4, 8, 8]; i8[4, 3, 3, 3]; i8[3]", "i8[1, 3, 10, 10]", CONVOLUTION)
DEQUANTIZE = Case("dequantize", "i8[4, 6]; =f16[6]", "f16[4, 6]", {"axis": 1, "dtype": "f16"})
BLOCKS = Case("dequantize", "=i4[4, 6]; =f16[2, 6]", "f16[4, 6]", {"axis": None, "dtype": "f16"})
SUM = Case("element_wise", "i8[2, 1]; i8[1, 3]", "i8[2, 3]", {"operation": "kSUM"})
GATHER = Case("gather", "bf16[4, 3]; i64[5]", "bf16[5, 3]", {"axis": 0, "num_broadcast_dims": 0})
LINSPACE = Case("linspace", "i32[2]; i64[]; i64[2]", "i64[?, ?]", {"dtype": "i64"})
MATMUL = Case("matrix_multiply", "bf16[1, 2, 3]; bf16[4, 3, 5]", "bf16[4, 2, 5]", {"op0": "kNONE", "op1": "kNONE"})
NORM = Case(
    "normalization",
    "f16[2, 3, 4]; f16[1, 1, 4]; f16[1, 1, 4]",
    "f16[2, 3, 4]",
    {"axis": (2,), "eps": 1e-5, "num_groups": 1},
)
GROUPS = Case(
    "normalization",
    "f16[2, 6, 4]; f16[1, 3, 1]; f16[1, 3, 1]",
    "f16[2, 6, 4]",
    {"axis": (2,), "eps": 1e-5, "num_groups": 3},
)
POOLING = Case(
    "pooling",
    "bf16[1, 2, 4, 4]",
    "bf16[1, 2, 3, 3]",
    {**WINDOW, "window_size": (2, 2), "pooling_type": "kMAX", "average_count_excludes_padding": None},
)
QUANTIZE = Case("quantize", "f32[4, ?]; =f32[]", "f8e4m3fn[4, ?]", {"axis": None, "dtype": "f8e4m3fn"})
QUANTIZE_I4 = Case("quantize", "=f32[4, 6]; =f32[2, 6]", "i4[4, 6]", {"axis": None, "dtype": "i4"})
REDUCE = Case("reduce", "i64[2, 3]", "i64[2]", {"axes": (1,), "operation": "kSUM", "keep_dimensions": False})
RESHAPE = Case("reshape", "i4[2, 6]; i32[2]", "i4[3, 4]")
NEAR = Case("resize_nearest", "i8[1, 2, 4, 4]; i32[4]", "i8[1, ?, ?, ?]", {"scales": None, **NEAREST})
SCALED = Case("resize_nearest", "i8[1, 2, 4, 4]; none", "i8[1, 2, 8, 8]", {"scales": (1.0, 1.0, 2.0, 2.0), **NEAREST})
SELECT = Case("select", "i1[2, 1]; i8[1, 3]; i8[2, 3]", "i8[2, 3]")
SHAPE = Case("shape", "i4[2, n]", "i32[2]")
SLICE = Case("slice", "bf16[4, ?]; i32[2]; i32[2]; i32[2]; none", "bf16[?, ?]", {"mode": "kDEFAULT"})
FILL = Case("slice", "f16[4, ?]; i32[2]; i32[2]; i32[2]; f16[]", "f16[?, ?]", {"mode": "kFILL"})
SOFTMAX = Case("softmax", "bf16[2, 3]", "bf16[2, 3]", {"axis": 1})
TOP_K = Case("top_k", "i64[2, n]", "i64[2, 5]; i32[2, 5]", {"k": 5, "axis": 1, "operation": "kMAX"})
TRANSPOSE = Case("transpose", "i4[2, 3]", "i4[3, 2]", {"permutation": (1, 0)})
NEG = Case("unary", "i64[2]", "i64[2]", {"operation": "kNEG"})

LEGAL = {
    **{name: value for name, value in globals().items() if isinstance(value, Case)},
    "a bool": CAST.but("u8[2]", "i1[2]"),
    "a comparison": SUM.but("i64[2]; i64[2]", "i1[2]", operation="kLESS"),
    "a disjunction": SUM.but("i1[2]; i1[2]", "i1[2]", operation="kOR"),
    "a vector": MATMUL.but("f32[3]; f32[3, 5]", "f32[5]", op0="kVECTOR"),
    "unknown dimensions": DEQUANTIZE.but("i8[?, ?]; =f16[6]", "f16[?, ?]"),
    "unknown channels": CONV.but("bf16[?, ?, ?, ?]; bf16[?, ?, 3, 3]; none", "bf16[?, ?, ?, ?]"),
    "an unknown size of k": TOP_K.but("f32[2, ?]", "f32[2, 3840]; i32[2, 3840]", k=3840),
    "an average": POOLING.but(pooling_type="kAVERAGE", average_count_excludes_padding=True),
    "alpha": RELU.but(operation="kELU", alpha=1.0),
}

ILLEGAL: dict[str, tuple[Case, str]] = {
    "activation of a bool": (
        RELU.but("i1[2]", "i1[2]"),
        r"activation kRELU: expected input of type i8, .* got i1\[2\]",
    ),
    "activation of an integer": (
        RELU.but("i32[2]", "i32[2]", operation="kTANH"),
        "kTANH: expected input of type i8, f16",
    ),
    "no such activation": (RELU.but(operation="kSWISH"), "operation to be one of kRELU, .* but got kSWISH"),
    "alpha is missing": (RELU.but(operation="kELU"), "expected alpha to be given but got None"),
    "beta is too much": (RELU.but(beta=1.0), "expected beta to be absent but got 1.0"),
    "broadcast by i64": (BROADCAST.but("i4[1, 3]; i64[3]"), "expected shape of type i32 but got i64"),
    "broadcast twice": (BROADCAST.but(broadcast_dims=(1, 1)), r"2 different numbers but got \[1, 1\]"),
    "broadcast beyond": (BROADCAST.but(broadcast_dims=(1, 3)), "within the 3 dimensions of the result"),
    "cast from f8": (CAST.but("f8e4m3fn[2]"), "expected input of type i1, .* but got f8e4m3fn"),
    "cast to i4": (CAST.but(results="i4[2]"), "expected the result of type i1, .* but got i4"),
    "cast to another shape": (CAST.but(results="bf16[3]"), r"of the shape of i1\[2\] but got bf16\[3\]"),
    "collapse what is not one": (COLLAPSE.but("f16[2, 3, 1]", "f16[3]"), "lack dimensions of size 1"),
    "collapse to more": (COLLAPSE.but("f16[3]", "f16[3, 1]"), "at most 1 dimensions"),
    "concatenation of i4": (CONCATENATION.but("i4[2]; i4[2]", "i4[4]", axis=0), r"inputs\[0\] of type"),
    "concatenation of types": (CONCATENATION.but("f16[2]; f32[2]", "f16[4]", axis=0), r"inputs\[1\] of type f16, as"),
    "concatenation of ranks": (CONCATENATION.but("f16[2]; f16[2, 2]", "f16[4]", axis=0), "of one rank"),
    "concatenation of nothing": (CONCATENATION.but("", "f16[4]"), r"expected operands inputs\[0\] but got none"),
    "concatenation beyond": (CONCATENATION.but(axis=2), "axis to be within the 2 dimensions"),
    "constant of another type": (CONSTANT.but(results="f16[2]"), r"f16\[2\] for float32\[2\]"),
    "convolution of int8": (
        CONV.but("i8[1, 4, 8, 8]; i8[6, 2, 3, 3]", "i8[1, 6, 6, 6]"),
        "input of type f16, bf16, f32",
    ),
    "convolution in groups": (CONV.but(num_groups=3), "input of channels that 3 groups divide"),
    "convolution to groups": (CONV.but("bf16[1, 4, 8, 8]; bf16[5, 2, 3, 3]"), "output channels that 2 groups divide"),
    "convolution's bias": (CONV.but("bf16[1, 4, 8, 8]; bf16[6, 2, 3, 3]; bf16[5]"), "element for each of 6 output"),
    "convolution's stride": (CONV.but(stride=(1,)), r"stride to be 2 numbers but got \[1\]"),
    "convolution of vectors": (CONV.but("bf16[1, 4]; bf16[6, 4]", "bf16[1, 6]"), "rank of at least 3"),
    "deconvolution of bf16": (DECONV.but("bf16[1, 4, 8, 8]; bf16[4, 3, 3, 3]"), "input of type i8, f16, f32"),
    "dequantize by an input": (DEQUANTIZE.but("i8[4, 6]; f16[6]"), "scale to be a constant that is known"),
    "dequantize a number": (DEQUANTIZE.but("i8[]; =f16[]", "f16[]", axis=None), "input of a rank of at least 1"),
    "dequantize to another type": (DEQUANTIZE.but(results="f32[4, 6]"), "result of type f16, as the operands before"),
    "dequantize f8 by column": (DEQUANTIZE.but("f8e4m3fn[4, 6]; =f16[6]"), "to be a scalar for f8e4m3fn"),
    "dequantize without an axis": (DEQUANTIZE.but(axis=None), "scalar where no axis is given"),
    "dequantize beyond": (DEQUANTIZE.but(axis=2), "axis to be within the 2 dimensions of input but got 2"),
    "dequantize too few": (DEQUANTIZE.but(axis=0), "as long as dimension 0 of"),
    "blocks of i8": (BLOCKS.but("=i8[4, 6]; =f16[2, 6]"), "only i4 has blocks"),
    "blocks of another size": (BLOCKS.but("=i4[4, 6]; =f16[3, 6]"), "blocks that divide"),
    "blocks of another width": (BLOCKS.but("=i4[4, 6]; =f16[2, 3]"), "blocks that divide"),
    "an odd row of i4": (BLOCKS.but("=i4[4, 5]; =f16[2, 5]", "f16[4, 5]"), "even last dimension"),
    "sum of bools": (SUM.but("i1[2]; i1[2]", "i1[2]"), "element_wise kSUM: expected lhs of type i8"),
    "sum of types": (SUM.but("f16[2]; f32[2]", "f16[2]"), "rhs of type f16, as the operands before it"),
    "sum of ranks": (SUM.but("f16[2]; f16[1, 2]", "f16[1, 2]"), "lhs and rhs of one rank"),
    "sum that is a bool": (SUM.but(results="i1[2, 3]"), "the result of type i8 but got i1"),
    "comparison that is a number": (SUM.but(operation="kEQUAL"), "the result of type i1 but got i8"),
    "disjunction of numbers": (SUM.but(operation="kOR"), "lhs of type i1 but got"),
    "power of i32": (SUM.but("i32[2]; i32[2]", "i32[2]", operation="kPOW"), "kPOW: expected lhs of type i8, i64, f16"),
    "gather of f8": (GATHER.but("f8e4m3fn[4, 3]; i32[5]"), "data of type i1"),
    "gather by i8": (GATHER.but("bf16[4, 3]; i8[5]"), "indices of type i32, i64 but got i8"),
    "gather beyond": (GATHER.but(axis=2), "axis to be within the 2 dimensions of data"),
    "gather by a batch": (GATHER.but(num_broadcast_dims=1), r"within \[0, 0\]"),
    "linspace of f16": (LINSPACE.but("i32[2]; f16[]; f16[2]", "f16[?, ?]"), "start of type i32, i64, f32"),
    "linspace of other steps": (LINSPACE.but("i32[2]; i64[]; i32[2]"), "step of type i64, as"),
    "linspace of few steps": (LINSPACE.but("i32[2]; i64[]; i64[1]"), "step to be 1-D and of 2 elements"),
    "linspace from a vector": (LINSPACE.but("i32[2]; i64[2]; i64[2]"), "start to be a scalar"),
    "product of integers": (MATMUL.but("i8[2, 3]; i8[3, 5]", "i8[2, 5]"), "input0 of type f16"),
    "product of batches": (MATMUL.but("bf16[1, 2, 3]; bf16[3, 5]"), "equally many batch dimensions"),
    "product of a vector": (MATMUL.but("bf16[3]; bf16[3, 5]"), "input0 of a rank of at least 2 for kNONE"),
    "product of what": (MATMUL.but(op1="kWHAT"), "op1 to be one of kNONE"),
    "normalization of types": (NORM.but("f16[2, 3, 4]; f32[1, 1, 4]; f32[1, 1, 4]"), "scale of type f16, as"),
    "normalization of ranks": (NORM.but("f16[2, 3, 4]; f16[4]; f16[4]"), "input and scale and bias of one rank"),
    "normalization beyond": (NORM.but(axis=(3,)), "axis to be within"),
    "groups that do not divide": (GROUPS.but(num_groups=4), "channels that 4 groups divide"),
    "groups of another scale": (
        GROUPS.but("f16[2, 6, 4]; f16[1, 6, 1]; f16[1, 3, 1]"),
        r"scale of the shape \[1, 3, 1\]",
    ),
    "groups of other axes": (GROUPS.but(axis=(1,)), "all after the channels"),
    "pooling of rank 3": (POOLING.but("bf16[1, 4, 4]"), "input of rank 4 or 5"),
    "pooling of i32": (POOLING.but("i32[1, 2, 4, 4]"), "input of type i8, f16, bf16, f32"),
    "pooling in one dimension": (POOLING.but(window_size=(2,)), "window_size to be 2 numbers"),
    "a maximum that averages": (POOLING.but(average_count_excludes_padding=True), "to be absent but got True"),
    "quantize to i32": (QUANTIZE.but(results="i32[4, ?]"), "the result of type i8, f8e4m3fn, i4"),
    "quantize by integers": (QUANTIZE.but("f32[4, ?]; =i32[]"), "scale of type f16"),
    "quantize f8 by column": (QUANTIZE.but("f32[4, 6]; =f32[6]", axis=1), "to be a scalar for f8e4m3fn"),
    "quantize an input to i4": (
        QUANTIZE_I4.but("f32[4, 6]; =f32[2, 6]"),
        "input to be a constant where the result is i4",
    ),
    "reduce a bool": (REDUCE.but("i1[2, 3]", "i1[2]"), "input of type i8"),
    "reduce beyond": (REDUCE.but(axes=(2,)), "axes to be within the 2 dimensions"),
    "reshape by i64": (RESHAPE.but("i4[2, 6]; i64[2]"), "shape of type i32"),
    "reshape to unknown ranks": (RESHAPE.but("i4[2, 6]; i32[?]"), "shape to be 1-D and of a known length"),
    "reshape to another rank": (RESHAPE.but("i4[2, 6]; i32[3]"), "1-D and of 2 elements"),
    "resize bf16": (NEAR.but("bf16[1, 2, 4, 4]; i32[4]"), "input of type i8, f16, f32"),
    "resize the batch": (NEAR.but(results="i8[2, 2, 4, 4]"), "but for the last 3 dimensions"),
    "resize the channels": (
        Case("resize_cubic", "f16[1, 2, 4, 4]; none", "f16[1, 4, 4, 4]", {"scales": (1.0, 2.0, 1.0, 1.0)}),
        "to be 1 but for the last 2",
    ),
    "resize both ways": (SCALED.but("i8[1, 2, 4, 4]; i32[4]"), "scales to be given where output_shape is not"),
    "select by numbers": (SELECT.but("i8[2]; i8[2]; i8[2]", "i8[2]"), "condition of type i1"),
    "select of f8": (SELECT.but("i1[2]; f8e4m3fn[2]; f8e4m3fn[2]", "f8e4m3fn[2]"), "then of type i1"),
    "select of ranks": (SELECT.but("i1[2]; i8[1, 2]; i8[1, 2]"), "of one rank"),
    "shape in i64": (SHAPE.but(results="i64[2]"), "the result of type i32"),
    "slice of i4": (SLICE.but("i4[4, ?]; i32[2]; i32[2]; i32[2]"), "input of type i1"),
    "slice of one dimension": (SLICE.but("bf16[4, ?]; i32[1]; i32[2]; i32[2]"), "start to be 1-D and of 2 elements"),
    "a fill without kFILL": (FILL.but(mode="kDEFAULT"), "mode to be kFILL where a fill is given"),
    "a fill of bf16": (SLICE.but(mode="kREFLECT"), "another type than bf16 in the mode kREFLECT"),
    "slice without a start": (
        SLICE.but("bf16[4, ?]; none; i32[2]; i32[2]"),
        "operands input, start, size, stride, fill",
    ),
    "softmax of integers": (SOFTMAX.but("i32[2, 3]", "i32[2, 3]"), "input of type f16, bf16, f32"),
    "softmax beyond": (SOFTMAX.but(axis=-1), "axis to be within the 2 dimensions of input but got -1"),
    "the most of i8": (TOP_K.but("i8[2, 9]", "i8[2, 5]; i32[2, 5]"), "input of type i32"),
    "the most of few": (TOP_K.but("i64[2, 4]"), "k to be at most 4"),
    "too many of the most": (TOP_K.but(k=3841), "k to be at most 3840"),
    "positions in i64": (TOP_K.but(results="i64[2, 5]; i64[2, 5]"), "the result of type i32 but got i64"),
    "transpose one twice": (TRANSPOSE.but(permutation=(0, 0)), r"permutation to be of the 2 dimensions .* \[0, 0\]"),
    "the root of an integer": (NEG.but(operation="kSQRT"), "unary kSQRT: expected input of type f16, bf16, f32"),
    "the tangent of bf16": (NEG.but("bf16[2]", "bf16[2]", operation="kTAN"), "input of type f16, f32 but got bf16"),
    "not of a number": (NEG.but(operation="kNOT"), "input of type i1 but got"),
    "one operand too many": (NEG.but("i64[2]; i64[2]"), "operands to be at most 1 but got 2"),
    "no such operation": (Case("einsum", "f32[2]", "f32[2]"), "one of TensorRT's operations but got einsum"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_tensorrt_accepts_passes(name: str) -> None:
    verify.run(LEGAL[name].graph())


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_tensorrt_refuses_is_refused(name: str) -> None:
    case, message = ILLEGAL[name]
    assert re.search(message, refused(case))


def test_every_rule_is_tested() -> None:
    kinds = {case.kind.replace("nearest", "*").replace("cubic", "*") for case, _ in ILLEGAL.values()}
    assert kinds >= {re.sub("nearest|cubic|linear", "*", kind) for kind in verify._RULES}


def test_a_scale_may_be_computed_from_constants() -> None:
    graph = QUANTIZE.but("f32[4, 6]; =f32[]").graph()
    quantize = graph.operations[-1]
    half = Operation("element_wise", [quantize.operands[1]] * 2, {"operation": "kSUM"}, [parsed("f32[]")])
    graph.operations.insert(-1, half)
    quantize.operands[1] = half.results[0]
    verify.run(graph)
    half.operands[1] = graph.inputs[0].value
    graph.inputs[0].value.set_type(parsed("f32[]"))
    with pytest.raises(GraphError, match="scale to be a constant"):
        half.operands[0] = graph.inputs[0].value
        quantize.operands[0] = Operation(
            "constant", [], {"value": np.ones((4, 6), np.float32)}, [parsed("f32[4, 6]")]
        ).results[0]
        verify.run(graph)


# --- as a user of nvtripy sees it -------------------------------------------------------------------------------------


def most_of_many(x: tp.Tensor) -> tp.Tensor:
    return tp.topk(x, 3841, dim=0)[0]


def test_a_refusal_names_the_users_line() -> None:
    with pytest.raises(tp.TripyException) as error:
        tp.compile(most_of_many, args=[tp.InputInfo((5000,), tp.float32)])
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error.value))
    assert "top_k kMAX: expected k to be at most 3840 for f32[5000, 1] but got 3841" in text
    assert f"{HERE}:{most_of_many.__code__.co_firstlineno + 1} in most_of_many()" in text


def test_evaluation_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = tp.Tensor(np.arange(4, dtype=np.int32))
    monkeypatch.setattr(tp.config, "enable_input_validation", False)
    with pytest.raises(tp.TripyException, match="kPOW: expected lhs of type"):
        (numbers**numbers).eval()
    monkeypatch.setenv("NVTRIPY_PORTABLE_VERIFY", "0")
    assert (numbers**numbers).tolist() == [1, 1, 4, 27]


def test_it_comes_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "PASSES", (lambda graph: pytest.fail("a pass ran"),))
    with pytest.raises(GraphError, match="expected input of type i1"):
        compiler.optimize(NEG.but(operation="kNOT").graph())


def test_constants_of_every_type() -> None:
    for name, dtype in DTYPES.items():
        case = Case("constant", "", f"{name}[2]", {"value": np.ones(2).astype(dtype)})
        if name == "u8":
            assert "of type i1" in refused(case)
        else:
            verify.run(case.graph())
    assert DTYPES["i4"] == np.dtype(ml_dtypes.int4)
