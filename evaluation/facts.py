"""What can be known of a variant without a clock: the size of its weights, its perplexity. Measured once, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import UsageError
from evaluation.perplexity import bits_per_byte, nats_of, perplexity
from evaluation.text import Tokens
from evaluation.variants import Variant
from evaluation.weights import compiled_weight_bytes
from generation import LogitsError
from loading.fingerprint import READERS
from weight_loader import Checkpoint
from whole_file import written_whole

if TYPE_CHECKING:
    import nvtripy as tp

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *(ROOT / name for name in ("model.py", "engine.py", "evaluation/perplexity.py", "evaluation/weights.py")),
    *READERS,
)


@dataclass(frozen=True)
class Facts:
    """A variant's numbers; None where one cannot be told."""

    name: str
    memory_bytes: int | None  # of the weights in the compiled model
    bits: float | None  # of a weight of the linear layers, with its share of the scales
    perplexity: float | None
    bits_per_byte: float | None  # of the text


def facts_of(
    variant: Variant, checkpoint: Checkpoint, tokens: Tokens, executable: tp.Executable, folder: Path
) -> Facts:
    """The facts, from ``folder`` where they are kept there; else measured, which takes a while, and kept.

    Args:
        variant: Its name and its data type count.
        checkpoint: Its weights.
        tokens: The text. Windows are as long as the context, or the text where that is shorter; the stride is half.
        executable: The compiled cached model.
        folder: Is made where it is not there. What cannot be kept is measured again the next time.

    Raises:
        CheckpointError: the weights cannot be loaded.
        tp.TripyException: nvtripy cannot compile the model.
    """
    path = folder / f"{_key(variant, checkpoint, tokens)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Facts(**{**json.loads(path.read_text()), "name": variant.name})
    from engine import config_of, load_model

    context = checkpoint.config.n_positions
    gpt = load_model(checkpoint, config_of(checkpoint, variant.dtype))
    weights = compiled_weight_bytes(executable, checkpoint.config)
    try:
        nats = nats_of(gpt, tokens.ids, context, max(1, context // 2), f"perplexity of {variant.name}")
    except LogitsError:  # whoever asks the model is told
        return Facts(variant.name, weights.total, weights.bits, perplexity=None, bits_per_byte=None)
    measured = perplexity(nats)
    facts = Facts(
        name=variant.name,
        memory_bytes=weights.total,
        bits=weights.bits,
        perplexity=measured if math.isfinite(measured) else None,
        bits_per_byte=bits_per_byte(nats, tokens.predicted) if math.isfinite(measured) else None,
    )
    with contextlib.suppress(OSError, UsageError):
        _keep(facts, path)
    return facts


def _key(variant: Variant, checkpoint: Checkpoint, tokens: Tokens) -> str:
    """Identifies everything that the facts depend on."""
    parts = [checkpoint.fingerprint(), variant.dtype, hashlib.sha256(tokens.ids.tobytes()).hexdigest()]
    parts += [hashlib.sha256(source.read_bytes()).hexdigest() for source in SOURCES]
    for package in ("nvtripy", "nvtripy-portable"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(metadata.version(package))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _keep(facts: Facts, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(asdict(facts)))
