"""``mlir_tensorrt.runtime.api``: memory, streams, and sessions that run executables.

nvtripy knows a "cpu" and a "gpu". The portable runtime's execution device answers to "gpu"; both are host memory.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from mlir_tensorrt.runtime import dlpack
from nvtripy_portable import executable as portable
from nvtripy_portable.cpu.versions import Version
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Input
from nvtripy_portable.interpreter import ExecutionError
from nvtripy_portable.plugins import PluginError


class MTRTException(Exception):
    """An error of the compiler or the runtime. nvtripy recognises some by their text and explains them itself.

    ``error_diagnostics``, where there are any, hold the locations by which nvtripy points at the user's own line.
    """

    error_diagnostics: list[Any]


class ScalarTypeCode(Enum):
    """Element types, by their MLIR names."""

    i1 = "i1"
    i4 = "i4"
    i8 = "i8"
    i32 = "i32"
    i64 = "i64"
    f8e4m3fn = "f8e4m3fn"
    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


class PointerType(Enum):
    host = 0
    device = 1


class MemRefValue(np.ndarray, metaclass=ABCMeta):
    """An array that knows where it is.

    It is an ndarray because nvtripy reads results through ``memoryview``, and Python 3.10 and 3.11 let only C types
    offer a buffer.
    """

    address_space: PointerType

    @staticmethod
    def view_of(array: np.ndarray, address_space: PointerType) -> MemRefValue:
        memref = array.view(MemRefValue)
        memref.address_space = address_space
        return memref

    @property
    def dtype(self) -> ScalarTypeCode:  # type: ignore[override]
        return ScalarTypeCode(DTYPE_NAMES[self.array.dtype])

    @property
    def array(self) -> np.ndarray:
        """The same memory as a plain array."""
        return self.view(np.ndarray)

    def __dlpack__(self, **arguments: Any) -> Any:
        return dlpack.to_capsule(self.array, DTYPE_NAMES[self.array.dtype])

    def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
        return (dlpack.CPU, 0)


@MemRefValue.register
class CacheMemRef:
    """A cache that a compiled function gave, in the device's memory.

    It is no array: a function that gets it may go on in its memory, and only who looks into it makes it stay.
    """

    address_space = PointerType.device

    def __init__(self, version: Version) -> None:
        self.version = version
        self.shape = version.shape
        self.dtype = ScalarTypeCode(DTYPE_NAMES[version.dtype])

    @property
    def array(self) -> np.ndarray:
        """The contents, which stay as they are from now on."""
        return self.version.array()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.array)  # type: ignore[arg-type]

    def __dlpack__(self, **arguments: Any) -> Any:
        return dlpack.to_capsule(self.array, DTYPE_NAMES[self.version.dtype])

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0)


class Device:
    """The one device."""


class Stream:
    """Calls complete before they return, so a stream has nothing to order and nothing to wait for."""

    @property
    def ptr(self) -> int:
        """An address that no other stream has at the same time: the object's own, as there is no CUDA stream."""
        return id(self)

    def sync(self) -> None:
        """Returns at once."""


class RuntimeClient:
    def __init__(self) -> None:
        self._devices = [Device()]

    def get_devices(self) -> list[Device]:
        return self._devices

    def create_stream(self) -> Stream:
        return Stream()

    def create_memref(
        self,
        array: Any = None,
        *,
        shape: Sequence[int],
        dtype: ScalarTypeCode,
        device: Device | None = None,
        stream: Stream | None = None,
    ) -> MemRefValue:
        """Memory of the given shape and type, holding a copy of ``array``'s elements where one is given."""
        numpy_dtype = DTYPES[dtype.value]
        if array is None:
            memory = np.zeros(tuple(shape), numpy_dtype)
        else:
            memory = np.array(array).astype(numpy_dtype).reshape(tuple(shape))
        return MemRefValue.view_of(memory, PointerType.host if device is None else PointerType.device)

    def create_memref_view_from_dlpack(self, capsule: Any, assert_canonical_strides: bool = True) -> MemRefValue:
        """A view of a capsule's memory. Nothing here takes other than canonical strides, asserted or not."""
        try:
            return MemRefValue.view_of(dlpack.from_capsule(capsule), PointerType.host)
        except TypeError as error:
            raise MTRTException(str(error)) from None

    def copy_to_host(self, device_memref: MemRefValue | CacheMemRef, **options: Any) -> MemRefValue:
        if isinstance(device_memref, CacheMemRef):
            return MemRefValue.view_of(device_memref.version.copy(), PointerType.host)
        return MemRefValue.view_of(device_memref.array.copy(), PointerType.host)

    def copy_to_device(self, host_memref: MemRefValue, device: Device, **options: Any) -> MemRefValue:
        return MemRefValue.view_of(host_memref.array.copy(), PointerType.device)


class Signature:
    def __init__(self, num_results: int) -> None:
        self._num_results = num_results

    def get_num_results(self) -> int:
        return self._num_results


class Executable:
    """A compiled function, from the bytes that :meth:`serialize` gave or straight from the compiler."""

    def __init__(self, data: bytes) -> None:
        try:
            self.portable = portable.deserialize(data)
        except (portable.FormatError, PluginError) as error:
            raise MTRTException(f"cannot load the executable: {error}") from None

    @classmethod
    def of(cls, executable: portable.Executable) -> Executable:
        instance = cls.__new__(cls)
        instance.portable = executable
        return instance

    def get_signature(self, name: str) -> Signature:
        return Signature(len(self.portable.graph.outputs))

    def serialize(self) -> bytes:
        return self.portable.serialize()

    def get_data_segments(self) -> list[tuple[str, bytes]]:
        """Where TensorRT would have its engine, there is the portable executable itself."""
        return [("portable", self.portable.serialize())]


class RuntimeSessionOptions:
    def __init__(self, num_devices: int, device_id: int) -> None:
        """There is one device, whatever is asked for."""


class RuntimeSession:
    def __init__(self, options: RuntimeSessionOptions, executable: Executable) -> None:
        self._executable = executable.portable

    def execute_function(
        self,
        name: str,
        in_args: Sequence[MemRefValue | CacheMemRef],
        stream: Stream | None = None,
        client: RuntimeClient | None = None,
    ) -> list[MemRefValue | CacheMemRef]:
        arrays = [memref.version if isinstance(memref, CacheMemRef) else memref.array for memref in in_args]
        _check_inputs(self._executable.graph.inputs, arrays)
        try:
            outputs = self._executable.run(arrays)
        except ExecutionError as error:
            raise MTRTException(str(error)) from error
        return [
            CacheMemRef(output) if isinstance(output, Version) else MemRefValue.view_of(output, PointerType.device)
            for output in outputs
        ]


def _check_inputs(inputs: Sequence[Input], arrays: Sequence[np.ndarray | Version]) -> None:
    if len(inputs) != len(arrays):
        raise MTRTException(f"function expects {len(inputs)} arguments but got {len(arrays)}")
    named: dict[str, tuple[int, str]] = {}
    after_dimension = False
    for entry, array in zip(inputs, arrays, strict=True):
        expected = entry.value.type
        if array.dtype != DTYPES[expected.dtype]:
            raise MTRTException(
                f"{entry.name}: function expects a memref type with element type {expected.dtype} "
                f"but got {DTYPE_NAMES[array.dtype]}"
            )
        if entry.value_bounds is not None:
            least, greatest = entry.value_bounds.min[0], entry.value_bounds.max[0]
            number = None if array.ndim else int(array if isinstance(array, np.ndarray) else array.copy())
            if number is None or not least <= number <= greatest:
                got = f"shape {list(array.shape)}" if number is None else number
                raise MTRTException(f"{entry.name}: expected a value within [{least}, {greatest}] but got {got}")
            after_dimension = True
            continue
        bounds = entry.shape_bounds
        least_shape, greatest_shape = (bounds.min, bounds.max) if bounds else (expected.shape, expected.shape)
        if array.ndim != len(least_shape) or any(
            not low <= size <= high for low, size, high in zip(least_shape, array.shape, greatest_shape, strict=True)
        ):
            # At "Runtime" nvtripy explains the mismatch itself, but stumbles over a dimension among the inputs before.
            start = "Shape mismatch" if after_dimension else "Runtime shape mismatch"
            raise MTRTException(
                f"{start}: {entry.name} expects a shape within min={list(least_shape)}, "
                f"max={list(greatest_shape)} but got {list(array.shape)}"
            )
        for index, symbol in entry.dimension_names.items():
            size, first = named.setdefault(symbol, (array.shape[index], entry.name))
            if size != array.shape[index]:
                raise MTRTException(
                    f"Shape mismatch: dimension {symbol!r} is {size} in {first} "
                    f"but {array.shape[index]} in {entry.name}: expected dimensions of one name to be equal"
                )
