"""Checkpoints of a few kilobytes, made without torch: for tests of what happens around the model.

Their vocabulary is the 256 bytes, each under its own number, and the token that ends a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CONTEXT = 64
EOS = 256
VOCABULARY = 257


def random_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Every parameter is random: the text depends on the whole prompt, is rarely UTF-8, and does not end by itself."""
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(size=shape) for name, shape in _shapes(32).items()}
    tensors["lm_head.weight"][EOS] = 0.0  # the likeliest of the others are far above
    return _write(folder, tensors, n_embd=32)


def reciting_checkpoint(folder: Path, script: Sequence[Iterable[int]]) -> Path:
    """Whatever the prompt, token number ``p`` of prompt and text together is one of ``script[p]``, the likeliest first.

    The positions' embeddings are one-hot and pass the layer unchanged; the last LayerNorm makes 1 and 0 again of what
    it has normalized; and the head holds the logits of what follows each position: 30, 29, 28, …, and 0 for the rest.
    """
    tensors = {name: np.zeros(shape) for name, shape in _shapes(CONTEXT).items()}
    tensors["transformer.wpe.weight"] = np.eye(CONTEXT)
    for position, tokens in enumerate(script[1 : CONTEXT + 1]):
        for place, token in enumerate(tokens):
            tensors["lm_head.weight"][token, position] = 30 - place
    tensors["transformer.ln_f.weight"] += np.sqrt(CONTEXT - 1) / CONTEXT
    tensors["transformer.ln_f.bias"] += 1 / CONTEXT
    return _write(folder, tensors, n_embd=CONTEXT)


def overflowing_checkpoint(folder: Path) -> Path:
    """A random one whose values overflow float16 where the cache stores them; no weight does."""
    random_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.weight"] *= 100
    tensors["transformer.h.0.attn.c_attn.bias"][64:] = 65504
    save_file(tensors, folder / "model.safetensors")
    return folder


def script_of(text: str) -> list[list[int]]:
    """The script that leaves no choice: the bytes of ``text``, then the end."""
    return [[byte] for byte in text.encode()] + [[EOS]]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _shapes(width: int) -> dict[str, tuple[int, ...]]:
    """HuggingFace's names and shapes (linear weights (in, out)) of one layer, with a head of its own."""
    block = "transformer.h.0"
    return {
        "transformer.wte.weight": (VOCABULARY, width),
        "transformer.wpe.weight": (CONTEXT, width),
        f"{block}.ln_1.weight": (width,),
        f"{block}.ln_1.bias": (width,),
        f"{block}.attn.c_attn.weight": (width, 3 * width),
        f"{block}.attn.c_attn.bias": (3 * width,),
        f"{block}.attn.c_proj.weight": (width, width),
        f"{block}.attn.c_proj.bias": (width,),
        f"{block}.ln_2.weight": (width,),
        f"{block}.ln_2.bias": (width,),
        f"{block}.mlp.c_fc.weight": (width, 4 * width),
        f"{block}.mlp.c_fc.bias": (4 * width,),
        f"{block}.mlp.c_proj.weight": (4 * width, width),
        f"{block}.mlp.c_proj.bias": (width,),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
        "lm_head.weight": (VOCABULARY, width),
    }


def _write(folder: Path, tensors: dict[str, np.ndarray], n_embd: int) -> Path:
    folder.mkdir(parents=True)
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCABULARY,
        "n_positions": CONTEXT,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": n_embd,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    return folder


def byte_vocabulary() -> dict[str, int]:
    """The 256 bytes. GPT-2 writes those that do not print as the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": EOS, "content": "<|endoftext|>", **how}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": byte_vocabulary(), "merges": []},
    }
