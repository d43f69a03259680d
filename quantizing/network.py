"""Where transformers' models keep what is quantized: a row for each family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Network:
    """The modules of a transformers model, by their names.

    Attributes:
        architecture: The class.
        body: All but the head.
        blocks: Of the body, the list of blocks.
        linears: Of a block, the linear layers in the order in which data passes them. Those that stand together have
            one input, and become one layer of ours.
        tokens: Of the body, the embedding of tokens.
        positions: Of the body, that of positions, where there is one.
    """

    architecture: str
    body: str
    blocks: str
    linears: tuple[tuple[str, ...], ...]
    tokens: str
    positions: str | None = None

    def body_of(self, model: Any) -> Any:
        return model.get_submodule(self.body)

    def blocks_of(self, model: Any) -> Any:
        return self.body_of(model).get_submodule(self.blocks)

    def groups_of(self, model: Any) -> Iterator[tuple[str, list[Any]]]:
        """The linear layers of all blocks that share an input, and the name of the first, counted from the body."""
        for number, block in enumerate(self.blocks_of(model)):
            for names in self.linears:
                yield f"{self.blocks}.{number}.{names[0]}", [block.get_submodule(name) for name in names]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GPT2 = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_LLAMA = (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_STARCODER2 = (_QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_NEMOTRON = (_QKV, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",))

#: model_type → what transformers makes of it.
NETWORKS = {
    "gpt2": Network("GPT2LMHeadModel", "transformer", "h", _GPT2, "wte", "wpe"),
    "gpt_bigcode": Network("GPTBigCodeForCausalLM", "transformer", "h", _GPT2, "wte", "wpe"),
    "starcoder2": Network("Starcoder2ForCausalLM", "model", "layers", _STARCODER2, "embed_tokens"),
    "nemotron": Network("NemotronForCausalLM", "model", "layers", _NEMOTRON, "embed_tokens"),
    "stablelm": Network("StableLmForCausalLM", "model", "layers", _LLAMA, "embed_tokens"),
    "llama": Network("LlamaForCausalLM", "model", "layers", _LLAMA, "embed_tokens"),
    "mistral": Network("MistralForCausalLM", "model", "layers", _LLAMA, "embed_tokens"),
    "granite": Network("GraniteForCausalLM", "model", "layers", _LLAMA, "embed_tokens"),
}


def network_of(model: Any) -> Network:
    """That of a model of transformers."""
    return NETWORKS[model.config.model_type]


def rows_of(module: Any) -> Any:
    """A linear layer's weight as (out, in), a view: transformers' Conv1D has it the other way round."""
    return module.weight.T if is_conv1d(module) else module.weight


def is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def inner_width(model: Any) -> int:
    """Of the MLP."""
    config = model.config
    if hasattr(config, "intermediate_size"):
        return int(config.intermediate_size)
    return int(config.n_inner or 4 * config.n_embd)


def query_width(model: Any) -> int:
    """Of all heads' queries together."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * size)
