"""Where in the model an adapter's matrices belong: the names under which a family stores its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from loading.config import CheckpointConfig
from loading.families import gpt2, gpt_bigcode, llama, starcoder2
from loading.table import Layout, parameters

#: The linear layers that adapters add to, in the model's order (model.py's ADAPTED), by the names of their parameters.
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Base(Protocol):
    """What has to be known of the checkpoint that an adapter is for; its weights are not needed."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> CheckpointConfig: ...
    @property
    def layout(self) -> Layout: ...


@dataclass(frozen=True)
class Described:
    """A checkpoint without its files."""

    path: Path
    config: CheckpointConfig
    layout: Layout


@dataclass(frozen=True)
class Place:
    """A stored linear layer, as a part of the model's.

    Attributes:
        linear: Which of ``LINEARS``.
        layer: Of which layer.
        rows: Where in the model's layer its rows are, (out_features,).
        in_features: Its inputs.
    """

    linear: int
    layer: int
    rows: np.ndarray
    in_features: int


def ranks_for(checkpoint: Base, rank: int) -> tuple[int, ...]:
    """For each of ``LINEARS`` the rank that adapters of at most ``rank`` can come to: layers that are stored in several
    parts have a rank for each."""
    layouts = (checkpoint.layout, _usual_layout(checkpoint.config))
    names = [f"h.{{}}.{name}" for name in LINEARS]
    return tuple(rank * max(len(layout.table[name].names) for layout in layouts) for name in names)


def places_of(checkpoint: Base, names: set[str]) -> dict[str, Place]:
    """The places of modules, by their names without the family's prefix; those that there are.

    Args:
        names: Of all modules that an adapter changes. Where the checkpoint's container has names of its own (GGUF,
            NeMo), they are those of transformers' model of the same kind.
    """
    own = _places(checkpoint.config, checkpoint.layout)
    return own if names <= own.keys() else _places(checkpoint.config, _usual_layout(checkpoint.config))


def _usual_layout(config: CheckpointConfig) -> Layout:
    """How transformers names the parameters of such a model."""
    if config.position_embedding == "rotary":
        return llama.LAYOUT if config.gated_mlp else starcoder2.LAYOUT
    if config.kv_heads == config.n_head:
        return gpt2.LAYOUT
    return Layout(gpt_bigcode.MULTI_QUERY, prefix=gpt2.LAYOUT.prefix)


def _places(config: CheckpointConfig, layout: Layout) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for parameter in parameters(config, layout):
        name, _, kind = parameter.name.rpartition(".")
        if kind != "weight" or not name.startswith("h."):
            continue
        _, layer, module = name.split(".", 2)
        if module not in LINEARS or parameter.axis:
            continue
        # Row i of the model is stored row order[i].
        places = np.arange(parameter.shape[0])
        if parameter.order is not None:
            places = np.argsort(parameter.order)
        begin = 0
        for piece in parameter.pieces:
            rows = places[begin : begin + piece.shape[0]]
            found[piece.module] = Place(LINEARS.index(module), int(layer), rows, piece.shape[1])
            begin += piece.shape[0]
    return found
