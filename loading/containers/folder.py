"""The weight files of a folder in HuggingFace's format, one or several, as one container."""

from __future__ import annotations

from pathlib import Path
from types import EllipsisType

import numpy as np

from loading.containers.safetensors_file import SafetensorsFile
from loading.containers.tensors import Stored, Tensors
from loading.containers.torch_file import TorchTensors, unpickled
from loading.disk import is_file, read_json
from loading.errors import CheckpointError, shown

# In order of preference, which is also that of transformers.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class WeightFolder:
    """The tensors of a folder's weight files. The files stay open (memory-mapped) as long as it lives.

    Of a tensor in two shards the last one counts, as in transformers.

    Raises:
        CheckpointError: there are none, or one of them cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.files = _weight_paths(path)
        self._file_of: dict[str, Tensors] = {}
        self.tensors: dict[str, Stored] = {}
        for file_path in self.files:
            file = open_weights(file_path)
            for name, stored in file.tensors.items():
                self._file_of[name], self.tensors[name] = file, stored

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        return self._file_of[name].read(name, rows)


def open_weights(path: Path) -> Tensors:
    """One weight file of either format."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchTensors(unpickled(path), path)


def shard_names(index: Path) -> list[str]:
    """The shards that a *.index.json names: files beside it, never elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected weight_map to map tensor names to file names")
    suffix = ".safetensors" if index.name == "model.safetensors.index.json" else ".bin"
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or shard.startswith(".") or not shard.endswith(suffix):
            raise CheckpointError(f"{index}: expected the name of a {suffix} file beside it, got {shown(shard)}")
    return shards


def _weight_paths(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    for file in WEIGHT_FILES:
        path = folder / file
        if is_file(path):
            paths = [folder / shard for shard in shard_names(path)] if file.endswith(".index.json") else [path]
            absent = [p.name for p in paths if not is_file(p)]
            if absent:
                raise CheckpointError(f"{path} names shards that are missing: {', '.join(absent)}")
            return paths
    raise CheckpointError(f"{str(folder)!r} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
