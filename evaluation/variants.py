"""Variants of a model, by name: words joined by "+", or the folder of a checkpoint, which words may follow.

    float16        int8-weight-only        int4-weight-only+lm-head+kv-int8        out-shakespeare+int8-weight-only

A new word takes one line of `WORDS`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantization
import quantizing.settings
from command_line import UsageError, report
from quantization import QuantizationConfig, QuantizationError
from weight_loader import PARAMETER_DTYPES, Checkpoint, open_checkpoint

DTYPE = "data type"
#: Each word: its kind, of which a variant has at most one (None: a switch), and what it sets in a QuantizationConfig.
WORDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    **{dtype: (DTYPE, {}) for dtype in PARAMETER_DTYPES},
    **{mode: ("quantization mode", {"mode": mode}) for mode in quantization.MODES},
    **{
        f"{method}-int{bits}": ("quantization mode", {"method": method, "bits": bits})
        for method in ("rtn", "gptq")
        for bits in quantizing.settings.MODE_OF_BITS
    },
    **{f"group-{size}": ("group size", {"group_size": size}) for size in (16, 32, 48, 64, 96, 128, 192, 256)},
    "no-clipping": (None, {"clipping": False}),
    "lm-head": (None, {"quant_lm_head": True}),
    "embeddings": (None, {"quant_lm_head": True, "quant_embeddings": True}),
    "per-channel": (None, {"per_channel": True}),
    "per-token": (None, {"per_token": True}),
    "kv-int8": ("KV cache type", {"kv_cache_dtype": "int8"}),
    "kv-fp8": ("KV cache type", {"kv_cache_dtype": "fp8"}),
}


@dataclass(frozen=True)
class Variant:
    """What is looked at: a checkpoint's folder (None: the one that the program was given), how it is quantized (None:
    as it is), and in which type it is computed."""

    name: str
    dtype: str = "float16"
    quantization: QuantizationConfig | None = None
    folder: Path | None = None


def add_variants_argument(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The option that names variants, for every program that takes it."""
    parser.add_argument(
        "--variants",
        metavar="V",
        nargs="+",
        help=f"words of {', '.join(WORDS)}, joined by '+'; or a checkpoint folder, which they may follow "
        f"(default: those of {' '.join(default)} that can be had)",
    )


def parse_variant(text: str, calibration: Mapping[str, Any] | None = None) -> Variant:
    """A variant by its name.

    Args:
        text: The name.
        calibration: Fields of a QuantizationConfig that are the same for all variants: those of the calibration text.

    Raises:
        UsageError: words that no variant has, or that do not go together.

    >>> parse_variant("int8-weight-only+kv-fp8").quantization.kv_cache_dtype
    'fp8'
    >>> parse_variant("./out+float32")
    Variant(name='./out+float32', dtype='float32', quantization=None, folder=PosixPath('out'))
    """
    folder, words = _split(text)
    for word in words:
        if word not in WORDS:
            raise UsageError(
                f"unknown variant {text!r}: expected a folder, or words of {', '.join(WORDS)}, joined by '+'"
            )
    chosen: dict[str | None, list[str]] = {}
    for word in words:
        chosen.setdefault(WORDS[word][0], []).append(word)
    for kind, same in chosen.items():
        if kind is not None and len(same) > 1:
            raise UsageError(f"expected one {kind} in a variant but got {len(same)} in {text!r}")
    (dtype,) = chosen.get(DTYPE, ["float16"])
    settings = {name: value for word in words for name, value in WORDS[word][1].items()}
    if not settings:
        return Variant(text, dtype, folder=folder)
    try:
        return Variant(text, dtype, QuantizationConfig(**{**(calibration or {}), **settings}), folder)
    except QuantizationError as error:
        raise UsageError(f"variant {text!r}: {error}") from None


def _split(text: str) -> tuple[Path | None, list[str]]:
    """The folder in front, if there is one, and the words. A folder's own name may hold a "+"."""
    parts = text.split("+")
    words: list[str] = []
    while parts:
        name = "+".join(parts)
        if os.path.isdir(os.path.expanduser(name)):
            return Path(name).expanduser(), words
        if parts[-1] not in WORDS:
            break
        words.insert(0, parts.pop())
    name = "+".join(parts)
    if name[:1] in (".", "~") or any(mark in name for mark in ("/", os.sep)):
        return Path(name).expanduser(), words
    return None, [*parts, *words]


def open_variants(variants: Sequence[Variant], source: Checkpoint) -> list[tuple[Variant, Checkpoint]]:
    """The variants with their checkpoints, quantized where that is needed. ``source`` is that of variants without a
    folder.

    Raises:
        QuantizationError, CheckpointError: one of them cannot be had.
    """
    return [(variant, _open(variant, source)) for variant in variants]


def open_available(
    names: Sequence[str], source: Checkpoint, calibration: Mapping[str, Any]
) -> list[tuple[Variant, Checkpoint]]:
    """The variants that can be had of those that nobody asked for by name; what is left out is reported."""
    found = []
    is_quantized = source.config.quant_mode is not None or source.config.kv_cache_dtype is not None
    for name in names:
        variant = parse_variant(name, calibration)
        if variant.quantization is not None and is_quantized:
            continue  # it cannot be quantized again
        try:
            found.append((variant, _open(variant, source)))
        except QuantizationError as error:
            report(f"left out {name}: {error}")
    return found


def _open(variant: Variant, source: Checkpoint) -> Checkpoint:
    checkpoint = source if variant.folder is None else open_checkpoint(variant.folder)
    if variant.quantization is None:
        return checkpoint
    return open_checkpoint(quantization.cached_checkpoint(checkpoint, variant.quantization, report=report))
