"""NeMo's .nemo: a tar, maybe compressed, of a configuration, pickled weights of every rank, and a tokenizer's files.

    model_config.yaml
    model_weights.ckpt                                  of one rank, or
    mp_rank_00/model_weights.ckpt ...                   of tensor parallelism, or
    tp_rank_00_pp_rank_000/model_weights.ckpt ...       of both kinds

An unpacked archive, a folder, is read as well. The pickles say which bytes of the tar are a tensor's: those are mapped,
and nothing is unpacked, unless the whole tar is compressed.
"""

from __future__ import annotations

import gzip
import io
import mmap
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from conversion import numpy_dtype
from loading.containers.tensors import NUMPY_NAMES, Stored
from loading.containers.torch_file import INSTALL
from loading.errors import CheckpointError, listed, reason

CONFIG_FILE = "model_config.yaml"
_WEIGHTS = re.compile(r"(?:mp_rank_(\d+)/|tp_rank_(\d+)_pp_rank_(\d+)/)?model_weights\.ckpt")
_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
_EXPONENT = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")
_LARGEST_CONFIG = 2**20  # bytes
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class _Member:
    """A file of the archive: where its bytes are on the disk."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class _Place:
    """Where a tensor's values are: in which file, and in steps of how many numbers along each dimension."""

    path: Path
    offset: int
    strides: tuple[int, ...]
    storage: int  # numbers from there to the storage's end


class NemoArchive:
    """The tensors of all ranks, by the names of one stage without its number of layers: layers are numbered throughout.

    With tensor parallelism, names begin with the rank: "1/". The wrappers' "model." and "module." are taken off.

    Attributes:
        ranks: How many there are, of tensor parallelism.
        config: What model_config.yaml holds.

    Raises:
        CheckpointError: it cannot be read, is damaged or incomplete, or its weights want to execute something.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._members = self._folder_members() if path.is_dir() else self._tar_members()
        self.config = self._read_config()
        self.tensors: dict[str, Stored] = {}
        self._places: dict[str, _Place] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._read_weights()

    def member(self, name: str) -> bytes | None:
        """The content of a file, and None where there is none of that name."""
        member = self._members.get(name.rpartition("/")[2])
        if member is None:
            return None
        with member.path.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    # --- files -------------------------------------------------------------------------------------------------------

    def _folder_members(self) -> dict[str, _Member]:
        files = [each for each in self.path.rglob("*") if each.is_file() and len(each.relative_to(self.path).parts) < 3]
        return {each.relative_to(self.path).as_posix(): _Member(each, 0, each.stat().st_size) for each in files}

    def _tar_members(self) -> dict[str, _Member]:
        try:
            with self.path.open("rb") as file:
                is_compressed = file.read(2) == _GZIP
            path = self._decompressed() if is_compressed else self.path
            size, members = path.stat().st_size, {}
            with tarfile.open(path, "r:") as tar:
                for each in tar:
                    if each.isfile():
                        if each.offset_data + each.size > size:
                            raise tarfile.ReadError("unexpected end of data")
                        members[each.name.removeprefix("./")] = _Member(path, each.offset_data, each.size)
        except Exception as error:  # tarfile, gzip and zlib each raise their own
            if isinstance(error, OSError) and error.errno is not None:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            raise CheckpointError(f"{self.path} is not a readable tar archive: {reason(error)}") from error
        return members

    def _decompressed(self) -> Path:
        """The tar within, in a scratch folder that goes when this does."""
        with gzip.open(self.path) as compressed:
            first = compressed.read(tarfile.BLOCKSIZE)
            tarfile.TarInfo.frombuf(first, "utf-8", "surrogateescape")  # before all of it is written
            self._scratch = tempfile.TemporaryDirectory(prefix="nemo-")
            path = Path(self._scratch.name) / "archive.tar"
            with path.open("wb") as file:
                file.write(first)
                shutil.copyfileobj(compressed, file, 2**20)
        return path

    def _read_config(self) -> dict[str, Any]:
        try:
            import yaml
        except ImportError as error:
            raise CheckpointError(f"PyYAML is needed to read {self.path}: pip install PyYAML==6.0.4") from error
        content = self.member(CONFIG_FILE)
        if content is None:
            raise CheckpointError(f"{self.path} is not a NeMo archive: it has no {CONFIG_FILE}")
        try:
            if len(content) > _LARGEST_CONFIG:
                raise ValueError(f"it is larger than {_LARGEST_CONFIG} bytes")

            class Loader(yaml.SafeLoader):
                """With numbers such as 1e-5, which YAML 1.1 takes for texts, and NeMo for numbers."""

            Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
            config = yaml.load(content, Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {CONFIG_FILE} is not valid YAML: {reason(error)}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.path}: expected settings in {CONFIG_FILE}, got a {type(config).__name__}")
        return config

    # --- weights -----------------------------------------------------------------------------------------------------

    def _read_weights(self) -> None:
        grid = self._grid()
        self.ranks = 1 + max(rank for rank, _ in grid)
        for rank in range(self.ranks):
            first_layer = 0
            for stage in range(1 + max(stage for _, stage in grid)):
                count = 0
                for name, stored, place in self._unpickled(grid[rank, stage]):
                    found = _LAYER.search(name)
                    if found:
                        count = max(count, int(found[0]) + 1)
                        name = _LAYER.sub(str(first_layer + int(found[0])), name, count=1)
                    name = name if self.ranks == 1 else f"{rank}/{name}"
                    if name not in self.tensors:  # a copy of the embedding can be in the last stage
                        self.tensors[name], self._places[name] = stored, place
                first_layer += count

    def _grid(self) -> dict[tuple[int, int], str]:
        """The names of the weight files by rank and stage."""
        found = {name: match for name in self._members if (match := _WEIGHTS.fullmatch(name))}
        grid = {(int(match[1] or match[2] or 0), int(match[3] or 0)): name for name, match in found.items()}
        if not grid:
            if any(name.startswith("model_weights/") for name in self._members):
                raise CheckpointError(
                    f"{self.path}: expected model_weights.ckpt, got a folder model_weights, a distributed checkpoint, "
                    "which is not supported: convert it to HuggingFace's format with NeMo"
                )
            raise CheckpointError(f"{self.path} holds no weights: expected model_weights.ckpt")
        if len(grid) < len(found):
            raise CheckpointError(f"{self.path}: expected one file of weights a rank, got {listed(sorted(found))}")
        ranks, stages = (1 + max(place[kind] for place in grid) for kind in (0, 1))
        if any("/" in name for name in found):
            ranks = max(ranks, self._said("tensor_model_parallel_size"))
            stages = max(stages, self._said("pipeline_model_parallel_size"))
        places = [(rank, stage) for rank in range(ranks) for stage in range(stages)]
        missing = [f"{rank} of stage {stage}" for rank, stage in places if (rank, stage) not in grid]
        if missing:
            raise CheckpointError(f"{self.path} lacks the weights of the tensor-parallel rank {listed(missing)}")
        return grid

    def _said(self, name: str) -> int:
        """How many ranks of a kind the configuration speaks of; 1 where it does not."""
        value = self.config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**10 else 1

    def _unpickled(self, name: str) -> Iterator[tuple[str, Stored, _Place]]:
        """The tensors in a file of weights, but for what modules keep beside them."""
        where = f"{self.path}: {name}"
        try:
            import torch
            from torch._subclasses.fake_tensor import FakeTensorMode
        except ImportError as error:
            raise CheckpointError(f"PyTorch is needed to read {self.path}, and is not installed: {INSTALL}") from error
        member = self._members[name]
        try:
            with member.path.open("rb") as file:
                window = _Window(file, member.offset, member.size)
                # Of tensors that are not real, torch says where in the file their values are.
                with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
                    state = torch.load(window, weights_only=True)
        except Exception as error:  # pickle, zip and torch each raise their own
            message = f"{where} is not a readable PyTorch file of tensors and nothing else: {reason(error)}"
            raise CheckpointError(message) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"expected a dict of tensors in {where}, got a {type(state).__name__}")
        notation = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        prompts = state.pop("prompt_table", None)  # a dict within, of prompt learning
        if isinstance(prompts, dict):
            state |= {f"prompt_table.{key}": tensor for key, tensor in prompts.items()}
        for key, tensor in state.items():
            if isinstance(key, str) and key.endswith("_extra_state"):
                continue
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise CheckpointError(f"expected only named tensors in {where}, got {key!r}: {type(tensor).__name__}")
            storage = tensor.untyped_storage()
            begin = getattr(storage, "_checkpoint_offset", None)
            if begin is None:
                raise CheckpointError(f"expected {where} to be of torch's zip format, got an older one")
            dtype = notation.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            size, offset = tensor.element_size(), tensor.storage_offset()
            place = _Place(
                member.path,
                member.offset + begin + size * offset,
                tuple(tensor.stride()),
                storage.nbytes() // size - offset,
            )
            yield re.sub(r"^(?:(?:model|module)\.)+", "", key), Stored(dtype, tuple(tensor.shape)), place

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        stored, place = self.tensors[name], self._places[name]
        if place.path not in self._mapped:
            with place.path.open("rb") as file:
                self._mapped[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = numpy_dtype(NUMPY_NAMES[stored.dtype])
        count = 1 + sum((size - 1) * step for size, step in zip(stored.shape, place.strides, strict=True))
        if 0 in stored.shape:
            return np.empty(stored.shape, dtype)[rows]
        if min(place.strides, default=0) < 0 or count > place.storage:
            raise ValueError(f"{name} reaches beyond what is stored of it")
        values = np.frombuffer(self._mapped[place.path], dtype, count, place.offset)
        strides = tuple(step * dtype.itemsize for step in place.strides)
        return np.lib.stride_tricks.as_strided(values, stored.shape, strides, writeable=False)[rows]


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        content = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
