"""nvtripy's tracing of plug-in calls, where TensorRT is missing.

Before nvtripy looks up a plug-in's fields it loads TensorRT's library of plug-ins, through ``import tensorrt`` and
ctypes. Here their fields come from :mod:`nvtripy_portable.plugins`, and there is nothing to load: that step is left
out, so that nothing has to stand in for the package or for the library. And nvtripy 0.1.7 puts what a call gives into a
list of one, as though every plug-in had one output: here several come out as several.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Replaces both in nvtripy's ``trace.ops.plugin``."""
    from nvtripy.trace.ops import plugin

    original = plugin.Plugin.to_mlir

    @functools.wraps(original)
    def to_mlir(self: plugin.Plugin, inputs: Any, outputs: Any) -> Any:
        (results,) = original(self, inputs, outputs)
        return results if isinstance(results, list) else [results]

    plugin.initialize_plugin_registry = lambda: None
    plugin.Plugin.to_mlir = to_mlir
