"""The part of MLIR's ``ir`` module that nvtripy touches while it lowers a trace.

Types and attributes are plain Python values wherever MLIR would wrap them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nvtripy_portable.graph import DTYPES, Bounds, Graph, TensorType, Value

_DYNAMIC = -(1 << 63)  # MLIR's own sentinel


class Diagnostic:
    def __init__(self, location: str) -> None:
        self.location = location


class MLIRError(Exception):
    """A compilation error. nvtripy reads the locations in ``error_diagnostics`` to point at the user's own line."""

    def __init__(self, message: str, location: str) -> None:
        super().__init__(message)
        self.error_diagnostics = [Diagnostic(location)]


class _Scope:
    """Something that is current inside a ``with``."""

    _stack: list[Any]

    def __init_subclass__(cls) -> None:
        cls._stack = []

    def __enter__(self) -> Any:
        self._stack.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.pop()

    @classmethod
    def current(cls) -> Any:
        return cls._stack[-1]


class Context(_Scope):
    def enable_multithreading(self, enable: bool) -> None:
        """Nothing here runs in threads."""


class Location(_Scope):
    """Where an operation comes from; its text is MLIR's notation, in which nvtripy finds its tensors' names."""

    def __init__(self, text: str) -> None:
        self._text = text

    @staticmethod
    def unknown(context: Context | None = None) -> Location:
        return Location("unknown")

    @staticmethod
    def name(name: str) -> Location:
        return Location(f'"{name}"')

    @staticmethod
    def fused(locations: Sequence[Location], metadata: str = "") -> Location:
        return Location(f'fused<"{metadata}">[{", ".join(each._text for each in locations)}]')

    def __str__(self) -> str:
        return f"loc({self._text})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Location) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)


class Block:
    """A place for operations: a module's body, or the graph of a function."""

    def __init__(
        self, module: Module | None = None, graph: Graph | None = None, arguments: Sequence[Value] = ()
    ) -> None:
        self.module = module
        self._graph = graph
        self.arguments = list(arguments)

    @property
    def graph(self) -> Graph:
        if self._graph is None:
            raise ValueError("expected an insertion point inside a function")
        return self._graph


class InsertionPoint(_Scope):
    def __init__(self, block: Block) -> None:
        self.block = block


class Module:
    """A module with one function. It is its own ``operation``."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.attributes: dict[str, Any] = {}
        self.body = Block(module=self)

    @staticmethod
    def create() -> Module:
        return Module()

    @property
    def operation(self) -> Module:
        return self

    def get_asm(self, large_elements_limit: int | None = None) -> str:
        return str(self.graph)

    def __str__(self) -> str:
        return str(self.graph)


# --- types ------------------------------------------------------------------------------------------------------------


class Type:
    """An element type, by its MLIR name: types of one name are equal."""

    mnemonic = ""

    def __init__(self, name: str | None = None) -> None:
        self.name = self.mnemonic if name is None else name

    @classmethod
    def get(cls) -> Type:
        return cls()

    def __eq__(self, other: object) -> bool:
        return self.name == other.name if isinstance(other, Type) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


class F64Type(Type):
    mnemonic = "f64"


class F32Type(Type):
    mnemonic = "f32"


class F16Type(Type):
    mnemonic = "f16"


class BF16Type(Type):
    mnemonic = "bf16"


class Float8E4M3FNType(Type):
    mnemonic = "f8e4m3fn"


class IntegerType(Type):
    @staticmethod
    def get_signless(width: int) -> IntegerType:
        return IntegerType(f"i{width}")


class ShapedType:
    @staticmethod
    def get_dynamic_size() -> int:
        return _DYNAMIC


class _GraphTypes(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, TensorType)


class RankedTensorType(metaclass=_GraphTypes):
    """What ``get`` gives is a graph's own type, and counts as an instance."""

    @staticmethod
    def get(shape: Sequence[int], element_type: Type) -> TensorType:
        return TensorType(element_type.name, tuple(None if dim == _DYNAMIC else dim for dim in shape))


class FunctionType:
    @staticmethod
    def get(inputs: Sequence[TensorType], results: Sequence[TensorType]) -> FunctionSignature:
        return tuple(inputs), tuple(results)


FunctionSignature = tuple[tuple[TensorType, ...], tuple[TensorType, ...]]


# --- attributes: plain values -----------------------------------------------------------------------------------------


class Attribute:
    @staticmethod
    def parse(text: str) -> Any:
        """Bounds from ``#tensorrt.shape_profile<min=[..], opt=[..], max=[..]>``; other attributes stay text."""
        if not text.startswith("#tensorrt.shape_profile<"):
            return text
        parts = dict(re.findall(r"(min|opt|max)=\[([^\]]*)\]", text))
        return Bounds(**{name: tuple(int(each) for each in re.findall(r"-?\d+", parts[name])) for name in parts})


class TypeAttr:
    @staticmethod
    def get(type: Any) -> Any:
        return type


class StringAttr:
    @staticmethod
    def get(text: str) -> str:
        return text


class BoolAttr:
    @staticmethod
    def get(value: bool) -> bool:
        return bool(value)


class IntegerAttr:
    @staticmethod
    def get(type: Type, value: int) -> int:
        return int(value)


class FloatAttr:
    @staticmethod
    def get(type: Type, value: float) -> float:
        return float(value)


class ArrayAttr:
    @staticmethod
    def get(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values)


class DictAttr:
    @staticmethod
    def get(values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)


class DenseI64ArrayAttr:
    @staticmethod
    def get(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(each) for each in values)


class DenseF32ArrayAttr:
    @staticmethod
    def get(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(float(each) for each in values)


class DenseElementsAttr:
    @staticmethod
    def get(array: Any, type: Type | None = None, shape: Sequence[int] = ()) -> Any:
        """A constant's elements, viewed, not copied: the compiler copies what survives its passes. Without a type, the
        values of a plug-in's field."""
        if type is None:
            return tuple(array)
        return np.asarray(array).view(np.ndarray).astype(DTYPES[type.name], copy=False).reshape(tuple(shape))
