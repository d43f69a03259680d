"""nanoGPT's ckpt.pt and meta.pkl, of a model of transformers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from random_models import random_model

LETTERS = sorted("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


def nano_model(has_bias: bool = True, **sizes: int) -> Any:
    """A GPT-2 with nanoGPT's exact GELU; without biases they are zero."""
    model = random_model("gpt2", vocab_size=65, activation_function="gelu", **sizes)
    if not has_bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    return model


def write_ckpt(path: Path, model: Any, has_bias: bool = True, prefix: str = "", changes: Any = None) -> Path:
    """What nanoGPT's train.py saves: linear weights (out, in), the tied head under both names."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {}
    for name, tensor in model.state_dict().items():
        if has_bias or not name.endswith("bias"):
            state[f"{prefix}{name}"] = tensor.T.contiguous() if name.endswith(conv1d) else tensor
    config = model.config
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "dropout": 0.0}
    arguments |= {"block_size": config.n_positions, "bias": has_bias, "vocab_size": config.vocab_size}
    content = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": arguments,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", "learning_rate": 1e-3},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **(changes or {})}, path)
    return path


def write_meta(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {letter: number for number, letter in enumerate(LETTERS)}
    meta = {"vocab_size": 65, "stoi": numbers, "itos": dict(enumerate(LETTERS))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
