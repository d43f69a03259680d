"""Prompt tables: prompt tuning (Lester et al. 2021) and p-tuning (Liu et al. 2021) → embeddings of virtual tokens.

A task's prompt is a few learned embeddings before those of the text. Its virtual tokens take positions and context as
others do. Read are:

- PEFT's folders of PROMPT_TUNING and P_TUNING: ``prompt_embeddings`` (tokens, width), one task;
- NeMo's archives: ``prompt_table.<task>.prompt_embeddings.weight`` of each task, or one
  ``embedding.adapter_layer.ptuning_adapter.inference_table``;
- ``.npy`` (tasks, tokens, width), as TensorRT-LLM's nemo_prompt_convert.py writes it: shorter prompts end in zeros,
  which are virtual tokens there, and so they are here;
- ``.safetensors`` with a tensor (tokens, width) of each task, ``<number>.<task>``, as prompt_table.py writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import AdapterError
from adapters.lora import CONFIG_FILE, digest_of, locate_lora, weights_file
from adapters.nemo_lora import SUFFIX as NEMO_SUFFIX
from adapters.parts import read_floats
from adapters.places import Base
from loading.containers.folder import open_weights
from loading.containers.nemo_archive import CONFIG_FILE as NEMO_CONFIG_FILE
from loading.containers.nemo_archive import NemoArchive
from loading.disk import is_file, read_json
from loading.errors import listed, reason, shown

_KINDS = ("PROMPT_TUNING", "P_TUNING")
_PEFT_NAME = "prompt_embeddings"
_NEMO_TASK = re.compile(r"(?:.*\.)?prompt_table\.(?P<task>[^.]+)\.prompt_embeddings\.weight")
_NUMBERED = re.compile(r"(\d{1,9})\.(.*)", re.DOTALL)
_NEMO_TABLE = "embedding.adapter_layer.ptuning_adapter.inference_table"


@dataclass(frozen=True)
class Prompt:
    """Of one task.

    Attributes:
        name: The task's; None where the file has none.
        rows: Embeddings of its virtual tokens, (tokens, width) float32.
    """

    name: str | None
    rows: np.ndarray


class PromptTable:
    """The prompts that an engine has, numbered from 0. Their virtual tokens have the ids from ``vocabulary`` on."""

    def __init__(self, prompts: Sequence[Prompt], vocabulary: int) -> None:
        self.prompts = list(prompts)
        self.rows = np.concatenate([each.rows for each in prompts]) if prompts else np.zeros((0, 0), np.float32)
        ends = vocabulary + np.cumsum([len(each.rows) for each in prompts])
        self._ids = [range(int(end) - len(each.rows), int(end)) for end, each in zip(ends, prompts, strict=True)]

    @property
    def digest(self) -> str:
        """A hexadecimal hash of its numbers."""
        return digest_of([self.rows]).hex()

    def ids(self, task: int) -> range:
        """The virtual tokens of a task."""
        return self._ids[task]


def find_prompts(name: str, checkpoint: Base) -> list[Prompt]:
    """The prompts of a file, of a folder or, downloaded once, of a repository at the hub, for a checkpoint.

    Raises:
        AdapterError: there are none, they are damaged, of another width, or longer than the context.
        CheckpointError: a file cannot be read.
    """
    path = locate_lora(name)
    prompts = read_prompts(path)
    config = checkpoint.config
    for number, each in enumerate(prompts):
        tokens, width = each.rows.shape
        if width != config.n_embd:
            raise AdapterError(
                f"{path} is for another model than {checkpoint.path}: expected a width of {config.n_embd} but got "
                f"{width}"
            )
        if not 1 <= tokens < config.n_positions:
            raise AdapterError(
                f"{path}: expected 1 to {config.n_positions - 1} virtual tokens, which leave the context of "
                f"{checkpoint.path} room for a text, but task {number} has {tokens}"
            )
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a file or folder, in the order of their numbers.

    Raises:
        AdapterError: there are none, or they are damaged.
        CheckpointError: a file cannot be read.
    """
    if path.is_dir() and not is_file(path / NEMO_CONFIG_FILE):
        return [_of_peft(path)]
    if path.is_dir() or path.suffix == NEMO_SUFFIX:
        return _of_nemo(path)
    if path.suffix == ".npy":
        return _of_npy(path)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    raise AdapterError(
        f"expected prompts in a PEFT folder, a {NEMO_SUFFIX}, .npy or .safetensors file but got {str(path)!r}"
    )


def _of_peft(folder: Path) -> Prompt:
    path = folder / CONFIG_FILE
    if not is_file(path):
        raise AdapterError(f"expected prompts in {str(folder)!r}, with an {CONFIG_FILE}, but it has none")
    settings = read_json(path)
    kind = settings.get("peft_type")
    if kind not in _KINDS:
        raise AdapterError(f"{path}: expected peft_type to be {' or '.join(_KINDS)} but got {shown(kind)}")
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(f"{path}: expected prompts of a decoder alone, with num_transformer_submodules 1")
    file = weights_file(folder)
    tensors = open_weights(file)
    if set(tensors.tensors) != {_PEFT_NAME}:
        raise AdapterError(f"{file}: expected {_PEFT_NAME} alone but got {listed(sorted(tensors.tensors))}")
    rows = _matrix(read_floats(tensors, _PEFT_NAME, file), _PEFT_NAME, file)
    wanted = (settings.get("num_virtual_tokens"), settings.get("token_dim"))
    if any(said not in (None, found) for said, found in zip(wanted, rows.shape, strict=True)):
        raise AdapterError(f"{file}: expected {_PEFT_NAME} to be {wanted}, by {CONFIG_FILE}, but got {rows.shape}")
    return Prompt(None, rows)


def _of_nemo(path: Path) -> list[Prompt]:
    archive = NemoArchive(path)
    if archive.ranks > 1:
        raise AdapterError(f"{path}: expected prompts of one rank, which has all of them, but got {archive.ranks}")
    tasks = {match["task"]: name for name in archive.tensors if (match := _NEMO_TASK.fullmatch(name))}
    if _NEMO_TABLE in archive.tensors:
        return [Prompt(None, _matrix(read_floats(archive, _NEMO_TABLE, path), _NEMO_TABLE, path))]
    if not tasks:
        raise AdapterError(f"{path} holds no prompts: expected prompt_table.<task>.prompt_embeddings.weight")
    order = [*_templates(archive.config), *tasks]  # templates number the tasks; without them their order does
    names = [name for place, name in enumerate(order) if name in tasks and name not in order[:place]]
    return [Prompt(name, _matrix(read_floats(archive, tasks[name], path), tasks[name], path)) for name in names]


def _templates(config: dict[str, Any]) -> list[str]:
    """The names of the tasks, in the order of the archive's settings."""
    templates = config.get("task_templates")
    names = (
        [each.get("taskname") for each in templates if isinstance(each, dict)] if isinstance(templates, list) else []
    )
    return [name for name in names if isinstance(name, str)]


def _of_npy(path: Path) -> list[Prompt]:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AdapterError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(table, np.ndarray) or table.ndim != 3 or 0 in table.shape or table.dtype.kind != "f":
        found = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else "several arrays"
        raise AdapterError(f"{path}: expected an array of floats (tasks, tokens, width) but got {found}")
    wide = table.astype(np.float32)
    if not np.isfinite(wide).all():
        raise AdapterError(f"{path}: expected finite numbers but it has others")
    return [Prompt(None, rows) for rows in wide]


def _of_safetensors(path: Path) -> list[Prompt]:
    tensors = open_weights(path)
    found = {name: _NUMBERED.fullmatch(name) for name in tensors.tensors}
    odd = sorted(name for name, match in found.items() if match is None)
    if odd or not found:
        raise AdapterError(f"{path}: expected tensors <number>.<task> but got {listed(odd) or 'none'}")
    numbers = {name: int(match[1]) for name, match in found.items() if match is not None}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise AdapterError(f"{path}: expected tasks 0 to {len(numbers) - 1} but got {listed(sorted(numbers))}")
    return [
        Prompt(name.partition(".")[2] or None, _matrix(read_floats(tensors, name, path), name, path))
        for name in sorted(numbers, key=lambda name: numbers[name])
    ]


def _matrix(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape:
        raise AdapterError(f"{path}: expected {name} to be (tokens, width) but got {array.shape}")
    return array
