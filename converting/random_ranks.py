"""Files of random weights for each rank: one model, however many there are, in memory that does not grow with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conversion import numpy_dtype
from converting import random_numbers
from converting.random_numbers import Draw, drawn
from converting.rank_writer import RankWriter
from converting.ranks import STORED, config_json
from loading.config import CheckpointConfig
from loading.families.tensorrt_llm import ALGORITHMS
from loading.rank_layout import Whole, wholes
from output_folder import written_beside
from parallelism.mapping import Mapping

#: A tensor, and the number of its first row that is drawn.
Rows = tuple[Whole, int]


def write(
    config: CheckpointConfig,
    mapping: Mapping,
    folder: Path,
    dtype: str,
    seed: int,
    generation: dict[str, Any],
    deviation_of: Callable[[Whole], float | None],
) -> None:
    """Writes a file for each rank, config.json and generation_config.json to a folder that is not there yet.

    Args:
        mapping: Of any of the ranks; it has to fit.
        generation: The content of generation_config.json.
        deviation_of: Of the numbers of a tensor; None: ones.

    Raises:
        UsageError: there is something at `folder`, or too little space on its disk.
    """
    from tqdm import tqdm

    has_head_copy = config.tie_word_embeddings and not mapping.shares_embedding(config)
    plan = list(wholes(config, ALGORITHMS[None], has_head_copy))
    writer = RankWriter(plan, config, mapping, lambda _: STORED[dtype])

    def draws() -> Iterator[Draw[Rows]]:
        for number, whole in enumerate(plan):
            width = math.prod(whole.shape[1:])
            step = max(1, random_numbers.BLOCK // width)
            if has_head_copy and whole.of == "lm_head.weight":
                number = 0  # the embedding's, once more
            for block, row in enumerate(range(0, whole.shape[0], step)):
                count = min(step, whole.shape[0] - row) * width
                yield Draw((whole, row), count, deviation_of(whole), (seed, number, block))

    with written_beside(folder, writer.size, "--output") as scratch:
        with (
            writer.opened(scratch),
            tqdm(total=writer.size, desc="random_checkpoint.py", unit="B", unit_scale=True) as progress,
        ):
            for (whole, row), block in drawn(draws(), dtype):
                values = block.view(numpy_dtype(dtype)).reshape(-1, *whole.shape[1:])
                progress.update(writer.write(whole, values, row))
        said = {"config.json": config_json(config, mapping, dtype, None), "generation_config.json": generation}
        for name, content in said.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
