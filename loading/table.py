"""A family's table, stored names → parameters, and what it says of a configuration's parameters one by one.

    TABLE = {
        "h.{}.attn.c_attn": From(("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", ...), ("q", "k", "v")),
        "h.{}.mlp.c_proj": From("h.{}.mlp.c_proj", is_conv1d=True),
        ...
    }

Names are those of modules: of each, weight and bias are stored, after a point, unless its name ends with "_". `{}` is
the number of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from loading.config import CheckpointConfig, parameter_shapes

#: Which stored row (of those of all pieces, one after the other) each row of a parameter is.
Order = Callable[[CheckpointConfig], np.ndarray]


@dataclass(frozen=True)
class From:
    """The stored modules that a module of the model comes from.

    Attributes:
        modules: The name of one, or the names of several, which are joined in this order.
        parts: What of the model's module each of several holds: "q", "k", "v", "kv" or "gate", "up". Without it, they
            are of the same size.
        is_conv1d: Weights are stored as (in, out), as transformers' Conv1D keeps them, and not as (out, in).
        axis: Along which dimension of the weight they are joined. Along 1, vectors are the first module's.
        order: In which rows are stored; None: as they are in the model.
    """

    modules: str | tuple[str, ...]
    parts: tuple[str, ...] = ()
    is_conv1d: bool = False
    axis: int = 0
    order: Order | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.modules,) if isinstance(self.modules, str) else self.modules


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names its tensors.

    Attributes:
        table: The stored modules of every module of the model.
        prefix: That all names but the head's may have or lack.
        ignored: Ends of the names of tensors that are no parameters.
        copies: Names of tensors of which others are read.
        cache_scale: The name of the scale of a layer's keys or values: of the layer and "k" or "v", twice.
    """

    table: Mapping[str, From]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: frozenset[str] = frozenset()
    cache_scale: str = "h.{0}.attn.{1}_proj.{1}_scale"


@dataclass(frozen=True)
class Piece:
    """A stored tensor that a parameter is made of."""

    name: str  # as stored, but for the prefix
    shape: tuple[int, ...]  # as the model has it: linear weights (out, in)
    is_transposed: bool  # stored (in, out)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_transposed else self.shape

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model before quantization: its pieces joined along `axis`, then its rows in `order`."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    axis: int = 0
    order: np.ndarray | None = field(default=None, compare=False)

    @property
    def is_of_layer(self) -> bool:
        return self.name.startswith("h.")

    @property
    def is_norm(self) -> bool:
        return ".ln_" in self.name or self.name.startswith("ln_f.")


def parameters(config: CheckpointConfig, layout: Layout, has_conv1d: bool = True) -> Iterator[Parameter]:
    """Every parameter of a configuration, in the order of `parameter_shapes`, and the pieces that it is made of.

    Args:
        has_conv1d: Whether weights are stored as (in, out) where the table says so; False: none is.
    """
    orders: dict[Order, np.ndarray] = {}
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        layer = module.split(".")[1] if module.startswith("h.") else ""
        source = layout.table[module.replace(f"h.{layer}.", "h.{}.", 1)]
        if source.order is not None and source.order not in orders:
            orders[source.order] = source.order(config)
        yield Parameter(
            name,
            shape,
            tuple(_pieces(config, source, layer, kind, shape, has_conv1d)),
            source.axis if len(shape) > 1 else 0,
            None if source.order is None else orders[source.order],
        )


def _pieces(
    config: CheckpointConfig, source: From, layer: str, kind: str, shape: tuple[int, ...], has_conv1d: bool
) -> Iterator[Piece]:
    modules = source.names if source.axis == 0 or len(shape) > 1 else source.names[:1]
    axis = source.axis if len(shape) > 1 else 0
    sizes = {
        "q": config.query_width,
        "k": config.key_width,
        "v": config.key_width,
        "kv": 2 * config.key_width,
        "gate": config.n_inner,
        "up": config.n_inner,
    }
    for place, module in enumerate(modules):
        size = sizes[source.parts[place]] if source.parts else shape[axis] // len(modules)
        yield Piece(
            f"{module.format(layer)}{'' if module.endswith('_') else '.'}{kind}",
            (*shape[:axis], size, *shape[axis + 1 :]),
            has_conv1d and source.is_conv1d and len(shape) > 1,
        )
