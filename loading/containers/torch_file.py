"""A file that torch.save wrote. Only tensors and plain values are unpickled (`weights_only`): code is never run."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from loading.containers.tensors import Stored
from loading.errors import CheckpointError, reason, shown

INSTALL = "pip install torch==2.13.0"


def unpickled(path: Path) -> Any:
    """What a file holds, its tensors memory-mapped where its format allows that.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds more than tensors and plain values.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"PyTorch is needed to read {path}, and is not installed: {INSTALL}") from error
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        # Only the zip format can be memory-mapped; files of before 2020 are read whole.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are odd or old: they are read, or refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch each raise their own
        message = f"{path} is not a readable PyTorch file of tensors and nothing else: {reason(error)}"
        raise CheckpointError(message) from error


class TorchTensors:
    """Unpickled tensors by name.

    Args:
        state: What was unpickled.
        path: Of the file, for messages.

    Raises:
        CheckpointError: it is anything but a dict of plain tensors.
    """

    def __init__(self, state: object, path: Path | str) -> None:
        import torch

        if not isinstance(state, dict):
            raise CheckpointError(f"expected a dict of tensors in {path}, got a {type(state).__name__}")
        notation = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self._bfloat16, self._int16 = torch.bfloat16, torch.int16
        self._state: Mapping[str, Any] = state
        self.tensors: dict[str, Stored] = {}
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"expected only named tensors in {path}, got {shown(str(name))}: {type(tensor).__name__}"
                )
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise CheckpointError(
                    f"{path}: {name} is a tensor without plain values ({tensor.layout}, {tensor.device.type})"
                )
            dtype = notation.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            self.tensors[name] = Stored(dtype, tuple(tensor.shape))

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        tensor = self._state[name].detach()[rows]
        if tensor.dtype == self._bfloat16:  # NumPy has no bfloat16 of its own: the bits go over as integers
            import ml_dtypes

            bits: np.ndarray = tensor.contiguous().view(self._int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        values: np.ndarray = tensor.numpy()
        return values
