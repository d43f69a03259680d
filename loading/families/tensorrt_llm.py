"""TensorRT-LLM's checkpoints: the settings in their config.json, there and back, and how they name tensors.

https://nvidia.github.io/TensorRT-LLM/architecture/checkpoint.html describes the format, tensorrt_llm/models/gpt and
models/llama what their scripts write into it. Two of its classes are known, by what they compute:

    LlamaForCausalLM    RMSNorm, rotary positions, an MLP gated by SiLU
    GPTForCausalLM      everything else; a gate is in the name of the activation ("swiglu")

Linear weights are (out, in), Q, K and V one matrix. A gated MLP is `mlp.proj(act(mlp.fc(x)) * mlp.gate(x))`
(tensorrt_llm/layers/mlp.py, GatedMLP): `fc` is what others call the gate, and `gate` what they call up. LayerNorm's
weights are what it multiplies by: where others add 1, it has been added. A tied head is stored a second time, unless
`share_embedding_table` is true.

Where these classes have no word for what a model is, fields have HuggingFace's names: `tie_word_embeddings`,
`sliding_window` (there an option at run time), `scale_attn_by_inverse_layer_idx`; or ours: `gated_mlp`, `norm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loading import settings
from loading.config import CheckpointConfig
from loading.errors import shown
from loading.settings import Settings
from loading.table import From, Layout

LLAMA, GPT = "LlamaForCausalLM", "GPTForCausalLM"
#: The classes of this format that compute what GPTForCausalLM does: HuggingFace's names, of which the scripts make it.
ARCHITECTURES = (
    *(LLAMA, "LLaMAForCausalLM", "MistralForCausalLM", "GraniteForCausalLM"),
    *(GPT, "GPT2LMHeadModel", "GPT2LMHeadCustomModel", "GPTBigCodeForCausalLM", "Starcoder2ForCausalLM"),
    "NemotronForCausalLM",
)
_LLAMAS = ARCHITECTURES[:4]

#: What a prefix of "transformer." precedes, but for the head.
LAYOUT = Layout(
    {
        "wte": From("vocab_embedding"),
        "wpe": From("position_embedding"),
        "h.{}.ln_1": From("layers.{}.input_layernorm"),
        "h.{}.attn.c_attn": From("layers.{}.attention.qkv"),
        "h.{}.attn.c_proj": From("layers.{}.attention.dense"),
        "h.{}.ln_2": From("layers.{}.post_layernorm"),
        "h.{}.mlp.c_fc": From(("layers.{}.mlp.fc", "layers.{}.mlp.gate"), ("gate", "up")),
        "h.{}.mlp.c_proj": From("layers.{}.mlp.proj"),
        "ln_f": From("ln_f"),
        "lm_head": From("lm_head"),
    },
    prefix="transformer.",
    cache_scale="layers.{0}.attention.{1}_cache_scaling_factor",
)
_PLAIN = {**LAYOUT.table, "h.{}.mlp.c_fc": From("layers.{}.mlp.fc")}

_GATED = {"swiglu": "silu", "fast-swiglu": "silu", "geglu": "gelu", "fast-geglu": "gelu"}
_SQUARED_RELU = "squared-relu"
_POSITIONS = {"learned_absolute": "learned", "rope_gpt_neox": "rotary"}


@dataclass(frozen=True)
class Algorithm:
    """What a quant_algo stores beside the weights of linear layers.

    Attributes:
        mode: The model's name of it; None: nothing is quantized.
        scales: The last parts of the names of scales, by the model's names of them.
        has_blocks: Whether each block of input features has a scale; else each output feature, or in fp8 each weight.
    """

    mode: str | None
    scales: Mapping[str, str]
    has_blocks: bool = False


#: By quant_algo. Of W8A16 and W4A16, scales are of output features; W4A16_AWQ's blocks may be without AWQ's own scales.
ALGORITHMS: dict[str | None, Algorithm] = {
    None: Algorithm(None, {}),
    "W8A16": Algorithm("int8-weight-only", {"weight_scale": "per_channel_scale"}),
    "W4A16": Algorithm("int4-weight-only", {"weight_scale": "per_channel_scale"}),
    "W4A16_AWQ": Algorithm(
        "int4-weight-only",
        {"weight_scale": "weights_scaling_factor", "pre_quant_scale": "prequant_scaling_factor"},
        has_blocks=True,
    ),
    "FP8": Algorithm("fp8", {"weight_scale": "weights_scaling_factor", "input_scale": "activation_scaling_factor"}),
}
CACHES: dict[str | None, str | None] = {None: None, "INT8": "int8", "FP8": "fp8"}


def layout_of(config: CheckpointConfig) -> Layout:
    """How the tensors of a model are named, layers numbered throughout."""
    return Layout(LAYOUT.table if config.gated_mlp else _PLAIN, LAYOUT.prefix, cache_scale=LAYOUT.cache_scale)


def is_meant(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format: HuggingFace's name several architectures, if any, and a model_type."""
    return "architecture" in raw and "model_type" not in raw and "architectures" not in raw


# ---- settings → configuration ----------------------------------------------------------------------------------------


def read_config(given: Settings, has_bias: Mapping[str, bool]) -> CheckpointConfig:
    """The configuration in a config.json, but for quantization.

    Args:
        has_bias: Whether there is one in "norm", "attention" and "mlp": this the tensors say.

    Raises:
        CheckpointError: it is of a class, or has a setting, that the model does not know.
    """
    architecture = given.value("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise given.refuse(f"expected architecture to be one of {', '.join(ARCHITECTURES)}, got {shown(architecture)}")
    is_llama = architecture in _LLAMAS
    given.absent("qk_layernorm", "inner_layernorm", "residual_mlp", "norm_before_bmm1", "embedding_scale")
    given.neutral(embedding_multiplier=1, residual_multiplier=1, output_multiplier_scale=1)
    moe = given.values.get("moe")
    if isinstance(moe, dict) and moe.get("num_experts"):
        raise given.refuse(f"moe={shown(moe)} is not supported: the model has no experts")
    n_embd = given.integer("hidden_size", limit=settings.WIDTH)
    n_head = given.integer("num_attention_heads", limit=settings.HEADS)
    n_kv_head = given.optional_integer("num_key_value_heads", limit=n_head)
    head_dim = given.optional_integer("head_size", limit=settings.WIDTH)
    if head_dim is None:
        given.divided("hidden_size", n_embd, "num_attention_heads", n_head)
    given.divided("num_attention_heads", n_head, "num_key_value_heads", n_kv_head or n_head)
    head_size = head_dim or n_embd // n_head
    positions = given.value("position_embedding_type", default="rope_gpt_neox" if is_llama else "learned_absolute")
    if not isinstance(positions, str) or positions not in _POSITIONS:
        raise given.refuse(f"expected position_embedding_type to be {' or '.join(_POSITIONS)}, got {shown(positions)}")
    activation, is_gated = _activation(given, is_llama)
    norm = given.value("norm", default="rms" if is_llama else "layer")
    if norm not in ("layer", "rms"):
        raise given.refuse(f"expected norm to be layer or rms, got {shown(norm)}")
    inner = given.optional_integer("intermediate_size", limit=settings.INNER_WIDTH)
    return CheckpointConfig(
        vocab_size=given.integer("vocab_size", limit=settings.VOCABULARY),
        n_positions=given.integer("max_position_embeddings", limit=settings.CONTEXT),
        n_layer=given.integer("num_hidden_layers", limit=settings.LAYERS),
        n_head=n_head,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        head_dim=None if head_size * n_head == n_embd else head_size,
        n_embd=n_embd,
        n_inner=4 * n_embd if inner is None else inner,
        activation_function=activation,
        gated_mlp=is_gated,
        norm=norm,
        norm_bias=norm != "rms" and has_bias["norm"],
        layer_norm_epsilon=given.fraction("norm_epsilon", default=1e-5),
        attention_bias=has_bias["attention"],
        mlp_bias=has_bias["mlp"],
        tie_word_embeddings=given.switch("tie_word_embeddings", given.switch("share_embedding_table", False)),
        scale_attn_weights=_is_scaled(given, head_size),
        scale_attn_by_inverse_layer_idx=given.switch("scale_attn_by_inverse_layer_idx", False),
        position_embedding=_POSITIONS[positions],
        window=_window(given),
        eos_token_ids=(),
        **(_rotary(given, head_size) if positions == "rope_gpt_neox" else {}),
    )


def _activation(given: Settings, is_llama: bool) -> tuple[str, bool]:
    """An activation by model.py's name, and whether it is a gate."""
    name = given.value("hidden_act", default="gelu")
    if name == _SQUARED_RELU:
        return "relu2", False
    if isinstance(name, str) and name in _GATED:
        return _GATED[name], True
    return given.activation("hidden_act", "gelu"), given.switch("gated_mlp", is_llama)


def _is_scaled(given: Settings, head_size: int) -> bool:
    """Whether scores are scaled by the root of a head's size, or not at all: what `q_scaling`, or the inverse, says."""
    scaling = given.positive("q_scaling", default=1.0) / given.positive("attention_multiplier", default=1.0)
    if not math.isclose(scaling, 1.0) and not math.isclose(scaling, head_size**-0.5, rel_tol=1e-6):
        raise given.refuse(f"expected q_scaling to be 1 or {head_size**-0.5:g}, got {scaling:g}")
    return math.isclose(scaling, 1.0)


def _window(given: Settings) -> int | None:
    size = given.optional_integer("sliding_window", limit=2**31)
    n_positions = given.integer("max_position_embeddings", limit=settings.CONTEXT)
    return None if size is None or size >= n_positions else size


def _rotary(given: Settings, head_size: int) -> dict[str, Any]:
    scaling = given.values.get("rotary_scaling")
    factor = 1.0
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise given.refuse(f"expected rotary_scaling to be an object or null, got {shown(scaling)}")
        inner = Settings(f"{given.source}: rotary_scaling", scaling)
        kind = inner.value("rope_type", "type")
        if kind not in ("linear", "default"):
            raise given.refuse(f"expected rotary_scaling to be linear, got {shown(scaling)}")
        factor = inner.positive("factor") if kind == "linear" else 1.0
    fraction = given.positive("rotary_pct", default=1.0)
    if fraction > 1 or int(head_size * fraction) % 2 or int(head_size * fraction) < 2:
        raise given.refuse(
            f"expected rotary_pct to make an even number of a head's {head_size} dimensions, got {fraction:g}"
        )
    return {
        "rotary_base": given.positive("rotary_base", default=10000.0),
        "rotary_fraction": fraction,
        "rotary_interpolation": factor,
    }


# ---- configuration → settings ----------------------------------------------------------------------------------------


def settings_of(config: CheckpointConfig, dtype: str, algorithm: str | None) -> dict[str, Any]:
    """What a config.json says of a model, but for how ranks share it. `read_config` gives `config` back, but for its
    quantization and the tokens that end a text, and for norms with 1 added, which are plain ones here.

    Args:
        dtype: Of the tensors.
        algorithm: One of `ALGORITHMS`.
    """
    is_llama = (
        config.norm == "rms"
        and config.position_embedding == "rotary"
        and config.gated_mlp
        and config.activation_function == "silu"
        and config.rotary_fraction == 1.0
    )
    said: dict[str, Any] = {
        "architecture": LLAMA if is_llama else GPT,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_size": config.head_size,
        "intermediate_size": config.n_inner,
        "hidden_act": config.activation_function if is_llama else _said_activation(config),
        "norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": {ours: theirs for theirs, ours in _POSITIONS.items()}[config.position_embedding],
        "tie_word_embeddings": config.tie_word_embeddings,
        "quantization": _said_quantization(config, algorithm),
    }
    scaling = 1.0 if config.scale_attn_weights else config.head_size**-0.5
    if is_llama:
        said |= {"attn_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
        said |= {} if scaling == 1.0 else {"attention_multiplier": 1.0 / scaling}
    else:
        said |= {"bias": config.attention_bias and config.mlp_bias, "q_scaling": scaling}
        said |= {"gated_mlp": True} if config.gated_mlp else {}
        said |= {"norm": "rms"} if config.norm == "rms" else {}
    if config.position_embedding == "rotary":
        factor = config.rotary_interpolation
        said["rotary_base"] = config.rotary_base
        said["rotary_scaling"] = None if factor == 1.0 else {"type": "linear", "factor": factor}
        said |= {} if is_llama else {"rotary_pct": config.rotary_fraction}
    if config.window is not None:
        said["sliding_window"] = config.window
    if config.scale_attn_by_inverse_layer_idx:
        said["scale_attn_by_inverse_layer_idx"] = True
    return said


def _said_activation(config: CheckpointConfig) -> str:
    name = config.activation_function
    if config.gated_mlp:
        return {"silu": "swiglu", "gelu": "geglu"}.get(name, name)
    return _SQUARED_RELU if name == "relu2" else name


def _said_quantization(config: CheckpointConfig, algorithm: str | None) -> dict[str, Any]:
    cache = {ours: theirs for theirs, ours in CACHES.items()}[config.kv_cache_dtype]
    said: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
    if ALGORITHMS[algorithm].has_blocks:
        said |= {"group_size": config.block_size, "has_zero_point": False, "pre_quant_scale": config.pre_quant_scale}
    if algorithm is not None and not config.quant_lm_head:
        said["exclude_modules"] = ["lm_head"]
    return said
