"""Every family quantized by every method, exported by ModelOpt, and read again: against ModelOpt's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import logits_of, random_model
from selection import partly_slow
from test_model import relative_error, stateless_logits

from engine import Engine, compile_model, config_of, load_model
from quantization import QuantizationConfig
from weight_loader import open_checkpoint

pytest.importorskip("modelopt.torch.quantization", reason="NVIDIA ModelOpt is not installed")

from quantizing.calibration import quantize_model
from quantizing.export import export
from quantizing.torch_model import load_torch_model

IDX = np.random.default_rng(0).integers(0, 97, (2, 21)).astype(np.int32)
SAMPLES = np.random.default_rng(1).integers(0, 97, (8, 32))

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-query": ("gpt_bigcode", {"n_embd": 64, "n_head": 4}),
    "multi-head": ("gpt_bigcode", {"n_embd": 64, "n_head": 2, "multi_query": False}),
    "starcoder2": ("starcoder2", {"hidden_size": 64, "intermediate_size": 96, "sliding_window": 7}),
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 96}),
    "llama, tied": ("llama", {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"hidden_size": 64, "intermediate_size": 96, "sliding_window": 9}),
    "nemotron": ("nemotron", {"hidden_size": 64, "intermediate_size": 96}),
    "stablelm": ("stablelm", {"hidden_size": 64, "intermediate_size": 96, "partial_rotary_factor": 0.5}),
}
CASES: dict[str, dict[str, Any]] = {
    "int8": {"mode": "int8-weight-only"},
    "full int8": {"mode": "int8-weight-only", "quant_lm_head": True, "quant_embeddings": True},
    "int8, int8 cache": {"mode": "int8-weight-only", "kv_cache_dtype": "int8"},
    "awq": {"mode": "int4-weight-only", "group_size": 32},
    "awq, head": {"mode": "int4-weight-only", "group_size": 16, "quant_lm_head": True},
    "rtn, 4 bits": {"method": "rtn", "bits": 4, "group_size": 32},
    "gptq, 4 bits": {"method": "gptq", "bits": 4, "group_size": 16},
    "gptq, 8 bits": {"method": "gptq", "bits": 8},
    "fp8": {"mode": "fp8"},
    "fp8, fp8 cache": {"mode": "fp8", "kv_cache_dtype": "fp8", "quant_lm_head": True},
    "smoothquant": {"mode": "int8-smoothquant"},
    "smoothquant by row and token": {"mode": "int8-smoothquant", "per_channel": True, "per_token": True},
    "cache": {"kv_cache_dtype": "int8"},
}
QUICK = [
    ("llama, tied", "awq"),
    ("llama", "fp8, fp8 cache"),
    ("starcoder2", "smoothquant"),
    ("multi-query", "full int8"),
]


def tolerance(case: str) -> float:
    """In float32. Where inputs or the cache are rounded to 8 bits, a last place becomes a whole step now and then."""
    rounds = "fp8" in case or "smoothquant" in case or "cache" in case
    return 3e-2 if rounds else 1e-4


@pytest.mark.parametrize(
    ("family", "case"), partly_slow([(family, case) for family in FAMILIES for case in CASES], QUICK)
)
def test_modelopts_own_model(tmp_path: Path, family: str, case: str) -> None:
    name, sizes = FAMILIES[family]
    random_model(name, **sizes).save_pretrained(tmp_path / "plain")
    model, config = load_torch_model(tmp_path / "plain"), QuantizationConfig(**CASES[case])
    quantize_model(model, config, SAMPLES)
    expected = logits_of(model, IDX)
    export(model, tmp_path / "quantized", config)
    checkpoint = open_checkpoint(tmp_path / "quantized")
    found_config = config_of(checkpoint, "float32")
    assert found_config.quant_mode == config.mode
    gpt = load_model(checkpoint, found_config)
    assert relative_error(stateless_logits(gpt, IDX), expected) <= tolerance(case)
    engine, zero = Engine(compile_model(gpt, 2), found_config, 2), np.zeros(2, np.int32)
    steps = [engine.step(IDX[:, :15], zero, zero + 14)]
    steps += [engine.step(IDX[:, at : at + 1], zero + at, zero) for at in range(15, 21)]
    assert relative_error(np.stack(steps, axis=1), expected[:, 14:]) <= tolerance(case)


def test_the_export_is_one_of_transformers(tmp_path: Path) -> None:
    """What is not quantized of it stands under transformers' names, in its own model."""
    random_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "plain")
    model, config = load_torch_model(tmp_path / "plain"), QuantizationConfig(mode="int8-weight-only")
    names = {name for name, _ in model.named_parameters()}
    quantize_model(model, config, None)
    export(model, tmp_path / "quantized", config)
    from safetensors import safe_open

    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if not name.endswith("_scale")}  # noqa: SIM118
        assert stored == names
        assert file.get_tensor("model.layers.0.self_attn.q_proj.weight").dtype == torch.int8
