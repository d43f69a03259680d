"""Adapters on quantized bases: what peft computes on ModelOpt's own quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_models import adapted, decoder_with, logits_with
from random_models import logits_of, random_model
from safetensors.numpy import load_file, save_file
from selection import partly_slow
from test_model import relative_error
from test_quantized_families import SAMPLES, tolerance

from adapters.errors import AdapterError
from adapters.folding import folded_scales
from adapters.lora import read_lora
from quantization import QuantizationConfig
from weight_loader import open_checkpoint

pytest.importorskip("modelopt.torch.quantization", reason="NVIDIA ModelOpt is not installed")
pytest.importorskip("peft", reason="the reference needs peft (requirements/test.txt)")

from quantizing.calibration import quantize_model
from quantizing.export import export
from quantizing.torch_model import load_torch_model

NORMS_OF_LLAMA = ("input_layernorm", "post_attention_layernorm")
IDX = np.random.default_rng(0).integers(0, 97, (1, 21)).astype(np.int32)

FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "multi-query": ("gpt_bigcode", {"n_embd": 64, "n_head": 4}, ["c_attn", "c_fc"]),
    "starcoder2": ("starcoder2", {"hidden_size": 64, "intermediate_size": 96}, ["q_proj", "o_proj", "c_proj"]),
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 96}, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
}
CASES: dict[str, dict[str, Any]] = {
    "int8": {"mode": "int8-weight-only"},
    "awq": {"mode": "int4-weight-only", "group_size": 32},
    "gptq, 4 bits": {"method": "gptq", "bits": 4, "group_size": 16},
    "fp8": {"mode": "fp8"},
    "fp8, fp8 cache": {"mode": "fp8", "kv_cache_dtype": "fp8", "quant_lm_head": True},
    "smoothquant": {"mode": "int8-smoothquant"},
    "smoothquant by row and token": {"mode": "int8-smoothquant", "per_channel": True, "per_token": True},
}


@pytest.mark.parametrize(
    ("family", "case"),
    partly_slow(
        [(family, case) for family in FAMILIES for case in CASES], [("llama", "awq"), ("starcoder2", "smoothquant")]
    ),
)
def test_the_bases_error_and_no_more(tmp_path: Path, family: str, case: str) -> None:
    name, sizes, targets = FAMILIES[family]
    random_model(name, **sizes).save_pretrained(tmp_path / "plain")
    model, config = load_torch_model(tmp_path / "plain"), QuantizationConfig(**CASES[case])
    quantize_model(model, config, SAMPLES)
    plain = logits_of(model, IDX)[0]
    # On the model that was quantized, which computes with rounded numbers; the adapter's products are floats.
    with_adapter = adapted(model, tmp_path / "adapter", 1, target_modules=targets)
    expected = logits_of(with_adapter, IDX)[0]
    export(with_adapter.unload(), tmp_path / "quantized", config)
    assert relative_error(expected, plain) > 0.05, "the adapter does nothing"
    checkpoint = open_checkpoint(tmp_path / "quantized")
    lora = read_lora(tmp_path / "adapter", checkpoint).unfolded(folded_scales(checkpoint))
    decoder = decoder_with(checkpoint, "float32", [lora])
    ids = IDX[0].tolist()
    assert relative_error(logits_with(decoder, ids, 0), plain) <= tolerance(case)
    assert relative_error(logits_with(decoder, ids, 1), expected) <= tolerance(case)


def test_scales_that_are_not_said(tmp_path: Path) -> None:
    """Someone else's export has them in its norms alone: an adapter would be wrong, and is refused."""
    name, sizes, _ = FAMILIES["llama"]
    random_model(name, **sizes).save_pretrained(tmp_path / "plain")
    model, config = load_torch_model(tmp_path / "plain"), QuantizationConfig(**CASES["awq"])
    quantize_model(model, config, SAMPLES)
    export(model, tmp_path / "quantized", config)
    file = tmp_path / "quantized" / "folded_scales.safetensors"
    tensors = load_file(file)
    assert sorted(tensors) == [f"model.layers.{layer}.{norm}.weight" for layer in range(2) for norm in NORMS_OF_LLAMA]
    for changed, message in [
        ({name: scale[:-1] for name, scale in tensors.items()}, "expected 64 scales other than zero"),
        ({"x": np.ones(1, np.float32)}, "expected 64 scales other than zero"),
    ]:
        save_file({name: np.ascontiguousarray(each) for name, each in changed.items()}, file)
        with pytest.raises(AdapterError, match=message):
            folded_scales(open_checkpoint(tmp_path / "quantized"))
    file.unlink()
    with pytest.raises(AdapterError, match=r"no folded_scales\.safetensors that says which they were"):
        folded_scales(open_checkpoint(tmp_path / "quantized"))
