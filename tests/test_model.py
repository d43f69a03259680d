"""The model's logits against transformers' on the same weights: the reference that we did not write.

Tolerances are relative in the 2-norm, over all logits of a call. float32: 1e-5, a hundred roundings of 6e-8 with room
to spare. float16: 2e-3, four units of its rounding (2**-11), which enters at every operation that the model declares in
float16.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import nvtripy as tp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from engine import Engine, compile_model, config_of, load_model
from model import GPT, GPTConfig
from weight_loader import open_checkpoint

TOLERANCES = {"float32": 1e-5, "float16": 2e-3}


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def save_random(folder: Path, seed: int = 0, **arguments: object) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, saved by transformers."""
    torch.manual_seed(seed)
    vocabulary = int(arguments.get("vocab_size", 50257))  # type: ignore[call-overload]
    config = GPT2Config(bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1, **arguments)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        # transformers starts biases at 0 and LayerNorm at 1 and 0, where a wrong one would not show.
        if name.endswith("bias") or ".ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def reference_logits(model: GPT2LMHeadModel, idx: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(idx).long()).logits.numpy()


def stateless_logits(gpt: GPT, idx: np.ndarray) -> np.ndarray:
    executable = tp.compile(gpt, args=[tp.InputInfo(idx.shape, dtype=tp.int32)])
    logits = executable(tp.copy(tp.Tensor(idx), tp.device("gpu")))
    return np.from_dlpack(tp.copy(logits, tp.device("cpu")))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, object]:
    heads = draw(st.integers(1, 4))
    return {
        "n_layer": draw(st.integers(1, 2)),
        "n_head": heads,
        "n_embd": heads * draw(st.sampled_from((1, 2, 5, 8, 16))),
        "n_inner": draw(st.sampled_from((None, 7, 64))),
        "vocab_size": draw(st.integers(2, 300)),
        "n_positions": draw(st.integers(1, 40)),
        "activation_function": draw(st.sampled_from(("gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu"))),
        "layer_norm_epsilon": draw(st.sampled_from((1e-5, 1e-6, 1e-2))),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
    }


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(configurations(), st.integers(1, 3), st.data())
def test_random_architectures_equal_transformers(
    tmp_path: Path, architecture: dict[str, object], batch: int, data: st.DataObject
) -> None:
    """Stateless and cached, the prompt split at a random place, against the logits of every position.

    Half precision from a width of 32 on: the LayerNorm of a few numbers can blow up their rounding without limit.
    """
    dtypes = ("float32", "float16") if int(architecture["n_embd"]) >= 32 else ("float32",)  # type: ignore[call-overload]
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    context = int(architecture["n_positions"])  # type: ignore[call-overload]
    seed = data.draw(st.integers(0, 2**31), label="seed")
    length = data.draw(st.integers(1, context), label="length")
    split = data.draw(st.integers(1, length), label="split")
    reference_model = save_random(tmp_path, seed, **architecture)
    idx = np.random.default_rng(seed).integers(0, architecture["vocab_size"], (batch, length)).astype(np.int32)
    reference = reference_logits(reference_model, idx)

    checkpoint = open_checkpoint(tmp_path)
    config = config_of(checkpoint, dtype)
    gpt = load_model(checkpoint, config)
    assert relative_error(stateless_logits(gpt, idx), reference) <= TOLERANCES[dtype]

    engine = Engine(compile_model(gpt, batch), config, batch)
    logits = engine.step(idx[:, :split], np.zeros(batch, np.int32), np.full(batch, split - 1, np.int32))
    found = [logits]
    for position in range(split, length):
        found.append(
            engine.step(idx[:, position : position + 1], np.full(batch, position, np.int32), np.zeros(batch, np.int32))
        )
    assert relative_error(np.stack(found, axis=1), reference[:, split - 1 :]) <= TOLERANCES[dtype]


@pytest.fixture(scope="module")
def gpt2_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A checkpoint of GPT-2's own size with random weights, token ids (1, 24), and the reference's logits for them."""
    folder = tmp_path_factory.mktemp("124m")
    idx = np.random.default_rng(1).integers(0, 50257, (1, 24)).astype(np.int32)
    return folder, idx, reference_logits(save_random(folder), idx)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.slow
def test_124m_equals_transformers(gpt2_size: tuple[Path, np.ndarray, np.ndarray], dtype: str) -> None:
    folder, idx, reference = gpt2_size
    checkpoint = open_checkpoint(folder)
    config = config_of(checkpoint, dtype)
    gpt = load_model(checkpoint, config)
    assert relative_error(stateless_logits(gpt, idx), reference) <= TOLERANCES[dtype]
    engine = Engine(compile_model(gpt, 1), config, 1)
    del gpt
    zero = np.zeros(1, np.int32)
    logits = engine.step(idx[:, :23], zero, zero + 22)
    assert relative_error(logits, reference[:, 22]) <= TOLERANCES[dtype]
    logits = engine.step(idx[:, 23:], zero + 23, zero)
    assert relative_error(logits, reference[:, 23]) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.slow
def test_scales_of_attention_scores(tmp_path: Path, by_size: bool, by_layer: bool, dtype: str) -> None:
    """Stanford's GPT-2s divide by the layer's number; reorder_and_upcast_attn changes the rounding alone."""
    reference_model = save_random(
        tmp_path,
        n_layer=3,
        n_head=4,
        n_embd=64,
        vocab_size=100,
        n_positions=16,
        initializer_range=0.1,  # so that scores matter
        scale_attn_weights=by_size,
        scale_attn_by_inverse_layer_idx=by_layer,
        reorder_and_upcast_attn=by_layer,
    )
    idx = np.random.default_rng(2).integers(0, 100, (2, 16)).astype(np.int32)
    reference = reference_logits(reference_model, idx)
    config = config_of(open_checkpoint(tmp_path), dtype)
    gpt = load_model(open_checkpoint(tmp_path), config)
    assert relative_error(stateless_logits(gpt, idx), reference) <= TOLERANCES[dtype]
    engine = Engine(compile_model(gpt, 2), config, 2)
    assert engine._rows is not None or importlib.util.find_spec("nvtripy_portable._native") is None  # all is fused
    found = [engine.step(idx[:, :10], np.zeros(2, np.int32), np.full(2, 9, np.int32))]
    for position in range(10, 16):
        step = engine.step(idx[:, position : position + 1], np.full(2, position, np.int32), np.zeros(2, np.int32))
        found.append(step)
    assert relative_error(np.stack(found, axis=1), reference[:, 9:]) <= TOLERANCES[dtype]


def test_bfloat16(tmp_path: Path) -> None:
    """bfloat16 rounds eight times as coarsely as float16 (2**-8): eight times its tolerance."""
    reference_model = save_random(tmp_path, n_layer=2, n_head=2, n_embd=64, vocab_size=100, n_positions=16)
    idx = np.random.default_rng(2).integers(0, 100, (2, 16)).astype(np.int32)
    checkpoint = open_checkpoint(tmp_path)
    gpt = load_model(checkpoint, config_of(checkpoint, "bfloat16"))
    error = relative_error(stateless_logits(gpt, idx), reference_logits(reference_model, idx))
    assert 1e-4 < error <= 8 * TOLERANCES["float16"]


def test_rows_of_different_lengths_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Prompts padded on the right, each continued at its own position, give each row's own logits."""
    reference_model = save_random(tmp_path, n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=12)
    checkpoint = open_checkpoint(tmp_path)
    config = config_of(checkpoint, "float32")
    engine = Engine(compile_model(load_model(checkpoint, config), 3), config, 3)
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 50, (3, 12)).astype(np.int32)
    lengths = np.array([2, 7, 4], np.int32)
    padded = np.where(np.arange(7) < lengths[:, None], rows[:, :7], 49).astype(np.int32)
    reference = reference_logits(reference_model, rows)

    logits = engine.step(padded, np.zeros(3, np.int32), lengths - 1)
    for _ in range(5):
        for row in range(3):
            assert relative_error(logits[row], reference[row, lengths[row] - 1]) <= TOLERANCES["float32"]
        logits = engine.step(rows[np.arange(3), lengths][:, None], lengths, np.zeros(3, np.int32))
        lengths = lengths + 1


def test_logits_of_every_position_without_last(tmp_path: Path) -> None:
    """The cached forward gives all logits where ``last`` is not asked for."""
    reference_model = save_random(tmp_path, n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8)
    checkpoint = open_checkpoint(tmp_path)
    config = config_of(checkpoint, "float32")
    gpt = load_model(checkpoint, config)
    idx = np.arange(6, dtype=np.int32)[None]
    logits, cache = gpt(tp.Tensor(idx), tp.Tensor([0]), tp.zeros(config.cache_shape(1), dtype=tp.float32))
    assert tuple(map(int, cache.shape)) == config.cache_shape(1)
    assert relative_error(np.from_dlpack(logits), reference_logits(reference_model, idx)) <= TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layer": 0}, "n_layer to be at least 1 but got 0"),
        ({"n_head": 5, "n_embd": 64}, "5 heads and a width of 64"),
        ({"activation_function": "mish"}, "mish"),
        ({"dtype": "float64"}, "float16, bfloat16, float32 but got float64"),
    ],
)
def test_impossible_configurations_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**arguments)  # type: ignore[arg-type]
