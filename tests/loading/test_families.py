"""Every family from its HuggingFace folder: logits against transformers' own class, in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import logits_of, random_model
from safetensors.torch import load_file, save_file
from santacoder_files import santacoder
from test_model import relative_error, stateless_logits

from engine import Engine, compile_model, config_of, load_model
from weight_loader import CheckpointError, open_checkpoint

IDX = np.random.default_rng(0).integers(0, 97, (2, 21)).astype(np.int32)


def check(model: Any, folder: Path, idx: np.ndarray = IDX) -> None:
    """Stateless, and cached with the prompt and then single tokens."""
    model.save_pretrained(folder)
    check_folder(folder, logits_of(model, idx), idx)


def check_folder(folder: Path, expected: np.ndarray, idx: np.ndarray = IDX) -> None:
    checkpoint = open_checkpoint(folder)
    config = config_of(checkpoint, "float32")
    gpt = load_model(checkpoint, config)
    assert relative_error(stateless_logits(gpt, idx), expected) <= 1e-5
    batch, length = idx.shape
    split = length // 2
    engine = Engine(compile_model(gpt, batch), config, batch)
    zero = np.zeros(batch, np.int32)
    found = [engine.step(idx[:, :split], zero, zero + split - 1)]
    found += [engine.step(idx[:, p : p + 1], zero + p, zero) for p in range(split, length)]
    assert relative_error(np.stack(found, axis=1), expected[:, split - 1 :]) <= 1e-5


@st.composite
def heads(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of Llama's kind; heads are even, as rotation takes pairs."""
    groups = draw(st.integers(1, 3))
    count, size = groups * draw(st.integers(1, 3)), draw(st.sampled_from((2, 4, 10, 16)))
    return {"num_attention_heads": count, "num_key_value_heads": groups, "hidden_size": count * size}


ROPES = (
    {},
    {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    {"rope_theta": 999999.442},
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5}},
    {"rope_theta": 2000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
)
LLAMA = {
    "vocab_size": st.sampled_from((97, 98, 130)),
    "tie_word_embeddings": st.booleans(),
    "num_hidden_layers": st.integers(1, 2),
    "intermediate_size": st.sampled_from((7, 48, 50)),
    "rms_norm_eps": st.sampled_from((1e-6, 1e-3)),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
}
BIGCODE = {
    "vocab_size": st.sampled_from((97, 98)),
    "tie_word_embeddings": st.booleans(),
    "multi_query": st.booleans(),
    "n_head": st.sampled_from((1, 2, 4)),
    "n_inner": st.sampled_from((None, 7, 64)),
    "activation_function": st.sampled_from(("gelu", "gelu_pytorch_tanh", "gelu_new", "relu")),
    "scale_attn_weights": st.booleans(),
    "attention_softmax_in_fp32": st.booleans(),
}
STARCODER2 = {
    "vocab_size": st.sampled_from((97, 98)),
    "tie_word_embeddings": st.booleans(),
    "use_bias": st.booleans(),
    "sliding_window": st.sampled_from((None, 1, 5, 20, 21, 48, 100)),
    "norm_epsilon": st.sampled_from((1e-5, 1e-2)),
    "hidden_act": st.sampled_from(("gelu", "gelu_pytorch_tanh")),
}
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=4, **SLOW)
@given(st.fixed_dictionaries(LLAMA), heads(), st.sampled_from(ROPES), st.sampled_from((None, 6)), st.integers(0, 99))
def test_llama(
    tmp_path: Path, config: dict[str, Any], sizes: dict[str, int], rope: dict[str, Any], size: int | None, seed: int
) -> None:
    check(random_model("llama", seed, head_dim=size, **config, **sizes, **rope), tmp_path)


@settings(max_examples=4, **SLOW)
@given(st.fixed_dictionaries(STARCODER2), heads(), st.sampled_from(ROPES), st.integers(0, 99))
def test_starcoder2(
    tmp_path: Path, config: dict[str, Any], sizes: dict[str, int], rope: dict[str, Any], seed: int
) -> None:
    check(random_model("starcoder2", seed, **config, **sizes, **rope), tmp_path)


@settings(max_examples=4, **SLOW)
@given(st.fixed_dictionaries(BIGCODE), st.integers(0, 99))
def test_gpt_bigcode(tmp_path: Path, config: dict[str, Any], seed: int) -> None:
    check(random_model("gpt_bigcode", seed, **config), tmp_path)


PARTS = (
    {},  # a half in Nemotron, a quarter in StableLM
    {"partial_rotary_factor": 1.0, "rope_theta": 500.0},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.75}},
)


@pytest.mark.parametrize("rope", PARTS, ids=str)
def test_nemotron(tmp_path: Path, rope: dict[str, Any]) -> None:
    has_bias = "rope_parameters" in rope
    check(random_model("nemotron", attention_bias=has_bias, mlp_bias=has_bias, **copy.deepcopy(rope)), tmp_path)


@pytest.mark.parametrize("rope", PARTS, ids=str)
def test_stablelm(tmp_path: Path, rope: dict[str, Any]) -> None:
    check(random_model("stablelm", hidden_act="gelu" if rope else "silu", **copy.deepcopy(rope)), tmp_path)


@pytest.mark.parametrize("window", [None, 3, 4096])
def test_mistral(tmp_path: Path, window: int | None) -> None:
    check(random_model("mistral", sliding_window=window), tmp_path)


@pytest.mark.parametrize("multiplier", [1.0, 8**-0.5])
def test_granite_without_multipliers(tmp_path: Path, multiplier: float) -> None:
    check(random_model("granite", attention_multiplier=multiplier), tmp_path)


def test_old_flat_settings(tmp_path: Path) -> None:
    """config.json as transformers 4 wrote it, and weights as LlamaModel has them, with buffers of old."""
    model = random_model("llama", rope_theta=5000.0)
    model.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=None, rope_theta=5000.0, rope_scaling=None)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    check_folder(tmp_path, logits_of(model, IDX))


def test_the_activation_in_force_of_starcoder2(tmp_path: Path) -> None:
    """Published configurations also carry an activation_function, which transformers does not look at."""
    model = random_model("starcoder2")
    model.save_pretrained(tmp_path)
    edit(tmp_path, activation_function="relu")
    check_folder(tmp_path, logits_of(model, IDX))


@pytest.mark.parametrize("name", ["layout of transformers", "by shards", "pytorch_model.bin"])
def test_containers_of_new_families(tmp_path: Path, name: str) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path, **({"max_shard_size": "9KB"} if name == "by shards" else {}))
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name)
    check_folder(tmp_path, logits_of(model, IDX))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_santacoder_original_is_its_native_port(tmp_path: Path, prefix: str) -> None:
    model = random_model("gpt_bigcode", activation_function="gelu_pytorch_tanh")
    original = open_checkpoint(santacoder(model, tmp_path / "original", prefix))
    model.save_pretrained(tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    assert original.config == native.config
    found, expected = dict(original.parameters("float16")), dict(native.parameters("float16"))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], name)
        assert array.flags.c_contiguous and array.flags.owndata, name
    check_folder(tmp_path / "original", logits_of(model, IDX))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 'to be default or linear, got "llama3"'),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, 'to be default or linear, got "yarn"'),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "expected factor to be a positive number, got null"),
    ("llama", {"rope_parameters": {"rope_theta": -1}}, "expected rope_theta to be a positive number, got -1"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"rope_parameters": [1]}, "expected rope_parameters to be an object"),
    ("llama", {"num_local_experts": 8}, "num_local_experts=8 is not supported"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm=true is not supported"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads to be an integer from 1 to 4, got 8"),
    ("llama", {"hidden_size": 33, "head_dim": None}, "hidden_size (33) is not a multiple of num_attention_heads (4)"),
    ("llama", {"head_dim": 7}, "expected a head of an even size, which rotary positions need, got 7"),
    ("llama", {"hidden_act": "mish"}, 'expected hidden_act to be one of gelu_new, .* got "mish"'),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"model_type": "qwen3"}, "'llama', 'mistral', 'granite', got \"qwen3\""),
    ("llama", {"vocab_size": 98}, r"embed_tokens.weight \(expected \(98, 32\), got \(97, 32\)\)"),
    ("llama", {"attention_bias": True}, "missing: layers.0.self_attn.q_proj.bias, layers.0.self_attn.k_proj.bias"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("granite", {"residual_multiplier": 0.22}, "residual_multiplier=0.22 is not supported, only residual_multiplier=1"),
    ("granite", {"logits_scaling": 8}, "logits_scaling=8 is not supported"),
    ("granite", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 is not supported"),
    ("granite", {"attention_multiplier": 0.015625}, "attention_multiplier=0.015625 is not supported"),
    (
        "nemotron",
        {"rope_parameters": {"partial_rotary_factor": 0.4}},
        "an even number of a head's 8 dimensions, got 0.4",
    ),
    (
        "stablelm",
        {"rope_parameters": {"partial_rotary_factor": 1.5}},
        "an even number of a head's 8 dimensions, got 1.5",
    ),
    ("stablelm", {"use_qkv_bias": True}, "use_qkv_bias=true is not supported, only use_qkv_bias=false"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=true is not supported"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm=true is not supported"),
    ("gpt_bigcode", {"multi_query": "yes"}, "expected multi_query to be true or false"),
    ("gpt_bigcode", {"multi_query": False}, r"h.0.attn.c_attn.weight \(expected \(96, 32\), got \(48, 32\)\)"),
    ("gpt2", {"attention_head_type": "grouped"}, "attention_head_type to be multihead or multiquery, got"),
    ("gpt2", {"attention_head_type": "multiquery"}, "missing: h.0.attn.q_attn.weight, h.0.attn.kv_attn.weight"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[str(each[1])[:60] for each in REFUSED])
def test_refused(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    random_model(family).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    escaped = message if "\\" in message or ".*" in message else message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CheckpointError, match=escaped) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_tensors_are_named_as_they_are_stored(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_proj.weight holds nan"):
        list(open_checkpoint(tmp_path).parameters("float16"))


def test_stored_bytes_go_by_the_models_names(tmp_path: Path) -> None:
    from compression import components

    model = random_model("llama")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.stored_bytes()["h.1.attn.c_attn.weight"] == 4 * 32 * (32 + 16 + 16)
    total = components(checkpoint)[-1]
    assert (total.parameters, total.stored) == (model.num_parameters(), 4 * model.num_parameters())
