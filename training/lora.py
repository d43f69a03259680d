"""LoRA (Hu et al. 2021, arXiv:2106.09685) with peft: a GPT-2 that stays as it is, and an adapter that learns.

    model = lora.add_adapter(base, config, "gpt2")   # transformers' GPT2LMHeadModel → peft's model of it
    ...                                              # train it as any other: nothing but the adapter learns
    lora.save(model, folder)                         # adapter_config.json and adapter_model.safetensors
    lora.load(base, folder)                          # peft's model with what the folder holds

This module imports peft, and train.py this module only where there is an adapter.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import GPT2LMHeadModel

from adapters.lora import CONFIG_FILE
from quantizing.quiet import quiet
from training.config import TrainConfig

_CARD = "README.md"  # peft's form of one, not filled in


def add_adapter(base: GPT2LMHeadModel, config: TrainConfig, name: str) -> peft.PeftModel:
    """A model with an adapter that does nothing yet: B is zero, A is drawn from torch's generator.

    Args:
        base: Is changed in place: its weights are frozen, and its layers are within peft's.
        name: Of the base, for those who read the folder.
    """
    alpha: Any = config.lora_alpha  # peft says a whole number, and takes any
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        r=config.lora_rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets.split(","),
        fan_in_fan_out=True,  # GPT-2's weights are (in, out)
    )
    with quiet():  # peft asks transformers for what it is going to rename
        model = peft.get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = name  # not the path in the hub's cache
    return model


def save(model: peft.PeftModel, folder: Path) -> None:
    """Writes an adapter as PEFT's folder.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    # Embeddings are frozen; "auto" would ask the hub about them.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / _CARD).unlink(missing_ok=True)
    path = folder / CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])  # of a set, in another order each time
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(model: peft.PeftModel, folder: str | Path) -> peft.PeftModel:
    """The model of the same base with the adapter that a folder holds; the given one is spent then."""
    with quiet():
        return peft.PeftModel.from_pretrained(model.unload(), folder).eval()


@torch.no_grad()
def base_digest(model: peft.PeftModel) -> str:
    """A hexadecimal hash of the weights that the adapter is for."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
