"""What each part of a checkpoint takes on disk, beside what it would take in float32.

    python quantization.py --model-type DIR --show-stats

It is read from the headers of the weight files: no weight is loaded, and torch is not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weight_loader import Checkpoint, parameter_shapes

# In the order of the data; the first that a tensor's name holds.
COMPONENTS = {
    "wte.": "token embedding",
    "wpe.": "position embedding",
    ".attn.": "attention",
    ".mlp.": "MLP",
    "lm_head.": "head",
    "ln_": "LayerNorm",
}
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Component:
    """A part of the model: how many parameters it has, and the bytes of its tensors with scales and biases.

    What shares its weight with another part has none of its own.
    """

    name: str
    parameters: int
    stored: int

    @property
    def in_float32(self) -> int:
        return _FLOAT32_BYTES * self.parameters

    @property
    def ratio(self) -> float | None:
        """How many times smaller it is stored than in float32; None where nothing is."""
        return self.in_float32 / self.stored if self.stored and self.parameters else None


def components(checkpoint: Checkpoint) -> list[Component]:
    """The parts of a checkpoint, in the order of `COMPONENTS`, and their total."""
    parameters, stored = (dict.fromkeys(COMPONENTS.values(), 0) for _ in range(2))
    for name, shape in parameter_shapes(checkpoint.config).items():
        parameters[_component_of(name)] += math.prod(shape)
    for name, size in checkpoint.stored_bytes().items():
        stored[_component_of(name)] += size
    parts = [Component(name, parameters[name], stored[name]) for name in COMPONENTS.values()]
    return [*parts, Component("total", sum(parameters.values()), sum(stored.values()))]


def _component_of(tensor: str) -> str:
    return next(name for part, name in COMPONENTS.items() if part in tensor)


def table(checkpoint: Checkpoint) -> str:
    """The parts as lines of text, with the weight files, whose headers count too, at the end."""
    files = sum(path.stat().st_size for path in checkpoint.weight_files)
    parts = components(checkpoint)
    rows: list[tuple[str, ...]] = [("component", "parameters", "float32 bytes", "stored bytes", "ratio")]
    for part in [*parts, Component("files", parts[-1].parameters, files)]:
        if not part.parameters and not part.stored:
            rows.append((part.name, "shared with the token embedding" if part.name == "head" else "none"))
            continue
        ratio = "-" if part.ratio is None else f"{part.ratio:.2f}"
        rows.append((part.name, *(f"{number:,}" for number in (part.parameters, part.in_float32, part.stored)), ratio))
    return "\n".join(_line(row) for row in rows)


def _line(row: tuple[str, ...]) -> str:
    name, *cells = row
    widths = (12, 15, 14, 7)[: len(cells)]
    return f"{name:20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
