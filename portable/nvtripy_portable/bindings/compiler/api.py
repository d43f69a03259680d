"""``mlir_tensorrt.compiler.api``: from a module to an executable."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from mlir_tensorrt.compiler import ir
from mlir_tensorrt.runtime.api import Executable, MTRTException
from nvtripy_portable import compiler
from nvtripy_portable import executable as portable
from nvtripy_portable.graph import GraphError

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
    """TensorRT's plug-in field types, which nvtripy names when it builds a table; the values are never used."""

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


class PluginFieldInfo:
    """Only an annotation in nvtripy."""


def get_tensorrt_plugin_field_schema(name: str, version: str, namespace: str, extra: str) -> dict[str, PluginFieldInfo]:
    # nvtripy imports `tensorrt` for the first plug-in of a process alone; the later ones come this far.
    raise NotImplementedError(
        "TensorRT plug-ins need NVIDIA's tensorrt package: the portable runtime cannot run "
        f"{name!r} (version {version})"
    )
