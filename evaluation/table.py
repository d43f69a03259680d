"""The results side by side: as text, as Markdown, as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.speed import Speed
from evaluation.weights import WeightBytes


@dataclass(frozen=True)
class Settings:
    """What all variants have in common."""

    text: str
    tokens: int  # of the first variant
    bytes: int  # in UTF-8
    is_one_tokenizer: bool  # whether all variants have the same one, as far as this text tells
    context: int  # of the windows
    stride: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    machine: str
    cores: int
    nvtripy: str

    def __str__(self) -> str:
        return (
            f"{self.text}, {self.bytes} bytes, {self.tokens} tokens"
            f"{'' if self.is_one_tokenizer else ' of the first variant (tokenizers differ: compare bits/byte)'} "
            f"in windows of {self.context}, stride {self.stride}; speed: "
            f"{self.new_tokens} tokens after a prompt of {self.prompt_tokens}, batch 1, median of {self.runs}; "
            f"{self.machine}, {self.cores} cores, nvtripy {self.nvtripy}"
        )


@dataclass(frozen=True)
class Result:
    """The measurements of one variant; None where there is none."""

    variant: str
    dtype: str
    perplexity: float
    ratio: float | None  # of the perplexity to the first variant's; None: another tokenizer's, or infinite
    bits_per_byte: float
    speed: Speed
    disk: WeightBytes
    memory: WeightBytes

    def as_json(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "dtype": self.dtype,
            "perplexity": _finite(self.perplexity),
            "ratio": _finite(self.ratio),
            "bits_per_byte": _finite(self.bits_per_byte),
            **asdict(self.speed),
            **_weights_as_json("disk", self.disk),
            **_weights_as_json("memory", self.memory),
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no other numbers


def _weights_as_json(where: str, weights: WeightBytes) -> dict[str, Any]:
    return {
        f"{where}_bytes": weights.total,
        f"{where}_layers_bytes": weights.layers,
        f"{where}_layers_to_float16": weights.to_float16,
        f"{where}_bits_per_weight": weights.bits,
    }


COLUMNS = (
    "variant",
    "perplexity",
    "ratio",
    "bits/byte",
    "tokens/s",
    "first token, ms",
    "disk, MB",
    "disk, bits",
    "memory, MB",
    "memory, bits",
    "peak, MB",
)
NOTE = (
    "disk, memory: the weights in the checkpoint's files and in the compiled model; bits: of one weight of the "
    "quantized or, where none is, of the linear layers, with its share of their scales. bits/byte: of the text. peak: "
    "memory of a process that opens the saved engine and generates."
)


def _cells(result: Result) -> list[str]:
    def shown(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(value * factor, form)

    return [
        result.variant,
        shown(result.perplexity, ".3f" if result.perplexity < 1e5 else ".4g"),
        shown(result.ratio, ".4f" if result.ratio is None or result.ratio < 1e5 else ".4g"),
        shown(result.bits_per_byte, ".4f"),
        shown(result.speed.tokens_per_second, ".1f"),
        shown(result.speed.first_token_seconds, ".1f", 1e3),
        shown(result.disk.total, ".2f", 1e-6),
        shown(result.disk.bits, ".2f"),
        shown(result.memory.total, ".2f", 1e-6),
        shown(result.memory.bits, ".2f"),
        shown(result.speed.peak_memory_bytes, ".0f", 1e-6),
    ]


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's cells, padded to the width of their columns: names on the left, numbers on the right."""
    rows = [list(COLUMNS), *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def as_text(settings: Settings, results: Sequence[Result]) -> str:
    """An aligned table under a line that says how it was measured."""
    rows = ["  ".join(row) for row in _rows(results)]
    width = len(rows[0])
    return "\n".join([*textwrap.wrap(str(settings), width), "", *rows, "", *textwrap.wrap(NOTE, width)])


def as_markdown(settings: Settings, results: Sequence[Result]) -> str:
    """The same in Markdown."""
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in _rows(results))
    rule = f"|:---|{'---:|' * (len(COLUMNS) - 1)}"
    return "\n".join([f"{settings}.", "", head, rule, *body, "", NOTE])


def as_json(settings: Settings, results: Sequence[Result]) -> str:
    """Everything, in bytes and seconds, unrounded; null where there is no number."""
    return json.dumps({"settings": asdict(settings), "variants": [each.as_json() for each in results]}, indent=2)


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json}
