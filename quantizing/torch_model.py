"""A checkpoint as transformers' own model: opened by transformers, or built here of what it does not open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loading import numbers
from loading.checkpoint import Checkpoint
from loading.disk import read_json
from loading.families import tensorrt_llm
from loading.table import Parameter, parameters
from quantizing.counterpart import Counterpart, counterpart_of
from quantizing.network import NETWORKS, Network
from quantizing.quiet import no_progress_bars, quiet
from quantizing.settings import QuantizationError

#: In plain operations: what is observed then does not depend on which fused kernel a processor has.
_ATTENTION = "eager"


def is_of_transformers(path: Path) -> bool:
    """Whether transformers opens what is at a path that `Checkpoint` has read: a folder of one of its classes."""
    file = path / "config.json"
    if not file.is_file():
        return False
    raw = read_json(file)
    return "attention_head_type" not in raw and not tensorrt_llm.is_meant(raw)  # SantaCoder's class is none of its own


def load_torch_model(folder: Path) -> Any:
    """transformers' model of a folder that it opens, in float32, ready to be quantized.

    Raises:
        QuantizationError: transformers does not load it, or not all of it.
    """
    import torch
    import transformers

    # Old folders have no model_type, and are GPT-2's.
    network = NETWORKS[read_json(folder / "config.json").get("model_type", "gpt2")]
    try:
        with quiet(), no_progress_bars():
            model, found = getattr(transformers, network.architecture).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=_ATTENTION,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise QuantizationError(f"transformers cannot open {folder}: {_first_line(error)}") from None
    if found["missing_keys"]:  # it would make them up
        raise QuantizationError(f"expected {sorted(found['missing_keys'])[0]} in {folder} but it is not there")
    return _ready(model, network)


def build_torch_model(checkpoint: Checkpoint) -> Any:
    """transformers' model of any checkpoint that is not quantized, in float32, ready to be quantized.

    Memory: that of the model, and of one parameter.

    Raises:
        QuantizationError: none of its classes computes the same.
        CheckpointError: a number is not finite, as `Checkpoint.parameters`.
    """
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    counterpart = counterpart_of(checkpoint)
    network, layout = NETWORKS[counterpart.model_type], counterpart.layout
    model_class = getattr(transformers, network.architecture)
    try:
        with quiet(), no_init_weights():
            settings = model_class.config_class(**counterpart.settings, attn_implementation=_ATTENTION)
            model = model_class(settings)
            model.tie_weights()
    except Exception as error:  # what its configurations and modules refuse
        raise QuantizationError(
            f"transformers cannot make a {counterpart.model_type} of {checkpoint.path}: {_first_line(error)}"
        ) from None
    waiting = dict(model.named_parameters())
    with torch.no_grad():
        for parameter, array in _values(checkpoint, counterpart):
            prefix = "" if parameter.name == "lm_head.weight" else layout.prefix
            for piece, values in numbers.taken_apart(parameter, array):
                waiting.pop(f"{prefix}{piece.name}").copy_(torch.from_numpy(values))
    assert not waiting, f"{network.architecture} has more parameters: {', '.join(waiting)}"
    return _ready(model, network)


def _values(checkpoint: Checkpoint, counterpart: Counterpart) -> Iterator[tuple[Parameter, np.ndarray]]:
    """The parameters of the counterpart, one at a time, in float32."""
    missing = {each.name: each for each in parameters(counterpart.config, counterpart.layout)}
    for name, array in checkpoint.parameters("float32"):
        parameter = missing.pop(name)
        adds_one = counterpart.adds_one and parameter.is_norm and name.endswith(".weight")
        yield parameter, array + np.float32(1) if adds_one else array
    for parameter in missing.values():  # biases
        yield parameter, np.zeros(parameter.shape, np.float32)


def _ready(model: Any, network: Network) -> Any:
    import transformers

    model.config.architectures = [network.architecture]  # the exporter reads it, and old checkpoints lack it
    model.generation_config = transformers.GenerationConfig()  # the exporter refuses some that others wrote
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
