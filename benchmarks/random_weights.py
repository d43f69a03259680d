"""Random weights: as good as trained ones for speed, and no download. Quantizing them is rounding to nearest: what a
weight is rounded to has no influence on speed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loading import modelopt_layout
from weight_loader import CheckpointConfig, open_checkpoint, parameter_shapes

SEED = 2019
MODES = {"int8": "int8-weight-only", "int4": "int4-weight-only"}

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

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, or of a GPTBigCode whose heads share their keys and values, in HuggingFace's names."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50257
    n_positions: int = 1024
    multi_query: bool = False

    @property
    def model_type(self) -> str:
        return "gpt_bigcode" if self.multi_query else "gpt2"


def write_random(folder: Path, sizes: Shape) -> None:
    """GPT-2's initialization (Radford et al. 2019), but biases are random too, so that a lost one is noticed."""
    folder.mkdir()
    config = {
        "model_type": sizes.model_type,
        "architectures": ["GPTBigCodeForCausalLM" if sizes.multi_query else "GPT2LMHeadModel"],
        "vocab_size": sizes.vocab_size,
        "n_positions": sizes.n_positions,
        "n_embd": sizes.n_embd,
        "n_layer": sizes.n_layer,
        "n_head": sizes.n_head,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": sizes.vocab_size - 1,
        "eos_token_id": sizes.vocab_size - 1,
    }
    if sizes.multi_query:
        config |= {"multi_query": True, "activation_function": "gelu_pytorch_tanh"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.Generator(np.random.Philox(SEED))
    tensors: Arrays = {}
    for name, wanted in _shapes(sizes).items():
        if name.endswith(".weight") and (".ln_" in name or name.startswith("ln_f")):
            values = np.ones(wanted, np.float32)
        else:
            deviation = 0.02 / np.sqrt(2 * sizes.n_layer) if name.endswith("c_proj.weight") else 0.02
            values = random.standard_normal(wanted, np.float32) * np.float32(deviation)
        if not sizes.multi_query and name.startswith("h.") and values.ndim == 2:  # HuggingFace keeps these as (in, out)
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
        n_kv_head=1 if sizes.multi_query else None,
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


def write_quantized(folder: Path, source: Path, width: str) -> None:
    folder.mkdir()
    checkpoint = open_checkpoint(source)
    config = replace(checkpoint.config, quant_mode=MODES[width], quant_lm_head=True, quant_embedding=True)
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
