"""Folders in SantaCoder's original layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def santacoder(model: Any, folder: Path, prefix: str = "transformer.") -> Path:
    """A multi-query GPTBigCode in SantaCoder's original layout."""
    tensors = {}
    width, size = model.config.n_embd, model.config.n_embd // model.config.n_head
    for name, tensor in model.transformer.state_dict().items():
        if name.endswith(("c_attn.weight", "c_attn.bias")):
            q, kv = tensor.split((width, 2 * size))
            stem, _, kind = name.rpartition("c_attn.")
            tensors |= {f"{stem}q_attn.{kind}": q.t().contiguous(), f"{stem}kv_attn.{kind}": kv.t().contiguous()}
        else:
            tensors[name] = tensor.T.contiguous() if name.endswith(("c_proj.weight", "c_fc.weight")) else tensor
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    for layer in range(model.config.n_layer):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {key: getattr(model.config, key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadCustomModel"], "activation_function": "gelu_fast"}
    config |= {"attention_head_type": "multiquery", "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
