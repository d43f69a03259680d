"""The models that are measured: one set of weights for each shape, and each peer's own file of them.

Random weights are as good as trained ones for speed, and need no download. Everything is made once, from a seed, and
kept in the cache folder. Quantizing is rounding to nearest: what a weight is rounded to has no influence on speed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import modelopt_layout
from weight_loader import Checkpoint, CheckpointConfig, open_checkpoint, parameter_shapes

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "checkpoints" / "shakespeare"
WIDTHS = ("fp16", "int8", "int4")
VERSION = 1  # of what is kept: raised when the same name has to mean other contents
SEED = 2019

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A GPT-2's sizes, in HuggingFace's names."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50257
    n_positions: int = 1024


#: The shapes of gpt2 and gpt2-medium; None is the checkpoint in the repository. "tiny" is for the tests.
SHAPES: dict[str, Shape | None] = {
    "124m": Shape(12, 12, 768),
    "355m": Shape(24, 16, 1024),
    "embedded": None,
    "tiny": Shape(2, 2, 128, vocab_size=1000, n_positions=128),
}

_MODES = {"int8": "int8-weight-only", "int4": "int4-weight-only"}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "int8": {"quant_algo": "W8A16"},
    "int4": {
        "quant_algo": "W4A16_AWQ",
        "group_size": modelopt_layout.BLOCK,
        "has_zero_point": False,
        "pre_quant_scale": True,
    },
}
_LARGEST = {"int8": 127, "int4": 7}


def cache_folder() -> Path:
    """Where checkpoints are kept unless the command line says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt-tripy" / "benchmarks"


def _made_once(path: Path, make: Callable[[Path], None]) -> Path:
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
    """A folder in HuggingFace's format with float32 weights, as the hub's GPT-2s have."""
    sizes = SHAPES[shape]
    if sizes is None:
        return EMBEDDED
    return _made_once(cache / f"{shape}-v{VERSION}" / "float", lambda folder: _write_random(folder, sizes))


def _write_random(folder: Path, sizes: Shape) -> None:
    """GPT-2's initialization (Radford et al. 2019), but biases are random too, so that a lost one is noticed."""
    folder.mkdir()
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": sizes.vocab_size,
        "n_positions": sizes.n_positions,
        "n_embd": sizes.n_embd,
        "n_layer": sizes.n_layer,
        "n_head": sizes.n_head,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": sizes.vocab_size - 1,
        "eos_token_id": sizes.vocab_size - 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.Generator(np.random.Philox(SEED))
    tensors: Arrays = {}
    for name, wanted in _shapes(sizes).items():
        if name.endswith(".weight") and (".ln_" in name or name.startswith("ln_f")):
            values = np.ones(wanted, np.float32)
        else:
            deviation = 0.02 / np.sqrt(2 * sizes.n_layer) if name.endswith("c_proj.weight") else 0.02
            values = random.standard_normal(wanted, np.float32) * np.float32(deviation)
        if name.startswith("h.") and values.ndim == 2:  # HuggingFace keeps these as (in, out)
            values = np.ascontiguousarray(values.T)
        tensors[f"transformer.{name}"] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, sizes.vocab_size)


def _shapes(sizes: Shape) -> dict[str, tuple[int, ...]]:
    config = CheckpointConfig(
        vocab_size=sizes.vocab_size,
        n_positions=sizes.n_positions,
        n_layer=sizes.n_layer,
        n_head=sizes.n_head,
        n_embd=sizes.n_embd,
        n_inner=4 * sizes.n_embd,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        eos_token_ids=(),
    )
    return parameter_shapes(config)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Token number n is the word "n". Nothing is tokenized, but CTranslate2's converter wants to see the tokens."""
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {str(n): n for n in range(vocabulary)}, "unk_token": "0"},
    }
    last = str(vocabulary - 1)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0", "bos_token": last, "eos_token": last}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def rounded(weight: np.ndarray, width: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight as integers and scales, symmetric, to nearest.

    Args:
        weight: (out, in).
        block: Input features that share a scale; ``in`` for one scale a row.

    Returns:
        int8 numbers (out, in), in -127..127 or -7..7, and float16 scales (out, in / block).
    """
    blocks = weight.astype(np.float32).reshape(len(weight), -1, block)
    scales = (np.abs(blocks).max(axis=2) / _LARGEST[width]).astype(np.float16)
    divisors = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
    numbers = np.clip(np.rint(blocks / divisors[:, :, None]), -_LARGEST[width], _LARGEST[width])
    return numbers.astype(np.int8).reshape(weight.shape), scales


def quantized_checkpoint(shape: str, width: str, cache: Path) -> Path:
    """A folder in ModelOpt's layout; head and embedding are quantized too, as by ``--quant-lm-head``.

    For int4 it has input scales, as AWQ does, so that a run does the same work as with calibrated ones.
    """
    source = float_checkpoint(shape, cache)
    path = cache / f"{shape}-v{VERSION}" / width
    return _made_once(path, lambda folder: _write_quantized(folder, source, width))


def _write_quantized(folder: Path, source: Path, width: str) -> None:
    folder.mkdir()
    checkpoint = open_checkpoint(source)
    config = replace(checkpoint.config, quant_mode=_MODES[width], quant_lm_head=True, quant_embedding=True)
    random = np.random.Generator(np.random.Philox(SEED + 1))
    tensors: Arrays = {}
    for name, weight in checkpoint.parameters("float32"):
        if not modelopt_layout.is_quantized(config, name):
            tensors[f"transformer.{name}"] = weight.astype(np.float16)
            continue
        layer = f"transformer.{name.removesuffix('.weight')}"
        if width == "int4" and name != "wte.weight":
            input_scale = np.exp(random.normal(0, 0.1, weight.shape[1])).astype(np.float16)
            tensors[f"{layer}.pre_quant_scale"] = input_scale
            weight = weight / input_scale.astype(np.float32)
        block = modelopt_layout.BLOCK if width == "int4" else weight.shape[1]
        if width == "int4" and len(weight) % 2:  # rows are packed in pairs
            weight = np.vstack([weight, np.zeros_like(weight[:1])])
        numbers, scales = rounded(weight, width, block)
        if width == "int4":
            low, high = numbers[0::2].view(np.uint8), numbers[1::2].view(np.uint8)
            tensors[f"{layer}.weight"] = (low & 0xF) | (high << 4)
            tensors[f"{layer}.weight_scale"] = scales
        else:
            tensors[f"{layer}.weight"] = numbers
            tensors[f"{layer}.weight_scale"] = scales[:, 0]
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    quantization = {**_ALGORITHMS[width], "kv_cache_quant_algo": None}
    description = json.dumps({"producer": {"name": "benchmarks"}, "quantization": quantization}, indent=2)
    (folder / modelopt_layout.DESCRIPTION_FILE).write_text(description)
    for file in source.iterdir():
        if file.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(file, folder / file.name)


def checkpoint_folder(shape: str, width: str, cache: Path) -> Path:
    """The folder that this project opens for a shape and a width."""
    return float_checkpoint(shape, cache) if width == "fp16" else quantized_checkpoint(shape, width, cache)


def bytes_per_token(config: CheckpointConfig, width: str) -> int:
    """Bytes of weights that one decoding step reads: every layer and the head once, with scales and biases.

    Of the two embeddings it reads one row each. What it reads of the key-value cache is not counted.
    """
    mode = _MODES.get(width)
    quantized = replace(config, quant_mode=mode, quant_lm_head=mode is not None, quant_embedding=mode is not None)
    sizes = {"I8": 1, "U8": 1}
    total = 0
    for name, spec in modelopt_layout.stored_tensors(quantized, parameter_shapes(quantized)).items():
        if name == "wpe.weight":
            continue
        is_norm = ".ln_" in name or name.startswith("ln_f.")  # always float32
        total += int(np.prod(spec.shape)) * (4 if is_norm else sizes.get(spec.dtypes[0], 2))
    return total


def parameters(folder: Path) -> tuple[CheckpointConfig, Iterator[tuple[str, np.ndarray]]]:
    """The configuration of a float checkpoint and its float32 parameters, linear weights (out, in)."""
    checkpoint: Checkpoint = open_checkpoint(folder)
    return checkpoint.config, checkpoint.parameters("float32")


# ---- the peers' files ------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
}
GGUF_TYPES = {"fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def gguf_file(shape: str, width: str, cache: Path) -> Path:
    """llama.cpp's file: F16, Q8_0 or Q4_0, the head and the embedding too ("pure"); norms, biases, positions F32."""
    source = float_checkpoint(shape, cache)
    path = cache / f"{shape}-v{VERSION}" / f"{GGUF_TYPES[width]}.gguf"
    return _made_once(path, lambda file: _write_gguf(file, source, width))


def _write_gguf(path: Path, source: Path, width: str) -> None:
    import gguf

    config, tensors = parameters(source)
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[width]]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + GGUF_TYPES[width]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")  # token ids in, token ids out
    writer.add_vocab_size(config.vocab_size)
    for name, array in tensors:
        name = _gguf_name(name)
        if array.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name.startswith("h."):
        _, layer, rest = name.split(".", 2)
        module, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_GGUF_NAMES[module]}.{kind}"


def ctranslate2_folder(shape: str, cache: Path) -> Path:
    """CTranslate2's model in float32, by its own converter. It quantizes when it loads, by the compute type."""
    source = float_checkpoint(shape, cache)

    def convert(folder: Path) -> None:
        from ctranslate2.converters import TransformersConverter
        from transformers.utils import logging

        logging.disable_progress_bar()
        TransformersConverter(str(source)).convert(str(folder))

    return _made_once(cache / f"{shape}-v{VERSION}" / "ctranslate2", convert)


def openvino_file(shape: str, width: str, cache: Path) -> Path:
    """OpenVINO's model; its weights lie beside it."""
    source = float_checkpoint(shape, cache)

    def build(folder: Path) -> None:
        import openvino
        import openvino_gpt2

        folder.mkdir()
        model = openvino_gpt2.build(*parameters(source), width)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    return _made_once(cache / f"{shape}-v{VERSION}" / f"openvino-{width}", build) / "model.xml"


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
