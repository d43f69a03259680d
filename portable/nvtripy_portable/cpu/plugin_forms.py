"""What a native program is told of a plug-in: its function, and the tensors and fields that this gets."""

from __future__ import annotations

from typing import Any

import numpy as np

from nvtripy_portable import reference
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, Operation, Value
from nvtripy_portable.plugins.native import DTYPE_CODES
from nvtripy_portable.plugins.registry import Plugin

_FLOATS = ("f32", "f16", "bf16")


def is_value(operand: Value) -> bool:
    """Whether an operand is computed, and not a constant."""
    return operand.constant is None


def plugin_form(plugin: Plugin, operation: Operation, location: str) -> dict[str, Any] | None:
    """What the program needs but the numbers of its values, or None where it cannot call this plug-in.

    It can if there is a native function, all that is computed is floats, something is, and what has rows is just that.
    """
    native, attributes = plugin.native, operation.attributes
    if native is None or any(dtype not in _FLOATS or rank < 1 for rank, dtype in attributes["output_info"]):
        return None
    inputs: list[dict[str, Any]] = []
    for number, (operand, dtype) in enumerate(zip(operation.operands, attributes["input_dtypes"], strict=True)):
        if operand is None:
            return None
        if plugin.rows is not False and plugin.has_rows(number) != is_value(operand):
            return None
        if not is_value(operand):
            inputs.append(_constant(operand, dtype))
        elif dtype in _FLOATS and operand.type.dtype in _FLOATS and operand.type.rank >= 1:
            inputs.append({"value": -1, "dtype": dtype})
        else:
            return None
    if not any("value" in each for each in inputs):
        return None
    return {
        "name": str(plugin),
        "location": location,
        "function": native.address,
        "context": native.context,
        "has_rows": plugin.rows is not False,
        "inputs": inputs,
        "outputs": [{"value": -1, "dtype": dtype} for _, dtype in attributes["output_info"]],
        "fields": plugin.described(plugin.complete(attributes["fields"])),
    }


def _constant(operand: Value, dtype: str) -> dict[str, Any]:
    array = operand.constant
    assert array is not None
    if DTYPE_NAMES[array.dtype] != dtype:
        array = reference.cast(array, dtype=DTYPES[dtype])
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"data": data, "code": DTYPE_CODES[dtype], "shape": array.shape}
