"""What benchmarks want of the portable runtime before they measure it."""

from __future__ import annotations

from typing import Any

from command_line import UsageError
from nvtripy_portable.cpu import native


def native_module() -> Any:
    """The native executor: what NumPy takes instead of it is nobody's figure.

    Raises:
        UsageError: it is not built.
    """
    module = native.load()
    if module is None:
        raise UsageError("the native executor is not built (portable/README.md says how): nothing was measured")
    return module
