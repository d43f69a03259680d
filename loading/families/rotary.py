"""Settings of rotary positions in transformers' config.json: those of its version 5, and the older flat ones."""

from __future__ import annotations

from dataclasses import dataclass

from loading import settings
from loading.errors import shown
from loading.settings import Settings


@dataclass(frozen=True)
class Rotary:
    """θ, what positions are divided by, and how much of a head is rotated."""

    base: float
    interpolation: float
    fraction: float


def rotary_heads(
    given: Settings, n_embd: int, n_head: int, n_kv_head: int, default_fraction: float | None = None
) -> tuple[int | None, Rotary]:
    """The size of a head where it is not the width's share, and the positions' settings.

    Raises:
        CheckpointError: as :func:`rotary`, or heads that do not divide the width or share keys evenly.
    """
    head_dim = given.optional_integer("head_dim", limit=settings.WIDTH)
    if head_dim is None:
        given.divided("hidden_size", n_embd, "num_attention_heads", n_head)
    given.divided("num_attention_heads", n_head, "num_key_value_heads", n_kv_head)
    return head_dim, rotary(given, head_dim or n_embd // n_head, default_fraction)


def rotary(given: Settings, head_size: int, default_fraction: float | None = None) -> Rotary:
    """What rope_parameters say or, where there are none, rope_theta and rope_scaling.

    Args:
        default_fraction: Of a head that is rotated, where nothing is said; None: the whole head is, always.

    Raises:
        CheckpointError: scaling of another kind than linear, a part of the head that is not possible, or a head of an
            odd size.
    """
    if head_size % 2:
        raise given.refuse(f"expected a head of an even size, which rotary positions need, got {head_size}")
    name = "rope_parameters" if given.values.get("rope_parameters") is not None else "rope_scaling"
    scaling = given.values.get(name)
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, dict):
        raise given.refuse(f"expected {name} to be an object, got {shown(scaling)}")
    inner = Settings(f"{given.source}: {name}", scaling)
    theta = given.values.get("rope_theta")
    base = inner.positive("rope_theta", default=10000.0 if theta is None else given.positive("rope_theta"))
    kind = inner.value("rope_type", "type", default="default")
    if kind not in ("default", "linear"):
        raise given.refuse(f"expected the rope_type of {name} to be default or linear, got {shown(kind)}")
    fraction = 1.0
    if default_fraction is None:
        for each in (given, inner):
            each.neutral(partial_rotary_factor=1)
    else:
        name = "partial_rotary_factor"
        fraction = (inner if name in inner.values else given).positive(name, default=default_fraction)
        if fraction > 1 or int(head_size * fraction) % 2 or int(head_size * fraction) < 2:
            raise given.refuse(
                f"expected {name} to make an even number of a head's {head_size} dimensions, got {fraction}"
            )
    return Rotary(base, inner.positive("factor") if kind == "linear" else 1.0, fraction)


def window(given: Settings, n_positions: int, default: int | None = None) -> int | None:
    """How many tokens one sees; None where that is all of the context.

    Raises:
        CheckpointError: no number, or layers that differ.
    """
    value = given.value("sliding_window", default=default)
    size = None if value is None else given.integer("sliding_window", default=default, limit=2**31)
    wanted = "full_attention" if size is None else "sliding_attention"
    kinds = given.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != wanted for kind in kinds)):
        raise given.refuse(f"expected layer_types to be {wanted} throughout, got {shown(kinds)}")
    return None if size is None or size >= n_positions else size
