"""LoRA adapters (Hu et al. 2021), PEFT's folders and NeMo's archives → the two matrices that each layer takes.

nemo_lora.py reads the archives. A folder has ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``);
of every module that it changes, ``lora_A.weight`` (rank, in_features) and ``lora_B.weight`` (out_features, rank), which
add ``scale * B @ A`` to the weight. What PEFT can do besides (DoRA, whole modules, biases, embeddings) is refused by
name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.download import download_adapter
from adapters.errors import AdapterError, NotPlainError
from adapters.nemo_lora import SUFFIX as NEMO_SUFFIX
from adapters.nemo_lora import nemo_parts
from adapters.parts import Part, read_floats
from adapters.places import LINEARS, Base, places_of
from loading.config import parameter_shapes
from loading.containers.folder import open_weights
from loading.containers.tensors import Tensors
from loading.disk import is_file, read_json
from loading.errors import listed, shown

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MAX_RANK = 1024  # of all parts of a layer together: the portable runtime's

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")

#: Settings that say how an adapter was trained, or what its tensors say themselves. Any other has to be off.
_HARMLESS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    )
)


@dataclass(frozen=True)
class Lora:
    """An adapter, in the model's order.

    Attributes:
        name: How messages call it.
        matrices: For each of ``LINEARS`` the ways down (layers, rank, in_features) and up (layers, rank, out_features),
            float32, the scale in the latter; or None where the adapter leaves that layer as it is.
    """

    name: str
    matrices: tuple[tuple[np.ndarray, np.ndarray] | None, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """For each of ``LINEARS``; 0 where it is left as it is."""
        return tuple(0 if pair is None else pair[0].shape[1] for pair in self.matrices)

    @property
    def digest(self) -> str:
        """A hexadecimal hash of its numbers."""
        return digest_of(self.tables((1,) * len(LINEARS))).hex()

    def unfolded(self, folded: Mapping[str, np.ndarray]) -> Lora:
        """For a base that has scales of inputs in its norms (folding.py)."""
        if not folded:
            return self
        changed = []
        for name, pair in zip(LINEARS, self.matrices, strict=True):
            scales = folded.get(name)
            changed.append(pair if pair is None or scales is None else (pair[0] / scales[:, None], pair[1]))
        return replace(self, matrices=tuple(changed))

    def tables(self, ranks: Sequence[int]) -> list[np.ndarray | None]:
        """What an engine with room for these ranks takes: of each of ``LINEARS`` that has one, the ways down and up."""
        pairs = [pair for pair, rank in zip(self.matrices, ranks, strict=True) if rank]
        return [matrix for pair in pairs for matrix in (pair if pair is not None else (None, None))]


def digest_of(matrices: Iterable[np.ndarray | None]) -> bytes:
    """What tells matrices from others: SHA-256 over their shapes and numbers."""
    digest = hashlib.sha256()
    for each in matrices:
        digest.update(b"none" if each is None else repr(each.shape).encode() + np.ascontiguousarray(each).tobytes())
    return digest.digest()


def find_lora(name: str, checkpoint: Base) -> Lora:
    """The adapter of a folder, of an archive or, downloaded once, of a repository at the hub.

    Raises:
        AdapterError: as :func:`read_lora`, or it cannot be downloaded.
    """
    return read_lora(locate_lora(name), checkpoint)


def locate_lora(name: str) -> Path:
    """The folder or the .nemo file of an adapter; a folder is downloaded where nothing has that name.

    Raises:
        AdapterError: it cannot be downloaded.
    """
    path = Path(name).expanduser()
    return path if path.exists() else download_adapter(name, (CONFIG_FILE, *WEIGHT_FILES))


def read_lora(path: Path, checkpoint: Base) -> Lora:
    """The adapter in a folder or a .nemo file, for a checkpoint.

    Raises:
        AdapterError: there is none, it is damaged, is for another model, or does what this project does not
            (NotPlainError).
        CheckpointError: a file of it cannot be read.
    """
    parts = nemo_parts(path, checkpoint) if path.suffix == NEMO_SUFFIX else _peft_parts(path, checkpoint)
    joined = tuple(
        _joined([part for part in parts if part.place.linear == linear], linear, checkpoint)
        for linear in range(len(LINEARS))
    )
    adapter = Lora(str(path), joined)
    if max(adapter.ranks) > MAX_RANK:
        raise AdapterError(
            f"{path}: expected ranks of at most {MAX_RANK} for each layer, its parts together, but got "
            f"{max(adapter.ranks)}"
        )
    return adapter


def _peft_parts(folder: Path, checkpoint: Base) -> list[Part]:
    """The matrices in PEFT's folder."""
    path = folder / CONFIG_FILE
    if not is_file(path):
        raise AdapterError(f"expected an adapter in {str(folder)!r}, with an {CONFIG_FILE}, but it has none")
    settings = read_json(path)
    _check(settings, path)
    file = weights_file(folder)
    tensors = open_weights(file)
    pairs = _pairs(tensors, file)
    prefix = checkpoint.layout.prefix
    names = {_without(name, prefix) for name in pairs}
    places = places_of(checkpoint, names)
    unknown = sorted(name for name in names if name not in places)
    if unknown:
        raise AdapterError(
            f"{folder} is for another model than {checkpoint.path}: it changes {listed(unknown)}, and the blocks of "
            "such a model have no such linear layer"
        )
    parts = []
    for name, (a, b) in pairs.items():
        place = places[_without(name, prefix)]
        down, up = read_floats(tensors, a, file), read_floats(tensors, b, file)
        rank = _rank(settings, name, path)
        wanted = ((rank, place.in_features), (len(place.rows), rank))
        if (down.shape, up.shape) != wanted:
            raise AdapterError(
                f"{file}: expected {name} to have lora_A {wanted[0]} and lora_B {wanted[1]}, by {CONFIG_FILE} and "
                f"{checkpoint.path}, but got {down.shape} and {up.shape}"
            )
        parts.append(Part(place, down, up * np.float32(_scale(settings, name, rank, path))))
    return parts


def weights_file(folder: Path) -> Path:
    """Where PEFT's folder has its tensors.

    Raises:
        AdapterError: it has none.
    """
    file = next((folder / name for name in WEIGHT_FILES if is_file(folder / name)), None)
    if file is None:
        raise AdapterError(f"{str(folder)!r} holds no adapter: expected one of {', '.join(WEIGHT_FILES)}")
    return file


def _without(name: str, prefix: str) -> str:
    for each in (prefix, "model.", "transformer."):
        if each and name.startswith(each):
            return name[len(each) :]
    return name


def _check(settings: dict[str, Any], path: Path) -> None:
    """Refuses by its name what would be left out."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        hint = ": it is for --prompt-table" if kind in ("PROMPT_TUNING", "P_TUNING") else ""
        raise AdapterError(f"{path}: expected peft_type to be LORA but got {shown(kind)}{hint}")
    if settings.get("modules_to_save"):
        raise NotPlainError(
            f"{path}: modules_to_save ({shown(settings['modules_to_save'])}) replaces whole modules, which an adapter "
            "beside others cannot: merge it into the model"
        )
    if settings.get("bias", "none") != "none":
        raise NotPlainError(
            f"{path}: expected bias to be none but got {shown(settings['bias'])}: merge it into the model"
        )
    on = sorted(name for name, value in settings.items() if name not in _HARMLESS and value)
    if on:
        raise NotPlainError(f"{path}: {listed(on)} is not supported: expected plain LoRA")


def _pairs(tensors: Tensors, file: Path) -> dict[str, tuple[str, str]]:
    """The names of each module's lora_A and lora_B."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for stored in tensors.tensors:
        match = _KEY.fullmatch(stored)
        if match is None:
            others.append(stored)
        else:
            found.setdefault(match[1], {})[match[2]] = stored
    if others:
        raise NotPlainError(
            f"{file}: expected lora_A and lora_B of linear layers only but got {listed(sorted(others))}"
        )
    alone = sorted(name for name, pair in found.items() if len(pair) != 2)
    if alone or not found:
        raise AdapterError(f"{file}: expected lora_A and lora_B of each module but got {listed(alone) or 'none'}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _rank(settings: dict[str, Any], name: str, path: Path) -> int:
    rank = _by_pattern(settings, "rank_pattern", name, path, settings.get("r"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{path}: expected r to be a positive integer but got {shown(rank)}")
    return rank


def _scale(settings: dict[str, Any], name: str, rank: int, path: Path) -> float:
    """alpha / r, or alpha / sqrt(r) where it is rank-stabilized (Kalajdzievski 2023)."""
    alpha = _by_pattern(settings, "alpha_pattern", name, path, settings.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: expected lora_alpha to be a number but got {shown(alpha)}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(settings: dict[str, Any], field: str, name: str, path: Path, otherwise: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT finds it."""
    patterns = settings.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: expected {field} to map patterns to numbers but got {shown(patterns)}")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error:
            raise AdapterError(
                f"{path}: expected {field} to have regular expressions but got {shown(pattern)}"
            ) from None
    return otherwise


def _joined(parts: list[Part], linear: int, checkpoint: Base) -> tuple[np.ndarray, np.ndarray] | None:
    """The matrices of one of the model's linear layers, of all layers. Parts that are stored by themselves (queries,
    keys and values) have numbers of their own on the way."""
    if not parts:
        return None
    config = checkpoint.config
    ranks = [0] * config.n_layer
    for part in parts:
        ranks[part.place.layer] += len(part.down)
    outputs, inputs = parameter_shapes(config)[f"h.0.{LINEARS[linear]}.weight"]
    downs, ups = (np.zeros((config.n_layer, max(ranks), width), np.float32) for width in (inputs, outputs))
    used = [0] * config.n_layer
    for part in sorted(parts, key=lambda part: int(part.place.rows[0])):
        layer, rank = part.place.layer, len(part.down)
        own = slice(used[layer], used[layer] + rank)
        used[layer] += rank
        downs[layer, own] = part.down
        ups[layer, own][:, part.place.rows] = part.up.T
    return downs, ups
