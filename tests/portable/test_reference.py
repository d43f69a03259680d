"""reference.py against torch, operation by operation, on fresh random operands.

Tolerances. Where both sides compute in float32 and round once, a difference in the last bit of the float32 can flip the
rounding: one unit in the last place of the result's dtype is allowed (`ONE_ULP`). A sum of n float32 terms may be added
in any order, for which n * 2**-24 relative to the sum of the terms' magnitudes is the usual bound; the tests use terms
of about 1 and a few hundred of them at most, so 1e-4 absolute is generous to the order and still far from any mistake.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvtripy_portable import reference

torch = pytest.importorskip("torch", reason="the reference is compared with torch")
functional = torch.nn.functional

# A NumPy warning would reach the user of a model, who can do nothing about it.
pytestmark = pytest.mark.filterwarnings("error")

F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
I4 = np.dtype(ml_dtypes.int4)
I8 = np.dtype(np.int8)
I32 = np.dtype(np.int32)
I64 = np.dtype(np.int64)
BOOL = np.dtype(np.bool_)
FLOATS = [F32, F16, BF16]
DTYPES = [F32, F16, BF16, F8, I4, I8, I32, I64, BOOL]
ONE_ULP = {F32: 2.0**-22, F16: 2.0**-10, BF16: 2.0**-7, F8: 2.0**-3}  # relative; two for float32, torch's own error

# torch's type, and the type to pass the bits in, of what torch.from_numpy does not know.
AS_BITS = {BF16: (torch.bfloat16, np.int16), F8: (torch.float8_e4m3fn, np.uint8)}

quick = settings(max_examples=40, deadline=None)  # no deadline: the machines that run this are shared
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """These operands are tiny, and torch's threads wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed: {seed}")  # pytest shows this for a test that fails
    return np.random.default_rng(seed)


def to_torch(array: np.ndarray) -> Any:
    if array.dtype in AS_BITS:
        dtype, bits = AS_BITS[array.dtype]
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).view(bits)).view(dtype)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    for numpy_dtype, (dtype, bits) in AS_BITS.items():
        if tensor.dtype == dtype:
            return tensor.view(torch.int16 if bits == np.int16 else torch.uint8).numpy().view(numpy_dtype)
    return tensor.numpy()


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Normal floats, small integers of either sign, or bools."""
    if dtype == BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    if dtype in (I4, I8, I32, I64):
        return rng.integers(-7, 8, shape).astype(dtype)
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def shape_operand(*sizes: int) -> np.ndarray:
    return np.array(sizes, dtype=np.int32)


def check(
    actual: Any, expected: Any, dtype: np.dtype[Any] | None = None, *, rtol: float | None = None, atol: float = 0.0
) -> None:
    """`actual` is an ndarray of `dtype` (that of `expected` if not given) with its shape and, about, its values."""
    if not isinstance(expected, np.ndarray):
        expected = to_numpy(expected)
    dtype = dtype or expected.dtype
    assert type(actual) is np.ndarray
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    if rtol is None:
        rtol = ONE_ULP.get(dtype, 0.0)
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
    )


def check_exact(actual: Any, expected: Any) -> None:
    check(actual, expected, rtol=0.0)


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)


@st.composite
def broadcastable(draw: st.DrawFn, count: int) -> list[tuple[int, ...]]:
    """`count` shapes of one rank whose dimensions are equal or 1."""
    full = draw(shapes)
    return [tuple(1 if draw(st.booleans()) else size for size in full) for _ in range(count)]


def test_operations_are_those_that_nvtripy_emits_and_the_passes_make() -> None:
    names = """cast concatenation top_k linspace reduce element_wise unary activation normalization shape collapse_rank
        slice reshape transpose broadcast softmax select gather matrix_multiply quantize dequantize convolution
        deconvolution pooling resize_nearest resize_linear resize_cubic
        quantized_rows"""
    assert set(reference.OPERATIONS) == set(names.split())
    for name, function in reference.OPERATIONS.items():
        assert function.__name__ == name
        assert function.__doc__


# ---------------------------------------------------------------------------------------------------------------------
# cast


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_cast_of_what_fits(rng: np.random.Generator, source: np.dtype[Any], target: np.dtype[Any]) -> None:
    operand = random(rng, (3, 5), source)
    if I4 in (source, target):  # torch has no int4: truncation of values that fit is all there is to it
        values = operand.astype(np.float64)
        expected = values != 0 if target == BOOL else (np.trunc(values) if target in (I4, I8, I32, I64) else values)
        check(reference.cast(operand, dtype=target), expected.astype(np.float32).astype(target))
        return
    expected = to_torch(operand).to(to_torch(np.zeros(1, target)).dtype)
    check_exact(reference.cast(operand, dtype=target), expected)


@pytest.mark.parametrize("target", [F32, BF16, F8], ids=str)
def test_cast_of_every_float16(target: np.dtype[Any]) -> None:
    operand = np.arange(2**16, dtype=np.uint16).view(np.float16)
    operand[np.isnan(operand)] = np.nan  # a signalling one would warn in the comparison
    if target == F8:
        operand = operand[~(np.abs(operand) > 448)]  # beyond, torch gives NaN where TensorRT saturates
    expected = to_torch(operand).to(torch.float32).to(to_torch(np.zeros(1, target)).dtype)
    check_exact(reference.cast(operand, dtype=target), expected)


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", [I4, I8, I32, I64], ids=str)
def test_cast_to_integer_saturates_and_truncates(source: np.dtype[Any], target: np.dtype[Any]) -> None:
    operand = np.array([np.nan, np.inf, -np.inf, 6.9, -6.9, 0.5, -0.5, -0.0, 1e30, -1e30, 2.0**31, -(2.0**63)])
    operand = operand.astype(np.float32)
    with np.errstate(over="ignore"):
        operand = operand.astype(source)
    low, high = int(ml_dtypes.iinfo(target).min), int(ml_dtypes.iinfo(target).max)

    def expected(value: float) -> int:
        return 0 if math.isnan(value) else max(low, min(high, int(max(-1e38, min(1e38, value)))))

    result = reference.cast(operand, dtype=target)
    assert result.dtype == target
    assert [int(element) for element in result] == [expected(float(element)) for element in operand]


def test_cast_saturates_between_integers_and_to_float8() -> None:
    assert reference.cast(np.array([300, -300, 5], I32), dtype=I8).tolist() == [127, -128, 5]
    assert reference.cast(np.array([2**40, -(2**40)], I64), dtype=I32).tolist() == [2**31 - 1, -(2**31)]
    assert reference.cast(np.array([9, -9], I8), dtype=I4).astype(int).tolist() == [7, -8]
    result = reference.cast(np.array([449, 1e9, -np.inf, np.nan, 464, 465], F32), dtype=F8)
    np.testing.assert_array_equal(result.astype(np.float32), [448, 448, -448, np.nan, 448, 448])


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_cast_to_bool_is_not_zero(source: np.dtype[Any]) -> None:
    values = [0.0, -0.0, 1.0, -2.0, 0.5, np.nan] if source in (F32, F16, BF16, F8) else [0, 1, -2]
    operand = np.array(values, np.float32).astype(source)
    assert reference.cast(operand, dtype=np.bool_).tolist() == [value != 0 for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and data movement


@quick
@given(shapes, st.sampled_from(DTYPES), st.randoms(use_true_random=False))
def test_shape_reshape_and_transpose(size: tuple[int, ...], dtype: np.dtype[Any], order: Any) -> None:
    operand = random(np.random.default_rng(), size, dtype)
    check_exact(reference.shape(operand), np.array(size, dtype=np.int32))
    shuffled = order.sample(size, len(size))
    check_exact(reference.reshape(operand, shape_operand(*shuffled)), operand.reshape(shuffled))
    check_exact(reference.reshape(operand, shape_operand(-1)), operand.reshape(operand.size))
    without_ones = tuple(dimension for dimension in size if dimension != 1)
    check_exact(reference.collapse_rank(operand, shape=without_ones), operand.reshape(without_ones))
    permutation = order.sample(range(len(size)), len(size))
    check_exact(reference.transpose(operand, permutation=permutation), np.transpose(operand, permutation))


@quick
@given(broadcastable(2), st.integers(0, 2), st.sampled_from(DTYPES))
def test_broadcast(pair: list[tuple[int, ...]], leading: int, dtype: np.dtype[Any]) -> None:
    source, other = pair
    target = (2,) * leading + np.broadcast_shapes(source, other)
    operand = random(np.random.default_rng(), source, dtype)
    result = reference.broadcast(
        operand, shape_operand(*target), broadcast_dims=tuple(range(leading, leading + len(source)))
    )
    check_exact(result, np.broadcast_to(operand, target))


def test_broadcast_into_other_dimensions() -> None:
    operand = np.arange(3, dtype=np.float32)
    result = reference.broadcast(operand, shape_operand(2, 3, 4), broadcast_dims=(1,))
    check_exact(result, np.broadcast_to(operand[:, None], (2, 3, 4)))


@quick
@given(st.data())
def test_concatenation(data: st.DataObject) -> None:
    size = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(size) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    operands = []
    for length in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        operands.append(random(np.random.default_rng(), (*size[:axis], length, *size[axis + 1 :]), dtype))
    check_exact(reference.concatenation(*operands, axis=axis), np.concatenate(operands, axis=axis))


@quick
@given(st.data())
def test_slice_inside_is_pythons(data: st.DataObject) -> None:
    size = data.draw(shapes)
    operand = random(np.random.default_rng(), size, data.draw(st.sampled_from(DTYPES)))
    starts, counts, strides, expected = [], [], [], operand
    for axis, length in enumerate(size):
        stride = data.draw(st.sampled_from([1, 2, 3, -1, -2]))
        first = data.draw(st.integers(0, max(length - 1, 0)))
        room = 0 if length == 0 else (length - 1 - first if stride > 0 else first) // abs(stride) + 1
        count = data.draw(st.integers(0, room))
        starts.append(first)
        counts.append(count)
        strides.append(stride)
        expected = np.take(expected, [first + i * stride for i in range(count)], axis=axis)
    operands = [shape_operand(*values) for values in (starts, counts, strides)]
    check_exact(reference.slice(operand, *operands), expected)
    # What lies inside is the same in every mode.
    if 0 not in size:
        for mode in ("kFILL", "kREFLECT", "kCLAMP", "kWRAP"):
            check_exact(reference.slice(operand, *operands, mode=mode), expected)


def test_slice_with_stride_0_repeats() -> None:
    operand = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = reference.slice(operand, shape_operand(0, 1), shape_operand(2, 4), shape_operand(1, 0))
    check_exact(result, np.array([[1, 1, 1, 1], [4, 4, 4, 4]], np.float32))


@quick
@given(st.data())
def test_slice_outside_is_padding(data: st.DataObject) -> None:
    modes = {"kFILL": "constant", "kREFLECT": "reflect", "kCLAMP": "edge", "kWRAP": "wrap"}
    mode = data.draw(st.sampled_from(sorted(modes)))
    size = data.draw(st.lists(st.integers(0 if mode == "kFILL" else 1, 4), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([F32, F16, BF16, I8, I32, I64, BOOL]))
    operand = random(np.random.default_rng(), tuple(size), dtype)
    padding = [(data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))) for _ in size]
    starts = shape_operand(*(-low for low, _ in padding))
    sizes = shape_operand(*(length + low + high for length, (low, high) in zip(size, padding, strict=True)))
    strides = shape_operand(*[1] * len(size))
    if mode == "kFILL":
        fill = np.array(data.draw(st.sampled_from([0, 1])), dtype=dtype)
        expected = np.pad(operand, padding, constant_values=fill)
        check_exact(reference.slice(operand, starts, sizes, strides, fill, mode=mode), expected)
    else:
        expected = np.pad(operand, padding, mode=modes[mode])  # type: ignore[call-overload]
        check_exact(reference.slice(operand, starts, sizes, strides, mode=mode), expected)


def test_slice_with_fill_steps_over_the_border() -> None:
    operand = np.arange(5, dtype=np.int32)

    def filled(start: int, size: int, stride: int) -> list[int]:
        operands = (shape_operand(start), shape_operand(size), shape_operand(stride))
        return reference.slice(operand, *operands, np.array(9, np.int32), mode="kFILL").tolist()

    assert filled(-3, 5, 2) == [9, 9, 1, 3, 9]
    assert filled(6, 5, -2) == [9, 4, 2, 0, 9]
    assert filled(7, 2, 1) == [9, 9]
    assert filled(2, 3, 0) == [2, 2, 2]
    assert reference.slice(operand, *map(shape_operand, (4, 2, 1)), mode="kFILL").tolist() == [4, 0]


@quick
@given(st.data())
def test_gather(data: st.DataObject) -> None:
    rng = np.random.default_rng()
    size = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(size) - 1))
    operand = random(rng, tuple(size), data.draw(st.sampled_from(DTYPES)))
    index_type = data.draw(st.sampled_from([np.int32, np.int64]))
    indices = rng.integers(0, size[axis], data.draw(shapes)).astype(index_type)
    expected = operand[(builtin_slice(None),) * axis + (indices,)]
    check_exact(reference.gather(operand, indices, axis=axis), np.asarray(expected))
    check_exact(reference.gather(operand, indices - index_type(size[axis]), axis=axis), np.asarray(expected))


builtin_slice = slice


@quick
@given(st.data())
def test_gather_with_common_dimensions(data: st.DataObject) -> None:
    rng = np.random.default_rng()
    batch = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    rest = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(rest) - 1))
    index_shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=2)))
    operand = random(rng, (*batch, *rest), F32)
    indices = rng.integers(0, rest[axis], (*batch, *index_shape)).astype(np.int32)
    expected = np.stack(
        [np.take(operand[position], indices[position], axis=axis) for position in np.ndindex(batch)]
    )  # one by one
    result = reference.gather(operand, indices, axis=axis + len(batch), num_broadcast_dims=len(batch))
    check_exact(result, expected.reshape(batch + expected.shape[1:]))


@quick
@given(broadcastable(3), st.sampled_from([F32, F16, BF16, I8, I32, I64]), seeds)
def test_select(sizes: list[tuple[int, ...]], dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    operands = [random(rng, size, kind) for size, kind in zip(sizes, (BOOL, dtype, dtype), strict=True)]
    check_exact(reference.select(*operands), torch.where(*map(to_torch, operands)))


@quick
@given(shapes, st.sampled_from([F32, I32, I64]), seeds)
def test_linspace(size: tuple[int, ...], dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    start, step = random(rng, (), dtype), random(rng, (len(size),), dtype)
    expected = np.full(size, float(start))
    for dimension, indices in enumerate(np.indices(size)):
        expected = expected + float(step[dimension]) * indices
    result = reference.linspace(shape_operand(*size), start, step, dtype=dtype)
    check(result, expected, dtype, atol=1e-5 if dtype == F32 else 0)  # a few terms of at most about 10 in float32


def test_linspace_makes_arange_and_iota() -> None:
    result = reference.linspace(shape_operand(8), np.array(2.3, F32), np.array([-0.2], F32), dtype=F32)
    np.testing.assert_allclose(result, np.arange(2.3, 0.8, -0.2), rtol=1e-6)
    result = reference.linspace(shape_operand(2, 3), np.array(0, I32), np.array([0, 1], I32), dtype=I32)
    check_exact(result, np.array([[0, 1, 2], [0, 1, 2]], I32))


# ---------------------------------------------------------------------------------------------------------------------
# Element by element

ELEMENT_WISE: dict[str, Callable[..., Any]] = {
    "kSUM": torch.add,
    "kSUB": torch.sub,
    "kPROD": torch.mul,
    "kDIV": torch.div,
    "kPOW": torch.pow,
    "kMAX": torch.maximum,
    "kMIN": torch.minimum,
    "kLESS": torch.lt,
    "kGREATER": torch.gt,
    "kEQUAL": torch.eq,
}
LOGICAL = {"kOR": torch.logical_or, "kAND": torch.logical_and, "kXOR": torch.logical_xor}


@settings(max_examples=120, deadline=None)
@given(broadcastable(2), st.sampled_from(sorted(ELEMENT_WISE)), st.sampled_from(FLOATS), seeds)
def test_element_wise_of_floats(sizes: list[tuple[int, ...]], operation: str, dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lhs, rhs = (random(rng, size, dtype) for size in sizes)
    if operation == "kPOW" and dtype != F32:  # torch does not compute these powers in float32
        expected = torch.pow(to_torch(lhs).float(), to_torch(rhs).float()).to(to_torch(lhs).dtype)
    else:
        expected = ELEMENT_WISE[operation](to_torch(lhs), to_torch(rhs))
    # Power multiplies the logarithm's rounding error by the exponent, which is at most about 5 here.
    check(reference.element_wise(lhs, rhs, operation=operation), expected, rtol=1e-6 if dtype == F32 else None)


@settings(max_examples=60, deadline=None)
@given(broadcastable(2), st.sampled_from([*sorted(ELEMENT_WISE), "kFLOOR_DIV"]), st.sampled_from([I8, I32, I64]), seeds)
def test_element_wise_of_integers(
    sizes: list[tuple[int, ...]], operation: str, dtype: np.dtype[Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lhs, rhs = (random(rng, size, dtype) for size in sizes)
    if operation in ("kDIV", "kFLOOR_DIV"):
        rhs = np.where(rhs == 0, dtype.type(3), rhs)
        mode = "trunc" if operation == "kDIV" else "floor"
        expected = torch.div(to_torch(lhs), to_torch(rhs), rounding_mode=mode)
    elif operation == "kPOW":
        lhs = np.where((lhs == 0) & (rhs.min(initial=0) < 0), dtype.type(1), lhs)  # torch divides by 0
        expected = torch.pow(to_torch(lhs), to_torch(rhs))
    else:
        expected = ELEMENT_WISE[operation](to_torch(lhs), to_torch(rhs))
    check_exact(reference.element_wise(lhs, rhs, operation=operation), expected)


@quick
@given(broadcastable(2), st.sampled_from(sorted(LOGICAL)), seeds)
def test_element_wise_of_bools(sizes: list[tuple[int, ...]], operation: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lhs, rhs = (random(rng, size, BOOL) for size in sizes)
    expected = LOGICAL[operation](to_torch(lhs), to_torch(rhs))
    check_exact(reference.element_wise(lhs, rhs, operation=operation), expected)


@pytest.mark.parametrize("dtype", [I8, I32, I64], ids=str)
def test_integer_division_at_its_edges(dtype: np.dtype[Any]) -> None:
    low = np.iinfo(dtype).min
    lhs, rhs = np.array([7, -7, 7, -7, 5, 0, low], dtype), np.array([2, 2, -2, -2, 0, 0, 1], dtype)
    assert reference.element_wise(lhs, rhs, operation="kDIV").tolist() == [3, -3, -3, 3, 0, 0, low]
    assert reference.element_wise(lhs, rhs, operation="kFLOOR_DIV").tolist() == [3, -4, -4, 3, 0, 0, low]
    reference.element_wise(np.array([low], dtype), np.array([-1], dtype), operation="kDIV")  # no warning, no crash
    scalar = reference.element_wise(np.array(1, dtype), np.array(0, dtype), operation="kDIV")
    assert scalar.shape == () and scalar == 0


def test_division_as_nvtripy_documents_it() -> None:
    def divide(a: list[float], b: list[float], operation: str = "kFLOOR_DIV") -> np.ndarray:
        return reference.element_wise(np.array(a, F32), np.array(b, F32), operation=operation)

    check_exact(divide([4, 6], [2, 3], "kDIV"), np.array([2, 2], F32))
    check_exact(divide([4, 6], [3, 4]), np.array([1, 1], F32))
    check_exact(divide([2, 2], [2, 3]), np.array([1, 0], F32))
    # nvtripy's a % b is a - (a // b) * b
    a, b = np.array([4, 6, -4, 2], F32), np.array([3, 4, 3, 4], F32)
    check_exact(a - divide(a.tolist(), b.tolist()) * b, np.array([1, 2, 2, 2], F32))
    check_exact(divide([1, -1, 0], [0, 0, 0], "kDIV"), np.array([np.inf, -np.inf, np.nan], F32))


def test_narrow_floats_compute_in_float32_and_round_once() -> None:
    for dtype, largest in ((F16, 65504.0), (F8, 448.0)):
        big = np.array([largest], np.float32).astype(dtype)
        expected = np.inf if dtype == F16 else 448.0
        assert float(reference.element_wise(big, big, operation="kSUM")[0]) == expected
    a, b = np.array([1], BF16), np.array([2.0**-8], BF16)
    assert float(reference.element_wise(a, b, operation="kSUM")[0]) == 1  # a tie goes to the even neighbour


# Name → torch's function, and where it is defined.
UNARY: dict[str, tuple[Callable[..., Any], float, float]] = {
    "kEXP": (torch.exp, -5, 5),
    "kLOG": (torch.log, 0.01, 50),
    "kSQRT": (torch.sqrt, 0, 50),
    "kRECIP": (torch.reciprocal, 0.01, 50),
    "kABS": (torch.abs, -5, 5),
    "kNEG": (torch.neg, -5, 5),
    "kSIN": (torch.sin, -9, 9),
    "kCOS": (torch.cos, -9, 9),
    "kTAN": (torch.tan, -1.5, 1.5),
    "kSINH": (torch.sinh, -5, 5),
    "kCOSH": (torch.cosh, -5, 5),
    "kASIN": (torch.asin, -1, 1),
    "kACOS": (torch.acos, -1, 0.9),
    "kATAN": (torch.atan, -9, 9),
    "kASINH": (torch.asinh, -9, 9),
    "kACOSH": (torch.acosh, 1.1, 50),
    "kATANH": (torch.atanh, -0.99, 0.99),
    "kCEIL": (torch.ceil, -9, 9),
    "kFLOOR": (torch.floor, -9, 9),
    "kERF": (torch.erf, -5, 5),
    "kSIGN": (torch.sign, -9, 9),
    "kROUND": (torch.round, -9, 9),
    "kISINF": (torch.isinf, -9, 9),
    "kISNAN": (torch.isnan, -9, 9),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operation", sorted(UNARY))
def test_unary(rng: np.random.Generator, operation: str, dtype: np.dtype[Any]) -> None:
    function, low, high = UNARY[operation]
    operand = np.concatenate([rng.uniform(low, high, 997), [low, high, math.copysign(0.0, low)]])
    operand = np.clip(operand, low, high).astype(np.float32).astype(dtype)
    for values in (operand, operand.reshape(10, 100), operand[:1].reshape(()), operand[:0]):
        expected = function(to_torch(values).double())
        if expected.dtype != torch.bool:
            expected = expected.to(to_torch(values).dtype)
        # float32 functions of different libraries are a few units in the last place apart; near a zero of sin, cos or
        # log, that is relative to the operand's magnitude.
        check(reference.unary(values, operation=operation), expected, rtol=1e-6 if dtype == F32 else None, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operation", sorted(set(UNARY) - {"kSIGN"}))  # torch's sign of NaN is 0
def test_unary_outside_of_the_numbers(operation: str, dtype: np.dtype[Any]) -> None:
    operand = np.array([np.nan, np.inf, -np.inf, -2.0, 0.0, 0.5, 2.5, -1.5], np.float32).astype(dtype)
    expected = UNARY[operation][0](to_torch(operand).float())
    if expected.dtype != torch.bool:
        expected = expected.to(to_torch(operand).dtype)
    check(reference.unary(operand, operation=operation), expected, rtol=1e-6 if dtype == F32 else None)


def test_unary_of_integers_and_bools(rng: np.random.Generator) -> None:
    for dtype in (I8, I32, I64):
        operand = random(rng, (4, 5), dtype)
        for operation, function in (("kABS", torch.abs), ("kNEG", torch.neg), ("kSIGN", torch.sign)):
            check_exact(reference.unary(operand, operation=operation), function(to_torch(operand)))
    operand = random(rng, (4, 5), BOOL)
    check_exact(reference.unary(operand, operation="kNOT"), ~operand)


def test_erf_is_accurate(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.uniform(-7, 7, 20000), rng.uniform(-0.5, 0.5, 20000), [0.46875, np.inf, -np.inf, 30]])
    expected = torch.erf(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(reference.erf(x), expected, rtol=1e-14, atol=1e-15)  # some units of float64 for either
    narrow = x.astype(np.float32)
    expected = torch.erf(torch.from_numpy(narrow).double()).numpy()
    assert np.abs(reference.erf(narrow) - expected).max() < 1e-7
    assert math.copysign(1, reference.erf(np.array(-0.0, np.float32))) == -1


ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[..., Any]]] = {
    "kRELU": ((), torch.relu),
    "kSIGMOID": ((), torch.sigmoid),
    "kTANH": ((), torch.tanh),
    "kSOFTSIGN": ((), functional.softsign),
    "kGELU_ERF": ((), functional.gelu),
    "kGELU_TANH": ((), lambda x: functional.gelu(x, approximate="tanh")),
    "kLEAKY_RELU": ((0.3,), functional.leaky_relu),
    "kELU": ((1.3,), functional.elu),
    "kTHRESHOLDED_RELU": ((0.4,), lambda x, alpha: functional.threshold(x, alpha, 0.0)),
    "kSELU": ((1.6732632423543772, 1.0507009873554805), lambda x, alpha, beta: functional.selu(x)),
    "kSOFTPLUS": ((1.5, 0.7), lambda x, alpha, beta: alpha * functional.softplus(x * beta)),
    "kCLIP": ((-0.5, 1.5), torch.clamp),
    "kHARD_SIGMOID": ((0.2, 0.5), lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1)),
    "kSCALED_TANH": ((1.7, 0.6), lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operation", sorted(ACTIVATIONS))
def test_activation(rng: np.random.Generator, operation: str, dtype: np.dtype[Any]) -> None:
    parameters, function = ACTIVATIONS[operation]
    attributes = dict(zip(("alpha", "beta"), parameters, strict=False))
    operand = (3 * rng.standard_normal((40, 25))).astype(np.float32).astype(dtype)
    operand.flat[:6] = [-100, 100, 0, -np.inf, np.inf, np.nan]
    if operation.startswith("kGELU") or operation == "kSOFTSIGN":
        operand.flat[3:5] = 1  # 0 * infinity
    for values in (operand, operand[:0], operand[9, 9:10].reshape(())):
        # In float64: torch's own GELU in float32 is off by up to 1.2e-6.
        expected = function(to_torch(values).double(), *parameters).to(to_torch(values).dtype)
        result = reference.activation(values, operation=operation, **attributes)
        # The tail of GELU is a difference of nearly equal numbers: absolute, it is as exact as its terms.
        check(result, expected, rtol=2e-6 if dtype == F32 else None, atol=1e-6)


def test_activation_of_integers(rng: np.random.Generator) -> None:
    for dtype in (I8, I32, I64):
        operand = random(rng, (30,), dtype)
        check_exact(reference.activation(operand, operation="kRELU"), torch.relu(to_torch(operand)))
    operand = random(rng, (30,), I4)
    check_exact(reference.activation(operand, operation="kRELU"), np.maximum(operand.astype(int), 0).astype(I4))
    operand = np.arange(-128, 128).astype(np.int8)
    expected = torch.round(functional.gelu(to_torch(operand).float())).to(torch.int8)
    check_exact(reference.activation(operand, operation="kGELU_ERF"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Along dimensions

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "kSUM": torch.sum,
    "kPROD": torch.prod,
    "kMAX": torch.amax,
    "kMIN": torch.amin,
    "kAVG": torch.mean,
}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(REDUCTIONS)), st.sampled_from([*FLOATS, I8, I32, I64]), st.booleans(), seeds)
def test_reduce(data: st.DataObject, operation: str, dtype: np.dtype[Any], keep: bool, seed: int) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axes = tuple(data.draw(st.lists(st.integers(0, len(size) - 1), min_size=1, unique=True)))
    operand = random(np.random.default_rng(seed), size, dtype)
    tensor = to_torch(operand).double() if dtype in FLOATS else to_torch(operand).long()
    if operation == "kPROD":
        expected = tensor
        for axis in sorted(axes, reverse=True):
            expected = torch.prod(expected, dim=axis, keepdim=keep)
    elif operation == "kAVG" and dtype not in FLOATS:
        total = torch.sum(tensor, dim=axes, keepdim=keep)
        expected = torch.div(total, math.prod(size[axis] for axis in axes), rounding_mode="trunc")
    else:
        expected = REDUCTIONS[operation](tensor, dim=axes, keepdim=keep)
    expected = expected.to(to_torch(operand).dtype)
    result = reference.reduce(operand, axes=axes, operation=operation, keep_dimensions=keep)
    # A product's relative error grows with its 625 factors at most; a sum's error is relative to its terms.
    check(result, expected, rtol=1e-4 if dtype == F32 else None, atol=1e-4 if dtype in FLOATS else 0)


@pytest.mark.parametrize("dtype", [*FLOATS, I8, I32, I64, BOOL], ids=str)
def test_reduce_over_nothing_gives_the_neutral_element(dtype: np.dtype[Any]) -> None:
    operand = np.zeros((2, 0), dtype)
    is_float = dtype in FLOATS
    low, high = (
        (-np.inf, np.inf) if is_float else (0, 1) if dtype == BOOL else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    )
    expected = {"kMAX": low, "kMIN": high}
    if dtype != BOOL:
        expected |= {"kSUM": 0, "kPROD": 1, "kAVG": np.nan if is_float else 0}
    for operation, value in expected.items():
        result = reference.reduce(operand, axes=(1,), operation=operation, keep_dimensions=False)
        check_exact(result, np.full(2, value, np.float64 if is_float else object).astype(dtype))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_reduce_accumulates_in_float32(dtype: np.dtype[Any]) -> None:
    operand = np.ones(2**14, dtype)  # in bfloat16 alone the sum would stop at 256, in float16 at 2048
    result = reference.reduce(operand, axes=(0,), operation="kSUM", keep_dimensions=False)
    assert result.shape == () and float(result) == 2**14


@quick
@given(st.data(), st.sampled_from(["kMAX", "kMIN"]), st.sampled_from([*FLOATS, I32, I64]), seeds)
def test_top_k(data: st.DataObject, operation: str, dtype: np.dtype[Any], seed: int) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(size) - 1))
    k = data.draw(st.integers(1, size[axis]))
    operand = np.round(random(np.random.default_rng(seed), size, F32)).astype(dtype)  # rounded: many are equal
    values, indices = reference.top_k(operand, k=k, axis=axis, operation=operation)
    # torch does not say which of equal elements it takes; its stable sort does.
    order = torch.sort(to_torch(operand), dim=axis, descending=operation == "kMAX", stable=True)
    check_exact(values, order.values.narrow(axis, 0, k))
    check_exact(indices, order.indices.narrow(axis, 0, k).to(torch.int32))


def test_top_k_puts_nan_first() -> None:
    operand = np.array([1, np.nan, 3, np.nan, -np.inf], F32)
    for k in (1, 3):
        _, indices = reference.top_k(operand, k=k, axis=0, operation="kMAX")
        assert indices.tolist() == [1, 3, 2][:k]
    assert reference.top_k(operand, k=5, axis=0, operation="kMIN")[1].tolist() == [4, 0, 2, 1, 3]


@quick
@given(st.data(), st.sampled_from(FLOATS), seeds)
def test_softmax(data: st.DataObject, dtype: np.dtype[Any], seed: int) -> None:
    size = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    axis = data.draw(st.integers(0, len(size) - 1))
    operand = (10 * random(np.random.default_rng(seed), size, F32)).astype(dtype)
    expected = torch.softmax(to_torch(operand).double(), dim=axis).to(to_torch(operand).dtype)
    # exp of a difference of up to about 80 carries that difference's rounding error: 80 * 2**-24.
    check(reference.softmax(operand, axis=axis), expected, rtol=1e-5 if dtype == F32 else None, atol=1e-7)


def test_softmax_of_masked_scores() -> None:
    operand = np.array([[0.0, -np.inf, 0.0], [-np.inf, -np.inf, -np.inf], [1e38, -1e38, 3e38]], F32)
    expected = np.array([[0.5, 0, 0.5], [np.nan] * 3, [0, 0, 1]], F32)
    check_exact(reference.softmax(operand, axis=1), expected)


@quick
@given(st.data(), st.sampled_from(FLOATS), seeds)
def test_normalization_is_layer_norm(data: st.DataObject, dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    count = data.draw(st.integers(1, len(size)))
    assume(math.prod(size[-count:]) > 1)  # of one element, the result is rounding error over sqrt(eps)
    operand, scale, bias = (random(rng, shape, dtype) for shape in (size, size[-count:], size[-count:]))
    wide = [to_torch(array).double() for array in (operand, scale, bias)]
    expected = functional.layer_norm(wide[0], size[-count:], wide[1], wide[2], eps=1e-5).to(to_torch(operand).dtype)
    ones = (1,) * (len(size) - count)
    result = reference.normalization(
        operand,
        scale.reshape(ones + scale.shape),
        bias.reshape(ones + bias.shape),
        axis=tuple(range(len(size) - count, len(size))),
        eps=1e-5,
        num_groups=1,
    )
    # Nearly equal elements lose digits in the subtraction of the mean, at worst as 2**-24 / sqrt(eps).
    check(result, expected, rtol=1e-5 if dtype == F32 else None, atol=1e-4)


@quick
@given(st.data(), seeds)
def test_normalization_in_groups(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    spatial = tuple(data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)))
    channels = groups * per_group
    operand = random(rng, (2, channels, *spatial), F32)
    scale, bias = random(rng, (channels,), F32), random(rng, (channels,), F32)
    ones = (1,) * len(spatial)
    axis = tuple(range(2, operand.ndim))

    def normalized(num_groups: int, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        parameters = (parameter.reshape(1, -1, *ones) for parameter in (scale, bias))
        return reference.normalization(operand, *parameters, axis=axis, eps=1e-5, num_groups=num_groups)

    tensors = [to_torch(array) for array in (operand, scale, bias)]
    expected = functional.instance_norm(tensors[0], weight=tensors[1], bias=tensors[2], eps=1e-5)
    check(normalized(channels, scale, bias), expected, atol=1e-4)
    if groups > 1:
        expected = functional.group_norm(tensors[0], groups, tensors[1], tensors[2], eps=1e-5)
        check(normalized(groups, scale, bias), expected, atol=1e-4)
        by_group = [np.repeat(parameter[:groups], per_group) for parameter in (scale, bias)]
        expected = functional.group_norm(tensors[0], groups, *map(to_torch, by_group), eps=1e-5)
        check(normalized(groups, scale[:groups], bias[:groups]), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix multiplication and quantization


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([*FLOATS, F8, I8, I32]), seeds)
def test_matrix_multiply(data: st.DataObject, dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batches = [shape[:2] for shape in data.draw(broadcastable(2))]
    rows, inner, columns = (data.draw(st.integers(0, 9)) for _ in range(3))
    ops = [data.draw(st.sampled_from(["kNONE", "kTRANSPOSE", "kVECTOR"])) for _ in range(2)]
    matrices = ((rows, inner), (inner, columns))
    operands, plain = [], []
    for side, (batch, op, matrix) in enumerate(zip(batches, ops, matrices, strict=True)):
        tail = (inner,) if op == "kVECTOR" else matrix[::-1] if op == "kTRANSPOSE" else matrix
        operands.append(random(rng, batch + tail, dtype))
        wide = to_torch(operands[-1]).double()
        if op == "kVECTOR":
            wide = wide.unsqueeze(-2 if side == 0 else -1)
        plain.append(wide.transpose(-1, -2) if op == "kTRANSPOSE" else wide)
    expected = torch.matmul(*plain)
    if ops[1] == "kVECTOR":
        expected = expected.squeeze(-1)
    if ops[0] == "kVECTOR":
        expected = expected.squeeze(-1 if ops[1] == "kVECTOR" else -2)
    expected = expected.to(torch.int32 if dtype == I8 else to_torch(operands[0]).dtype)
    result = reference.matrix_multiply(*operands, op0=ops[0], op1=ops[1])
    check(result, expected, atol=1e-5 if dtype in FLOATS else 2e-3 if dtype == F8 else 0)  # float8's least step: 2**-9


def test_matrix_multiply_of_int8_is_exact() -> None:
    operand = np.full((2, 100_000), -128, np.int8)  # in float32, sums beyond 2**24 would be rounded
    operand[:, ::3] = 127
    expected = operand.astype(np.int64) @ operand.T.astype(np.int64)
    check_exact(reference.matrix_multiply(operand, operand, op0="kNONE", op1="kTRANSPOSE"), expected.astype(np.int32))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_matrix_multiply_takes_a_widened_right_hand_side(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    lhs, rhs = random(rng, (3, 8), dtype), random(rng, (8, 4), dtype)
    expected = reference.matrix_multiply(lhs, rhs, op0="kNONE", op1="kNONE")
    assert expected.dtype == dtype
    check_exact(reference.matrix_multiply(lhs, rhs.astype(np.float32), op0="kNONE", op1="kNONE"), expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([I8, I4, F8]), st.sampled_from(FLOATS), seeds)
def test_quantize_and_dequantize(data: st.DataObject, target: np.dtype[Any], dtype: np.dtype[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = data.draw(st.sampled_from(["tensor", "channel", "block"]))
    axis = None
    if kind == "tensor":
        size, scale_shape = data.draw(shapes), ()
        view_shape = ()
    elif kind == "channel":
        size = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
        axis = data.draw(st.integers(0, len(size) - 1))
        scale_shape = (size[axis],)
        view_shape = (-1,) + (1,) * (len(size) - 1 - axis)
    else:
        blocks, block, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
        size, scale_shape = (blocks * block, columns), (blocks, columns)
        view_shape = scale_shape
    operand = (20 * random(rng, size, F32)).astype(dtype)
    scale = np.asarray(rng.uniform(0.05, 3, scale_shape)).astype(np.float32).astype(dtype)
    view = to_torch(scale).float().reshape(view_shape) if view_shape else to_torch(scale).float()
    if kind == "block":
        view = view.repeat_interleave(block, dim=0)
    low, high = (-448, 448) if target == F8 else (-8, 7) if target == I4 else (-128, 127)
    exact = to_torch(operand).float() / view
    codes = torch.clamp(exact, low, high).to(torch.float8_e4m3fn).float() if target == F8 else None
    codes = torch.clamp(torch.round(exact), low, high) if codes is None else codes

    quantized = reference.quantize(operand, scale, dtype=target, axis=axis)
    check_exact(quantized, to_numpy(codes).astype(target))
    restored = reference.dequantize(quantized, scale, dtype=dtype, axis=axis)
    check_exact(restored, (codes * view).to(to_torch(operand).dtype))


def test_quantize_rounds_half_to_even_saturates_and_takes_nan_for_0() -> None:
    operand = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.inf, -np.inf, np.nan], F32)
    one = np.array(1, F32)
    expected = [0, 2, 2, 0, -2]
    assert reference.quantize(operand, one, dtype=I8).tolist() == [*expected, 127, -128, 127, -128, 0]
    assert reference.quantize(operand, one, dtype=I4).astype(int).tolist() == [*expected, 7, -8, 7, -8, 0]
    result = reference.quantize(operand, one, dtype=F8).astype(np.float32)
    np.testing.assert_array_equal(result, [0.5, 1.5, 2.5, -0.5, -1.5, 448, -448, 448, -448, np.nan])
    by_zero = reference.quantize(np.array([1, 0, -1], F32), np.array(0, F32), dtype=I8)
    assert by_zero.tolist() == [127, 0, -128]


def test_quantization_as_nvtripy_documents_it() -> None:
    operand = np.arange(6, dtype=np.float32).reshape(2, 3)
    scale = np.array([0.99872, 0.96125], np.float32)
    expected = (operand / np.array([0.99872, 0.96125]).reshape(2, 1)).astype(np.int8)
    check_exact(reference.quantize(operand, scale, dtype=I8, axis=0), expected)
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    expected = (codes * np.array([0.99872, 0.96125]).reshape(2, 1)).astype(np.float32)
    check_exact(reference.dequantize(codes, scale, dtype=F32, axis=0), expected)
    expected = (np.array([1, 2, 3], np.int8) * 0.99872).astype(np.float32)
    check_exact(reference.dequantize(codes[0], scale[0:1].reshape(()), dtype=F32), expected)
    blocks = np.array([[1.0, 1.0]], np.float32)
    quantized = reference.quantize(operand[:, :2], blocks, dtype=I4)
    check_exact(reference.dequantize(quantized, blocks, dtype=F32), operand[:, :2])


@pytest.mark.parametrize("target", [I8, I4, F8], ids=str)
def test_quantize_needs_few_copies_of_a_big_weight(target: np.dtype[Any]) -> None:
    operand = np.ones((768, 3072), np.float16)
    scale = np.array(0.1, np.float16)
    tracemalloc.start()
    try:
        reference.dequantize(reference.quantize(operand, scale, dtype=target), scale, dtype=F16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * 4 * operand.size  # in float32 copies


# ---------------------------------------------------------------------------------------------------------------------
# Convolution, pooling and resizing


@st.composite
def windows(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """The geometry that convolution, its transpose and pooling have in common."""
    rank = draw(st.sampled_from(ranks))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    return {
        "rank": rank,
        "spatial": each(1, 6),
        "kernel": each(1, 3),
        "stride": each(1, 3),
        "dilation": each(1, 2),
        "pre_padding": each(0, 2),
        "post_padding": each(0, 2),
        "batch": draw(st.integers(0, 2)),
        "groups": draw(st.integers(1, 3)),
        "in_per_group": draw(st.integers(1, 3)),
        "out_per_group": draw(st.integers(1, 3)),
        "has_bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(FLOATS)),
        "seed": draw(seeds),
    }


ATTRIBUTES = ("stride", "pre_padding", "post_padding", "dilation")


def torch_padding(geometry: dict[str, Any]) -> list[int]:
    """torch.nn.functional.pad wants the last dimension first."""
    pairs = zip(geometry["pre_padding"], geometry["post_padding"], strict=True)
    return [size for pair in reversed(list(pairs)) for size in pair]


def convolution_operands(geometry: dict[str, Any], kernel_channels: tuple[int, int]) -> list[np.ndarray | None]:
    rng = np.random.default_rng(geometry["seed"])
    channels_in, channels_out = (geometry["groups"] * geometry[name] for name in ("in_per_group", "out_per_group"))
    operand = random(rng, (geometry["batch"], channels_in, *geometry["spatial"]), geometry["dtype"])
    kernel = random(rng, (*kernel_channels, *geometry["kernel"]), geometry["dtype"])
    return [operand, kernel, random(rng, (channels_out,), geometry["dtype"]) if geometry["has_bias"] else None]


@settings(max_examples=60, deadline=None)
@given(windows())
def test_convolution(geometry: dict[str, Any]) -> None:
    for axis in range(geometry["rank"]):
        padded = geometry["spatial"][axis] + geometry["pre_padding"][axis] + geometry["post_padding"][axis]
        assume(padded > geometry["dilation"][axis] * (geometry["kernel"][axis] - 1))
    groups = geometry["groups"]
    operands = convolution_operands(geometry, (groups * geometry["out_per_group"], geometry["in_per_group"]))
    wide = [None if array is None else to_torch(array).float() for array in operands]
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[geometry["rank"] - 1]
    expected = convolve(
        functional.pad(wide[0], torch_padding(geometry)),
        *wide[1:],
        stride=geometry["stride"],
        dilation=geometry["dilation"],
        groups=groups,
    )
    attributes = {name: geometry[name] for name in ATTRIBUTES}
    result = reference.convolution(*operands, num_groups=groups, **attributes)
    check(result, expected.to(to_torch(operands[0]).dtype), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(windows())
def test_deconvolution(geometry: dict[str, Any]) -> None:
    groups = geometry["groups"]
    for axis in range(geometry["rank"]):
        full = (geometry["spatial"][axis] - 1) * geometry["stride"][axis]
        full += geometry["dilation"][axis] * (geometry["kernel"][axis] - 1) + 1
        assume(full > geometry["pre_padding"][axis] + geometry["post_padding"][axis])
    assume(geometry["batch"])  # torch refuses an empty batch here
    operands = convolution_operands(geometry, (groups * geometry["in_per_group"], geometry["out_per_group"]))
    wide = [None if array is None else to_torch(array).float() for array in operands]
    deconvolve = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    expected = deconvolve[geometry["rank"] - 1](
        *wide, stride=geometry["stride"], dilation=geometry["dilation"], groups=groups
    )
    cut = [-size for size in torch_padding(geometry)]  # torch's padding is symmetric: the rest is cut off
    expected = functional.pad(expected, cut)
    attributes = {name: geometry[name] for name in ATTRIBUTES}
    result = reference.deconvolution(*operands, num_groups=groups, **attributes)
    check(result, expected.to(to_torch(operands[0]).dtype), atol=1e-4)


def test_deconvolution_takes_an_empty_batch() -> None:
    attributes: dict[str, Any] = {"stride": (2,), "pre_padding": (0,), "post_padding": (0,), "dilation": (1,)}
    result = reference.deconvolution(np.zeros((0, 2, 3), F32), np.zeros((2, 1, 3), F32), num_groups=2, **attributes)
    assert result.shape == (0, 2, 7)


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from([*FLOATS, I8]))
def test_max_pooling(geometry: dict[str, Any], dtype: np.dtype[Any]) -> None:
    assume(geometry["batch"])
    for axis in range(geometry["rank"]):
        padded = geometry["spatial"][axis] + geometry["pre_padding"][axis] + geometry["post_padding"][axis]
        assume(padded >= geometry["kernel"][axis])
    operand = random(np.random.default_rng(geometry["seed"]), (geometry["batch"], 2, *geometry["spatial"]), dtype)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[geometry["rank"] - 1]
    padded_operand = functional.pad(to_torch(operand).float(), torch_padding(geometry), value=-math.inf)
    expected = pool(padded_operand, geometry["kernel"], geometry["stride"])
    if dtype == I8:
        expected = expected.clamp(min=-128)
    result = reference.pooling(
        operand,
        window_size=geometry["kernel"],
        pooling_type="kMAX",
        **{name: geometry[name] for name in ATTRIBUTES if name != "dilation"},
    )
    check_exact(result, expected.to(to_torch(operand).dtype))


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from([True, False, None]))
def test_average_pooling(geometry: dict[str, Any], excludes: bool | None) -> None:
    assume(geometry["batch"])
    padding = tuple(
        min(pad, window // 2) for pad, window in zip(geometry["pre_padding"], geometry["kernel"], strict=True)
    )
    for size, window in zip(geometry["spatial"], geometry["kernel"], strict=True):
        assume(size >= window)  # torch demands it whatever the padding
    operand = random(np.random.default_rng(geometry["seed"]), (2, 2, *geometry["spatial"]), geometry["dtype"])
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[geometry["rank"] - 1]
    expected = pool(
        to_torch(operand).float(),
        geometry["kernel"],
        geometry["stride"],
        padding=padding,
        count_include_pad=excludes is False,
    )
    result = reference.pooling(
        operand,
        window_size=geometry["kernel"],
        stride=geometry["stride"],
        pre_padding=padding,
        post_padding=padding,
        pooling_type="kAVERAGE",
        average_count_excludes_padding=excludes,
    )
    check(result, expected.to(to_torch(operand).dtype), atol=1e-6)


def test_average_pooling_of_int8_and_of_uneven_padding() -> None:
    attributes: dict[str, Any] = {"window_size": (2,), "stride": (2,), "pooling_type": "kAVERAGE"}
    operand = np.array([[[1, 2, 3, 4, -3]]], np.int8)
    result = reference.pooling(operand, pre_padding=(0,), post_padding=(0,), **attributes)
    assert result.tolist() == [[[2, 4]]]  # 1.5 and 3.5, to the even neighbour
    operand = np.array([[[4, 8, 2]]], np.float32)
    result = reference.pooling(
        operand, pre_padding=(2,), post_padding=(1,), average_count_excludes_padding=True, **attributes
    )
    assert result.tolist() == [[[0, 6, 2]]]
    result = reference.pooling(
        operand, pre_padding=(2,), post_padding=(1,), average_count_excludes_padding=False, **attributes
    )
    assert result.tolist() == [[[0, 6, 1]]]


MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@st.composite
def resizes(draw: st.DrawFn, ranks: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    rank = draw(st.sampled_from(ranks))
    spatial = tuple(draw(st.integers(1, 7)) for _ in range(rank))
    target = tuple(draw(st.integers(1, 12)) for _ in range(rank))
    dtype = draw(st.sampled_from(FLOATS))
    return random(np.random.default_rng(draw(seeds)), (2, 2, *spatial), dtype), target


@quick
@given(resizes((1, 2, 3)))
def test_resize_nearest(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    operand, target = case
    expected = functional.interpolate(to_torch(operand).float(), size=target, mode="nearest")
    result = reference.resize_nearest(
        operand,
        shape_operand(2, 2, *target),
        coordinate_transformation="kASYMMETRIC",
        nearest_rounding="kFLOOR",
        selector="kFORMULA",
    )
    check_exact(result, expected.to(to_torch(operand).dtype))


def test_resize_nearest_rounds_as_told() -> None:
    operand = np.arange(4, dtype=np.int32)

    def resized(rounding: str, transformation: str = "kASYMMETRIC") -> list[int]:
        return reference.resize_nearest(
            operand,
            shape_operand(8),
            coordinate_transformation=transformation,
            nearest_rounding=rounding,
            selector="kFORMULA",
        ).tolist()

    assert resized("kFLOOR") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resized("kCEIL") == [0, 1, 1, 2, 2, 3, 3, 3]
    assert resized("kHALF_UP") == [0, 1, 1, 2, 2, 3, 3, 3]
    assert resized("kHALF_DOWN") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resized("kFLOOR", "kHALF_PIXEL") == [0, 0, 0, 1, 1, 2, 2, 3]


@quick
@given(resizes((1, 2, 3)), st.booleans())
def test_resize_linear(case: tuple[np.ndarray, tuple[int, ...]], align_corners: bool) -> None:
    operand, target = case
    mode = MODES[len(target)]
    expected = functional.interpolate(to_torch(operand).float(), size=target, mode=mode, align_corners=align_corners)
    result = reference.resize_linear(
        operand,
        shape_operand(2, 2, *target),
        coordinate_transformation="kALIGN_CORNERS" if align_corners else "kHALF_PIXEL",
        selector="kFORMULA",
    )
    check(result, expected.to(to_torch(operand).dtype), atol=1e-5)  # the coordinates' rounding errors, 12 * 2**-24


@quick
@given(resizes((2,)), st.booleans())
def test_resize_cubic(case: tuple[np.ndarray, tuple[int, ...]], align_corners: bool) -> None:
    operand, target = case
    expected = functional.interpolate(
        to_torch(operand).float(), size=target, mode="bicubic", align_corners=align_corners
    )
    result = reference.resize_cubic(
        operand,
        shape_operand(2, 2, *target),
        coordinate_transformation="kALIGN_CORNERS" if align_corners else "kHALF_PIXEL",
        selector="kFORMULA",
        cubic_coeff=-0.75,
    )
    check(result, expected.to(to_torch(operand).dtype), atol=2e-5)  # as above, through 16 weights of at most 1.2


@quick
@given(
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    # No scale but 2 may round to twice the size: there, torch's "nearest" takes the scale to be 2.
    st.tuples(st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.6]), st.sampled_from([0.5, 1.0, 1.7, 3.0])),
    seeds,
)
def test_resize_by_scales(spatial: tuple[int, int], scales: tuple[float, float], seed: int) -> None:
    operand = random(np.random.default_rng(seed), (1, 2, *spatial), F32)
    tensor, all_scales = to_torch(operand), (1.0, 1.0, *scales)
    nearest = reference.resize_nearest(
        operand,
        scales=all_scales,
        coordinate_transformation="kASYMMETRIC",
        nearest_rounding="kFLOOR",
        selector="kFORMULA",
    )
    check_exact(nearest, functional.interpolate(tensor, scale_factor=scales, mode="nearest"))
    attributes: dict[str, Any] = {"scales": all_scales, "coordinate_transformation": "kHALF_PIXEL"}
    linear = reference.resize_linear(operand, selector="kFORMULA", **attributes)
    check(linear, functional.interpolate(tensor, scale_factor=scales, mode="bilinear"), atol=1e-5)
    cubic = reference.resize_cubic(operand, selector="kFORMULA", cubic_coeff=-0.75, **attributes)
    check(cubic, functional.interpolate(tensor, scale_factor=scales, mode="bicubic"), atol=2e-5)


def test_resize_of_int8_rounds_and_saturates() -> None:
    operand = np.array([[100, 127, 127, -128]], np.int8)
    attributes: dict[str, Any] = {"coordinate_transformation": "kHALF_PIXEL", "selector": "kFORMULA"}
    linear = reference.resize_linear(operand, shape_operand(1, 2), **attributes)
    assert linear.dtype == np.int8 and linear.tolist() == [[114, 0]]  # 113.5 and -0.5, to the even neighbours
    cubic = reference.resize_cubic(operand, shape_operand(1, 8), cubic_coeff=-0.75, **attributes)
    assert cubic.dtype == np.int8 and cubic.max() == 127 and cubic.min() == -128


def test_resize_to_one_element_by_selector() -> None:
    operand = np.arange(5, dtype=np.float32)
    for selector, expected in (("kFORMULA", 2.0), ("kUPPER", 0.0)):
        result = reference.resize_linear(
            operand, shape_operand(1), coordinate_transformation="kHALF_PIXEL", selector=selector
        )
        assert result.tolist() == [expected]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def bad_calls() -> Iterator[tuple[str, type[Exception], str, Callable[[], Any]]]:
    ref = reference
    a = np.zeros((2, 3), F32)
    b = np.zeros((3, 2), F32)
    h = np.zeros((2, 3), F16)
    window: dict[str, Any] = {"stride": (1,), "pre_padding": (0,), "post_padding": (0,)}
    conv: dict[str, Any] = {**window, "num_groups": 1, "dilation": (1,)}
    image = np.zeros((1, 2, 3), F32)
    s = shape_operand
    yield "reshape", ValueError, "6 elements", lambda: ref.reshape(a, s(4, 2))
    yield "collapse", ValueError, "size 1", lambda: ref.collapse_rank(a, shape=(3, 2))
    yield "transpose", ValueError, "permutation", lambda: ref.transpose(a, permutation=(0, 0))
    yield "broadcast", ValueError, r"\(2, 4\)", lambda: ref.broadcast(a, s(2, 4), broadcast_dims=(0, 1))
    yield "broadcast dims", ValueError, r"\[0\]", lambda: ref.broadcast(a, s(2, 3, 4), broadcast_dims=(0,))
    yield "concatenation", ValueError, r"\(3, 2\)", lambda: ref.concatenation(a, b, axis=0)
    yield "concatenation dtypes", ValueError, "float16", lambda: ref.concatenation(a, h, axis=0)
    yield "slice outside", ValueError, "within", lambda: ref.slice(a, s(0, 1), s(2, 3), s(1, 1))
    yield "slice before", ValueError, "within", lambda: ref.slice(a, s(-1, 0), s(1, 1), s(1, 1))
    yield "slice negative", ValueError, "within", lambda: ref.slice(a, s(0, 0), s(-1, 1), s(1, 1))
    yield "slice rank", ValueError, "each dimension", lambda: ref.slice(a, s(0), s(1), s(1))
    yield "slice mode", ValueError, "kREFLECT", lambda: ref.slice(a, s(0, 0), s(1, 1), s(1, 1), mode="kNO")
    yield "gather", IndexError, "dimension 1", lambda: ref.gather(a, np.array([0, 3], np.int32), axis=1)
    yield "gather negative", IndexError, "-4", lambda: ref.gather(a, np.array([-4], np.int32), axis=1)
    yield "select", ValueError, r"\(3, 2\)", lambda: ref.select(a > 0, a, b)
    yield "select condition", ValueError, "bool", lambda: ref.select(a, a, a)
    yield "linspace", ValueError, "one step", lambda: ref.linspace(s(2, 2), s(0)[0], s(1), dtype=I32)
    yield "element_wise", ValueError, r"\(3, 2\)", lambda: ref.element_wise(a, b, operation="kSUM")
    yield "element_wise rank", ValueError, "rank", lambda: ref.element_wise(a, a[0], operation="kSUM")
    yield "element_wise dtype", ValueError, "float16", lambda: ref.element_wise(a, h, operation="kSUM")
    yield "element_wise name", ValueError, "kSUM", lambda: ref.element_wise(a, a, operation="kADD")
    yield "unary name", ValueError, "kEXP", lambda: ref.unary(a, operation="kNOT")
    yield "unary of integers", ValueError, "kABS", lambda: ref.unary(s(1), operation="kEXP")
    yield "activation", ValueError, "alpha", lambda: ref.activation(a, operation="kELU")
    yield "reduce", ValueError, "kSUM", lambda: ref.reduce(a, axes=(0,), operation="kNO", keep_dimensions=True)
    yield "top_k", ValueError, "at most 3", lambda: ref.top_k(a, k=4, axis=1, operation="kMAX")
    yield "top_k name", ValueError, "kMIN", lambda: ref.top_k(a, k=2, axis=1, operation="kNO")
    yield "normalization", ValueError, "scale", lambda: ref.normalization(a, b, b, axis=(1,), eps=1e-5)
    yield "groups", ValueError, "2 groups", lambda: ref.normalization(a, a, a, axis=(), eps=1e-5, num_groups=2)
    yield "matmul", ValueError, r"\(2, 3\)", lambda: ref.matrix_multiply(a, a, op0="kNONE", op1="kNONE")
    yield "matmul rank", ValueError, "rank", lambda: ref.matrix_multiply(a[0], b, op0="kNONE", op1="kNONE")
    yield "matmul name", ValueError, "kVECTOR", lambda: ref.matrix_multiply(a, b, op0="kNO", op1="kNONE")
    yield "quantize channel", ValueError, "axis 0", lambda: ref.quantize(a, np.ones(3, F32), dtype=I8, axis=0)
    yield "quantize block", ValueError, "2-D", lambda: ref.quantize(a, np.ones((3, 3), F32), dtype=I4)
    yield "quantize dtype", ValueError, "int8", lambda: ref.quantize(a, np.array(1, F32), dtype=I32)
    yield "dequantize", ValueError, "scalar", lambda: ref.dequantize(a.astype(I8), np.ones(2, F32), dtype=F32)
    yield "kernel", ValueError, "groups", lambda: ref.convolution(image, np.zeros((1, 3, 1), F32), **conv)
    yield "bias", ValueError, "bias", lambda: ref.convolution(image, np.zeros((1, 2, 1), F32), np.zeros(2, F32), **conv)
    yield "too small", ValueError, "fit", lambda: ref.convolution(image, np.zeros((1, 2, 4), F32), **conv)
    yield "stride", ValueError, "stride", lambda: ref.convolution(image[0], np.zeros((2, 3), F32), **conv)
    yield "deconvolution", ValueError, "groups", lambda: ref.deconvolution(image, np.zeros((1, 3, 1), F32), **conv)
    yield "pooling", ValueError, "fit", lambda: ref.pooling(image, window_size=(4,), pooling_type="kMAX", **window)
    yield "pooling name", ValueError, "kMAX", lambda: ref.pooling(image, window_size=(1,), pooling_type="kNO", **window)
    linear: dict[str, Any] = {"coordinate_transformation": "kHALF_PIXEL", "selector": "kFORMULA"}
    yield "resize rank", ValueError, "each dimension", lambda: ref.resize_linear(a, s(2), **linear)
    yield "resize nothing", ValueError, "scales", lambda: ref.resize_linear(a, **linear)
    yield "resize empty", ValueError, "at least 1", lambda: ref.resize_linear(a[:0], s(1, 1), **linear)


@pytest.mark.parametrize(("error", "message", "call"), [pytest.param(*case[1:], id=case[0]) for case in bad_calls()])
def test_error_says_what_was_expected(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert " expects " in str(caught.value) and "\n" not in str(caught.value)
