"""Plug-ins of NVIDIA's that have a meaning from the start."""

from __future__ import annotations

import numpy as np

from nvtripy_portable.plugins.registry import Field, register


def _gelu(x: np.ndarray, *, type_id: int, bias: tuple[float, ...]) -> np.ndarray:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016) of ``x + bias``, of which there may be none.

    ``type_id`` says in which precision TensorRT computes: 0 float32, 1 float16, 2 int8. Here it is float32.
    """
    wide = x.astype(np.float32)
    if bias:
        wide = wide + np.array(bias, np.float32)
    inner = np.float32(np.sqrt(2 / np.pi)) * (wide + np.float32(0.044715) * wide**3)
    return (np.float32(0.5) * wide * (1 + np.tanh(inner))).astype(x.dtype)


def register_all() -> None:
    """Registers them."""
    register(
        "CustomGeluPluginDynamic",
        compute=_gelu,
        fields={"type_id": Field("int32"), "bias": Field("float32", length=0, default=())},
        inputs=1,
        row_wise=True,
    )
