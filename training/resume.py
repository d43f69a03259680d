"""Whether what a ckpt.pt holds can be gone on with: everything is looked at before any of it is used.

`state.load_state` reads the file, `check_values` looks at its plain values, `check_weights` and `check_training`
compare its tensors with a model and an optimizer that are built by then. What is wrong is one line.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config

from command_line import UsageError
from training.config import TrainConfig

UINT32, UINT64 = 1 << 32, 1 << 64
FIXED = ("init_from", "seed", "n_layer", "n_head", "n_embd", "block_size", "bias", "qat")  # that a resume compares
FIXED_LORA = ("lora_rank", "lora_alpha", "lora_targets")  # as well; files of older programs have none of them


class _Damage(Exception):
    """What is wrong, in a few words."""


@contextlib.contextmanager
def _told_of(path: object) -> Iterator[None]:
    """Makes a line of what is wrong with the file."""
    try:
        yield
    except _Damage as damage:
        raise UsageError(f"cannot resume: {path} is damaged ({damage})") from None


def check_values(state: Mapping[str, Any], path: object) -> None:
    """Looks at everything but the numbers in tensors.

    Raises:
        UsageError: something has another type or shape than `train.Run.state` gives it, or cannot be.
    """
    with _told_of(path):
        _expect(_is_count(state["step"]), "step")
        _expect(_is_number(state["best"], finite=False), "best")
        config = state["config"]
        _expect(isinstance(config, dict), "config")
        for name in FIXED:
            _expect(type(config.get(name)) is type(getattr(TrainConfig, name)), f"config.{name}")
        for name in FIXED_LORA:
            _expect(type(began_with(state, name)) is type(getattr(TrainConfig, name)), f"config.{name}")
        _expect(isinstance(state["tokenizer"], str), "tokenizer")
        _expect(isinstance(state["history"], list), "history")
        for entry in state["history"]:
            _expect(isinstance(entry, (list, tuple)) and len(entry) == 5 and _is_count(entry[0]), "history")
            _expect(all(_is_number(value) for value in entry[1:]), "history")
        if began_with(state, "lora_rank"):  # the model is its base's, opened again
            _expect(config["init_from"] not in ("scratch", "resume"), "config.init_from")
        else:
            _check_architecture(state["architecture"], state["model"])
        _check_scaler(state["scaler"])
        batches = state["batches"]
        _expect(isinstance(batches, dict) and {"rng", "epoch_began"} <= batches.keys(), "batches")
        _check_generator(batches["rng"])
        if batches["epoch_began"] is not None:
            _check_generator(batches["epoch_began"])
        _expect(isinstance(state["random"], list), "random")
        for states in state["random"]:
            _expect(isinstance(states, dict) and "cpu" in states, "random")
            for value in states.values():
                _expect(_is_plain_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1, "random")


def began_with(state: Mapping[str, Any], name: str) -> Any:
    """A setting that the run began with."""
    return state["config"].get(name, getattr(TrainConfig, name))


def trained_tensors(module: nn.Module, config: TrainConfig) -> dict[str, torch.Tensor]:
    """What a resume needs of a model, or of the moving average of one: all of it, or an adapter's matrices alone."""
    state = module.state_dict()
    return {k: v for k, v in state.items() if ".lora_" in k or k == "n_averaged"} if config.lora_rank else state


def check_weights(state: Mapping[str, Any], expected: Mapping[str, torch.Tensor], path: object) -> None:
    """Compares the weights with those of a model, and looks for infinities.

    Raises:
        UsageError: one is missing or too many, has another type or shape, or does not hold finite numbers.
    """
    with _told_of(path):
        _check_like(state["model"], expected, "model")


def check_training(
    state: Mapping[str, Any],
    averaged: Mapping[str, torch.Tensor] | None,
    optimizer: torch.optim.Optimizer,
    path: object,
) -> None:
    """The same of the moving average's weights, where there are some to go on with, and of AdamW's moments.

    Raises:
        UsageError: as `check_weights`.
    """
    with _told_of(path):
        if averaged is not None and state["averaged"] is not None:
            _check_like(state["averaged"], averaged, "averaged")
            _expect(int(state["averaged"]["n_averaged"]) >= 0, "averaged.n_averaged")
        _check_optimizer(state["optimizer"], optimizer)


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise _Damage(what)


def _is_count(value: Any, below: int = 1 << 63) -> bool:
    return type(value) is int and 0 <= value < below


def _is_number(value: Any, finite: bool = True) -> bool:
    if type(value) not in (int, float) or math.isnan(value):
        return False
    return not finite or math.isfinite(value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_architecture(architecture: Any, model: Any) -> None:
    """The numbers from which a model is built, which have to be those of the tensors that it is to hold."""
    _expect(isinstance(architecture, dict) and all(isinstance(key, str) for key in architecture), "architecture")
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        _expect(_is_count(architecture.get(name)) and architecture[name] > 0, f"architecture.{name}")
    usual = GPT2Config().to_dict()
    for name, value in architecture.items():
        _expect(_is_json(value), f"architecture.{name}")
        default = usual.get(name)
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        _expect(default is None or fits or name.endswith("_token_id"), f"architecture.{name}")
        is_token = value is None or (type(value) is int and abs(value) < 1 << 63)
        _expect(not name.endswith("_token_id") or is_token, f"architecture.{name}")
    _expect(architecture.get("model_type") == "gpt2", "architecture.model_type")
    _expect(isinstance(model, dict) and all(isinstance(key, str) for key in model), "model")
    layers = {name.split(".")[2] for name in model if name.startswith("transformer.h.")}
    _expect(architecture["n_layer"] == len(layers), "architecture.n_layer")
    for name, rows in (("wte", "vocab_size"), ("wpe", "n_positions")):
        weight = model.get(f"transformer.{name}.weight")
        _expect(_is_plain_tensor(weight), f"model.transformer.{name}.weight")
        _expect(weight.shape == (architecture[rows], architecture["n_embd"]), f"architecture.{rows}")
    inner, bias = architecture.get("n_inner"), model.get("transformer.h.0.mlp.c_fc.bias")
    _expect(_is_plain_tensor(bias), "model.transformer.h.0.mlp.c_fc.bias")
    size = 4 * architecture["n_embd"] if inner is None else inner
    _expect(_is_count(size) and bias.shape == (size,), "architecture.n_inner")


def _check_scaler(scaler: Any) -> None:
    _expect(isinstance(scaler, dict), "scaler")
    if scaler:
        for name in ("scale", "growth_factor", "backoff_factor"):
            _expect(_is_number(scaler.get(name)) and scaler[name] > 0, f"scaler.{name}")
        for name in ("growth_interval", "_growth_tracker"):
            _expect(_is_count(scaler.get(name), UINT32), f"scaler.{name}")


def _check_generator(state: Any) -> None:
    """The state of a Philox generator of NumPy's, which believes what it is given."""
    what = "batches"
    _expect(isinstance(state, dict) and state.get("bit_generator") == "Philox", what)
    inner = state.get("state")
    _expect(isinstance(inner, dict), what)
    for values, length in ((inner.get("counter"), 4), (inner.get("key"), 2), (state.get("buffer"), 4)):
        _expect(isinstance(values, list) and len(values) == length and all(_is_count(v, UINT64) for v in values), what)
    _expect(inner.keys() == {"counter", "key"}, what)
    for name, below in (("buffer_pos", 5), ("has_uint32", 2), ("uinteger", UINT32)):
        _expect(_is_count(state.get(name), below), what)


def _check_like(found: Any, expected: Mapping[str, torch.Tensor], what: str) -> None:
    _expect(isinstance(found, dict), what)
    odd = sorted(map(str, found.keys() ^ expected.keys()))
    _expect(not odd, f"{what}.{odd[0] if odd else ''}")
    for name, tensor in expected.items():
        _check_tensor(found[name], tensor.shape, tensor.dtype, f"{what}.{name}")


def _check_tensor(value: Any, shape: Iterable[int], dtype: torch.dtype, what: str) -> None:
    _expect(_is_plain_tensor(value) and value.shape == torch.Size(shape) and value.dtype == dtype, what)
    _expect(bool(value.isfinite().all()), f"{what} holds infinities or NaNs")


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """What AdamW has of each parameter. The settings of its groups are not read: the run's own count."""
    what = "optimizer"
    _expect(isinstance(found, dict) and isinstance(found.get("state"), dict), what)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups, own = found.get("param_groups"), optimizer.state_dict()["param_groups"]
    _expect(isinstance(groups, list) and len(groups) == len(own), f"{what}.param_groups")
    for group, expected in zip(groups, own, strict=True):
        numbers = group.get("params") if isinstance(group, dict) else None
        _expect(isinstance(numbers, list) and all(map(_is_count, numbers)), f"{what}.param_groups")
        _expect(numbers == expected["params"], f"{what}.param_groups")
    _expect(found["state"].keys() == set(range(len(parameters))), f"{what}.state")
    for number, parameter in enumerate(parameters):
        moments = found["state"][number]
        name = f"{what}.state.{number}"
        _expect(isinstance(moments, dict) and moments.keys() == {"step", "exp_avg", "exp_avg_sq"}, name)
        _check_tensor(moments["step"], (), torch.float32, f"{name}.step")
        _expect(float(moments["step"]) >= 1, f"{name}.step")
        for moment in ("exp_avg", "exp_avg_sq"):
            _check_tensor(moments[moment], parameter.shape, parameter.dtype, f"{name}.{moment}")
        _expect(bool((moments["exp_avg_sq"] >= 0).all()), f"{name}.exp_avg_sq is negative")
