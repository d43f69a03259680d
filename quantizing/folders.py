"""From a checkpoint to the folder of the quantized one, all of it or nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loading.checkpoint import Checkpoint
from loading.hub import GENERATION_FILE
from quantizing.calibration import quantize_model
from quantizing.counterpart import counterpart_of
from quantizing.export import export
from quantizing.quiet import quiet
from quantizing.settings import QuantizationConfig, QuantizationError
from quantizing.text import calibration_samples
from quantizing.torch_model import build_torch_model, is_of_transformers, load_torch_model

REQUIREMENTS = "requirements/quant.txt"


def quantize_checkpoint(checkpoint: Checkpoint, config: QuantizationConfig, folder: Path) -> None:
    """Loads a checkpoint, calibrates it, and writes the quantized one to `folder`, all of it or nothing.

    Args:
        folder: Must not exist, or be empty.

    Raises:
        QuantizationError: it cannot be quantized as asked, or `folder` cannot be written; told before any long work
            where that is possible.
        CheckpointError: the checkpoint or its tokenizer cannot be used.
    """
    check_source(checkpoint, config)
    check_target(folder)
    kept = kept_files(checkpoint)
    samples = calibration_samples(checkpoint, config) if config.needs_calibration else None
    _require_modelopt()
    with written_beside(folder) as partial:
        opens = is_of_transformers(checkpoint.path)
        model = load_torch_model(checkpoint.path) if opens else build_torch_model(checkpoint)
        quantize_model(model, config, samples)
        _export_or_say_why(model, partial, config)
        (partial / GENERATION_FILE).unlink(missing_ok=True)  # transformers' idea of it: the checkpoint's own counts
        for name, content in kept.items():
            (partial / name).write_bytes(content)


def check_target(folder: Path) -> None:
    """Refuses to write to a folder that is there, unless it is empty.

    Raises:
        QuantizationError: it is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QuantizationError(f"expected {folder} not to exist but it does")


@contextlib.contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Gives a new folder to write to, which becomes `folder` in the end; nothing is left of it where that fails.

    Raises:
        QuantizationError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise QuantizationError(f"cannot write {folder}: {error.strerror}") from None
    try:
        yield partial
        for path in (partial, *partial.iterdir()):  # mkdtemp and safetensors make them for their owner alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise QuantizationError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def kept_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What a folder made of a checkpoint has as that has it: read before the work, which would be in vain without.

    Raises:
        QuantizationError: a file cannot be read.
        CheckpointError: the tokenizer cannot be used.
    """
    from tokenizing.export import files_of

    contents, path = files_of(checkpoint.tokenizer_source), checkpoint.path / GENERATION_FILE
    try:
        if path.is_file():
            contents[GENERATION_FILE] = path.read_bytes()
        elif not is_of_transformers(checkpoint.path) and checkpoint.config.eos_token_ids:
            ends = {"eos_token_id": checkpoint.config.eos_token_ids}
            contents[GENERATION_FILE] = (json.dumps(ends, indent=2) + "\n").encode()
    except OSError as error:
        raise QuantizationError(f"cannot read {path}: {error.strerror}") from None
    return contents


def _export_or_say_why(model: Any, folder: Path, config: QuantizationConfig) -> None:
    """`export`, whose libraries each have their own exceptions, for a full disk too.

    Raises:
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError

    try:
        export(model, folder, config)
    except (SafetensorError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def check_source(checkpoint: Checkpoint, config: QuantizationConfig) -> None:
    """Refuses what cannot be quantized as asked, from its config alone."""
    if checkpoint.config.quant_mode is not None or checkpoint.config.kv_cache_dtype is not None:
        raise QuantizationError(f"expected a checkpoint that is not quantized yet but {checkpoint.path} is")
    if not is_of_transformers(checkpoint.path):
        counterpart_of(checkpoint)
    if config.mode == "int4-weight-only":
        widths = {
            "h.0.attn.c_attn": checkpoint.config.n_embd,
            "h.0.attn.c_proj": checkpoint.config.query_width,
            "h.0.mlp.c_proj": checkpoint.config.n_inner,
        }
        block = config.block(*widths.values())
        for layer, width in widths.items():
            if width % block and config.group_size is None:
                fitting = math.gcd(block, *widths.values())
                raise QuantizationError(
                    f"expected the int4 block of {block} to divide the {width} input features of {layer}: try "
                    f"--group-size {fitting}"
                )
            if width % block:
                raise QuantizationError(
                    f"expected --group-size to divide the {width} input features of {layer} but got {block}"
                )


def _require_modelopt() -> None:
    try:
        with quiet():  # ModelOpt warns of every transformers that is newer than itself
            for name in ("torch", "transformers", "tqdm", "modelopt.torch.quantization"):
                importlib.import_module(name)
    except ImportError as error:
        raise QuantizationError(
            f"quantizing needs the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
        ) from None
