"""A compiled function: its graph, ready to run or to be written to a file.

The file holds nothing but data. Layout: the magic, the length of the header and its SHA-256 (so that a damaged file is
refused before anything is built from it), the header (JSON: producer, inputs, operations, outputs), then the constants'
bytes, each at a multiple of 64. They can also be kept apart, to be mapped into memory (:func:`constants_apart`). Like a
TensorRT engine, it is for the code that made it: another version of this package refuses it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nvtripy_portable import interpreter
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.cpu.versions import Version
from nvtripy_portable.dims import Dim, Symbolic
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Bounds, Graph, GraphError, Input, Operation, TensorType, Value
from nvtripy_portable.packing import pack_int4, unpack_int4
from nvtripy_portable.plan import OPERATIONS, Plan
from nvtripy_portable.plugins import calling

_MAGIC = b"NVTPORT1"
_PREFIX = struct.Struct("<8sQ32s")
_ALIGNMENT = 64
_MAX_RANK = 32

# What reading a header can raise that is valid JSON but not what serialize() wrote: wrong types, absent names, numbers
# that are no sizes, lists in lists without end.
_NONSENSE = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, GraphError)


class FormatError(ValueError):
    """The bytes are not an executable that this version wrote."""


class Executable:
    """A graph and, once it has run, its native program, or its plan where it has none."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._runner: Executor | Plan | None = None

    def run(self, inputs: Sequence[np.ndarray | Version]) -> list[np.ndarray | Version]:
        """Outputs for ``inputs``, which must have been checked against the graph's own.

        What a native program makes of a cache is a version of it, which can be an input again.

        Raises:
            ExecutionError: an operation failed on the shapes or values that reached it.
        """
        runner = self.runner()
        if isinstance(runner, Executor):
            return runner.run(inputs)
        arrays = [each.copy() if isinstance(each, Version) else each for each in inputs]
        return [*interpreter.run(runner, arrays)]

    def runner(self) -> Executor | Plan:
        """The native program, or the plan where there is none.

        Raises:
            ExecutionError: the environment asks for an instruction set or a number of threads that cannot be.
        """
        if self._runner is None:
            self._runner = Executor.of(self.graph) or Plan(self.graph)
        return self._runner

    def serialize(self) -> bytes:
        """The executable as bytes for :func:`deserialize`; within :func:`constants_apart` without its constants."""
        chunks: list[memoryview] = [] if _apart is None else _apart
        offset = 0

        def store(value: np.ndarray) -> dict[str, Any]:
            nonlocal offset
            data = _pack(value)
            padding = -offset % _ALIGNMENT
            chunks.extend((memoryview(bytes(padding)), data))
            offset += padding
            entry = {"dtype": DTYPE_NAMES[value.dtype], "shape": value.shape, "offset": offset, "bytes": len(data)}
            offset += len(data)
            return entry

        encoded = _encode(self.graph, store)
        if _apart is not None:
            encoded["bytes_apart"] = offset
        header = json.dumps(encoded, separators=(",", ":")).encode()
        prefix = _PREFIX.pack(_MAGIC, len(header), hashlib.sha256(header).digest())
        if _apart is not None:
            return prefix + header
        return b"".join((prefix, header, bytes(-(_PREFIX.size + len(header)) % _ALIGNMENT), *chunks))


_apart: Any = None  # where constants go, or come from, while `constants_apart` is in force


@contextlib.contextmanager
def constants_apart(constants: memoryview | None = None) -> Iterator[list[memoryview]]:
    """Within it, what is serialized leaves its constants in the list that this gives, and what is deserialized finds
    them in ``constants``.

    It holds for the whole process, as nvtripy's own saving and loading do not say for which executable they ask.
    """
    global _apart
    before, _apart = _apart, [] if constants is None else constants
    try:
        yield _apart
    finally:
        _apart = before


def deserialize(data: bytes) -> Executable:
    """An executable from :meth:`Executable.serialize`'s bytes.

    Raises:
        FormatError: the bytes are anything else. Nothing in them is ever executed.
        PluginError: it calls a plug-in that is not registered in this process.
    """
    if len(data) < _PREFIX.size:
        raise FormatError(f"expected an executable of at least {_PREFIX.size} bytes but got {len(data)}")
    magic, length, digest = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise FormatError(f"expected an executable that starts with {_MAGIC!r} but got {magic!r}")
    header = data[_PREFIX.size : _PREFIX.size + length]
    if len(header) != length or hashlib.sha256(header).digest() != digest:
        raise FormatError("the executable's header is truncated or damaged")
    start = _PREFIX.size + length
    constants = memoryview(data)[start + (-start % _ALIGNMENT) :]
    try:
        decoded = json.loads(header)
        if "bytes_apart" in decoded:
            constants = _apart if isinstance(_apart, memoryview) else memoryview(b"")
            if len(constants) != decoded["bytes_apart"]:
                size = decoded["bytes_apart"]
                raise FormatError(f"expected {size} bytes of constants beside it but got {len(constants)}")
        return Executable(_decode(decoded, constants))
    except _NONSENSE as error:
        raise FormatError(f"the executable's header makes no sense: {error!r}") from None


def _pack(value: np.ndarray) -> memoryview:
    """Little-endian bytes in row-major order, where possible those of the array itself; int4 two elements a byte."""
    packed = pack_int4(value.reshape(-1)) if value.dtype == ml_dtypes.int4 else np.ascontiguousarray(value)
    return packed.reshape(-1).view(np.uint8).data


def _unpack(data: memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype != ml_dtypes.int4:
        return np.frombuffer(data, dtype).reshape(shape)
    return unpack_int4(np.frombuffer(data, np.uint8), math.prod(shape)).astype(dtype).reshape(shape)


def _encode(graph: Graph, store: Any) -> dict[str, Any]:
    numbers: dict[Value, int] = {}

    def define(value: Value) -> dict[str, Any]:
        numbers[value] = len(numbers)
        return {"dtype": value.type.dtype, "shape": [_encode_dim(dim) for dim in value.type.shape]}

    inputs = [
        {
            "name": entry.name,
            "type": define(entry.value),
            "shape_bounds": entry.shape_bounds and asdict(entry.shape_bounds),
            "dimension_names": entry.dimension_names,
            "value_bounds": entry.value_bounds and asdict(entry.value_bounds),
        }
        for entry in graph.inputs
    ]
    operations = []
    for operation in graph.operations:
        attributes = dict(operation.attributes)
        if operation.kind == "constant":
            attributes["value"] = store(attributes["value"])
        operations.append(
            {
                "kind": operation.kind,
                "operands": [None if operand is None else numbers[operand] for operand in operation.operands],
                "attributes": attributes,
                "results": [define(result) for result in operation.results],
                "location": operation.location,
            }
        )
    outputs = [numbers[output] for output in graph.outputs]
    return {"producer": _producer(), "inputs": inputs, "operations": operations, "outputs": outputs}


@functools.cache
def _producer() -> str:
    """Identifies the code that compiles and runs executables: this package's own sources."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _decode(header: dict[str, Any], constants: memoryview) -> Graph:
    values: list[Value] = []

    def decode_type(entry: dict[str, Any]) -> TensorType:
        if entry["dtype"] not in DTYPES or len(entry["shape"]) > _MAX_RANK:
            raise FormatError(f"unknown tensor type {entry}")
        return TensorType(entry["dtype"], tuple(_decode_dim(dim) for dim in entry["shape"]))

    def value(index: Any) -> Value:
        if type(index) is not int or not 0 <= index < len(values):
            raise FormatError(f"expected one of the {len(values)} values so far but got {index!r}")
        return values[index]

    if header["producer"] != _producer():
        raise FormatError("the executable was made by another version of nvtripy-portable")
    graph = Graph()
    for entry in header["inputs"]:
        graph.inputs.append(_decode_input(entry, decode_type(entry["type"])))
        values.append(graph.inputs[-1].value)
    for entry in header["operations"]:
        kind, attributes = entry["kind"], {name: _as_tuple(value) for name, value in entry["attributes"].items()}
        result_types = [decode_type(each) for each in entry["results"]]
        if kind == "constant":
            attributes = {"value": _load(attributes["value"], constants)}
            if result_types != [TensorType(DTYPE_NAMES[attributes["value"].dtype], attributes["value"].shape)]:
                raise FormatError("a constant is not of the type that is declared")
        elif kind not in OPERATIONS or attributes.get("dtype", "f32") not in DTYPES:
            raise FormatError(f"unknown operation {kind!r} with attributes {attributes}")
        operands = [None if index is None else value(index) for index in entry["operands"]]
        has_two_results = kind == "top_k" or (kind == "attention" and operands[1] is not None)
        num_results = len(attributes["output_info"]) if kind == "plugin" else 1 + has_two_results
        if len(result_types) != num_results or num_results < 1:
            raise FormatError(f"{kind} cannot have {len(result_types)} results")
        if kind == "plugin":
            calling.check_counts(calling.of(attributes), len(operands), num_results)
        values.extend(graph.add(Operation(kind, operands, attributes, result_types, str(entry["location"]))).results)
    graph.outputs = [value(index) for index in header["outputs"]]
    return graph


def _decode_input(entry: dict[str, Any], type: TensorType) -> Input:
    def decode_bounds(name: str, length: int) -> Bounds | None:
        if entry[name] is None:
            return None
        parts = [tuple(entry[name][part]) for part in ("min", "opt", "max")]
        if any(len(part) != length or not all(isinstance(each, int) for each in part) for part in parts):
            raise FormatError(f"expected {name} of {length} numbers but got {entry[name]}")
        return Bounds(*parts)

    names = {int(index): str(name) for index, name in entry["dimension_names"].items()}
    result = Input(
        Value(type),
        str(entry["name"]),
        decode_bounds("shape_bounds", type.rank),
        names,
        decode_bounds("value_bounds", 1),
    )
    if any(not 0 <= index < type.rank for index in names) or not (result.shape_bounds or type.is_static):
        raise FormatError(f"expected bounds and names for the dimensions of an input of type {type}")
    return result


def _load(entry: dict[str, Any], constants: memoryview) -> np.ndarray:
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(dim) for dim in entry["shape"])
    size = math.prod(shape)
    expected = (size + 1) // 2 if dtype == ml_dtypes.int4 else size * dtype.itemsize
    data = constants[entry["offset"] : entry["offset"] + entry["bytes"]]
    if min(shape, default=0) < 0 or entry["offset"] < 0 or entry["bytes"] != expected or len(data) != expected:
        raise FormatError(f"constant {list(shape)} needs {expected} bytes but the file has {len(data)}")
    return _unpack(data, dtype, shape)


def _encode_dim(dim: Dim) -> int | str | None:
    return str(dim) if isinstance(dim, Symbolic) else dim


def _decode_dim(entry: int | str | None) -> Dim:
    """Expressions come back as single symbols: at run time only their being dynamic matters."""
    if isinstance(entry, str):
        return Symbolic.of(entry)
    if entry is not None and (type(entry) is not int or entry < 0):
        raise FormatError(f"expected a dimension but got {entry!r}")
    return entry


def _as_tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tuple(each) for name, each in value.items()}
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list) else value
