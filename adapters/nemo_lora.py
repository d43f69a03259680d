"""NeMo's LoRA archives: a .nemo with the adapters of queries, keys and values, and no weights of the model's own.

Of each layer it has ``…self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight`` (rank, n_embd) and
``….linear_out.weight`` (out_features, rank), whose product is added to the fused weight as it is: there is no scale,
and rows stand by group, [q of the heads that share the keys, k, v], as those of the weight do in Megatron. With tensor
parallelism both are cut along their rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from adapters.errors import AdapterError
from adapters.parts import Part, read_floats
from adapters.places import LINEARS, Base, Place
from loading.containers.nemo_archive import NemoArchive
from loading.errors import listed, shown
from loading.families.gpt_next import by_group

SUFFIX = ".nemo"

_KEY = re.compile(
    r"(?:(?P<rank>\d+)/)?(?:.+\.)?layers\.(?P<layer>\d+)\.self_attention\.adapter_layer\.lora_kqv_adapter\."
    r"linear_(?P<way>in|out)\.weight"
)


def nemo_parts(path: Path, checkpoint: Base) -> list[Part]:
    """The matrices of an archive, or of an unpacked one, for a checkpoint of any container.

    Raises:
        AdapterError: it is for another model, lacks something, or does what is not supported.
        CheckpointError: it cannot be read as an archive.
    """
    archive, config = NemoArchive(path), checkpoint.config
    _refuse_scale(archive, path)
    names: dict[tuple[int, str], dict[int, str]] = {}  # of a layer and a way, by rank
    others = []
    for name in archive.tensors:
        match = _KEY.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            names.setdefault((int(match["layer"]), match["way"]), {})[int(match["rank"] or 0)] = name
    if others:
        raise AdapterError(f"{path}: expected lora_kqv_adapter of each layer only but got {listed(sorted(others))}")
    rows = np.argsort(by_group(config))  # the model's row of each of the archive's
    wanted = {(layer, way) for layer in range(config.n_layer) for way in ("in", "out")}
    if names.keys() != wanted or any(len(pieces) != archive.ranks for pieces in names.values()):
        odd = sorted(f"linear_{way} of layer {layer}" for layer, way in names.keys() ^ wanted)
        raise AdapterError(
            f"{path}: expected linear_in and linear_out of each of the {config.n_layer} layers of {checkpoint.path}, "
            f"of {archive.ranks} ranks, but they differ in {listed(odd) or 'the ranks that have them'}"
        )
    parts = []
    for layer in range(config.n_layer):
        pieces = {way: names[layer, way] for way in ("in", "out")}
        down, up = (_joined(archive, pieces[way], path) for way in ("in", "out"))
        expected = ((len(down), config.n_embd), (len(rows), len(down)))
        if len(down) < 1 or (down.shape, up.shape) != expected:
            raise AdapterError(
                f"{path}: expected linear_in (rank, {config.n_embd}) and linear_out ({len(rows)}, rank) of layer "
                f"{layer}, by {checkpoint.path}, but got {down.shape} and {up.shape}"
            )
        parts.append(Part(Place(LINEARS.index("attn.c_attn"), layer, rows, config.n_embd), down, up))
    return parts


def _joined(archive: NemoArchive, pieces: dict[int, str], path: Path) -> np.ndarray:
    """The rows of all ranks."""
    arrays = [read_floats(archive, pieces[rank], path) for rank in sorted(pieces)]
    if any(array.ndim != 2 or array.shape[1] != arrays[0].shape[1] for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise AdapterError(f"{path}: expected {pieces[0]} to be a matrix of rows but got {shapes}")
    return np.concatenate(arrays)


def _refuse_scale(archive: NemoArchive, path: Path) -> None:
    """Newer versions of NeMo can train with a scale of alpha / adapter_dim, which its merging leaves out."""
    settings: object = archive.config
    for name in ("peft", "lora_tuning"):
        settings = settings.get(name) if isinstance(settings, dict) else None
    if isinstance(settings, dict) and settings.get("alpha") not in (None, settings.get("adapter_dim")):
        raise AdapterError(
            f"{path}: expected alpha to be adapter_dim, or none, but got {shown(settings['alpha'])}, which is not "
            "supported"
        )
