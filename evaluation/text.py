"""The text that models are evaluated on, and what it is to each tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import quantizing.text
from command_line import EMBEDDED_CHECKPOINT, UsageError
from evaluation.variants import Variant
from quantization import MODES, QuantizationConfig, QuantizationError
from weight_loader import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_TEXT = EMBEDDED_CHECKPOINT / "held-out.txt"  # that the embedded checkpoint was not trained on


def read_text(data: str | None, max_tokens: int) -> tuple[str, str]:
    """The text to evaluate on, and its name.

    Args:
        data: A UTF-8 file, or a data set at the hub; None: the embedded checkpoint's held-out text.
        max_tokens: So many are wanted, 0 for all: no more documents of a data set are loaded than that takes.

    Raises:
        UsageError: there is none, or it is not text.
    """
    # Of a data set as many documents as are sure to do; what is too much is cut off as tokens.
    documents = max(32, max_tokens // 64) if max_tokens else 1 << 16
    source = QuantizationConfig(
        mode=MODES[0], calib_data=str(HELD_OUT_TEXT) if data is None else data, calib_size=documents
    )
    try:
        text, name = quantizing.text.calibration_text(source)
    except QuantizationError as error:
        raise UsageError(str(error).replace(" to calibrate on", "")) from None
    return text, HELD_OUT_TEXT.relative_to(ROOT).as_posix() if data is None else name


@dataclass(frozen=True)
class Tokens:
    """A text as one tokenizer sees it."""

    ids: np.ndarray  # (tokens,) int32
    predicted: bytes  # of all tokens but the first, which nothing predicts


def encode(text: str, name: str, max_tokens: int, variants: Sequence[tuple[Variant, Checkpoint]]) -> dict[Path, Tokens]:
    """The text as tokens, for each checkpoint's folder. All cover the same text: that of the first one's tokens.

    Raises:
        UsageError: there are not two tokens.
        CheckpointError: a tokenizer cannot be used, or lacks a character of the text.
    """
    from tokenizer import load_tokenizer

    (_, first), *_ = variants
    tokenizer = load_tokenizer(first.tokenizer_source, first.config.vocab_size)
    ids = again = tokenizer.encode(text)
    if 0 < max_tokens < len(ids):
        ids = ids[:max_tokens]
        # A token may end within a character, whose beginning is left out of the text; and a word that is cut off may
        # have other tokens: ``again`` is what the same tokenizer makes of what the others are given.
        text = tokenizer.decode(ids[len(tokenizer.prefix) :], "ignore")
        again = tokenizer.encode(text)
    found: dict[Path, Tokens] = {}
    for variant, checkpoint in variants:
        if checkpoint.path in found:
            continue
        tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
        own = tokenizer.encode(text)
        own = ids if own == again else own
        if len(own) < 2:
            raise UsageError(f"expected a text of at least 2 tokens but {name} has {len(own)} for {variant.name}")
        found[checkpoint.path] = Tokens(np.array(own, dtype=np.int32), tokenizer.decode_bytes(own[1:]))
    return found
