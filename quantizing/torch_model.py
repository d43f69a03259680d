"""A checkpoint as transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loading.disk import read_json
from quantizing.network import NETWORKS
from quantizing.quiet import no_progress_bars, quiet
from quantizing.settings import QuantizationError


def load_torch_model(folder: Path) -> Any:
    """transformers' model of a checkpoint folder, in float32, ready to be quantized.

    Raises:
        QuantizationError: transformers does not load it, or not all of it.
    """
    import torch
    import transformers

    # Attention in plain operations: what is observed then does not depend on which fused kernel a processor has.
    network = NETWORKS[_model_type(folder)]
    try:
        with quiet(), no_progress_bars():
            model, found = getattr(transformers, network.architecture).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QuantizationError(f"transformers cannot open {folder}: {reason}") from None
    if found["missing_keys"]:  # it would make them up
        raise QuantizationError(f"expected {sorted(found['missing_keys'])[0]} in {folder} but it is not there")
    model.config.architectures = [network.architecture]  # the exporter reads it, and old checkpoints lack it
    model.generation_config = transformers.GenerationConfig()  # the exporter refuses some that others wrote
    return model.eval()


def _model_type(folder: Path) -> str:
    """Of a folder that `Checkpoint` has read; old ones have none, and are GPT-2's."""
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_type = raw.get("model_type", "gpt2")
    if not raw or "attention_head_type" in raw:
        raise QuantizationError(
            f"expected a folder that transformers can open, of {', '.join(NETWORKS)}, to quantize but got {folder}"
        )
    return str(model_type)
