"""Adapters in PEFT's format, made without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_lora(folder: Path, modules: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Path:
    """A random adapter.

    Args:
        modules: Names of linear layers, without the model's prefix, and their (in_features, out_features).
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (inputs, outputs) in modules.items():
        prefix = f"base_model.model.transformer.{name}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, inputs)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((outputs, rank)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [*modules], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
