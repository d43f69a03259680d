"""The one helper of MLIR's generated bindings that nvtripy calls."""

from nvtripy_portable.graph import Value


def get_op_result_or_value(value: Value) -> Value:
    """Operations are represented by their results here, so a value it is already."""
    return value
