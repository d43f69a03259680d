"""``mlir_tensorrt.compiler.api``: from a module to an executable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from mlir_tensorrt.compiler import ir
from mlir_tensorrt.runtime.api import Executable, MTRTException
from nvtripy_portable import compiler
from nvtripy_portable import executable as portable
from nvtripy_portable.graph import GraphError
from nvtripy_portable.plugins import PluginError, registry

__all__ = [
    "CompilerClient",
    "Executable",
    "PluginFieldInfo",
    "PluginFieldType",
    "get_tensorrt_plugin_field_schema",
    "translate_mlir_to_executable",
]


class CompilerClient:
    def __init__(self, context: ir.Context) -> None:
        """The context holds nothing that the portable compiler needs."""

    def get_compilation_task(self, mnemonic: str, arguments: Sequence[str]) -> CompilationTask:
        """The options are TensorRT's (builder level, timing cache); the portable compiler has no use for them."""
        return CompilationTask()


class CompilationTask:
    def run(self, module: ir.Module) -> None:
        try:
            compiler.optimize(module.graph)
        except GraphError as error:
            # As TensorRT's compiler says it, with the location where nvtripy looks for it.
            failure = MTRTException(f"InternalError: failed to run pass pipeline: {error}")
            failure.error_diagnostics = [ir.Diagnostic(error.location)]
            raise failure from None


def translate_mlir_to_executable(module: ir.Module) -> Executable:
    return Executable.of(portable.Executable(module.graph))


class PluginFieldType(Enum):
    """TensorRT's plug-in field types."""

    FLOAT16 = 0
    FLOAT32 = 1
    FLOAT64 = 2
    INT8 = 3
    INT16 = 4
    INT32 = 5
    CHAR = 6
    DIMS = 7
    UNKNOWN = 8
    BF16 = 9
    INT64 = 10
    FP8 = 11
    INT4 = 12


@dataclass(frozen=True)
class PluginFieldInfo:
    """What a plug-in's field takes: values of a type, ``length`` of them where that is not 0."""

    type: PluginFieldType
    length: int


_FIELD_TYPES = {
    "float16": PluginFieldType.FLOAT16,
    "float32": PluginFieldType.FLOAT32,
    "float64": PluginFieldType.FLOAT64,
    "bfloat16": PluginFieldType.BF16,
    "float8": PluginFieldType.FP8,
    "int4": PluginFieldType.INT4,
    "int8": PluginFieldType.INT8,
    "int16": PluginFieldType.INT16,
    "int32": PluginFieldType.INT32,
    "int64": PluginFieldType.INT64,
    "text": PluginFieldType.CHAR,
    "dims": PluginFieldType.DIMS,
}


def get_tensorrt_plugin_field_schema(name: str, version: str, namespace: str, extra: str) -> dict[str, PluginFieldInfo]:
    """The fields of a plug-in that has a meaning here.

    Raises:
        MLIRError: it has none.
    """
    try:
        plugin = registry.find(name, version, namespace)
    except PluginError as error:
        raise ir.MLIRError(str(error), str(ir.Location.current())) from None
    return {each: PluginFieldInfo(_FIELD_TYPES[field.type], field.length) for each, field in plugin.fields.items()}
