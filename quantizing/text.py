"""Calibration text: where it comes from, and its samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import text_file
from command_line import EMBEDDED_CHECKPOINT, UsageError
from loading.checkpoint import Checkpoint
from quantizing.quiet import quiet
from quantizing.settings import CALIB_LENGTH, QuantizationConfig, QuantizationError

CALIBRATION_TEXT = EMBEDDED_CHECKPOINT / "calibration.txt"

# Names that people type → (repository, configuration, column with the text). Of others the column is guessed.
HUB_DATASETS = {"cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "article")}
_TEXT_COLUMNS = ("text", "article", "content", "document", "sentence")


def calibration_text(config: QuantizationConfig) -> tuple[str, str]:
    """The text to calibrate on, and its name for messages.

    Raises:
        QuantizationError: there is none, or it is not text.
    """
    if config.calib_data is None:
        return _read_text(CALIBRATION_TEXT), str(CALIBRATION_TEXT)
    if not is_hub_dataset(config.calib_data):
        return _read_text(Path(config.calib_data).expanduser()), config.calib_data
    return _download_text(config.calib_data, config.calib_size), f"data set {config.calib_data}"


def is_hub_dataset(name: str) -> bool:
    """Whether a --calib-data is the name of a data set: `name` or `organization/name`, and no such file."""
    is_path = name == "" or name[0] in "./~" or name[-1] == "/" or name.count("/") > 1 or "\\" in name
    return not (is_path or os.path.exists(name) or Path(name).suffix.lower() in (".txt", ".md", ".text"))


def _read_text(path: Path) -> str:
    try:
        text = text_file.read_text(path)
    except UsageError as error:
        raise QuantizationError(str(error)) from None
    if not text.strip():
        raise QuantizationError(f"expected text to calibrate on but {path} is empty")
    return text


def _download_text(name: str, documents: int) -> str:
    """The first documents of a data set's training split, with an empty line between them."""
    repository, configuration, column = HUB_DATASETS.get(name, (name, None, None))
    try:
        import datasets
    except ImportError:
        raise QuantizationError(
            f"there is no file {name!r}, and the data set of that name needs: pip install datasets"
        ) from None
    try:
        with quiet():
            split = datasets.load_dataset(repository, configuration, split="train", streaming=True)
            rows = list(split.take(documents))
    except Exception as error:  # no network, no such data set, or whatever its loader raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuantizationError(
            f"there is no file {name!r}, and the data set cannot be loaded from the hub: {reason[:200]}"
        ) from None
    known = [c for c in (column, *_TEXT_COLUMNS) if c is not None and rows and isinstance(rows[0].get(c), str)]
    if not known:
        columns = ", ".join(rows[0]) if rows else "none"
        raise QuantizationError(f"expected a column of text in the data set {name!r} but its columns are: {columns}")
    return "\n\n".join(str(row[known[0]]) for row in rows)


def calibration_samples(checkpoint: Checkpoint, config: QuantizationConfig) -> np.ndarray:
    """Token ids, (samples, tokens) int64: windows of the text at even distances, the first at its start.

    Raises:
        QuantizationError: there is no text, or it is too short for one sample.
        CheckpointError: the checkpoint's tokenizer cannot be used.
    """
    from tokenizer import UnknownCharacterError, load_tokenizer

    context = checkpoint.config.n_positions
    length = min(CALIB_LENGTH, context) if config.calib_length is None else config.calib_length
    if length > context:
        raise QuantizationError(f"expected --calib-length to be at most the context of {context} but got {length}")
    text, source = calibration_text(config)
    try:
        ids = np.array(
            load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size).encode(text), dtype=np.int64
        )
    except UnknownCharacterError as error:
        raise QuantizationError(f"cannot calibrate on {source}: {error}; name a text with --calib-data") from None
    if len(ids) < length:
        raise QuantizationError(
            f"expected at least {length} tokens to calibrate on (one sample) but {source} has {len(ids)}"
        )
    last = len(ids) - length
    size = min(config.calib_size, last + 1)  # more samples would be the same ones again
    starts = sorted({last * sample // max(size - 1, 1) for sample in range(size)})
    return np.stack([ids[start : start + length] for start in starts])
