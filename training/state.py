"""What a training run leaves in its out_dir: a HuggingFace folder of its best weights, and what it needs to go on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel

from command_line import UsageError
from loading.modelopt_layout import DESCRIPTION_FILE
from tokenizing.description import Description, to_json, write_json
from training.folders import written_together

STATE_FILE = "ckpt.pt"
#: What ckpt.pt holds; train.Run.state says what each is.
KEYS = {
    *("step", "best", "config", "architecture", "tokenizer", "history"),
    *("model", "averaged", "optimizer", "scaler", "batches", "random"),
}


@contextlib.contextmanager
def _written_together(folder: Path) -> Iterator[Path]:
    """`written_together`, with what the libraries that write models raise instead of an OSError; weights come last."""
    with written_together(folder, last=".safetensors") as partial:
        try:
            yield partial
        except Exception as error:
            # Of safetensors, tokenizers and torch, each has its own for a disk that is full, and nothing narrower.
            if not isinstance(error, SafetensorError) and "os error" not in str(error):
                raise
            raise OSError(str(error)) from None
        if not (partial / DESCRIPTION_FILE).exists() and (partial / "config.json").exists():
            (folder / DESCRIPTION_FILE).unlink(missing_ok=True)  # of a quantized model that was here before


def save_model(
    model: GPT2LMHeadModel,
    tokenizer: Description | None,
    folder: Path,
    write: Callable[[GPT2LMHeadModel, Path], object] = GPT2LMHeadModel.save_pretrained,
) -> None:
    """Write the HuggingFace folder: config.json, model.safetensors (float32) and the tokenizer.

    Args:
        tokenizer: None: the folder has none, as an adapter's.
        write: what writes the model's own files; with qat.export the folder is a quantized one.

    Raises:
        UsageError: the disk is full, or `folder` cannot be written to; what was there before is still there.
    """
    with _written_together(folder) as partial:
        write(model, partial)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, model.config.n_positions, partial)


def _write_tokenizer(tokenizer: Description, n_positions: int, folder: Path) -> None:
    eos = tokenizer.eos_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": n_positions,
        **({"bos_token": eos, "eos_token": eos, "unk_token": eos} if eos else {}),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(write_json(to_json(tokenizer), indent=2), encoding="utf-8")
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write ckpt.pt: tensors and plain values.

    Raises:
        UsageError: the disk is full, or `folder` cannot be written to; the ckpt.pt before it is still there.
    """
    with _written_together(folder) as partial:
        try:
            with open(partial / STATE_FILE, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's writer, where the file does not take it all
            cause = error.__context__ if isinstance(error.__context__, OSError) else None
            raise OSError(str(error).splitlines()[0] if cause is None else cause.strerror) from None


def load_state(folder: Path) -> dict[str, Any]:
    """Read ckpt.pt, to the CPU's memory. It is not unpickled: a file from someone else cannot run anything.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = KEYS - state.keys()
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(f"cannot resume from {path}: {error.strerror}") from None
    except Exception as error:  # pickle, zip and torch each raise their own
        raise UsageError(f"cannot resume: {path} is damaged ({type(error).__name__})") from None
    if missing:
        raise UsageError(f"cannot resume: {path} lacks {', '.join(sorted(missing))}")
    return state
