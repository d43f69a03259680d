"""The model's quantization modes against transformers with fake-quantized weights and inputs, from the same scales.

In float32, so that only the order of summation differs: 1e-5 relative to the norm, as for the unquantized model. Where
activations are rounded too, a difference in the last bit before the rounding becomes a whole step after it, 1/127 of
the range, for a few elements: 2e-2 covers those. A scale left out or on the wrong axis is off by tenths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest
import torch
from selection import partly_slow
from test_model import reference_logits, relative_error, save_random, stateless_logits
from transformers import GPT2LMHeadModel

from engine import Engine, compile_model, even_columns, linear_layers
from model import GPT, QUANT_MODES, GPTConfig, QuantMode
from weight_loader import open_checkpoint

ARCHITECTURE = {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 160, "n_positions": 24}
TOPS = {"int8": 127.0, "int4": 7.0, "float8": 448.0}
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FULL_INT8 = {"quant_lm_head": True, "quant_embedding": True, "quant_position_embedding": True}
IDX = np.random.default_rng(0).integers(0, 160, (2, 20)).astype(np.int32)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """What an 8-bit or 4-bit type keeps of values that are scaled already."""
    if dtype == "float8":
        return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    top = TOPS[dtype]
    return np.clip(np.rint(values), -top - 1, top)


class Quantized:
    """A random GPT-2 twice: as this model with scales, and as transformers' with everything rounded by NumPy."""

    def __init__(self, folder: Path, mode: str | None, **options: object) -> None:
        architecture = ARCHITECTURE | {name: options[name] for name in ("vocab_size",) if name in options}
        self.reference = save_random(
            folder, **architecture, tie_word_embeddings=options.get("tie_word_embeddings", True)
        )
        self.config = GPTConfig(**ARCHITECTURE | options, dtype="float32", quant_mode=mode)  # type: ignore[arg-type]
        self.gpt = GPT(self.config)
        self.rng = np.random.default_rng(1)
        self.state = dict(open_checkpoint(folder).parameters("float32"))
        if self.config.linear_mode is not None:
            for layer in range(self.config.n_layer):
                for name in LINEARS:
                    self.quantize(f"h.{layer}.{name}", self.config.linear_mode)
        if self.config.head_mode is not None:
            if self.config.tie_word_embeddings:
                self.state["lm_head.weight"] = self.state["wte.weight"]
            if self.config.embedding_is_head:
                del self.state["wte.weight"]
            self.quantize("lm_head", self.config.head_mode)
        if self.config.quant_position_embedding:
            self.quantize("wpe", QUANT_MODES["int8-weight-only"])
        if self.config.quant_embedding and not self.config.embedding_is_head:
            self.quantize("wte", QUANT_MODES["int8-weight-only"])
        layers = dict(linear_layers(self.gpt))
        for name, array in self.state.items():
            self.state[name] = even_columns(array, layers.get(name.rpartition(".")[0]))
        self.gpt.load_state_dict({name: tp.Tensor(np.array(array, order="C")) for name, array in self.state.items()})

    def quantize(self, name: str, mode: QuantMode) -> None:
        weight, dtype = self.state[f"{name}.weight"], mode.weight.name  # (out, in)
        pre_scale = np.ones(weight.shape[1], np.float32)
        if mode.scales_input:
            pre_scale = self.rng.uniform(0.5, 2.0, weight.shape[1]).astype(np.float32)
            weight = weight / pre_scale
            self.state[f"{name}.pre_quant_scale"] = pre_scale
        if mode.scales == "block":
            blocks = weight.reshape(len(weight), -1, self.config.block_size)
            scale = (np.abs(blocks).max(axis=2) / TOPS[dtype]).astype(np.float32)
            rounded = (round_to(blocks / scale[:, :, None], dtype) * scale[:, :, None]).reshape(weight.shape)
            weight, stored_scale = weight.T, np.ascontiguousarray(scale.T)
        elif mode.scales == "channel" and (self.config.per_channel or not mode.quantizes_input):
            stored_scale = (np.abs(weight).max(axis=1) / TOPS[dtype]).astype(np.float32)
            rounded = round_to(weight / stored_scale[:, None], dtype) * stored_scale[:, None]
        else:
            stored_scale = np.array(np.abs(weight).max() / TOPS[dtype], np.float32)
            rounded = round_to(weight / stored_scale, dtype) * stored_scale
        self.state[f"{name}.weight"], self.state[f"{name}.weight_scale"] = weight, stored_scale
        round_input: Callable[[np.ndarray], np.ndarray] = lambda x: x  # noqa: E731
        if mode.quantizes_input and self.config.per_token:

            def round_input(x: np.ndarray) -> np.ndarray:
                scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / 127, 1e-6)
                return round_to(x / scale, dtype) * scale

        elif mode.quantizes_input:
            # Narrow enough that some inputs are cut off.
            input_scale = np.float32(3.0 / TOPS[dtype])
            self.state[f"{name}.input_scale"] = np.array(input_scale)

            def round_input(x: np.ndarray) -> np.ndarray:
                return round_to(x / input_scale, dtype) * input_scale

        self.round_reference(name, rounded, pre_scale, round_input)

    def round_reference(
        self, name: str, rounded: np.ndarray, pre_scale: np.ndarray, round_input: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        model: GPT2LMHeadModel = self.reference
        module = model.lm_head if name == "lm_head" else model.transformer.get_submodule(name)
        if name in ("lm_head", "wte", "wpe"):
            module.weight = torch.nn.Parameter(torch.from_numpy(rounded))
            if name == "lm_head" and self.config.embedding_is_head:
                model.transformer.wte.weight = torch.nn.Parameter(torch.from_numpy(rounded))
        else:
            module.weight.data = torch.from_numpy(np.ascontiguousarray(rounded.T))  # a Conv1D: (in, out)
        if name in ("wte", "wpe"):
            return
        module.register_forward_pre_hook(
            lambda _, inputs: (torch.from_numpy(round_input(inputs[0].detach().numpy() * pre_scale)),)
        )

    def cached_logits(self, split: int) -> np.ndarray:
        batch, length = IDX.shape
        engine = Engine(compile_model(self.gpt, batch), self.config, batch)
        zeros = np.zeros(batch, np.int32)
        logits = [engine.step(IDX[:, :split], zeros, zeros + split - 1)]
        logits += [engine.step(IDX[:, at : at + 1], zeros + at, zeros) for at in range(split, length)]
        return np.stack(logits, axis=1)


MODE_CASES = [
    ("int8-weight-only", {}),
    ("int8-weight-only", {"quant_lm_head": True}),
    ("int8-weight-only", {"quant_lm_head": True, "quant_embedding": True}),
    ("int8-weight-only", {"quant_position_embedding": True}),
    ("int8-weight-only", FULL_INT8),
    ("int8-weight-only", FULL_INT8 | {"tie_word_embeddings": False}),
    ("int4-weight-only", {}),
    ("int4-weight-only", {"quant_lm_head": True, "quant_embedding": True}),
    ("int4-weight-only", {"block_size": 64, "pre_quant_scale": False, "quant_lm_head": True}),
    ("int4-weight-only", {"block_size": 16, "quant_lm_head": True, "quant_embedding": True}),
    ("int4-weight-only", {"vocab_size": 161, "quant_lm_head": True, "quant_embedding": True}),
    ("int4-weight-only", {"vocab_size": 161, "quant_lm_head": True, "tie_word_embeddings": False}),
    ("fp8", {}),
    ("fp8", {"quant_lm_head": True}),
    ("fp8", {"quant_lm_head": True, "quant_embedding": True}),
    ("int8-smoothquant", {}),
    ("int8-smoothquant", {"per_channel": False}),
    ("int8-smoothquant", {"per_token": True}),
    (
        "int8-smoothquant",
        {"per_token": True, "per_channel": False, "quant_lm_head": True, "quant_embedding": True},
    ),
]
QUICK = [MODE_CASES[4], MODE_CASES[10], MODE_CASES[13], MODE_CASES[17]]


@pytest.mark.parametrize(("mode", "options"), partly_slow(MODE_CASES, QUICK))
def test_modes_equal_fake_quantization(tmp_path: Path, mode: str, options: dict[str, bool]) -> None:
    quantized = Quantized(tmp_path, mode, **options)
    expected = reference_logits(quantized.reference, IDX)
    tolerance = 2e-2 if QUANT_MODES[mode].quantizes_input else 1e-5
    assert relative_error(stateless_logits(quantized.gpt, IDX), expected) <= tolerance
    assert relative_error(quantized.cached_logits(7), expected[:, 6:]) <= tolerance


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_is_what_attention_sees(tmp_path: Path, kv_cache_dtype: str) -> None:
    """Cached generation equals the stateless forward, which rounds keys and values the same way."""
    quantized = Quantized.__new__(Quantized)
    quantized.reference = save_random(tmp_path, **ARCHITECTURE)
    quantized.config = GPTConfig(**ARCHITECTURE, dtype="float32", kv_cache_dtype=kv_cache_dtype)  # type: ignore[arg-type]
    quantized.gpt = GPT(quantized.config)
    state = dict(open_checkpoint(tmp_path).parameters("float32"))
    top = TOPS["int8" if kv_cache_dtype == "int8" else "float8"]
    for layer in range(2):
        for name in ("k_scale", "v_scale"):
            state[f"h.{layer}.attn.{name}"] = np.array(4.0 / top, np.float32)
    quantized.gpt.load_state_dict({name: tp.Tensor(array) for name, array in state.items()})
    stateless = stateless_logits(quantized.gpt, IDX)
    assert relative_error(quantized.cached_logits(5), stateless[:, 4:]) <= 1e-5
    # It is rounded at all, and no more than 8 bits explain.
    assert 1e-4 < relative_error(stateless, reference_logits(quantized.reference, IDX)) < 5e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_mode": "int3"}, "int8-weight-only, int4-weight-only, fp8, int8-smoothquant but got int3"),
        ({"kv_cache_dtype": "int2"}, "int8, fp8 but got int2"),
        ({"quant_lm_head": True}, "a quant_mode with quant_lm_head"),
        ({"quant_mode": "fp8", "quant_embedding": True}, "quant_embedding of tied embeddings only with quant_lm_head"),
        ({"quant_mode": "fp8", "quant_position_embedding": True}, "in int8-weight-only only but got fp8"),
        ({"quant_position_embedding": True}, "in int8-weight-only only but got None"),
        (
            {"quant_mode": "int4-weight-only", "quant_embedding": True, "tie_word_embeddings": False},
            "in int8-weight-only only but got int4-weight-only",
        ),
        ({"quant_mode": "int4-weight-only", "n_embd": 192, "n_head": 3}, "widths that 128, .* 192 and 768"),
        ({"quant_mode": "int4-weight-only", "n_embd": 192, "n_head": 3, "block_size": 80}, "widths that 80, "),
        ({"block_size": 0}, "block_size to be at least 1 but got 0"),
    ],
)
def test_impossible_modes_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)  # type: ignore[arg-type]
