"""One model on several processes: what ``AllReduce`` and ``AllGather`` mean here, by their names on TensorRT.

A model that is shared by ranks calls TensorRT-LLM's plug-ins (namespace ``tensorrt_llm``): there they are NCCL's
operations, here what :func:`register` is given. With functions of MPI they run in the middle of a native program
(``csrc/collectives.cpp``).

Every rank computes a sum from all ranks' numbers, in the order of the ranks: it is the same on all of them, to the last
bit, whatever carried the numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvtripy_portable import plugins
from nvtripy_portable.plugins import Field, PluginError

NAMESPACE = "tensorrt_llm"

#: AllGather and what arranges its result along the last dimension, as one operation: passes/columns.py makes it.
COLUMNS, COLUMNS_NAMESPACE = "AllGatherColumns", "nvtripy_portable"

_LIBRARY = Path(__file__).with_name("_collectives.so")


@dataclass(frozen=True)
class MpiFunctions:
    """Of a communicator, addresses of what C calls. What they point to stays where it is.

    Attributes:
        all_gather: ``MPI_Allgather``.
        error_string: ``MPI_Error_string``.
        communicator: Where the communicator's handle is.
        byte_type: Where that of ``MPI_BYTE`` is.
        handle_bytes: How large a handle is: 4 or 8.
    """

    all_gather: int
    error_string: int
    communicator: int
    byte_type: int
    handle_bytes: int


class _Context(ctypes.Structure):
    _fields_ = (
        ("all_gather", ctypes.c_void_p),
        ("error_string", ctypes.c_void_p),
        ("communicator", ctypes.c_void_p),
        ("byte_type", ctypes.c_void_p),
        ("handle_bytes", ctypes.c_int64),
        ("ranks", ctypes.c_int64),
    )


_contexts: list[_Context] = []  # native programs have their addresses


def register(ranks: int, gather: Callable[[np.ndarray], Sequence[np.ndarray]], mpi: MpiFunctions | None = None) -> None:
    """Gives both a meaning, in place of any other, for what is compiled or opened from now on.

    Args:
        ranks: How many there are.
        gather: Gives every rank's array, from this one's; all ranks call it, each with the same shape.
        mpi: With it, native programs call MPI.

    Raises:
        ValueError: handles of a size that no MPI has.
    """
    native, context = {}, 0
    if mpi is not None:
        if mpi.handle_bytes not in (4, 8):
            raise ValueError(f"expected MPI's handles to have 4 or 8 bytes but got {mpi.handle_bytes}")
        if _LIBRARY.exists():  # it is not where there was no compiler: then there are no native programs either
            held = _Context(mpi.all_gather, mpi.error_string, mpi.communicator, mpi.byte_type, mpi.handle_bytes, ranks)
            _contexts.append(held)
            context = ctypes.addressof(held)
            native = {name: (_LIBRARY, name) for name in ("all_reduce", "all_gather_columns")}
    fields = {"group": Field("int32", length=0), "type_id": Field("int32")}

    def gathered(x: np.ndarray, group: tuple[int, ...]) -> Sequence[np.ndarray]:
        if len(group) != ranks:
            raise PluginError(f"expected a group of all {ranks} ranks but got {group}")
        return gather(np.ascontiguousarray(x))

    def all_reduce(x: np.ndarray, *, group: tuple[int, ...], type_id: int) -> np.ndarray:
        return summed(gathered(x, group))

    def all_gather(x: np.ndarray, *, group: tuple[int, ...], type_id: int) -> np.ndarray:
        return np.concatenate(gathered(x, group))

    def columns_of(x: np.ndarray, *, group: tuple[int, ...], type_id: int, columns: int) -> np.ndarray:
        return np.ascontiguousarray(np.concatenate(gathered(x, group), axis=-1)[..., :columns])

    def shape_of(shape: tuple[Any, ...], *, group: tuple[int, ...], **_: Any) -> tuple[Any, ...]:
        return (shape[0] * ranks, *shape[1:])

    usual: dict[str, Any] = {"inputs": 1, "has_effects": True, "replace": True}  # ranks meet in them: never left out
    plugins.register(
        "AllReduce",
        compute=all_reduce,
        native=native.get("all_reduce"),
        fields=fields,
        row_wise=True,
        context=context,
        namespace=NAMESPACE,
        **usual,
    )
    plugins.register("AllGather", compute=all_gather, shapes=shape_of, fields=fields, namespace=NAMESPACE, **usual)
    plugins.register(
        COLUMNS,
        compute=columns_of,
        native=native.get("all_gather_columns"),
        shapes=lambda shape, *, columns, **_: (*shape[:-1], columns),
        fields=fields | {"columns": Field("int32")},
        row_wise=True,
        context=context,
        namespace=COLUMNS_NAMESPACE,
        **usual,
    )


def summed(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum in the parts' order, in float32, of their type."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total.astype(parts[0].dtype)
