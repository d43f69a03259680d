"""Ranks' files, written at once: each tensor of the whole model goes, in one piece or row by row, where its parts are.

The files' headers are known from the settings, so that no tensor has to be kept until others are there.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion import numpy_dtype
from loading.config import CheckpointConfig
from loading.containers.safetensors_file import header_of
from loading.containers.tensors import NUMPY_NAMES
from loading.numbers import packed
from loading.rank_folder import rank_file
from loading.rank_layout import Whole, held
from parallelism.mapping import Mapping
from parallelism.splitting import clipped, cut_out


@dataclass(frozen=True)
class _Place:
    """Where a rank's part of a tensor is: in which file, and where in it."""

    mapping: Mapping
    offset: int
    row_bytes: int


class RankWriter:
    """The files of all ranks.

    Args:
        plan: The tensors of the model.
        config: Its settings.
        mapping: Of any of the ranks.
        dtype_of: What a tensor is stored as, in safetensors' notation.

    Attributes:
        size: Bytes that all files take.
    """

    def __init__(
        self, plan: Sequence[Whole], config: CheckpointConfig, mapping: Mapping, dtype_of: Callable[[Whole], str]
    ) -> None:
        self._config, self._mapping = config, mapping
        self._dtypes = {whole.name: numpy_dtype(NUMPY_NAMES[dtype_of(whole)]) for whole in plan}
        self._places: dict[str, list[_Place]] = {whole.name: [] for whole in plan}
        self._headers: list[bytes] = []
        self._sizes: list[int] = []
        for rank in range(mapping.world_size):
            # The widest types first, as the safetensors library has them: every number is where its type may be.
            own = sorted(held(list(plan), config, mapping.of_rank(rank)), key=self._item_bytes, reverse=True)
            self._lay_out(own, mapping.of_rank(rank), dtype_of)
        self.size = sum(self._sizes)
        self._files: list[int] = []

    def _item_bytes(self, whole: Whole) -> int:
        return self._dtypes[whole.name].itemsize

    def _lay_out(self, own: Sequence[Whole], mapping: Mapping, dtype_of: Callable[[Whole], str]) -> None:
        """A rank's header, and where its tensors are."""
        shapes = [whole.stored_shape(self._config, mapping) for whole in own]
        sizes = [math.prod(shape) * self._item_bytes(whole) for whole, shape in zip(own, shapes, strict=True)]
        names = [whole.stored_name(mapping, self._config.n_layer) for whole in own]
        self._headers.append(header_of(zip(names, map(dtype_of, own), shapes, sizes, strict=True)))
        begin = len(self._headers[-1])
        for whole, shape, size in zip(own, shapes, sizes, strict=True):
            row_bytes = math.prod(shape[1:]) * self._item_bytes(whole)
            self._places[whole.name].append(_Place(mapping, begin, row_bytes))
            begin += size
        self._sizes.append(begin)

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[None]:
        """The files in a folder, which `write` may be called for; what is not written of them is zero.

        Raises:
            OSError: they cannot be written.
        """
        try:
            for rank, (header, size) in enumerate(zip(self._headers, self._sizes, strict=True)):
                file = os.open(folder / rank_file(rank), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._files.append(file)
                with _named(rank):
                    os.truncate(file, size)
                self._put(rank, header, 0)
            yield
        finally:
            for file in self._files:
                os.close(file)
            self._files = []

    def write(self, whole: Whole, values: np.ndarray, first_row: int = 0) -> int:
        """Writes a tensor of the whole model, or some of its rows, to every rank that has a part of them.

        Args:
            values: Of the type that is stored; what is stored in pairs of rows comes whole, as int8.
            first_row: Where they begin.

        Returns:
            Bytes that were written.
        """
        values = np.atleast_1d(values).astype(self._dtypes[whole.name], copy=False)
        return sum(self._write_part(whole, place, values, first_row) for place in self._places[whole.name])

    def _write_part(self, whole: Whole, place: _Place, values: np.ndarray, first_row: int) -> int:
        rank, found = place.mapping.rank, whole.cut(self._config, place.mapping)
        if whole.is_packed:
            part = values if found is None else cut_out(values, *found)
            return self._put(rank, packed(part), place.offset)
        if found is None or found[0] != 0:
            part = values if found is None else cut_out(values, *found)
            return self._put(rank, part, place.offset + first_row * place.row_bytes)
        written = 0
        for run in found[1].runs():
            begin, end, at = clipped(run, first_row, first_row + len(values))
            part = values[begin - first_row : end - first_row]
            written += self._put(rank, part, place.offset + at * place.row_bytes)
        return written

    def _put(self, rank: int, content: bytes | memoryview | np.ndarray, offset: int) -> int:
        if isinstance(content, np.ndarray):
            content = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data.cast("B")
        view = memoryview(content)
        size = len(view)
        with _named(rank):
            while view:
                written = os.pwrite(self._files[rank], view, offset)
                view, offset = view[written:], offset + written
        return size


@contextlib.contextmanager
def _named(rank: int) -> Iterator[None]:
    """What the system says of a file by its number is said with its name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, rank_file(rank)) from error
