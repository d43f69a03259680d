"""executable.py: what is saved comes back, and bytes that are anything else are refused and do nothing."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Imported after nvtripy, under the name that nvtripy knows it by: there is one MTRTException.
from mlir_tensorrt.runtime import api
from nvtripy_portable import executable
from nvtripy_portable.dims import Symbolic
from nvtripy_portable.executable import Executable, FormatError, deserialize
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Bounds, Graph, Input, Operation, TensorType, Value

MAGIC = b"NVTPORT1"
PREFIX = struct.Struct("<8sQ32s")


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed: {seed}")  # pytest shows this for a test that fails
    return np.random.default_rng(seed)


def compiled(function: Callable[..., Any], *infos: Any) -> Executable:
    return tp.compile(function, args=list(infos))._executable.portable


def run(what: Executable, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """As nvtripy runs an executable: inputs are checked, and errors are its own."""
    session = api.RuntimeSession(api.RuntimeSessionOptions(1, 0), api.Executable.of(what))
    inputs = [api.MemRefValue.view_of(array, api.PointerType.device) for array in arrays]
    results = session.execute_function("main", in_args=inputs)
    assert all(isinstance(result.dtype, api.ScalarTypeCode) for result in results)
    return [result.array for result in results]


def of_constants(*values: np.ndarray) -> Executable:
    graph = Graph()
    for value in values:
        type = TensorType(DTYPE_NAMES[value.dtype], value.shape)
        graph.outputs += graph.add(Operation("constant", [], {"value": value}, [type])).results
    return Executable(graph)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


# --- there and back ---------------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (3,), (2, 3), (3, 0, 2), (5, 7, 3), (64,), (1, 1, 129)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_constants_of_every_type_and_size(rng: np.random.Generator, dtype: np.dtype) -> None:
    values = []
    for shape in SHAPES:
        bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        if dtype == np.bool_:
            bits &= 1
        if dtype == ml_dtypes.int4:
            values.append(rng.integers(-8, 8, shape).astype(np.int8).astype(dtype))
        else:  # every bit pattern, NaNs and negative zeros among them
            values.append(np.frombuffer(bits.tobytes(), dtype).reshape(shape))
    loaded = deserialize(of_constants(*values).serialize())
    for result, value in zip(loaded.run([]), values, strict=True):
        assert_same(result, value)


@pytest.mark.parametrize("size", range(9))
def test_int4_is_packed_two_elements_a_byte(size: int) -> None:
    value = np.arange(-8, -8 + size).astype(np.int8).astype(ml_dtypes.int4)
    data = of_constants(value).serialize()
    assert_same(run(deserialize(data), [])[0], value)
    packed = data[-((size + 1) // 2) :] if size else b""
    assert packed == bytes(
        sum((int(element) & 15) << (4 * place) for place, element in enumerate(value[at : at + 2].astype(np.int8)))
        for at in range(0, size, 2)
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2],
        lambda a: a[:, ::-1],
        lambda a: np.broadcast_to(a[:1], (4, 6)),
        np.asfortranarray,
    ],
    ids=["transposed", "every other", "reversed", "broadcast", "column-major"],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.int4], ids=["float32", "int4"])
def test_constants_in_another_order_of_memory(view: Callable[[np.ndarray], np.ndarray], dtype: Any) -> None:
    value = view(np.arange(24).reshape(4, 6).astype(np.int8).astype(dtype))
    assert_same(run(deserialize(of_constants(value).serialize()), [])[0], np.ascontiguousarray(value))


def test_constants_start_at_multiples_of_64() -> None:
    values = [np.frombuffer(b"constant" + b"!" * size, np.int8) for size in (1, 55, 56, 57, 3)]
    data = of_constants(*values).serialize()
    starts = [at for at in range(len(data)) if data.startswith(b"constant!", at)]
    assert len(starts) == len(values)
    assert all(start % 64 == 0 for start in starts)


def test_every_kind_of_attribute() -> None:
    attributes = {
        "none": None,
        "true": True,
        "false": False,
        "integer": -(2**62),
        "float": 1e-5,
        "infinite": float("-inf"),
        "string": 'kSUM "quoted" \u00fc\n',
        "integers": (1, 0, -3),
        "floats": (0.1, 2.5, 1e300),
        "empty": (),
        "pairs": ((1, 2), (3, 4)),
        "dtype": "bf16",
    }
    graph = Graph([Input(Value(TensorType("f32", (2,))), "arg0")])
    graph.outputs = graph.add(
        Operation("cast", [graph.inputs[0].value, None], attributes, [TensorType("f32", (2,))], 'loc("here")')
    ).results
    (operation,) = deserialize(Executable(graph).serialize()).graph.operations
    assert operation.attributes == attributes
    assert [type(operation.attributes[name]) for name in attributes] == [type(value) for value in attributes.values()]
    assert operation.operands[1] is None
    assert operation.location == 'loc("here")'


def test_inputs_keep_what_was_promised_about_them() -> None:
    batch = Symbolic.of("batch")
    entries = [
        Input(Value(TensorType("f16", ())), "arg0"),
        Input(Value(TensorType("f16", (batch, 3))), "arg1", Bounds((1, 3), (2, 3), (4, 3)), {0: "batch"}),
        Input(Value(TensorType("i32", ())), "arg2", None, {}, Bounds((-1,), (0,), (7,))),
        Input(Value(TensorType("i1", (0, 2))), "\u00fcber", Bounds((0, 2), (0, 2), (0, 2)), {1: "a b", 0: ""}),
    ]
    graph = Graph(entries, [], [entry.value for entry in entries])
    graph.outputs += graph.add(
        Operation("shape", [entries[1].value], {}, [TensorType("f16", (None, Symbolic.of("batch + 1"), 4))])
    ).results
    loaded = deserialize(Executable(graph).serialize()).graph
    for entry, expected in zip(loaded.inputs, entries, strict=True):
        assert entry.value.type == expected.value.type
        assert (entry.name, entry.shape_bounds, entry.dimension_names, entry.value_bounds) == (
            (expected.name, expected.shape_bounds, expected.dimension_names, expected.value_bounds)
        )
    assert str(loaded) == str(graph)
    assert [loaded.outputs.index(entry.value) for entry in loaded.inputs] == [0, 1, 2, 3]


class Everything(tp.Module):
    """One operation of nearly every kind, on dynamic shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = tp.LayerNorm(6)
        self.norm.weight, self.norm.bias = tp.iota((6,)), tp.ones((6,))
        self.conv = tp.Conv(2, 2, (2, 3), padding=[(1, 0), (1, 1)], bias=False)
        self.conv.weight = tp.iota((2, 2, 2, 3), dim=3)
        self.table = tp.Tensor(np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6))

    def forward(self, x: tp.Tensor, n: tp.DimensionSize) -> tuple[tp.Tensor, ...]:
        half = tp.cast(self.norm(x), tp.float16)
        images = tp.reshape(tp.concatenate([x, x], dim=0), (-1, 2, 2, 3))
        values, indices = tp.topk(x, 2, dim=1)
        packed = tp.quantize(self.table, tp.Tensor(np.full((2, 6), 0.25, np.float32)), tp.int4)
        return (
            half,
            tp.softmax(x @ tp.transpose(self.table, 0, 1), dim=1),
            self.conv(images),
            tp.maxpool(images, (2, 2)),
            tp.avgpool(images, (2, 2), padding=[(1, 1), (1, 1)], count_include_pad=False),
            tp.resize(images, scales=(1, 1, 1.5, 2), mode="cubic"),
            values,
            indices,
            x @ tp.transpose(tp.dequantize(packed, tp.Tensor(np.full((2, 6), 0.25, np.float32)), tp.float32), 0, 1),
            tp.where(x > 0.0, x, tp.gelu(x)),
            tp.pad(x, [(1, 1), (0, 2)], mode="reflect"),
            tp.reshape(tp.iota((n, 2)), (-1,)),
            tp.gather(self.table, 1, indices),
            tp.sum(x, dim=1, keepdim=True),
        )


@pytest.fixture(scope="module")
def everything() -> Executable:
    rows = tp.NamedDimension("rows", 2, 2, 6)
    return compiled(Everything(), tp.InputInfo((rows, 6), tp.float32), tp.DimensionInputInfo((1, 2, 4)))


ARGUMENTS = [np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6), np.array(3, np.int32)]


def test_a_program_comes_back(everything: Executable) -> None:
    data = everything.serialize()
    loaded = deserialize(data)
    assert str(loaded.graph) == str(everything.graph)
    for actual, expected in zip(run(loaded, ARGUMENTS), run(everything, ARGUMENTS), strict=True):
        assert_same(actual, expected)
    assert loaded.serialize() == data
    assert deserialize(bytes(bytearray(data))).serialize() == data
    with pytest.raises(api.MTRTException, match=r"within min=\[2, 6\], max=\[6, 6\] but got \[7, 6\]"):
        run(loaded, [np.zeros((7, 6), np.float32), ARGUMENTS[1]])
    with pytest.raises(api.MTRTException, match=r"within \[1, 4\] but got 5"):
        run(loaded, [ARGUMENTS[0], np.array(5, np.int32)])


def test_it_comes_back_before_and_after_it_ran() -> None:
    # The plan holds widened copies of half-precision weights; what is saved stays half precision.
    weight = tp.Tensor(np.linspace(0, 1, 9, dtype=np.float16).reshape(3, 3))
    fresh = compiled(lambda x: x @ weight, tp.InputInfo((2, 3), tp.float16))
    before = fresh.serialize()
    (result,) = run(fresh, [np.ones((2, 3), np.float16)])
    assert fresh.serialize() == before
    assert_same(run(deserialize(before), [np.ones((2, 3), np.float16)])[0], result)


def test_nvtripys_save_and_load(tmp_path: Path) -> None:
    rows = tp.NamedDimension("rows", 1, 2, 4)

    def program(x: tp.Tensor, others: list[tp.Tensor], n: tp.DimensionSize) -> list[tp.Tensor]:
        return [x * 2.0 + others[0], tp.reshape(x, (n, -1))]

    original = tp.compile(
        program,
        args=[
            tp.InputInfo((rows, 3), tp.float32),
            [tp.InputInfo((rows, 3), tp.float32)],
            tp.DimensionInputInfo((1, 1, 3)),
        ],
    )
    original.save(str(tmp_path / "executable.json"))
    loaded = tp.Executable.load(str(tmp_path / "executable.json"))
    x = tp.copy(tp.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)), tp.device("gpu"))
    arguments = (x, [x], tp.DimensionSize(3))
    results = [each.tolist() for each in loaded(*arguments)]
    assert results == [each.tolist() for each in original(*arguments)]
    assert results == [[[0, 3, 6], [9, 12, 15]], [[0, 1], [2, 3], [4, 5]]]
    assert str(loaded) == str(original)
    with pytest.raises(tp.TripyException, match="'rows' is 2 in arg0 but 1 in arg1"):
        loaded(x, [tp.ones((1, 3)).eval()], tp.DimensionSize(3))


def test_the_engine_is_the_executable_itself() -> None:
    program = tp.compile(lambda x: x + 1.0, args=[tp.InputInfo((2,), tp.float32)])
    engine = program.serialized_tensorrt_engine
    assert run(deserialize(engine), [np.float32([1, 2])])[0].tolist() == [2, 3]


# --- bytes that are something else ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved() -> bytes:
    """A small executable, whose last bytes are a constant's."""
    weight = tp.Tensor(np.arange(1, 7, dtype=np.float32).reshape(3, 2))
    rows = tp.NamedDimension("rows", 1, 2, 4)
    program = compiled(
        lambda x, n: (tp.reshape(x @ weight, (n, -1)), tp.topk(x, 2, dim=1)[1]),
        tp.InputInfo((rows, 3), tp.float32),
        tp.DimensionInputInfo((1, 1, 4)),
    )
    for operation in program.graph.operations:
        operation.location = "here"  # pytest's stack is long, and these tests go through every byte
    data = program.serialize()
    assert deserialize(data).serialize() == data
    return data


VALID = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(2, np.int32)]


def header_end(data: bytes) -> int:
    return PREFIX.size + PREFIX.unpack_from(data)[1]


def sealed(header: bytes, constants: bytes = b"") -> bytes:
    """A file with a header of one's own and a right SHA-256."""
    start = PREFIX.size + len(header)
    return PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()) + header + b"\0" * (-start % 64) + constants


def constants_of(data: bytes) -> bytes:
    end = header_end(data)
    return data[end + (-end % 64) :]


def test_the_layout_is_the_one_these_tests_forge(saved: bytes) -> None:
    assert sealed(saved[PREFIX.size : header_end(saved)], constants_of(saved)) == saved


def test_random_bytes(rng: np.random.Generator, saved: bytes) -> None:
    starts = (b"", MAGIC, saved[:16], saved[: PREFIX.size], saved[: PREFIX.size + 40])
    for number in range(20_000):
        data = starts[number % len(starts)] + rng.bytes(int(rng.integers(0, 200)))
        with pytest.raises(FormatError):
            deserialize(data)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    for start in (b"", MAGIC):
        with pytest.raises(FormatError):
            deserialize(start + data)


@pytest.mark.parametrize("start", [b"", MAGIC], ids=["random", "with the magic"])
def test_a_million_random_bytes(rng: np.random.Generator, start: bytes) -> None:
    with pytest.raises(FormatError):
        deserialize(start + rng.bytes(1_000_000))


def test_a_million_random_bytes_as_a_header(rng: np.random.Generator) -> None:
    with pytest.raises(FormatError):
        deserialize(sealed(rng.bytes(1_000_000)))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 0, 1])
def test_a_length_that_is_not_the_headers(saved: bytes, length: int) -> None:
    _, _, digest = PREFIX.unpack_from(saved)
    with pytest.raises(FormatError, match="truncated or damaged"):
        deserialize(PREFIX.pack(MAGIC, length, digest) + saved[PREFIX.size :])


def test_truncation_at_every_length(saved: bytes) -> None:
    for length in range(len(saved)):
        with pytest.raises(FormatError):
            deserialize(saved[:length])


def test_every_flipped_bit_before_the_constants(saved: bytes) -> None:
    for position in range(header_end(saved)):
        for bit in range(8) if position < PREFIX.size else (position % 8,):
            damaged = bytearray(saved)
            damaged[position] ^= 1 << bit
            with pytest.raises(FormatError):
                deserialize(bytes(damaged))


def test_a_flipped_bit_of_a_constant_changes_a_value_at_most(saved: bytes) -> None:
    expected = run(deserialize(saved), VALID)
    for position in range(header_end(saved), len(saved)):
        damaged = bytearray(saved)
        damaged[position] ^= 1 << (position % 8)
        try:
            results = run(deserialize(bytes(damaged)), VALID)
        except (FormatError, api.MTRTException):
            continue
        assert [each.dtype for each in results] == [each.dtype for each in expected]


def test_another_version_is_refused(saved: bytes) -> None:
    header = json.loads(saved[PREFIX.size : header_end(saved)])
    header["producer"] = "0" * 64
    with pytest.raises(FormatError, match="another version"):
        deserialize(sealed(json.dumps(header).encode(), constants_of(saved)))


def test_nvtripy_gets_an_error_that_it_knows(saved: bytes) -> None:
    with pytest.raises(api.MTRTException, match=r"cannot load the executable: .*truncated or damaged"):
        api.Executable(saved[: PREFIX.size + 100])


# --- headers that are sealed but make no sense ------------------------------------------------------------------------


def attempt(data: bytes, arguments: list[np.ndarray]) -> str:
    """What happens: refused at load, failed at run, or ran. Anything else is raised."""
    try:
        loaded = deserialize(data)
    except FormatError:
        return "refused"
    try:
        run(loaded, arguments)
    except api.MTRTException:
        return "failed"
    return "ran"


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def changed(text: bytes, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    """A JSON document with the value at ``path`` changed."""
    document = parent = json.loads(text)
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(document).encode()


NONSENSE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**30,
    -(10**30),
    1.5,
    float("inf"),
    float("nan"),
    "",
    "f32",
    "x" * 10_000,
    [],
    {},
    [[]],
]
NONSENSE += [
    [-1],
    [1] * 40,
    [10**30, 10**30],
    [None],
    {"a": 1},
    [2, 0],
    ["f16"],
    {"min": [0], "opt": [0], "max": [10**30]},
]


def put(value: Any) -> Callable[[Any, Any], None]:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    return change


def remove(parent: Any, key: Any) -> None:
    del parent[key]


def repeat(parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent["another " + key] = parent[key]


@pytest.mark.slow
def test_every_value_of_a_header_replaced_by_nonsense(saved: bytes) -> None:
    header, constants = saved[PREFIX.size : header_end(saved)], constants_of(saved)
    assert attempt(sealed(header, constants), VALID) == "ran"
    happened: Counter[str] = Counter()
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in places(json.loads(header)):
        for change in [put(value) for value in NONSENSE] + [remove, repeat]:
            happened[attempt(sealed(changed(header, path, change), constants), VALID)] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 200_000  # KiB
    assert happened["refused"] > 1000
    assert happened["failed"] > 100


def test_whole_headers_of_nonsense() -> None:
    for value in NONSENSE:
        with pytest.raises(FormatError):
            deserialize(sealed(json.dumps(value).encode()))
    for text in (b"", b"{", b"nul", b"\xff\xfe", b'"\\ud800"', b"1" * 10_000, b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(FormatError):
            deserialize(sealed(text))


def test_endless_lists_inside_a_header(saved: bytes) -> None:
    header = saved[PREFIX.size : header_end(saved)]
    for path in (("inputs",), ("operations", 0, "attributes"), ("operations", 0, "location"), ("outputs", 0)):
        text = changed(header, path, put("HERE")).replace(b'"HERE"', b"[" * 50_000 + b"]" * 50_000)
        with pytest.raises(FormatError):
            deserialize(sealed(text, constants_of(saved)))


def header_with(**parts: Any) -> dict[str, Any]:
    """A header of one input x: f32[2] and one operation, relu, with parts of the operation replaced."""
    operation = {
        "kind": "activation",
        "operands": [0],
        "attributes": {"operation": "kRELU"},
        "results": [{"dtype": "f32", "shape": [2]}],
        "location": "",
    }
    names = {"name": "arg0", "shape_bounds": None, "dimension_names": {}, "value_bounds": None}
    return {
        "producer": executable._producer(),
        "inputs": [{**names, "type": {"dtype": "f32", "shape": [2]}}],
        "operations": [{**operation, **parts}],
        "outputs": [1],
    }


def constant(shape: list[int], bytes: int = 0, offset: int = 0, dtype: str = "f32") -> dict[str, Any]:
    entry = {"dtype": dtype, "shape": shape, "offset": offset, "bytes": bytes}
    return {
        "kind": "constant",
        "operands": [],
        "attributes": {"value": entry},
        "results": [{"dtype": dtype, "shape": shape}],
    }


def test_the_small_header_is_right() -> None:
    (result,) = run(deserialize(sealed(json.dumps(header_with()).encode())), [np.float32([-1, 2])])
    assert result.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        (constant([10**6, 10**6]), "refused"),
        (constant([10**6, 10**6], bytes=4 * 10**12), "refused"),
        (constant([2**62, 4], bytes=2**66), "refused"),
        (constant([0, 10**30]), "refused"),
        (constant([0, 2**62, 2**62]), "refused"),
        (constant([-1, -4], bytes=16), "refused"),
        (constant([2], bytes=8, offset=-8), "refused"),
        (constant([1], bytes=4, offset=-8), "refused"),  # which Python would take for one before the last
        (constant([2], bytes=8, offset=64), "refused"),
        (constant([2], bytes=8, offset=2**70), "refused"),
        (constant([3], bytes=8), "refused"),
        (constant([1] * 33, bytes=4), "refused"),
        (constant([2], bytes=8, dtype="f64"), "refused"),
        ({**constant([2], bytes=8), "results": [{"dtype": "f32", "shape": [3]}]}, "refused"),
        ({**constant([2], bytes=8), "results": [{"dtype": "f16", "shape": [2]}]}, "refused"),
        ({**constant([2], bytes=8), "results": []}, "refused"),
        ({"results": [{"dtype": "f32", "shape": [-2]}]}, "refused"),
        ({"results": [{"dtype": "f32", "shape": [10**30]}]}, "ran"),  # a claim: no memory comes of it
        ({"results": [{"dtype": "f32", "shape": [2]}] * 2}, "refused"),
        ({"results": []}, "refused"),
        ({"kind": "rm -rf"}, "refused"),
        ({"kind": "__class__"}, "refused"),
        ({"kind": ["activation"]}, "refused"),
        ({"operands": [1]}, "refused"),  # itself
        ({"operands": [2]}, "refused"),
        ({"operands": [-1]}, "refused"),
        ({"operands": [0.0]}, "refused"),
        ({"operands": [True]}, "refused"),
        ({"operands": [[0]]}, "refused"),
        ({"operands": []}, "failed"),
        ({"operands": [None]}, "failed"),
        ({"operands": [0, 0, 0]}, "failed"),
        ({"attributes": {}}, "failed"),
        ({"attributes": {"operation": "kNONE"}}, "failed"),
        ({"attributes": {"operation": ["kRELU"]}}, "failed"),
        ({"attributes": {"operation": {"kRELU": 1}}}, "failed"),
        ({"attributes": {"operation": "kRELU", "more": 1}}, "failed"),
        ({"attributes": {"operation": "kRELU", "input": 1}}, "failed"),
        ({"attributes": []}, "refused"),
        ({"kind": "cast", "attributes": {"dtype": "f64"}}, "refused"),
        ({"kind": "cast", "attributes": {"dtype": 7}}, "refused"),
        ({"kind": "cast", "attributes": {"dtype": ["f32"]}}, "refused"),
        ({"kind": "cast", "attributes": {"dtype": "f16"}}, "ran"),
        ({"kind": "transpose", "attributes": {"permutation": [10**30]}}, "failed"),
        ({"kind": "transpose", "attributes": {"permutation": "0"}}, "failed"),
        ({"kind": "softmax", "attributes": {"axis": 10**30}}, "failed"),
        ({"kind": "collapse_rank", "attributes": {"shape": [10**30]}}, "failed"),
        ({"kind": "top_k", "attributes": {"k": 10**30, "axis": 0, "operation": "kMAX"}}, "refused"),
        (
            {
                "kind": "top_k",
                "attributes": {"k": 10**30, "axis": 0, "operation": "kMAX"},
                "results": [{"dtype": "f32", "shape": [2]}] * 2,
            },
            "failed",
        ),
        ({"kind": "reduce", "attributes": {"axes": [0, 0], "operation": "kSUM", "keep_dimensions": 1}}, "failed"),
    ],
    ids=str,
)
def test_an_operation_of_nonsense(parts: dict[str, Any], outcome: str) -> None:
    tracemalloc.start()
    try:
        data = sealed(json.dumps(header_with(**parts)).encode(), b"\0" * 8)
        assert attempt(data, [np.float32([-1, 2])]) == outcome
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "parts",
    [
        {"shape_bounds": {"min": [1], "opt": [1], "max": []}},
        {"shape_bounds": {"min": [1, 1], "opt": [1, 1], "max": [1, 1]}},
        {"shape_bounds": {"min": ["a"], "opt": ["a"], "max": ["a"]}},
        {"shape_bounds": {"min": "a", "opt": "a", "max": "a"}},
        {"shape_bounds": {"min": [None], "opt": [None], "max": [None]}},
        {"shape_bounds": []},
        {"shape_bounds": ""},
        {"shape_bounds": 1},
        {"value_bounds": {"min": [], "opt": [], "max": []}},
        {"value_bounds": {"min": [0.5], "opt": [1], "max": [2]}},
        {"dimension_names": {"7": "rows"}},
        {"dimension_names": {"-1": "rows"}},
        {"dimension_names": {"x": "rows"}},
        {"dimension_names": ["rows"]},
        {"type": {"dtype": "f32", "shape": [None]}},
        {"type": {"dtype": "f32", "shape": ["rows"]}},
        {"type": {"dtype": "f32", "shape": [2.0]}},
        {"type": {"dtype": "f32", "shape": [[2]]}},
        {"type": {"dtype": "f32", "shape": [True]}},
        {"type": {"dtype": "f32"}},
        {"type": "f32"},
    ],
    ids=str,
)
def test_an_input_of_nonsense(parts: dict[str, Any]) -> None:
    header = header_with()
    header["inputs"][0].update(parts)
    with pytest.raises(FormatError):
        deserialize(sealed(json.dumps(header).encode()))


@pytest.mark.parametrize("outputs", [[2], [-1], [None], ["0"], [0.0], 1, None, {"0": 1}, [[0]]], ids=str)
def test_outputs_of_nonsense(outputs: Any) -> None:
    with pytest.raises(FormatError):
        deserialize(sealed(json.dumps({**header_with(), "outputs": outputs}).encode()))


@pytest.mark.parametrize(
    "arguments", [[], [np.float32([1, 2])] * 2, [np.float32(1)], [np.float32([1])], [np.int32([1, 2])]], ids=str
)
def test_wrong_arguments_are_refused(arguments: list[np.ndarray]) -> None:
    loaded = deserialize(sealed(json.dumps(header_with()).encode()))
    with pytest.raises(api.MTRTException):
        run(loaded, [np.asarray(each) for each in arguments])
