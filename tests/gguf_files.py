"""GGUF files of transformers' models, written by the package `gguf` as llama.cpp's converters do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_COMMON = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ARCHITECTURES = {"gpt2": "gpt2", "gpt_bigcode": "starcoder", "starcoder2": "starcoder2", "llama": "llama"}


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OTHERS:
        return f"{_OTHERS[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_COMMON[rest]}.{kind}"


def stored(model: Any, name: str, tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the converters arrange it: linear weights (out, in), Llama's rows of q and k in pairs."""
    config = model.config
    if config.model_type == "gpt2" and tensor.ndim == 2 and ".h." in name:
        tensor = tensor.T
    if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        by_head = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        tensor = by_head.swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(tensor.detach().numpy())


def write_gguf(path: Path, model: Any, kind: str = "F32", **changes: Any) -> Path:
    """Writes a model with its two-dimensional weights in a type that the package can make.

    Args:
        changes: Of the metadata; None takes a key away.
    """
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    is_gpt2 = config.model_type.startswith("gpt")
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": (config.n_inner or 4 * config.n_embd) if is_gpt2 else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "starcoder":
        values["attention.head_count_kv"] = 1
    if not is_gpt2:
        values["attention.head_count_kv"] = config.num_key_value_heads
        values["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    epsilon = "rms_norm_eps" if architecture == "llama" else "norm_epsilon" if not is_gpt2 else "layer_norm_epsilon"
    name = "attention.layer_norm_rms_epsilon" if architecture == "llama" else "attention.layer_norm_epsilon"
    values[name] = float(getattr(config, epsilon))
    values = {f"{architecture}.{key}": value for key, value in values.items()}
    values |= {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.tokens": [str(i) for i in range(config.vocab_size)]}
    values |= changes
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for tensor_name, tensor in tensors_of(model).items():
        if tensor.ndim == 2 and kind != "F32":
            type_ = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(tensor, type_)
            writer.add_tensor(tensor_name, packed, raw_dtype=type_)
        else:
            writer.add_tensor(tensor_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """By GGUF's names, in float32."""
    tied = model.config.tie_word_embeddings
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not tied}
    return {gguf_name(name): stored(model, name, tensor) for name, tensor in state.items()}


def round_weights(model: Any, kind: str) -> None:
    """Makes a model's matrices what is left of them in a type of GGUF's."""
    if kind == "F32":
        return
    type_ = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_conv1d = model.config.model_type == "gpt2" and ".h." in name
                matrix = (parameter.T if is_conv1d else parameter).contiguous().numpy()
                rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix, type_), type_).copy())
                parameter.copy_(rounded.T if is_conv1d else rounded)
