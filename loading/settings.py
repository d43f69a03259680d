"""Values of a mapping that a file holds (config.json, GGUF's metadata, ...), each checked when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loading.errors import CheckpointError, shown

# The largest accepted sizes. They are far above any real model; they keep a damaged file from asking for astronomic
# amounts of work before the first comparison with the weights.
VOCABULARY = CONTEXT = 2**24
LAYERS = HEADS = 2**12
WIDTH = 2**17
INNER_WIDTH = 2**19

# Names of activations → model.py's.
ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",  # the same formula
    "gelu_fast": "gelu_new",  # and again
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


class Settings:
    """A mapping and what messages call its file. What is wrong with a value raises `CheckpointError`.

    Names are given with their synonyms, if they have any: `integer("n_embd", "hidden_size", ...)`. A default of None
    means that the value has to be there.
    """

    def __init__(self, source: Path | str, values: Mapping[str, Any]) -> None:
        self.source, self.values = source, values

    def refuse(self, message: str) -> CheckpointError:
        """The exception that says what is wrong with the file."""
        return CheckpointError(f"{self.source}: {message}")

    def value(self, *names: str, default: object = None) -> Any:
        """The value of a name or of its synonyms, which must not contradict each other."""
        given = [name for name in names if name in self.values]
        for name in given[1:]:
            first, other = self.values[given[0]], self.values[name]
            if first != other:
                raise self.refuse(
                    f"{given[0]} and its synonym {name} contradict each other: {shown(first)} and {shown(other)}"
                )
        return self.values[given[0]] if given else default

    def integer(self, *names: str, default: int | None = None, limit: int) -> int:
        """An integer from 1 to `limit`."""
        value = self.value(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.refuse(f"expected {names[0]} to be an integer from 1 to {limit}, got {shown(value)}")
        return value

    def optional_integer(self, *names: str, limit: int) -> int | None:
        """An integer from 1 to `limit`; None where there is none, or null."""
        return None if self.value(*names) is None else self.integer(*names, limit=limit)

    def fraction(self, *names: str, default: float | None = None) -> float:
        """A number between 0 and 1, neither of them."""
        value = self.value(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise self.refuse(f"expected {names[0]} to be a number between 0 and 1, got {shown(value)}")
        return float(value)

    def positive(self, *names: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.value(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.refuse(f"expected {names[0]} to be a positive number, got {shown(value)}")
        return float(value)

    def switch(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.value(name, default=default)
        if not isinstance(value, bool):
            raise self.refuse(f"expected {name} to be true or false, got {shown(value)}")
        return value

    def activation(self, name: str, default: str) -> str:
        """An activation, by model.py's name."""
        value = self.value(name, default=default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(f"expected {name} to be one of {', '.join(ACTIVATIONS)}, got {shown(value)}")
        return ACTIVATIONS[value]

    def only(self, **implemented: object) -> None:
        """Refuses settings that change the computation, where they are not what the model implements."""
        for name, wanted in implemented.items():
            value = self.values.get(name, wanted)
            if type(value) is not type(wanted) or value != wanted:
                raise self.refuse(f"{name}={shown(value)} is not supported, only {name}={shown(wanted)}")

    def neutral(self, **neutral: float) -> None:
        """Refuses numbers that the model does not know, where they are not those that change nothing."""
        for name, wanted in neutral.items():
            value = self.values.get(name)
            if value is not None and (isinstance(value, bool) or value != wanted):
                raise self.refuse(f"{name}={shown(value)} is not supported, only {name}={wanted:g}")

    def absent(self, *names: str) -> None:
        """Refuses settings that switch on what the model does not have."""
        for name in names:
            if self.values.get(name):
                raise self.refuse(f"{name}={shown(self.values[name])} is not supported: the model has no such thing")

    def divided(self, width: str, size: int, heads: str, count: int) -> None:
        """Refuses a width that is not a multiple of a number of heads."""
        if size % count:
            raise self.refuse(f"{width} ({size}) is not a multiple of {heads} ({count})")
