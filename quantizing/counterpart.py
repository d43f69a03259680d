"""Which of transformers' models computes what a configuration says: for checkpoints that transformers does not open.

Each class is described by the config.json that would say it. Our own reader of that file then says what the class
computes, and under which names it keeps its parameters: a class is the model's counterpart if nothing differs but how
the same numbers are written. Neither torch nor transformers is needed to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loading.checkpoint import Checkpoint
from loading.config import CheckpointConfig
from loading.errors import CheckpointError, shown
from loading.families import gpt2, gpt_bigcode, llama, nemotron, stablelm, starcoder2
from loading.settings import Settings
from loading.table import Layout
from quantizing.settings import QuantizationError

Values = dict[str, Any]


@dataclass(frozen=True)
class Counterpart:
    """A model of transformers with random weights, as it were.

    Attributes:
        model_type: One of network.py's.
        settings: What its configuration is made of.
        config: What it computes.
        layout: How it names its parameters, those of a checkpoint or, where the checkpoint has none, biases of zero.
        adds_one: Whether its norms' weights are the checkpoint's with 1 added.
    """

    model_type: str
    settings: Values
    config: CheckpointConfig
    layout: Layout
    adds_one: bool


def counterpart_of(checkpoint: Checkpoint) -> Counterpart:
    """transformers' model of a checkpoint that is not quantized.

    Raises:
        QuantizationError: none of its classes computes the same.
    """
    wanted = checkpoint.config
    lacking: dict[str, list[str]] = {}
    for model_type, (settings_of, read) in _CLASSES.items():
        settings = settings_of(wanted)
        try:
            config, layout = read(Settings(model_type, settings))
        except CheckpointError:  # sizes that it cannot have
            continue
        adds_one = wanted.norm == "layer1p" and config.norm == "layer"
        lacking[model_type] = _differences(replace(wanted, norm="layer") if adds_one else wanted, config)
        if not lacking[model_type]:
            return Counterpart(model_type, settings, config, layout, adds_one)
    nearest = min(lacking, key=lambda model_type: len(lacking[model_type]), default=None)
    reason = "" if nearest is None else f", which is {nearest} but for {' and '.join(lacking[nearest])}"
    raise QuantizationError(
        f"expected a model that one of transformers' classes computes ({', '.join(_CLASSES)}) but got "
        f"{checkpoint.path}{reason}"
    )


def _differences(wanted: CheckpointConfig, found: CheckpointConfig) -> list[str]:
    """The settings that a class cannot have, with their values. A bias that is not wanted can be zero."""
    left, right = _brought_to_one_form(wanted), _brought_to_one_form(found)
    zeros = [name for name in ("norm_bias", "attention_bias", "mlp_bias") if right[name] and not left[name]]
    return [f"{name}={shown(value)}" for name, value in left.items() if value != right[name] and name not in zeros]


def _brought_to_one_form(config: CheckpointConfig) -> Values:
    """The settings, those that mean the same with the same values."""
    same = replace(
        config,
        n_kv_head=config.kv_heads,
        head_dim=config.head_size,
        norm_bias=config.norm_bias and config.norm != "rms",
        eos_token_ids=(),
    )
    if same.position_embedding == "learned":
        same = replace(same, rotary_base=1.0, rotary_fraction=1.0, rotary_interpolation=1.0)
    return same.as_dict()


def _gpt2(config: CheckpointConfig) -> Values:
    return {
        **_shared(config),
        "n_positions": config.n_positions,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _gpt_bigcode(config: CheckpointConfig) -> Values:
    settings = {**_gpt2(config), "activation_function": _fused(config.activation_function), "multi_query": True}
    del settings["scale_attn_by_inverse_layer_idx"]  # which the class does not know
    return settings


def _mistral(config: CheckpointConfig) -> Values:
    rope: Values = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rotary_interpolation != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rotary_interpolation}
    return {
        **_shared(config),
        "max_position_embeddings": config.n_positions,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": _fused(config.activation_function),
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_parameters": rope,
        "sliding_window": config.window,
    }


def _llama(config: CheckpointConfig) -> Values:
    settings = {**_mistral(config), "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    del settings["sliding_window"]
    return settings


def _starcoder2(config: CheckpointConfig) -> Values:
    settings = {**_mistral(config), "use_bias": config.attention_bias or config.mlp_bias}
    settings["norm_epsilon"] = settings.pop("rms_norm_eps")
    return settings


def _nemotron(config: CheckpointConfig) -> Values:
    settings = _llama(config)
    settings["norm_eps"] = settings.pop("rms_norm_eps")
    settings["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return settings


def _stablelm(config: CheckpointConfig) -> Values:
    settings = _nemotron(config)
    settings["layer_norm_eps"] = settings.pop("norm_eps")
    for name in ("head_dim", "attention_bias", "mlp_bias"):  # which the class does not know
        del settings[name]
    return settings


def _shared(config: CheckpointConfig) -> Values:
    ends = config.eos_token_ids
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
    }


def _fused(activation: str) -> str:
    """The name of the tanh form of GELU in all classes but GPT-2's: the same formula in one kernel."""
    return "gelu_pytorch_tanh" if activation == "gelu_new" else activation


#: model_type → its settings, and what reads them. The first that fits is taken.
_CLASSES: dict[
    str, tuple[Callable[[CheckpointConfig], Values], Callable[[Settings], tuple[CheckpointConfig, Layout]]]
] = {
    "gpt2": (_gpt2, gpt2.from_huggingface),
    "gpt_bigcode": (_gpt_bigcode, gpt_bigcode.from_huggingface),
    "starcoder2": (_starcoder2, starcoder2.from_huggingface),
    "llama": (_llama, llama.from_huggingface("llama")),
    "mistral": (_mistral, llama.from_huggingface("mistral")),
    "nemotron": (_nemotron, nemotron.from_huggingface),
    "stablelm": (_stablelm, stablelm.from_huggingface),
}
