"""Models of transformers with random weights, of every family: for tests that compare with them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

#: model_type → configuration and model of transformers, and small settings of it.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"n_head": 4, "n_embd": 32}),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, transformers.GPTBigCodeForCausalLM, {"n_head": 4, "n_embd": 32}),
    "starcoder2": (transformers.Starcoder2Config, transformers.Starcoder2ForCausalLM, {}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {}),
    "nemotron": (transformers.NemotronConfig, transformers.NemotronForCausalLM, {}),
    "stablelm": (transformers.StableLmConfig, transformers.StableLmForCausalLM, {}),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, {}),
}
_GPT2_SIZES = {"n_positions": 48, "n_layer": 2}
_SIZES = {
    "max_position_embeddings": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
}


def random_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """In float32. Biases and norms are random too: transformers starts them at 0 and 1, where a wrong one would not
    show. Weights are large, so that attention is not uniform."""
    config_class, model_class, own = FAMILIES[family]
    sizes = _GPT2_SIZES if family.startswith("gpt") else _SIZES
    settings = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1, **sizes, **own, **settings}
    torch.manual_seed(seed)
    model = model_class(config_class(attn_implementation="eager", **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                scale = 1.0 if "wte" in name or "embed" in name else 2.0 * parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale)
    return model


def logits_of(model: Any, idx: Any) -> Any:
    """Of every position, as NumPy's float32."""
    with torch.no_grad():
        return model(torch.from_numpy(idx).long()).logits.float().numpy()
