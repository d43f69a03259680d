"""GPT-Next: NeMo's megatron GPT, by the names of its older modules and of Megatron core's.

Tensor-parallel ranks hold rows of linear layers that widen, columns of those that narrow, and copies of the rest. Rows
of queries, keys and values stand by group: [q of the heads that share the keys, k, v]; those of a gate and what it
gates stand so in each rank's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from loading import settings
from loading.config import CheckpointConfig
from loading.containers.tensors import Stored
from loading.errors import shown
from loading.settings import Settings
from loading.table import From, Layout, Order

# Names of activations in model_config.yaml → model.py's, and whether they are gates. "gelu" is settled below.
_ACTIVATIONS = {
    "gelu": ("gelu", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swish": ("silu", False),
    "squared-relu": ("relu2", False),
    **{f"{prefix}geglu": ("gelu", True) for prefix in ("", "fast-")},
    **{f"{prefix}reglu": ("relu", True) for prefix in ("", "fast-")},
    **{f"{prefix}swiglu": ("silu", True) for prefix in ("", "fast-")},
}
_NORMS = {"layernorm": "layer", "layernorm1p": "layer1p", "rmsnorm": "rms"}
_POSITIONS = {"learned_absolute": "learned", "rope": "rotary"}

_CORE, _LEGACY = "decoder.layers.{}", "language_model.encoder.layers.{}"
_CORE_EMBEDDING, _LEGACY_EMBEDDING = "embedding.word_embeddings", "language_model.embedding.word_embeddings"
#: Ends of the names of tensors of which every rank has a copy.
_COPIES = (
    *("norm.weight", "norm.bias", "layer_norm_weight", "layer_norm_bias", "position_embeddings.weight"),
    *("dense.bias", "dense_4h_to_h.bias", "linear_proj.bias", "linear_fc2.bias"),
)
_BUFFERS = ("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq", "core_attention.bias")


def by_group(config: CheckpointConfig) -> np.ndarray:
    """Where the rows [q | k | v] are among those of one group after the other."""
    shared, size = config.n_head // config.kv_heads, config.head_size
    rows = np.arange(config.kv_heads * (shared + 2) * size).reshape(config.kv_heads, shared + 2, size)
    return np.concatenate([part.reshape(-1) for part in (rows[:, :shared], rows[:, shared], rows[:, shared + 1])])


def by_rank(ranks: int, config: CheckpointConfig) -> np.ndarray:
    """Where the rows [gate | up] are among the [gate | up] of one rank after the other."""
    return np.arange(2 * config.n_inner).reshape(ranks, 2, -1).transpose(1, 0, 2).reshape(-1)


def from_nemo(given: Settings, tensors: Mapping[str, Stored], ranks: int) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a model_config.yaml, and how the tensors of its archive are named.

    Args:
        tensors: Headers by name; with several ranks, names begin with the rank's number: "1/".
        ranks: Of tensor parallelism.
    """
    first = "" if ranks == 1 else "0/"
    is_core = f"{first}{_CORE_EMBEDDING}.weight" in tensors
    _refuse_others(given)
    config = _read_config(given, tensors, ranks, is_core)
    tied = config.tie_word_embeddings
    table = _core(ranks, config, tensors) if is_core else _legacy(ranks, config, tensors)
    others = tuple(f"{rank}/" for rank in range(1, ranks))
    copies = [
        name
        for name in tensors
        if (name.startswith(others) and name.endswith(_COPIES))
        or name.rpartition("/")[2] == "word_embeddings.weight"  # the last stage's, for a tied head
        or (tied and name.endswith("output_layer.weight"))
    ]
    return config, Layout(table, ignored=_BUFFERS, copies=frozenset(copies))


def _refuse_others(given: Settings) -> None:
    target = given.value("target", default="MegatronGPTModel")
    if not isinstance(target, str) or "GPT" not in target.rpartition(".")[2]:
        raise given.refuse(f"expected the target to be a megatron GPT model, got {shown(target)}")
    given.absent("megatron_legacy", "num_moe_experts", "headscale", "qk_layernorm", "rotary_interleaved")
    given.absent("apply_residual_connection_post_layernorm", "multi_query_attention")
    given.absent("virtual_pipeline_model_parallel_size", "window_size", "attn_logit_softcapping")
    for name, wanted in {"transformer_block_type": "pre_ln", "normalize_attention_scores": True}.items():
        if given.values.get(name) not in (None, wanted):
            given.only(**{name: wanted})


def _read_config(given: Settings, tensors: Mapping[str, Stored], ranks: int, is_core: bool) -> CheckpointConfig:
    n_embd = given.integer("hidden_size", limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", limit=settings.HEADS)
    n_kv_head = given.optional_integer("num_query_groups", limit=n_head)
    head_dim = given.optional_integer("kv_channels", limit=settings.WIDTH)
    n_inner = given.optional_integer("ffn_hidden_size", limit=settings.INNER_WIDTH)
    if head_dim is None:
        given.divided("hidden_size", n_embd, "num_attention_heads", n_head)
    given.divided("num_attention_heads", n_head, "num_query_groups", n_kv_head or n_head)
    n_inner = 4 * n_embd if n_inner is None else n_inner
    given.divided("num_query_groups", n_kv_head or n_head, "the number of ranks", ranks)
    given.divided("ffn_hidden_size", n_inner, "the number of ranks", ranks)

    first = "" if ranks == 1 else "0/"
    layer = f"{first}{_CORE if is_core else _LEGACY}".format(0)
    qkv, narrow = ("linear_qkv", "linear_fc2") if is_core else ("query_key_value", "dense_4h_to_h")
    name = f"{_CORE_EMBEDDING if is_core else _LEGACY_EMBEDDING}.weight"
    parts = [tensors.get(name if ranks == 1 else f"{rank}/{name}") for rank in range(ranks)]
    rows = [part.shape[0] for part in parts if part is not None and len(part.shape) == 2]
    if len(rows) != ranks:
        raise given.refuse(f"expected the weights of each rank to have {name} with rows, got them of {len(rows)}")
    activation, is_gated = _activation(given, f"{layer}.mlp.{narrow}.bias" in tensors)
    positions = _one_of(given, "position_embedding_type", _POSITIONS, "learned_absolute")
    fraction = given.positive("rotary_percentage", default=1.0)
    size = head_dim or n_embd // n_head
    if positions == "rotary" and (fraction > 1 or int(size * fraction) % 2 or int(size * fraction) < 2):
        raise given.refuse(
            f"expected rotary_percentage to make an even number of a head's {size} dimensions, got {shown(fraction)}"
        )
    factor = given.value("seq_len_interpolation_factor")
    norm = _one_of(given, "normalization", _NORMS, "layernorm")
    return CheckpointConfig(
        vocab_size=sum(rows),
        n_positions=given.integer(
            "max_position_embeddings", default=given.value("encoder_seq_length"), limit=settings.CONTEXT
        ),
        n_layer=given.integer("num_layers", limit=settings.LAYERS),
        n_head=n_head,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        head_dim=head_dim,
        n_embd=n_embd,
        n_inner=n_inner,
        activation_function=activation,
        gated_mlp=is_gated,
        norm=norm,
        norm_bias=norm != "rms" and any(name.endswith("final_layernorm.bias") for name in tensors),
        layer_norm_epsilon=given.fraction("layernorm_epsilon", default=1e-5),
        attention_bias=f"{layer}.self_attention.{qkv}.bias" in tensors,
        mlp_bias=f"{layer}.mlp.{narrow}.bias" in tensors,
        tie_word_embeddings=given.switch("share_embeddings_and_output_weights", True),
        position_embedding=positions,
        rotary_base=given.positive("rotary_base", default=10000.0),
        rotary_fraction=fraction,
        rotary_interpolation=1.0 if factor is None else given.positive("seq_len_interpolation_factor"),
        eos_token_ids=(),
    )


def _one_of(given: Settings, name: str, known: Mapping[str, str], default: str) -> str:
    value = given.value(name, default=default)
    if not isinstance(value, str) or value not in known:
        raise given.refuse(f"expected {name} to be one of {', '.join(known)}, got {shown(value)}")
    return known[value]


def _activation(given: Settings, has_bias: bool) -> tuple[str, bool]:
    """An activation by model.py's name, and whether it is a gate. NeMo fuses GELU with a bias in its tanh form."""
    value = given.value("activation", default="gelu")
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise given.refuse(f"expected activation to be one of {', '.join(_ACTIVATIONS)}, got {shown(value)}")
    name, is_gated = _ACTIVATIONS[value]
    is_fused = has_bias and given.switch("bias_activation_fusion", True)
    if name == "gelu" and (is_fused or given.switch("openai_gelu", False)):
        name = "gelu_new"
    return name, is_gated


def _ranked(ranks: int, *modules: str) -> tuple[str, ...]:
    """The modules of all ranks, one module after the other."""
    return modules if ranks == 1 else tuple(f"{rank}/{module}" for module in modules for rank in range(ranks))


def _table(ranks: int, names: Mapping[str, str], wide: Mapping[str, Order | None]) -> dict[str, From]:
    """A table of modules by the model's names: `wide` ones are split by rows, and their rows in some order."""
    table = {}
    for name, module in names.items():
        if name in wide:
            table[name] = From(_ranked(ranks, module), order=wide[name])
        elif name.endswith("c_proj"):
            table[name] = From(_ranked(ranks, module), axis=1)
        else:
            table[name] = From(_ranked(ranks, module)[0])
    return table


def _legacy(ranks: int, config: CheckpointConfig, tensors: Mapping[str, Any]) -> dict[str, From]:
    first = "" if ranks == 1 else "0/"
    names = {
        "wte": _LEGACY_EMBEDDING,
        "wpe": "language_model.embedding.position_embeddings",
        "h.{}.ln_1": f"{_LEGACY}.input_layernorm",
        "h.{}.attn.c_attn": f"{_LEGACY}.self_attention.query_key_value",
        "h.{}.attn.c_proj": f"{_LEGACY}.self_attention.dense",
        "h.{}.ln_2": f"{_LEGACY}.post_attention_layernorm",
        "h.{}.mlp.c_fc": f"{_LEGACY}.mlp.dense_h_to_4h",
        "h.{}.mlp.c_proj": f"{_LEGACY}.mlp.dense_4h_to_h",
        "ln_f": "language_model.encoder.final_layernorm",
        "lm_head": "language_model.output_layer",
    }
    gate = partial(by_rank, ranks) if config.gated_mlp else None
    table = _table(ranks, names, {"wte": None, "h.{}.attn.c_attn": by_group, "h.{}.mlp.c_fc": gate, "lm_head": None})
    if f"{first}{_LEGACY}.mlp.dense_h_to_4h_2.weight".format(0) in tensors:  # the gate's partner, by itself
        both = (f"{_LEGACY}.mlp.dense_h_to_4h", f"{_LEGACY}.mlp.dense_h_to_4h_2")
        table["h.{}.mlp.c_fc"] = From(_ranked(ranks, *both))
    return table


def _core(ranks: int, config: CheckpointConfig, tensors: Mapping[str, Any]) -> dict[str, From]:
    first = "" if ranks == 1 else "0/"
    is_fused = f"{first}{_CORE}.self_attention.linear_qkv.layer_norm_weight".format(0) in tensors
    names = {
        "wte": _CORE_EMBEDDING,
        "wpe": "embedding.position_embeddings",
        "h.{}.ln_1": f"{_CORE}.self_attention.linear_qkv.layer_norm_" if is_fused else f"{_CORE}.input_layernorm",
        "h.{}.attn.c_attn": f"{_CORE}.self_attention.linear_qkv",
        "h.{}.attn.c_proj": f"{_CORE}.self_attention.linear_proj",
        "h.{}.ln_2": f"{_CORE}.mlp.linear_fc1.layer_norm_" if is_fused else f"{_CORE}.pre_mlp_layernorm",
        "h.{}.mlp.c_fc": f"{_CORE}.mlp.linear_fc1",
        "h.{}.mlp.c_proj": f"{_CORE}.mlp.linear_fc2",
        "ln_f": "decoder.final_layernorm",
        "lm_head": "output_layer",
    }
    gate = partial(by_rank, ranks) if config.gated_mlp else None
    return _table(ranks, names, {"wte": None, "h.{}.attn.c_attn": by_group, "h.{}.mlp.c_fc": gate, "lm_head": None})
