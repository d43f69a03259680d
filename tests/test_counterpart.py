"""Checkpoints that transformers does not open, as its own model: the same numbers, to the last bit where there is a
folder of the same weights, and the logits of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import santacoder_files
import torch
from nanogpt_files import nano_model, write_ckpt
from nemo_archives import write_nemo
from random_models import logits_of, random_model
from test_model import relative_error, stateless_logits

from engine import config_of, load_model
from loading import numbers
from loading.config import CheckpointConfig
from loading.families import gpt_bigcode, llama, santacoder
from loading.table import parameters
from quantizing.counterpart import counterpart_of
from quantizing.settings import QuantizationError
from quantizing.torch_model import build_torch_model, load_torch_model
from weight_loader import Checkpoint, open_checkpoint

IDX = np.random.default_rng(0).integers(0, 65, (2, 21)).astype(np.int32)


def write_gguf(path: Path, model: Any, **changes: Any) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
    import gguf_files

    return gguf_files.write_gguf(path, model, **changes)


def nemotron() -> Any:
    """LayerNorm with 1 added, squared ReLU, no biases, the whole head rotated."""
    return random_model("nemotron", vocab_size=96, partial_rotary_factor=1.0)


#: What it is → transformers' model, the model_type of what is made of it, and what writes the checkpoint.
CONTAINERS: dict[str, tuple[Callable[[], Any], str, Callable[[Path, Any], Path]]] = {
    "gguf, gpt2": (lambda: random_model("gpt2"), "gpt2", lambda path, model: write_gguf(path / "a.gguf", model)),
    "gguf, starcoder": (
        lambda: random_model("gpt_bigcode", activation_function="gelu_pytorch_tanh"),
        "gpt_bigcode",
        lambda path, model: write_gguf(path / "a.gguf", model),
    ),
    "gguf, starcoder2": (
        lambda: random_model("starcoder2", tie_word_embeddings=False, sliding_window=7),
        "starcoder2",
        lambda path, model: write_gguf(path / "a.gguf", model, **{"starcoder2.attention.sliding_window": 7}),
    ),
    "gguf, llama": (lambda: random_model("llama"), "llama", lambda path, model: write_gguf(path / "a.gguf", model)),
    "gguf, llama with a window": (
        lambda: random_model("mistral", sliding_window=9),
        "mistral",
        lambda path, model: write_gguf(path / "a.gguf", as_llama(model), **{"llama.attention.sliding_window": 9}),
    ),
    "ckpt.pt": (nano_model, "gpt2", lambda path, model: write_ckpt(path / "ckpt.pt", model)),
    "ckpt.pt, no biases": (
        lambda: nano_model(has_bias=False),
        "gpt2",
        lambda path, model: write_ckpt(path / "ckpt.pt", model, has_bias=False),
    ),
    "nemo, gpt2": (
        lambda: random_model("gpt2", vocab_size=96),
        "gpt2",
        lambda path, model: write_nemo(path / "a.nemo", model, is_core=True, ranks=2),
    ),
    "nemo, llama": (
        lambda: random_model("llama", vocab_size=96),
        "llama",
        lambda path, model: write_nemo(path / "a.nemo", model),
    ),
    "nemo, interpolated": (
        lambda: random_model("llama", vocab_size=96, rope_parameters=INTERPOLATED),
        "llama",
        lambda path, model: write_nemo(path / "a.nemo", model, is_core=True, seq_len_interpolation_factor=4),
    ),
    "nemo, layernorm1p": (nemotron, "starcoder2", lambda path, model: write_nemo(path / "a.nemo", model)),
    "nemo, a part of the head": (
        lambda: random_model("nemotron", vocab_size=96),
        "nemotron",
        lambda path, model: write_nemo(path / "a.nemo", model, is_core=True),
    ),
    "nemo, as GPT-2B": (
        lambda: random_model("stablelm", vocab_size=96, partial_rotary_factor=0.5),
        "stablelm",
        lambda path, model: write_nemo(path / "a.nemo", less_one(model), normalization="layernorm1p"),
    ),
    "santacoder": (
        lambda: random_model("gpt_bigcode", activation_function="gelu_pytorch_tanh"),
        "gpt_bigcode",
        lambda path, model: santacoder_files.santacoder(model, path),
    ),
}
INTERPOLATED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def as_llama(model: Any) -> Any:
    """A Mistral as the Llama that has its weights."""
    sizes = {"hidden_size": model.config.hidden_size, "intermediate_size": model.config.intermediate_size}
    other = random_model("llama", **sizes)
    other.load_state_dict(model.state_dict())
    return other


def less_one(model: Any) -> Any:
    """A model from whose norms' weights 1 is taken, which gives the same weights again when it is added."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm.weight" in name:
                parameter.sub_(1)
                dict(model.named_parameters())[name].copy_(parameter + 1)
    return other


@pytest.mark.parametrize("name", CONTAINERS)
def test_it_is_the_model(tmp_path: Path, name: str) -> None:
    make, model_type, write = CONTAINERS[name]
    (tmp_path / "container").mkdir()
    model = make()
    checkpoint = open_checkpoint(write(tmp_path / "container", model))
    built = build_torch_model(checkpoint)
    assert built.config.model_type == model_type
    ours = stateless_logits(load_model(checkpoint, config_of(checkpoint, "float32")), IDX)
    assert relative_error(logits_of(built, IDX), ours) <= 1e-5
    assert relative_error(logits_of(built, IDX), logits_of(model, IDX)) <= 1e-5
    if model.config.model_type != model_type:
        return  # transformers has another class of the same model, which is not one of ours
    model.save_pretrained(tmp_path / "folder")
    wanted = load_torch_model(tmp_path / "folder")
    assert torch.equal(built(torch.from_numpy(IDX)).logits, wanted(torch.from_numpy(IDX)).logits)
    assert built.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(values, wanted.state_dict()[key]) for key, values in built.state_dict().items())
    assert {each.dtype for each in built.parameters()} == {torch.float32}
    assert built.config.tie_word_embeddings == (built.lm_head.weight is built.get_input_embeddings().weight)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = write_ckpt(tmp_path_factory.mktemp("plain") / "ckpt.pt", nano_model())
    return open_checkpoint(path)


ROTARY = {"position_embedding": "rotary"}
ROOT_MEAN_SQUARE = {**ROTARY, "norm": "rms", "gated_mlp": True, "attention_bias": False, "mlp_bias": False}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_kv_head": 2}, "gpt2 but for n_kv_head=2"),
        ({"norm": "rms"}, 'gpt2 but for norm="rms"'),
        ({**ROTARY, "rotary_fraction": 0.5}, "starcoder2 but for rotary_fraction=0.5"),
        ({**ROTARY, "norm": "layer1p", "gated_mlp": True}, "starcoder2 but for gated_mlp=true"),
        ({**ROTARY, "scale_attn_weights": False}, "starcoder2 but for scale_attn_weights=false"),
        ({**ROOT_MEAN_SQUARE, "gated_mlp": False}, 'starcoder2 but for norm="rms"'),
        ({**ROOT_MEAN_SQUARE, "attention_bias": True, "window": 5}, "llama but for window=5"),
        ({"n_kv_head": 1, "scale_attn_by_inverse_layer_idx": True}, "gpt2 but for n_kv_head=1"),
    ],
)
def test_what_no_class_computes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(checkpoint, "config", replace(checkpoint.config, **settings))
    with pytest.raises(QuantizationError) as error:
        counterpart_of(checkpoint)
    known = "gpt2, gpt_bigcode, starcoder2, llama, mistral, nemotron, stablelm"
    assert str(error.value) == (
        f"expected a model that one of transformers' classes computes ({known}) but got {checkpoint.path}, "
        f"which is {reason}"
    )


@pytest.mark.parametrize(
    ("settings", "model_type"),
    [
        ({}, "gpt2"),
        ({"activation_function": "relu2"}, "gpt2"),
        ({"norm": "layer1p"}, "gpt2"),
        ({"n_kv_head": 1}, "gpt_bigcode"),
        ({**ROTARY, "n_kv_head": 2, "mlp_bias": False}, "starcoder2"),
        ({**ROTARY, "rotary_interpolation": 2.0}, "starcoder2"),
        ({**ROOT_MEAN_SQUARE, "mlp_bias": True}, "llama"),
        ({**ROOT_MEAN_SQUARE, "activation_function": "gelu_new"}, "llama"),
        ({**ROOT_MEAN_SQUARE, "window": 5}, "mistral"),
        ({**ROTARY, "norm": "layer1p", "rotary_fraction": 0.5, "attention_bias": False}, "nemotron"),
        ({**ROTARY, "norm": "layer1p", "gated_mlp": True, "attention_bias": False, "mlp_bias": False}, "stablelm"),
    ],
)
def test_what_computes_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], model_type: str
) -> None:
    monkeypatch.setattr(checkpoint, "config", replace(checkpoint.config, **settings))
    assert counterpart_of(checkpoint).model_type == model_type


@pytest.mark.parametrize("layout", ["rows in order", "joined", "transposed"])
def test_parameters_are_taken_apart_into_what_they_are_made_of(layout: str) -> None:
    config = CheckpointConfig(9, 8, 1, 4, 8, 12, "relu", 1e-5, False, ())
    if layout == "rows in order":
        used = replace(santacoder.LAYOUT, table=gpt_bigcode.MULTI_HEAD)
    elif layout == "joined":
        used, config = llama.LAYOUT, replace(config, n_kv_head=2, gated_mlp=True, position_embedding="rotary")
    else:
        used, config = santacoder.LAYOUT, replace(config, n_kv_head=1)
    random = np.random.default_rng(0)
    for parameter in parameters(config, used):
        stored = {piece.name: random.normal(size=piece.stored_shape) for piece in parameter.pieces}
        values = numbers.plain(parameter, stored.__getitem__, np.dtype("float64"))
        found = {piece.name: part for piece, part in numbers.taken_apart(parameter, values)}
        assert found.keys() == stored.keys()
        for name, part in found.items():
            np.testing.assert_array_equal(part, stored[name])
