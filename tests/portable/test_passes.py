"""The passes and the shape inference: a graph means the same after them, and what they claim to know of it is true.

Random programs are traced through nvtripy once each; the graph that arrives is optimized by every selection of the
passes, and all run on inputs of several sizes. No pass reorders arithmetic, so results are equal to the last bit.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from graphs import UNFUSED, clone, kinds, optimized, run, traced
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvtripy_portable import compiler, dims, shape_inference
from nvtripy_portable.dims import Dim, Symbolic
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Bounds, Graph, GraphError, Input, Operation, TensorType, Value
from nvtripy_portable.passes import fold_constants, merge_equal
from nvtripy_portable.plan import Plan

I32 = np.int32

#: The passes that are tested here. Those after them exchange operations for faster ones, which may round otherwise.
PASSES = UNFUSED


# --- tools ------------------------------------------------------------------------------------------------------------


def run_recorded(graph: Graph, inputs: list[np.ndarray]) -> dict[Value, np.ndarray]:
    """What every value of a graph is at run time."""
    recorded: dict[Value, np.ndarray] = {entry.value: array for entry, array in zip(graph.inputs, inputs, strict=True)}
    plan = Plan(graph)
    computed = [operation for operation in graph.operations if operation.kind != "constant"]

    def watched(operation: Operation, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            results = function(*operands)
            many = results if isinstance(results, tuple) else (results,)
            recorded.update(zip(operation.results, many, strict=True))
            return results

        return call

    for step, operation in zip(plan.steps, computed, strict=True):
        step.function = watched(operation, step.function)
    executable = Executable(graph)
    executable._runner = plan
    executable.run(inputs)
    return recorded


def evaluate(dim: Dim, sizes: dict[str, int]) -> int | None:
    """The number that a dim stands for: its text, computed by Python."""
    if dim is None or isinstance(dim, int):
        return dim
    text = re.sub(r"%[\w.]+|[A-Za-z]+(?!\w|\()", lambda match: str(sizes[match[0]]), str(dim))
    assert re.fullmatch(r"(floor|max|min|[\d\s()+*/,-])*", text), text
    return eval(text, {"__builtins__": {}, "floor": math.floor, "max": max, "min": min})


def symbols_of(graph: Graph, inputs: list[np.ndarray]) -> dict[str, int]:
    """The sizes that symbols stand for, given the inputs."""
    sizes: dict[str, int] = {}
    for entry, array in zip(graph.inputs, inputs, strict=True):
        for index, size in enumerate(array.shape):
            sizes[f"%{entry.name}.{index}"] = size
            if index in entry.dimension_names:
                sizes[entry.dimension_names[index]] = size
        if entry.value_bounds is not None:
            sizes[f"%{entry.name}"] = int(array)
    return sizes


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


# --- random programs --------------------------------------------------------------------------------------------------

Shape = tuple[str, ...]  # the dimensions of a tensor as Python expressions of the sizes T and U
MOST_ELEMENTS = 4000
LEAST, MOST = {"T": 2, "U": 1}, {"T": 5, "U": 4}


def size(expression: str, sizes: dict[str, int] = MOST) -> int:
    return eval(expression, {"__builtins__": {}}, dict(sizes))


class Program:
    """A random function of tensors: a list of tensors to which each step adds some, made of those that are there."""

    def __init__(self, seed: int, steps: int = 14) -> None:
        self.seed = seed
        self.steps = steps

    def infos(self) -> list[Any]:
        choice = random.Random(self.seed)
        t = choice.choice([tp.NamedDimension("T", 2, 3, 5), (2, 3, 5), 4])
        u = choice.choice([tp.NamedDimension("U", 1, 2, 4), (1, 2, 4), 3])
        self.named = isinstance(t, tp.NamedDimension), isinstance(u, tp.NamedDimension)
        self.sizes = [{"T": 2, "U": 4}, {"T": 5, "U": 1}, {"T": 3, "U": 3}]
        for name, dimension in (("T", t), ("U", u)):
            if isinstance(dimension, int):
                for each in self.sizes:
                    each[name] = dimension
        return [
            tp.InputInfo((t, 3), tp.float32),
            tp.InputInfo((2, u, t), tp.float32),
            tp.InputInfo((u,), tp.int32),
            tp.DimensionInputInfo((2, 3, 5)),
        ]

    def inputs(self, sizes: dict[str, int]) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [
            rng.standard_normal((sizes["T"], 3)).astype(np.float32),
            rng.standard_normal((2, sizes["U"], sizes["T"])).astype(np.float32),
            rng.integers(0, 2, sizes["U"]).astype(np.int32),
            np.array(sizes["T"], np.int32),
        ]

    def __call__(self, x: tp.Tensor, y: tp.Tensor, z: tp.Tensor, n: tp.DimensionSize) -> list[tp.Tensor]:
        self.choice = random.Random(self.seed + 1)
        self.pool: list[tuple[tp.Tensor, Shape]] = [
            (x, ("T", "3")),
            (y, ("2", "U", "T")),
            (tp.cast(z, tp.float32), ("U",)),
            (tp.iota((n, 2)), ("T", "2")),
        ]
        makers = [getattr(self, name) for name in dir(Program) if name.startswith("make_")]
        makers += [self.make_unary, self.make_binary] * 3  # which come in many kinds
        for _ in range(self.steps):
            tensor, shape = self.choice.choice(self.pool[-5:] if self.choice.random() < 0.7 else self.pool)
            made = self.choice.choice(makers)(tensor, shape)
            if made is not None and 0 < math.prod(map(size, made[1])) < MOST_ELEMENTS and len(made[1]) <= 4:
                self.pool.append(made)
        outputs = [tensor for tensor, _ in self.pool[-4:]]
        shapes = [tp.stack([tp.reshape(each, (1,)) for each in tensor.shape]) for tensor in outputs if tensor.rank]
        return outputs + shapes[:2]

    def axis(self, shape: Shape) -> int:
        return self.choice.randrange(len(shape))

    def make_unary(self, x: tp.Tensor, shape: Shape) -> Any:
        functions = (tp.relu, tp.sigmoid, tp.tanh, tp.gelu, tp.exp, abs, lambda t: -t, lambda t: t * 0.5)
        return self.choice.choice(functions)(x), shape

    def make_binary(self, x: tp.Tensor, shape: Shape) -> Any:
        functions = (
            lambda a, b: a + b,
            lambda a, b: a - b,
            lambda a, b: a * b,
            lambda a, b: a // b,
            tp.maximum,
            tp.minimum,
            lambda a, b: tp.where(a > b, a, b),
        )
        others = [tensor for tensor, other in self.pool if other == shape]
        return self.choice.choice(functions)(x, self.choice.choice(others)), shape

    def make_broadcast(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return x + tp.Tensor([1.0, 2.0]), ("2",)
        return x - tp.max(x, dim=self.axis(shape), keepdim=True), shape

    def make_constant(self, x: tp.Tensor, shape: Shape) -> Any:
        values = np.random.default_rng(self.choice.randrange(99)).standard_normal(3).astype(np.float32)
        return (x * tp.Tensor(values) + tp.Tensor(values), shape) if shape[-1:] == ("3",) else None

    def make_permutation(self, x: tp.Tensor, shape: Shape) -> Any:
        order = self.choice.sample(range(len(shape)), len(shape))
        return tp.permute(x, order), tuple(shape[index] for index in order)

    def make_rank(self, x: tp.Tensor, shape: Shape) -> Any:
        axis = self.choice.randrange(len(shape) + 1)
        if axis < len(shape) and shape[axis] == "1":
            return tp.squeeze(x, axis), shape[:axis] + shape[axis + 1 :]
        return tp.unsqueeze(x, axis), (*shape[:axis], "1", *shape[axis:])

    def make_flat(self, x: tp.Tensor, shape: Shape) -> Any:
        if len(shape) < 2:
            return None
        total = "*".join(f"({each})" for each in shape)
        if self.choice.random() < 0.5:
            return tp.flatten(x), (total,)
        last = x.shape[len(shape) - 1]
        rows = "*".join(f"({each})" for each in shape[:-1])
        return tp.reshape(x, (-1, last)), (rows, shape[-1])

    def make_swapped_shape(self, x: tp.Tensor, shape: Shape) -> Any:
        return (tp.reshape(x, x.shape[::-1]), shape[::-1]) if len(shape) > 1 else None

    def make_concatenation(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        axis = self.axis(shape)
        others = [
            (t, s)
            for t, s in self.pool
            if s[:axis] + s[axis + 1 :] == shape[:axis] + shape[axis + 1 :] and len(s) == len(shape)
        ]
        other, its = self.choice.choice(others)
        return tp.concatenate([x, other], dim=axis), (*shape[:axis], f"({shape[axis]}+{its[axis]})", *shape[axis + 1 :])

    def make_slice(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        axis, which = self.axis(shape), self.choice.randrange(5)
        index, result = [
            (slice(1, None), f"({shape[axis]}-1)"),
            (slice(None, -1), f"({shape[axis]}-1)"),
            (slice(None, None, 2), f"(({shape[axis]}+1)//2)"),
            (slice(None, None, -1), shape[axis]),
            (slice(0, 2), f"(2 if ({shape[axis]})>2 else ({shape[axis]}))"),
        ][which]
        if size(result, LEAST) < 1:
            return None
        return x[(*[slice(None)] * axis, index)], (*shape[:axis], result, *shape[axis + 1 :])

    def make_element(self, x: tp.Tensor, shape: Shape) -> Any:
        return (x[-1], shape[1:]) if shape else None

    def make_flip(self, x: tp.Tensor, shape: Shape) -> Any:
        return (tp.flip(x, self.axis(shape)), shape) if shape else None

    def make_reduction(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        axis, keep = self.axis(shape), self.choice.random() < 0.5
        function = self.choice.choice([tp.sum, tp.mean, tp.max, tp.min])
        return function(x, dim=axis, keepdim=keep), (*shape[:axis], *(["1"] if keep else []), *shape[axis + 1 :])

    def make_softmax(self, x: tp.Tensor, shape: Shape) -> Any:
        return (tp.softmax(x, dim=self.axis(shape)), shape) if shape else None

    def make_product(self, x: tp.Tensor, shape: Shape) -> Any:
        if len(shape) < 2:
            return None
        return x @ tp.transpose(x, -1, -2), (*shape[:-1], shape[-2])

    def make_casts(self, x: tp.Tensor, shape: Shape) -> Any:
        dtype = self.choice.choice([tp.int32, tp.float16, tp.bool, tp.float32, tp.int64])
        return tp.cast(tp.cast(x, dtype), tp.float32), shape

    def make_size_of_dimension(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        axis = self.axis(shape)
        dimension = x.shape[axis]
        which = self.choice.randrange(6)
        if which == 0:
            return tp.iota((dimension * 2, 3)), (f"2*({shape[axis]})", "3")
        if which == 1:
            return tp.full((3, dimension), 2.5), ("3", shape[axis])
        if which == 2:
            return tp.cast(tp.reshape(dimension * 3 - 2, (1,)), tp.float32), ("1",)
        if which == 3:
            return tp.ones((dimension // 2 + 1,)), (f"(({shape[axis]})//2+1)",)
        if which == 4:
            return tp.zeros((tp.maximum(dimension, tp.DimensionSize(3)), 2)), (
                f"(({shape[axis]}) if ({shape[axis]})>3 else 3)",
                "2",
            )
        return tp.expand(tp.unsqueeze(x, 0), (dimension, *x.shape)), (shape[axis], *shape)

    def make_gathering(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        axis = self.axis(shape)
        return tp.gather(x, axis, tp.Tensor([0, -1, 0])), (*shape[:axis], "3", *shape[axis + 1 :])

    def make_stack(self, x: tp.Tensor, shape: Shape) -> Any:
        return tp.stack([x, x * 2.0]), ("2", *shape)

    def make_padding(self, x: tp.Tensor, shape: Shape) -> Any:
        if not shape:
            return None
        return tp.pad(x, [(1, 0)] * len(shape), value=0.5), tuple(f"({each}+1)" for each in shape)

    def make_top(self, x: tp.Tensor, shape: Shape) -> Any:
        return (tp.topk(x, 1, dim=0)[self.choice.randrange(1)], ("1", *shape[1:])) if shape else None

    def make_quantized(self, x: tp.Tensor, shape: Shape) -> Any:
        weight = tp.Tensor(np.random.default_rng(3).standard_normal((3, 3)).astype(np.float32))
        scale = tp.Tensor(np.array([0.5, 0.25, 0.125], np.float32))
        dequantized = tp.dequantize(tp.quantize(weight, scale, tp.int8, dim=0), scale, tp.float32, dim=0)
        return (x @ dequantized, shape) if len(shape) > 1 and shape[-1] == "3" else None


SELECTIONS = {
    "none": (),
    "fold": (fold_constants.run,),
    "merge": (merge_equal.run,),
    "merge, fold": (merge_equal.run, fold_constants.run),
    "fold, merge": PASSES,
    "merge, fold, merge": (merge_equal.run, *PASSES),
    "twice": PASSES * 2,
}
PROGRAMS = 40


@pytest.mark.parametrize("seed", range(PROGRAMS // 5))
def test_a_random_program_means_the_same_and_is_known(seed: int) -> None:
    check_program(seed, Counter())


@pytest.mark.slow
def test_many_random_programs_and_what_they_are_made_of() -> None:
    """Over all of them: most dims and many contents are known, and they are made of most of the dialect."""
    totals: Counter[str] = Counter()
    for seed in range(PROGRAMS):
        check_program(seed, totals)
    assert totals["dims"] > 20 * totals["unknown dims"]
    assert totals["elements"] > 500
    expected = """activation broadcast cast collapse_rank concatenation constant dequantize element_wise gather linspace
        matrix_multiply quantize reduce reshape select shape slice softmax top_k transpose unary"""
    assert {kind for kind in expected.split() if not totals[kind]} == set()


def check_program(seed: int, totals: Counter[str]) -> None:
    program = Program(seed)
    infos = program.infos()
    with np.errstate(all="ignore"):
        raw = traced(program, *infos)
        totals.update(kinds(raw))
        graphs = {name: optimized(raw, passes) for name, passes in SELECTIONS.items()}
        assert len(graphs["fold, merge"].operations) <= len(graphs["fold"].operations) <= len(raw.operations)
        assert kinds(graphs["twice"]) == kinds(graphs["fold, merge"])
        everything = optimized(raw, compiler.PASSES)
        for sizes in program.sizes:
            inputs = program.inputs(sizes)
            expected = run(raw, inputs)
            for graph in graphs.values():
                assert_same(run(graph, inputs), expected)
            check_what_is_known(graphs["fold, merge"], inputs, totals)
            check_what_is_known(everything, inputs, totals)
            if "dequantize" not in kinds(raw):  # whose products are the ones that other operations replace
                assert_same(run(everything, inputs), expected)


def check_what_is_known(graph: Graph, inputs: list[np.ndarray], totals: Counter[str]) -> None:
    """Every type and every content that was inferred holds for what the operations really give."""
    sizes = symbols_of(graph, inputs)
    for value, array in run_recorded(graph, inputs).items():
        assert DTYPE_NAMES[array.dtype] == value.type.dtype
        assert array.ndim == value.type.rank
        for dim, length in zip(value.type.shape, array.shape, strict=True):
            known = evaluate(dim, sizes)
            assert known in (None, length), f"{value.type} is {array.shape} for {sizes}"
            totals["unknown dims" if known is None else "dims"] += 1
        contents = value.contents if isinstance(value.contents, tuple) else (value.contents,)
        for dim, element in zip(contents, array.reshape(-1).tolist(), strict=False):
            known = evaluate(dim, sizes)
            assert known in (None, element), f"{value.contents} is {array} for {sizes}"
            totals["elements"] += known is not None


def test_the_compiler_begins_with_these_passes() -> None:
    assert compiler.PASSES[:3] == SELECTIONS["merge, fold, merge"]


# --- shape inference --------------------------------------------------------------------------------------------------


def as_type(*shape: int | str | None) -> TensorType:
    return TensorType("f32", tuple(Symbolic.of(dim) if isinstance(dim, str) else dim for dim in shape))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (1, "a", "a"),
        ("a", "a", "a"),
        ("a", "b", None),  # equal, or one of them 1: which one, only the run shows
        (3, "a", 3),  # a is 3 or 1
        (0, "a", 0),
        (1, 0, 0),
        (None, 1, None),
        (None, 3, 3),
        (None, "a", None),
    ],
)
def test_broadcasting_of_dims(left: Any, right: Any, expected: Any) -> None:
    for operands in ((left, right), (right, left)):
        types: list[TensorType | None] = [as_type(2, dim) for dim in operands]
        assert shape_inference.infer("element_wise", types, [None, None], {"operation": "kSUM"}) == [
            as_type(2, expected)
        ]
        types = [as_type(operands[0]), as_type(2, operands[1])]
        assert shape_inference.infer("element_wise", types, [None, None], {"operation": "kSUM"}) == [
            as_type(2, expected)
        ]


@pytest.mark.parametrize(
    ("start", "size", "stride", "expected"),
    [
        (0, 4, 1, ["a", 3, "b", 5]),
        (1, 2, 1, [3, "b"]),
        (0, 2, 2, ["a", "b"]),
        (3, 4, -1, [5, "b", 3, "a"]),
        (2, 3, 0, ["b", "b", "b"]),
        (1, 0, 1, []),
    ],
)
def test_a_slice_of_a_shape_is_known(start: int, size: int, stride: int, expected: list[Any]) -> None:
    type = TensorType("f32", (None, 3, None, 5))
    entry = Input(Value(type), "arg0", Bounds((1, 3, 1, 5), (2, 3, 2, 5), (9, 3, 9, 5)), {0: "a", 2: "b"})
    graph = Graph([entry])
    shape = apply(graph, "shape", [entry.value], TensorType("i32", (4,)))
    parameters = [constant(graph, [each], np.int32) for each in (start, size, stride)]
    sliced = apply(graph, "slice", [shape, *parameters, None], TensorType("i32", (None,)), mode="kDEFAULT")
    graph.outputs = [apply(graph, "cast", [sliced], TensorType("i64", (None,)), dtype="i64")]
    fold_constants.run(graph)
    (known,) = graph.outputs
    assert known.type == TensorType("i64", (len(expected),))
    assert [str(dim) for dim in known.contents] == [str(dim) for dim in expected]  # type: ignore[union-attr]
    inputs = [np.zeros((7, 3, 2, 5), np.float32)]
    check_what_is_known(graph, inputs, Counter())
    sizes = {"a": 7, "b": 2}
    assert run(graph, inputs)[0].tolist() == [sizes.get(each, each) for each in expected]


# --- fold_constants ---------------------------------------------------------------------------------------------------


def test_constants_are_computed() -> None:
    table = tp.Tensor([[1.0, 2.0], [3.0, 4.0]])

    def program(x: tp.Tensor) -> tp.Tensor:
        return x + tp.transpose(table * 2.0 + tp.ones((2, 2)), 0, 1)[0]

    graph = optimized(traced(program, tp.InputInfo((2,), tp.float32)))
    assert kinds(graph) == {"constant": 1, "element_wise": 1}
    assert graph.operations[0].attributes["value"].tolist() == [3, 7]


def test_dequantize_stays_and_quantize_does_not() -> None:
    weight = tp.Tensor(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    scale = tp.Tensor(np.full(3, 0.01, np.float32))

    def program(x: tp.Tensor) -> tp.Tensor:
        return x @ tp.dequantize(tp.quantize(weight, scale, tp.int8, dim=0), scale, tp.float32, dim=0)

    graph = optimized(traced(program, tp.InputInfo((2, 3), tp.float32)))
    assert kinds(graph) == {"constant": 2, "dequantize": 1, "matrix_multiply": 1}
    packed = graph.operations[-2].operands[0]
    assert packed is not None and packed.constant is not None
    assert packed.constant.dtype == np.int8
    assert packed.constant.tolist() == np.rint(np.linspace(-100, 100, 12)).reshape(3, 4).tolist()


@pytest.mark.parametrize(("rows", "folds"), [(256, True), (257, False)])
def test_a_broadcast_is_left_alone_once_it_is_large(rows: int, folds: bool) -> None:
    # 1 MiB is 256 rows of 1024 float32.
    graph = optimized(traced(lambda x: x + tp.ones((rows, 1024)), tp.InputInfo((rows, 1024), tp.float32)))
    assert kinds(graph)["broadcast"] == (0 if folds else 1)
    biggest = max(value.nbytes for value in compiler._constants(graph).values())
    assert biggest == (rows * 1024 * 4 if folds else 8)


def test_what_does_not_grow_is_computed_at_any_size() -> None:
    weight = tp.Tensor(np.arange(3 * 2**18, dtype=np.float32).reshape(3, -1))
    graph = optimized(traced(lambda x: tp.transpose(weight, 0, 1) * x, tp.InputInfo((3,), tp.float32)))
    assert kinds(graph)["transpose"] == 0
    (large,) = (value for value in compiler._constants(graph).values() if value.size > 3)
    assert large.shape == (2**18, 3)
    np.testing.assert_array_equal(large, np.arange(3 * 2**18, dtype=np.float32).reshape(3, -1).T)


def test_constants_that_survive_are_nobody_elses() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = tp.Tensor(array)
    graph = optimized(traced(lambda x: x + tp.transpose(weight, 0, 1), tp.InputInfo((3, 2), tp.float32)))
    (constant,) = compiler._constants(graph).values()
    assert constant.tolist() == array.T.tolist()
    assert not np.shares_memory(constant, array)


def constant(graph: Graph, value: Any, dtype: Any) -> Value:
    array = np.asarray(value, dtype)
    type = TensorType(DTYPE_NAMES[array.dtype], array.shape)
    return graph.add(Operation("constant", [], {"value": array}, [type])).results[0]


def apply(graph: Graph, kind: str, operands: list[Value | None], type: TensorType, **attributes: Any) -> Value:
    return graph.add(Operation(kind, operands, attributes, [type])).results[0]


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    ("operation", "a", "b", "dtype", "expected"),
    [
        ("kSUM", LARGEST, 1, np.int32, -(2**31)),
        ("kSUB", -(2**31), 1, np.int32, LARGEST),
        ("kPROD", 2**20, 2**20, np.int32, 0),
        ("kPROD", 2**20, 2**20, np.int64, 2**40),
        ("kSUM", 2**63 - 1, 1, np.int64, -(2**63)),
        ("kSUM", 100, 100, np.int8, -56),
        ("kDIV", -7, 2, np.int32, -3),
        ("kDIV", 7, -2, np.int32, -3),
        ("kDIV", -7, -2, np.int32, 3),
        ("kFLOOR_DIV", -7, 2, np.int32, -4),
        ("kFLOOR_DIV", 7, -2, np.int32, -4),
        ("kDIV", 7, 0, np.int32, 0),
        ("kFLOOR_DIV", 7, 0, np.int32, 0),
        ("kMAX", -3, 2, np.int32, 2),
        ("kMIN", -3, 2, np.int32, -3),
        ("kPOW", -3, 3, np.int64, -27),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "tensor"])
def test_folded_integers_are_those_of_the_operation(
    operation: str, a: int, b: int, dtype: Any, expected: int, shape: tuple[int, ...]
) -> None:
    graph = Graph()
    operands: list[Value | None] = [constant(graph, np.full(shape, each), dtype) for each in (a, b)]
    type = TensorType(DTYPE_NAMES[np.dtype(dtype)], shape)
    # And once more on the result: what is known of it must have been right, too.
    first = apply(graph, "element_wise", operands, type, operation=operation)
    graph.outputs = [first, apply(graph, "element_wise", [first, operands[1]], type, operation="kMAX")]
    reference = run(clone(graph), [])
    assert reference[0].reshape(-1).tolist() == [expected]
    folded = optimized(graph)
    assert set(kinds(folded)) == {"constant"}
    assert_same(run(folded, []), reference)


def test_a_cast_that_saturates_is_folded_so() -> None:
    assert tp.cast(tp.Tensor([2**40, -(2**40), 5]), tp.int32).tolist() == [LARGEST, -(2**31), 5]
    assert (tp.Tensor([LARGEST, 1]) + 1).tolist() == [-(2**31), 2]


def test_contradictions_name_the_operation() -> None:
    graph = Graph([Input(Value(TensorType("f32", (2, 3))), "arg0")])
    operands: list[Value | None] = [graph.inputs[0].value, constant(graph, np.ones((2, 4)), np.float32)]
    graph.outputs = [apply(graph, "element_wise", operands, TensorType("f32", (None, None)), operation="kSUM")]
    graph.operations[-1].location = "loc(here)"
    with pytest.raises(GraphError, match=r"element_wise: .* in shapes \(2, 3\) and \(2, 4\)") as error:
        compiler.optimize(graph)
    assert error.value.location == "loc(here)"


# --- merge_equal ------------------------------------------------------------------------------------------------------


def test_equal_operations_are_merged() -> None:
    def program(x: tp.Tensor) -> list[tp.Tensor]:
        first, second = tp.relu(x * 2.0), tp.relu(x * 2.0)
        return [first + second, tp.topk(x, 2, dim=0)[0] + tp.topk(x, 2, dim=0)[0], tp.topk(x, 2, dim=0)[1]]

    raw = traced(program, tp.InputInfo((4,), tp.float32))
    before, after = kinds(optimized(raw, (fold_constants.run,))), kinds(optimized(raw))
    assert (before["activation"], before["top_k"]) == (2, 3)
    # The constants are 2.0, and the shapes (4, 1) and (2,): nvtripy takes the top of a vector in two dimensions.
    assert after == {"constant": 3, "element_wise": 3, "activation": 1, "top_k": 1, "reshape": 3}


def test_the_shape_arithmetic_of_every_tensor_is_merged() -> None:
    def program(x: tp.Tensor) -> list[tp.Tensor]:
        rows = x.shape[0]
        return [
            tp.reshape(x, (rows * 2, 2)),
            tp.reshape(x * 2.0, (2 * x.shape[0], 2)),
            tp.reshape(x * 3.0, (rows + x.shape[0], 2)),
            tp.reshape(x * 4.0, (rows * 8 // 4, 2)),
        ]

    graph = optimized(traced(program, tp.InputInfo(((1, 2, 4), 4), tp.float32)))
    counted = kinds(graph)
    assert counted["reshape"] - 4 == counted["concatenation"] == 1  # one shape, for all four
    assert counted["shape"] == 1
    assert {str(output.type) for output in graph.outputs} == {"f32[2*%arg0.0, 2]"}


def pairs() -> Iterator[tuple[str, Callable[[Graph, Value], list[Value]], bool]]:
    """Two values each, and whether they are one."""

    def size_of(graph: Graph, x: Value) -> Value:
        return apply(graph, "shape", [x], TensorType("i32", (1,)))

    def scalar(graph: Graph, value: Value) -> Value:
        return apply(graph, "collapse_rank", [value], TensorType(value.type.dtype, ()), shape=())

    def cast(graph: Graph, value: Value, dtype: str) -> Value:
        return apply(graph, "cast", [value], TensorType(dtype, value.type.shape), dtype=dtype)

    def arithmetic(graph: Graph, value: Value, operation: str, number: int) -> Value:
        other = constant(graph, np.full(value.type.shape, number), DTYPES[value.type.dtype])
        return apply(graph, "element_wise", [value, other], value.type, operation=operation)

    def unary(graph: Graph, x: Value, operation: str) -> Value:
        return apply(graph, "unary", [x], x.type, operation=operation)

    yield "one operation", lambda g, x: [unary(g, x, "kEXP"), unary(g, x, "kEXP")], True
    yield "attributes", lambda g, x: [unary(g, x, "kEXP"), unary(g, x, "kLOG")], False
    yield "operands", lambda g, x: [unary(g, x, "kEXP"), unary(g, unary(g, x, "kEXP"), "kEXP")], False
    yield "contents", lambda g, x: [arithmetic(g, size_of(g, x), "kSUM", 0), size_of(g, x)], True
    yield (
        "contents in two ways",
        lambda g, x: [
            arithmetic(g, size_of(g, x), "kPROD", 2),
            apply(g, "element_wise", [size_of(g, x), size_of(g, x)], TensorType("i32", (1,)), operation="kSUM"),
        ],
        True,
    )
    yield (
        "int32 and int64",
        lambda g, x: [
            arithmetic(g, size_of(g, x), "kPROD", 3),
            arithmetic(g, cast(g, size_of(g, x), "i64"), "kPROD", 3),
        ],
        False,
    )
    yield "int32 and a cast of it to int32", lambda g, x: [size_of(g, x), cast(g, size_of(g, x), "i32")], True
    yield "shapes () and (1,)", lambda g, x: [size_of(g, x), scalar(g, size_of(g, x))], False
    yield (
        "two roundings",
        lambda g, x: [
            arithmetic(g, arithmetic(g, size_of(g, x), "kPROD", -3), each, 2) for each in ("kDIV", "kFLOOR_DIV")
        ],
        False,
    )
    yield (
        "equal roundings",
        lambda g, x: [arithmetic(g, size_of(g, x), each, 2) for each in ("kDIV", "kFLOOR_DIV")],
        True,
    )
    yield "constants", lambda g, x: [constant(g, [1.5, 2.5], np.float32), constant(g, [1.5, 2.5], np.float32)], True
    yield "constants of two types", lambda g, x: [constant(g, [1, 2], np.int32), constant(g, [1, 2], np.int64)], False
    yield (
        "equal bits of two types",
        lambda g, x: [constant(g, [0, 0], np.int32), constant(g, [0, 0], np.float32)],
        False,
    )
    yield "constants of two shapes", lambda g, x: [constant(g, [1], np.int32), constant(g, 1, np.int32)], False
    yield (
        "constants of two longer shapes",
        lambda g, x: [constant(g, [[1, 2]], np.int32), constant(g, [[1], [2]], np.int32)],
        False,
    )
    yield "zeros of two signs", lambda g, x: [constant(g, [0.0], np.float32), constant(g, [-0.0], np.float32)], False
    yield "true and one", lambda g, x: [constant(g, [True], np.bool_), constant(g, [1], np.int8)], False
    yield "not a number", lambda g, x: [constant(g, [np.nan], np.float32), constant(g, [np.nan], np.float32)], True
    yield (
        "large constants",
        lambda g, x: [constant(g, np.zeros(1025), np.float32), constant(g, np.zeros(1025), np.float32)],
        False,
    )


@pytest.mark.parametrize(("build", "are_one"), [each[1:] for each in pairs()], ids=[each[0] for each in pairs()])
def test_what_is_merged_and_what_is_not(build: Callable[[Graph, Value], list[Value]], are_one: bool) -> None:
    x = Value(TensorType("f32", (None,)))
    graph = Graph([Input(x, "arg0", Bounds((1,), (2,), (9,)))])
    graph.outputs = build(graph, x)
    raw = clone(graph)
    compiler.optimize(graph)
    assert (graph.outputs[0] is graph.outputs[1]) == are_one
    for length in (1, 3, 8):
        array = np.linspace(1, 2, length, dtype=np.float32)
        assert_same(run(graph, [array]), run(raw, [array]))


@pytest.mark.parametrize("name", ["arg1", "arg0.0", "rows"])
def test_a_users_name_is_not_taken_for_another_dimension(name: str) -> None:
    # A name that the compiler itself could have made up for another input or dimension.
    def program(x: tp.Tensor, n: tp.DimensionSize, y: tp.Tensor) -> list[tp.Tensor]:
        return [tp.reshape(each, (1,)) for each in (x.shape[0] * 1, n * 1, y.shape[0] * 1)]

    named = tp.NamedDimension(name, 1, 2, 9)
    infos = [
        tp.InputInfo(((1, 2, 9),), tp.float32),
        tp.DimensionInputInfo((1, 2, 9)),
        tp.InputInfo((named,), tp.float32),
    ]
    graph = optimized(traced(program, *infos))
    results = run(graph, [np.zeros(3, np.float32), np.array(4, I32), np.zeros(5, np.float32)])
    assert [result.tolist() for result in results] == [[3], [4], [5]]


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("also", ["nothing", "added", "left", "returned", "transposed"])
def test_half_precision_weights_are_themselves_wherever_they_are_used(dtype: str, also: str) -> None:
    # Where they are only multiplied by, the plan holds them in float32; the results must not show it.
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((3, 3)).astype(np.float32).astype(DTYPES[dtype]) for _ in range(2))
    type = TensorType(dtype, (3, 3))
    graph = Graph([Input(Value(type), "arg0")])
    a, w = graph.inputs[0].value, constant(graph, weight, DTYPES[dtype])
    graph.outputs = [apply(graph, "matrix_multiply", [a, w], type, op0="kNONE", op1="kNONE")]
    exact = [x.astype(np.float32) @ weight.astype(np.float32)]
    if also == "added":
        graph.outputs.append(apply(graph, "element_wise", [w, a], type, operation="kSUM"))
        exact.append(x.astype(np.float32) + weight.astype(np.float32))
    elif also == "left":
        graph.outputs.append(apply(graph, "matrix_multiply", [w, a], type, op0="kNONE", op1="kNONE"))
        exact.append(weight.astype(np.float32) @ x.astype(np.float32))
    elif also == "returned":
        graph.outputs.append(w)
        exact.append(weight)
    elif also == "transposed":
        graph.outputs.append(apply(graph, "transpose", [w], type, permutation=(1, 0)))
        exact.append(weight.T)
    results = run(graph, [x])
    assert_same(results, [np.ascontiguousarray(each.astype(DTYPES[dtype])) for each in exact])
    assert weight.dtype == DTYPES[dtype]


# --- printing ---------------------------------------------------------------------------------------------------------


def program_to_print(x: tp.Tensor, n: tp.DimensionSize) -> list[tp.Tensor]:
    return [tp.reshape(x, (n, 12)) * tp.Tensor(np.full((1, 12), 0.5, np.float32)), *tp.topk(x[: x.shape[0] // 2], 1, 1)]


PRINTED = """\
graph(%arg0: f32[rows, 4], %arg1: i32[]):
  %0 = constant(value=[1]) : i32[1]
  %1 = reshape(%arg1, %0) : i32[1]
  %2 = constant(value=[12]) : i32[1]
  %3 = concatenation(%1, %2, axis=0) : i32[2]
  %4 = reshape(%arg0, %3) : f32[%arg1, 12]
  %5 = constant(value=<f32[1, 12]>) : f32[1, 12]
  %6 = element_wise(%4, %5, operation=kPROD) : f32[%arg1, 12]
  %7 = constant(value=[0, 0]) : i32[2]
  %8 = shape(%arg0) : i32[2]
  %9 = constant(value=[0]) : i32[1]
  %10 = slice(%8, %9, %0, %0, none, mode=kDEFAULT) : i32[1]
  %11 = collapse_rank(%10, shape=()) : i32[]
  %12 = constant(value=2) : i32[]
  %13 = element_wise(%11, %12, operation=kFLOOR_DIV) : i32[]
  %14 = constant(value=0) : i32[]
  %15 = element_wise(%13, %14, operation=kLESS) : i1[]
  %16 = unary(%15, operation=kNOT) : i1[]
  %17 = element_wise(%11, %13, operation=kSUM) : i32[]
  %18 = select(%16, %13, %17) : i32[]
  %19 = element_wise(%18, %11, operation=kMIN) : i32[]
  %20 = element_wise(%19, %14, operation=kSUB) : i32[]
  %21 = element_wise(%20, %14, operation=kMAX) : i32[]
  %22 = reshape(%21, %0) : i32[1]
  %23 = constant(value=[4]) : i32[1]
  %24 = concatenation(%22, %23, axis=0) : i32[2]
  %25 = constant(value=[1, 1]) : i32[2]
  %26 = slice(%arg0, %7, %24, %25, none, mode=kDEFAULT) : f32[?, ?]
  %27, %28 = top_k(%26, k=1, axis=1, operation=kMAX) : f32[?, 1], i32[?, 1]
  return %6, %27, %28
"""


def test_a_graph_prints_as_it_is_read() -> None:
    infos = [tp.InputInfo((tp.NamedDimension("rows", 2, 3, 9), 4), tp.float32), tp.DimensionInputInfo((1, 1, 9))]
    graph = optimized(traced(program_to_print, *infos))
    assert str(graph) + "\n" == PRINTED
    assert str(optimized(traced(program_to_print, *infos))) == str(graph)


def test_every_name_is_defined_once_and_before_its_use() -> None:
    program = Program(7)
    text = str(optimized(traced(program, *program.infos())))
    header, *lines = text.splitlines()
    defined = set(re.findall(r"(%\w+):", header))
    assert len(defined) == 4
    for line in lines:
        results, _, rest = line.partition(" = ") if not line.startswith("  return") else ("", "", line)
        operands = set(re.findall(r"%\w+(?=[,)]|$)", rest.partition(" : ")[0]))
        assert operands <= defined, line
        for result in re.findall(r"%\w+", results):
            assert result not in defined
            defined.add(result)
    assert lines[-1].startswith("  return %")


# --- dims -------------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "kSUM": lambda a, b: a + b,
    "kSUB": lambda a, b: a - b,
    "kPROD": lambda a, b: a * b,
    "kFLOOR_DIV": lambda a, b: a // b,
    "kDIV": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "kMAX": max,
    "kMIN": min,
}
Expression = Any  # a number, a symbol's name, or (operation, expression, expression)


def expressions(operations: list[str]) -> st.SearchStrategy[Expression]:
    leaves = st.integers(-6, 12) | st.sampled_from(["a", "b", "c"])
    return st.recursive(leaves, lambda inner: st.tuples(st.sampled_from(operations), inner, inner), max_leaves=8)


def as_dim(expression: Expression) -> Dim:
    if isinstance(expression, tuple):
        return dims.combine(expression[0], as_dim(expression[1]), as_dim(expression[2]))
    return Symbolic.of(expression) if isinstance(expression, str) else expression


def as_number(expression: Expression, sizes: dict[str, int]) -> int:
    if isinstance(expression, tuple):
        return OPERATIONS[expression[0]](as_number(expression[1], sizes), as_number(expression[2], sizes))
    return sizes[expression] if isinstance(expression, str) else expression


sizes_of_symbols = st.fixed_dictionaries(dict.fromkeys("abc", st.integers(0, 20)))


@given(expressions(list(OPERATIONS)), sizes_of_symbols)
@settings(max_examples=600, deadline=None)
def test_dims_agree_with_integers(expression: Expression, sizes: dict[str, int]) -> None:
    try:
        expected = as_number(expression, sizes)
    except ZeroDivisionError:
        assume(False)
    assert evaluate(as_dim(expression), sizes) in (None, expected)


@given(expressions(["kSUM", "kSUB", "kPROD"]), sizes_of_symbols)
@settings(max_examples=300, deadline=None)
def test_polynomials_are_always_known(expression: Expression, sizes: dict[str, int]) -> None:
    assert evaluate(as_dim(expression), sizes) == as_number(expression, sizes)


polynomials = expressions(["kSUM", "kSUB", "kPROD"])


@given(polynomials, polynomials, polynomials)
@settings(max_examples=200, deadline=None)
def test_equal_polynomials_are_equal_dims(x: Expression, y: Expression, z: Expression) -> None:
    def same(first: Expression, second: Expression) -> bool:
        return as_dim(first) == as_dim(second) and str(as_dim(first)) == str(as_dim(second))

    assert same(("kSUM", x, y), ("kSUM", y, x))
    assert same(("kPROD", x, y), ("kPROD", y, x))
    assert same(("kPROD", x, ("kSUM", y, z)), ("kSUM", ("kPROD", x, y), ("kPROD", x, z)))
    assert same(("kSUB", ("kSUM", x, y), y), x)
    assert same(("kFLOOR_DIV", ("kPROD", x, ("kPROD", 4, "a")), ("kPROD", "a", 2)), ("kPROD", 2, x))
    assert same(("kMAX", x, x), x)


@pytest.mark.parametrize(
    ("operation", "a", "b", "expected"),
    [
        ("kFLOOR_DIV", ("kPROD", "a", 128), 64, "2*a"),
        ("kFLOOR_DIV", ("kPROD", ("kPROD", "a", "b"), 12), ("kPROD", "b", 3), "4*a"),
        ("kFLOOR_DIV", "a", 2, "floor((a)/(2))"),
        ("kDIV", ("kPROD", "a", 4), 2, "2*a"),
        ("kMAX", ("kSUB", "a", 3), 0, "max(-3 + a, 0)"),
        ("kMAX", 0, ("kSUM", "a", 3), "3 + a"),
        ("kMIN", ("kPROD", "a", "b"), 0, "0"),
        ("kMIN", "a", "a", "a"),
        ("kSUB", "a", "a", "0"),
        ("kDIV", "a", 0, "None"),
        ("kDIV", ("kSUB", "a", 3), 2, "None"),  # toward zero, where the sign is not known
        ("kPOW", "a", 2, "None"),
        ("kMIN", ("kSUB", "a", 3), 5, "None"),  # could be negative, as no symbol may be
        ("kMAX", ("kSUB", "a", 3), -1, "None"),
        ("kFLOOR_DIV", ("kSUB", "a", 3), 2, "None"),
        ("kSUM", 2, 3, "5"),
    ],
)
def test_dims_by_example(operation: str, a: Expression, b: Expression, expected: str) -> None:
    assert str(dims.combine(operation, as_dim(a), as_dim(b))) == expected


def test_unknown_dims_stay_unknown() -> None:
    for operation in OPERATIONS:
        assert dims.combine(operation, None, 1) is None
        assert dims.combine(operation, Symbolic.of("a"), None) is None
