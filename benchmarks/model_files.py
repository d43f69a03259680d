"""The models that are measured: one set of weights for each shape, and each peer's own file of them.

Everything is made once, from a seed, and kept in the cache folder. A model is named by its shape, or by the path of a
GGUF file, which is measured as it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import llama_files
import numpy as np
import random_weights
from random_weights import Shape
from rounded_checkpoint import rounded_config

import machine
from loading import modelopt_layout
from loading.families import gpt2
from loading.table import parameters as parameters_of
from weight_loader import Checkpoint, CheckpointConfig, open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "checkpoints" / "shakespeare"
WIDTHS = ("fp16", "int8", "int4")
VERSION = 2  # of what is kept: raised when the same name has to mean other contents

#: The shapes of gpt2 and gpt2-medium, and of the first with one key-value head; None is the checkpoint in the
#: repository. The tiny ones are for the tests.
SHAPES: dict[str, Shape | None] = {
    "124m": Shape(12, 12, 768),
    "355m": Shape(24, 16, 1024),
    "embedded": None,
    "multi-query": Shape(12, 12, 768, multi_query=True),
    "tiny": Shape(2, 2, 128, vocab_size=1000, n_positions=128),
    "tiny-multi-query": Shape(2, 2, 128, vocab_size=1000, n_positions=128, multi_query=True),
}


def is_gguf(shape: str) -> bool:
    """Whether a model is a GGUF file."""
    return shape.endswith(".gguf")


def kind(shape: str) -> str:
    """What peers have to be able to run: "gpt2", "gpt_bigcode" or "gguf"."""
    if is_gguf(shape):
        return "gguf"
    sizes = SHAPES[shape]
    return "gpt2" if sizes is None else sizes.model_type


def title(shape: str) -> str:
    """A model's name in the report."""
    names = {"gpt2": f"GPT-2 {shape}", "gpt_bigcode": f"GPTBigCode {shape}", "gguf": Path(shape).name}
    return names[kind(shape)]


def cache_folder() -> Path:
    """Where checkpoints are kept unless the command line says otherwise."""
    return machine.cache_folder() / "benchmarks"


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` under another name first, so that an interrupted run leaves nothing half-written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            make(scratch / path.name)
            os.replace(scratch / path.name, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def float_checkpoint(shape: str, cache: Path) -> Path:
    """A folder in HuggingFace's format with float32 weights, as the hub's GPT-2s have; or the GGUF file."""
    if is_gguf(shape):
        return Path(shape)
    sizes = SHAPES[shape]
    if sizes is None:
        return EMBEDDED
    return made_once(cache / f"{shape}-v{VERSION}" / "float", lambda folder: random_weights.write_random(folder, sizes))


def quantized_checkpoint(shape: str, width: str, cache: Path) -> Path:
    """A folder in ModelOpt's layout; head and embedding are quantized too, as by ``--quant-lm-head``.

    For int4 it has input scales, as AWQ does, so that a run does the same work as with calibrated ones.
    """
    source = float_checkpoint(shape, cache)
    path = cache / f"{shape}-v{VERSION}" / width
    return made_once(path, lambda folder: random_weights.write_quantized(folder, source, width))


def checkpoint_folder(shape: str, width: str, cache: Path) -> Path:
    """What this project opens for a shape and a width: a folder; or the GGUF file, which is rounded as it is loaded."""
    if width == "fp16" or is_gguf(shape):
        return float_checkpoint(shape, cache)
    return quantized_checkpoint(shape, width, cache)


def bytes_per_token(config: CheckpointConfig, width: str, has_input_scales: bool = True) -> int:
    """Bytes of weights that one decoding step reads: every layer and the head once, with scales and biases.

    Of the embeddings it reads a row each. What it reads of the key-value cache is not counted.

    Args:
        config: Of the float checkpoint.
        has_input_scales: Whether int4 has a scale for each input, as random weights have.
    """
    config = replace(rounded_config(config, width), pre_quant_scale=has_input_scales)
    sizes = {"I8": 1, "U8": 1}
    total = 0
    layout = gpt2.LAYOUT
    for name, spec in modelopt_layout.stored_tensors(config, parameters_of(config, layout), layout, {}).items():
        if name == "wpe.weight" or (name == "wte.weight" and not config.tie_word_embeddings):
            continue
        is_norm = ".ln_" in name or name.startswith("ln_f.")  # always float32
        total += int(np.prod(spec.shape)) * (4 if is_norm else sizes.get(spec.dtypes[0], 2))
    return total


def parameters(folder: Path) -> tuple[CheckpointConfig, Iterator[tuple[str, np.ndarray]]]:
    """The configuration of a float checkpoint and its float32 parameters, linear weights (out, in)."""
    checkpoint: Checkpoint = open_checkpoint(folder)
    return checkpoint.config, checkpoint.parameters("float32")


# ---- the peers' files ------------------------------------------------------------------------------------------------


def gguf_file(shape: str, width: str, cache: Path) -> Path:
    """llama.cpp's file: F16, Q8_0 or Q4_0, the head and the embedding too ("pure"); or the GGUF file that is there."""
    source = float_checkpoint(shape, cache)
    if is_gguf(shape):
        return source
    path = cache / f"{shape}-v{VERSION}" / f"{llama_files.TYPES[width]}.gguf"
    return made_once(path, lambda file: llama_files.write(file, source, width))


def ctranslate2_folder(shape: str, cache: Path) -> Path:
    """CTranslate2's model in float32, by its own converter. It quantizes when it loads, by the compute type."""
    source = float_checkpoint(shape, cache)

    def convert(folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter
        from transformers.utils import logging

        logging.disable_progress_bar()
        TransformersConverter(str(source)).convert(str(folder))

    return made_once(cache / f"{shape}-v{VERSION}" / "ctranslate2", convert)


def openvino_file(shape: str, width: str, cache: Path) -> Path:
    """OpenVINO's model; its weights lie beside it."""
    source = float_checkpoint(shape, cache)

    def build(folder: Path) -> None:
        import openvino
        import openvino_gpt2

        folder.mkdir()
        model = openvino_gpt2.build(*parameters(source), width)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    return made_once(cache / f"{shape}-v{VERSION}" / f"openvino-{width}", build) / "model.xml"


def model_file(peer: str, shape: str, width: str, cache: Path) -> Path:
    """The file or the folder that an engine loads; written first, if it is not there yet."""
    if peer == "ours":
        return checkpoint_folder(shape, width, cache)
    if peer == "llama.cpp":
        return gguf_file(shape, width, cache)
    if peer == "ctranslate2":
        return ctranslate2_folder(shape, cache)
    if peer == "openvino":
        return openvino_file(shape, width, cache)
    return float_checkpoint(shape, cache)
