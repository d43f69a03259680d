"""The function that a trace becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlir_tensorrt.compiler import ir
from nvtripy_portable.graph import Bounds, Graph, Input, Value


class FuncOp:
    """A function with a graph for its body."""

    def __init__(self, name: str, type: ir.FunctionSignature, ip: ir.InsertionPoint) -> None:
        self.name = name
        self.attributes: dict[str, Any] = {}
        self._input_types = type[0]
        self._graph = Graph()
        ip.block.module.graph = self._graph

    def add_entry_block(self) -> ir.Block:
        self._graph.inputs = [Input(Value(type), f"arg{i}") for i, type in enumerate(self._input_types)]
        return ir.Block(graph=self._graph, arguments=[entry.value for entry in self._graph.inputs])

    @property
    def arg_attrs(self) -> Sequence[dict[str, Any]]:
        raise AttributeError("argument attributes are write-only here: the graph's inputs hold what they say")

    @arg_attrs.setter
    def arg_attrs(self, attributes: Sequence[dict[str, Any]]) -> None:
        for entry, given in zip(self._graph.inputs, attributes, strict=True):
            profile: Bounds | None = given.get("tensorrt.shape_profile")
            entry.shape_bounds = profile
            entry.value_bounds = given.get("tensorrt.value_bounds")
            entry.dimension_names = {int(k): name for k, name in given.get("tensorrt.dimension_names", {}).items()}


def ReturnOp(values: Sequence[Value]) -> None:
    """Ends the function at the current insertion point."""
    ir.InsertionPoint.current().block.graph.outputs = list(values)
