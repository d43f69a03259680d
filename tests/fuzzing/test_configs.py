"""Damaged config.json, generation_config.json, hf_quant_config.json: what transformers makes of them, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mutations import fuzz_json
from quantized_folders import quantized_folder
from tiny_checkpoints import EOS, VOCABULARY, random_checkpoint

from weight_loader import Checkpoint, CheckpointError, open_checkpoint

torch = pytest.importorskip("torch", reason="the reference")
transformers = pytest.importorskip("transformers", reason="the reference")

from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.slow

_WORDS = """
model_type gpt2 gpt_bigcode llama architectures GPT2LMHeadModel GPT2Model GPT2ForTokenClassification vocab_size
n_positions n_ctx n_layer n_head n_embd n_inner hidden_size num_hidden_layers num_attention_heads
max_position_embeddings activation_function gelu gelu_new relu silu tanh layer_norm_epsilon tie_word_embeddings
eos_token_id bos_token_id pad_token_id scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn
add_cross_attention is_encoder_decoder pruned_heads quantization_config torch_dtype dtype text_config max_length
do_sample
"""
WORDS = _WORDS.split()
#: What determines the logits. transformers also refuses nonsense in settings that determine nothing here.
_SETTINGS = """
vocab_size n_positions n_layer n_head n_embd n_inner activation_function layer_norm_epsilon max_position_embeddings
num_hidden_layers num_attention_heads hidden_size tie_word_embeddings scale_attn_weights
scale_attn_by_inverse_layer_idx
"""
SETTINGS = _SETTINGS.split()
MOST_COMPARED = 60  # models whose logits are compared


def opened(folder: Path) -> Checkpoint | None:
    """The checkpoint, read to its last weight; None where it is refused, in one line."""
    try:
        checkpoint = open_checkpoint(folder)
        for _ in checkpoint.parameters("float32"):
            pass
    except CheckpointError as error:
        assert str(error) and "\n" not in str(error)
        return None
    return checkpoint


def our_logits(checkpoint: Checkpoint, idx: np.ndarray) -> np.ndarray:
    """(B, T, V) float32, of the model as it is declared, without a cache."""
    import nvtripy as tp

    from engine import config_of, load_model

    return np.from_dlpack(load_model(checkpoint, config_of(checkpoint, "float32"))(tp.Tensor(idx)))


def reference_logits(folder: Path, idx: np.ndarray) -> np.ndarray:
    raw = json.loads((folder / "config.json").read_bytes())
    config = transformers.GPT2Config(**{key: raw[key] for key in SETTINGS if key in raw}, eos_token_id=EOS)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return model(torch.from_numpy(idx).long()).logits.numpy()


def test_config_json(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "sound")
    path = folder / "config.json"
    sound = transformers.GPT2Config(**json.loads(path.read_text())).to_dict()  # every key
    idx = np.arange(12, dtype=np.int32)[None]
    compared: set[object] = set()

    def check() -> bool:
        checkpoint = opened(folder)
        if checkpoint is not None and checkpoint.config not in compared and len(compared) < MOST_COMPARED:
            # In tens of thousands of units of float32's rounding: a layer_norm_epsilon may be anything.
            np.testing.assert_allclose(our_logits(checkpoint, idx), reference_logits(folder, idx), rtol=2e-3, atol=2e-3)
            compared.add(checkpoint.config)
        return checkpoint is not None

    fuzz_json(path, sound, WORDS, 4000, check, at_least=400)
    assert len(compared) >= 4


def test_generation_config_json(tmp_path: Path) -> None:
    """Which ids end a text, as transformers reads them; one that the vocabulary lacks ends none."""
    folder = random_checkpoint(tmp_path / "sound")
    path = folder / "generation_config.json"
    sound = transformers.GenerationConfig(eos_token_id=[EOS, 3], bos_token_id=EOS, do_sample=True, top_k=5).to_dict()

    def check() -> bool:
        checkpoint = opened(folder)
        if checkpoint is not None:
            read = json.loads(path.read_bytes())
            ends = transformers.GenerationConfig(eos_token_id=read.get("eos_token_id")).eos_token_id
            listed = ends if isinstance(ends, list) else [ends]
            assert checkpoint.config.eos_token_ids == tuple(sorted({end for end in listed if end in range(VOCABULARY)}))
        return checkpoint is not None

    fuzz_json(path, sound, WORDS, 2000, check, at_least=400)


def test_hf_quant_config_json(tmp_path: Path) -> None:
    """The description of a quantized folder: what is accepted loads to its last scale."""
    folder = quantized_folder(tmp_path / "sound", "int4-weight-only")
    path = folder / "hf_quant_config.json"
    names = """
    quantization quant_algo kv_cache_quant_algo group_size has_zero_point pre_quant_scale quantized_layers
    MIXED_PRECISION W4A16_AWQ W8A16 FP8 INT8 W8A8_SQ_PER_CHANNEL
    """
    words = names.split()
    fuzz_json(path, json.loads(path.read_text()), words, 2000, lambda: opened(folder) is not None, at_least=50)
