"""A folder of ranks' files (rank_layout.py), read as the tensors of one process: nothing is joined before it is read.

What is quantized appears as ModelOpt's layout has it (modelopt_layout.py), which the rest of the loader knows.
"""

from __future__ import annotations

from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from loading import numbers
from loading.config import CheckpointConfig
from loading.containers.safetensors_file import SafetensorsFile
from loading.containers.tensors import Stored
from loading.errors import CheckpointError, listed
from loading.families.tensorrt_llm import Algorithm
from loading.rank_layout import Whole, held, wholes
from parallelism.mapping import Mapping
from parallelism.splitting import put_together


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank{rank}.safetensors"


def open_ranks(folder: Path, mapping: Mapping) -> list[SafetensorsFile]:
    """The files of all ranks, from their headers alone.

    Raises:
        CheckpointError: one is missing or cannot be read, or there are more than the mapping says.
    """
    names = [rank_file(rank) for rank in range(mapping.world_size)]
    found = {path.name for path in folder.glob("rank*.safetensors")}
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"{str(folder)!r} lacks {listed(missing)}: expected the files of {mapping.tp_size} x {mapping.pp_size} "
            "ranks, which the mapping in its config.json speaks of"
        )
    if len(found) > len(names):
        raise CheckpointError(
            f"{str(folder)!r} holds {listed(sorted(found - set(names)))}, but the mapping in its config.json speaks of "
            f"{mapping.world_size} ranks"
        )
    return [SafetensorsFile(folder / name) for name in names]


class RankFolder:
    """The tensors of all ranks, joined.

    Attributes:
        paths: The ranks' files.

    Raises:
        CheckpointError: a rank's tensors are not those that the settings imply.
    """

    def __init__(
        self,
        folder: Path,
        files: list[SafetensorsFile],
        mapping: Mapping,
        config: CheckpointConfig,
        algorithm: Algorithm,
        has_head_copy: bool,
    ) -> None:
        self._folder, self._files, self._mapping, self._config = folder, files, mapping, config
        self.paths = [folder / rank_file(rank) for rank in range(mapping.world_size)]
        self._has_blocks = algorithm.has_blocks
        self._wholes = {whole.name: whole for whole in wholes(config, algorithm, has_head_copy)}
        self._check()
        self.tensors = {name: self._header(whole) for name, whole in self._wholes.items()}

    def _check(self) -> None:
        """Compare each rank's tensors with its part of those that the settings imply."""
        all_wholes = list(self._wholes.values())
        for rank, file in enumerate(self._files):
            mapping = self._mapping.of_rank(rank)
            expected = {
                whole.stored_name(mapping, self._config.n_layer): whole
                for whole in held(all_wholes, self._config, mapping)
            }
            wrong = []
            for name in expected.keys() & file.tensors.keys():
                shape, stored = expected[name].stored_shape(self._config, mapping), file.tensors[name]
                is_scalar = shape == (1,) and stored.shape == ()
                if stored.shape != shape and not is_scalar:
                    wrong.append(f"{name} (expected {shape}, got {stored.shape})")
                elif stored.dtype not in expected[name].dtypes:
                    wrong.append(f"{name} (expected {', '.join(expected[name].dtypes)}, got {stored.dtype})")
            faults = {
                "missing": [name for name in expected if name not in file.tensors],
                "unexpected": sorted(file.tensors.keys() - expected.keys()),
                "of a wrong shape or dtype": sorted(wrong),
            }
            found = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
            if found:
                raise CheckpointError(
                    f"the tensors in {self._folder / rank_file(rank)} are not those that config.json implies for rank "
                    f"{rank} of {self._mapping.tp_size} x {self._mapping.pp_size}: {found}"
                )

    def has_files_of(self, mapping: Mapping) -> bool:
        """Whether ranks share it as this one does with the others, so that it has a file of its own."""
        return self._mapping == mapping.of_rank(0)

    def part(self, name: str, mapping: Mapping) -> np.ndarray:
        """What the file of a rank has of a tensor that is not quantized: no other file is read."""
        return self._files[mapping.rank].read(self._wholes[name].stored_name(mapping, self._config.n_layer))

    def _places(self, whole: Whole) -> list[tuple[Mapping, str]]:
        """The ranks that have a part of a tensor, by tp_rank, and the name it has in their files."""
        n_layer = self._config.n_layer
        ranks = self._mapping.stage_ranks(self._mapping.stage_of(whole.of, n_layer))
        return [(rank, whole.stored_name(rank, n_layer)) for rank in ranks]

    def _header(self, whole: Whole) -> Stored:
        places = self._places(whole)
        dtypes = {self._files[rank.rank].tensors[name].dtype for rank, name in places}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self._folder}: expected {places[0][1]} to be of one dtype in all ranks, got "
                f"{' and '.join(sorted(dtypes))}"
            )
        [dtype] = dtypes
        if whole.is_packed:
            return Stored("U8", (-(-whole.shape[0] // 2), whole.shape[1]))
        if self._is_in_blocks(whole):
            rows = whole.outputs + whole.outputs % 2
            return Stored(dtype, (rows, self._blocks(whole)))
        return Stored(dtype, whole.shape)

    def _is_in_blocks(self, whole: Whole) -> bool:
        """Whether it is the scales of a weight in int4: one for each block of each row in ModelOpt's layout."""
        return whole.kind == "weight_scale" and self._config.quant_mode == "int4-weight-only"

    def _blocks(self, whole: Whole) -> int:
        weight = self._wholes[f"{whole.module}.weight"]
        return weight.shape[1] // self._config.block_size

    def read(self, name: str, rows: slice | EllipsisType = ...) -> np.ndarray:
        whole, config = self._wholes[name], self._config
        places = self._places(whole)
        parts: list[Any] = [self._files[rank.rank].read(stored_name) for rank, stored_name in places]
        cuts = [whole.cut(config, rank) for rank, _ in places]
        if whole.is_packed:
            parts = [
                numbers.unpacked(part.view(np.uint8), whole.part_shape(config, rank)[0])
                for part, (rank, _) in zip(parts, places, strict=True)
            ]
        axis = None if cuts[0] is None else cuts[0][0]
        wanted = rows if isinstance(rows, slice) and not whole.is_packed and not self._is_in_blocks(whole) else None
        try:
            values = put_together(name, parts, axis, [each[1] for each in cuts if each], wanted or slice(None))
        except ValueError as error:
            raise CheckpointError(f"{self._folder}: {error}") from None
        if wanted is not None:
            return values
        if whole.is_packed:
            values = numbers.packed(values)
        elif self._is_in_blocks(whole):
            values = self._in_blocks(whole, values)
        return values if rows is ... else values[rows]

    def _in_blocks(self, whole: Whole, scales: np.ndarray) -> np.ndarray:
        """Scales of int4 as ModelOpt has them: one for each block of each row, and of a row that makes them even."""
        if scales.ndim == 1:
            scales = np.repeat(scales[:, None], self._blocks(whole), 1)
        return np.pad(scales, ((0, whole.outputs % 2), (0, 0)), constant_values=1)
