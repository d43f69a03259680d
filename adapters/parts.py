"""What an adapter's files hold: the two matrices of each stored layer that it adds to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.errors import AdapterError
from adapters.places import Place
from loading.containers.tensors import NUMPY_NAMES, Tensors


@dataclass(frozen=True)
class Part:
    """Of one layer as it is stored.

    Attributes:
        place: Where in the model it is.
        down: (rank, in_features), float32.
        up: (out_features, rank), float32, its rows in the order of ``place.rows``, the scale in it.
    """

    place: Place
    down: np.ndarray
    up: np.ndarray


def read_floats(tensors: Tensors, name: str, file: Path) -> np.ndarray:
    """A stored tensor, in float32.

    Raises:
        AdapterError: it is not of floats, or holds infinities or NaNs.
    """
    if tensors.tensors[name].dtype not in NUMPY_NAMES or tensors.tensors[name].dtype in ("I8", "U8"):
        raise AdapterError(f"{file}: expected {name} to be of floats but got {tensors.tensors[name].dtype}")
    array = np.asarray(tensors.read(name)).astype(np.float32)
    if not np.isfinite(array).all():
        raise AdapterError(f"{file}: expected finite numbers but {name} has others")
    return array
