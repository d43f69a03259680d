"""NeMo archives of transformers' models, with the names, the order of rows and the split among ranks that NeMo has."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

Tensors = dict[str, torch.Tensor]

EPSILONS = {"llama": "rms_norm_eps", "nemotron": "norm_eps", "stablelm": "layer_norm_eps"}
NORMS = {"llama": "rmsnorm", "nemotron": "layernorm1p", "stablelm": "layernorm"}


def config_of(model: Any, **changes: Any) -> dict[str, Any]:
    """A model_config.yaml of a GPT-2, a Llama, a Nemotron or a StableLM. A change to None takes a setting away."""
    config, kind = model.config, model.config.model_type
    settings: dict[str, Any] = {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "encoder_seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer"},
    }
    if kind == "gpt2":
        settings |= {"ffn_hidden_size": 4 * config.n_embd, "activation": "gelu"}
    else:
        settings |= {
            "ffn_hidden_size": config.intermediate_size,
            "num_query_groups": config.num_key_value_heads,
            "position_embedding_type": "rope",
            "rotary_base": config.rope_parameters["rope_theta"],
            "layernorm_epsilon": getattr(config, EPSILONS[kind]),
            "normalization": NORMS[kind],
            "activation": "squared-relu" if kind == "nemotron" else "fast-swiglu",
            "rotary_percentage": config.rope_parameters.get("partial_rotary_factor", 1.0),
        }
    return {name: value for name, value in (settings | changes).items() if value is not None}


def grouped(model: Any, tensors: Tensors) -> torch.Tensor:
    """The rows of q, k and v, group by group: [q of its heads, k, v]."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    parts = [tensors[which].reshape(groups, -1, *tensors[which].shape[1:]) for which in "qkv"]
    return torch.cat(parts, dim=1).reshape(-1, *tensors["q"].shape[1:])


def nemo_tensors(model: Any, is_core: bool) -> Tensors:
    """The state of one rank, under NeMo's names."""
    state, is_gpt2 = model.state_dict(), model.config.model_type == "gpt2"
    prefix = "" if is_core else "language_model."
    found: Tensors = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        found[f"model.{name}"] = tensor.clone().contiguous()

    embedding = "transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight"
    put(f"{prefix}embedding.word_embeddings.weight", state[embedding])
    if is_gpt2:
        put(f"{prefix}embedding.position_embeddings.weight", state["transformer.wpe.weight"])
    for layer in range(model.config.num_hidden_layers):
        source = f"transformer.h.{layer}." if is_gpt2 else f"model.layers.{layer}."
        target = f"decoder.layers.{layer}." if is_core else f"language_model.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, tensor in _layer(model, state, source, kind).items():
                put(target + (CORE if is_core else LEGACY)[name].format(kind), tensor)
    for kind in ("weight", "bias"):
        name = f"transformer.ln_f.{kind}" if is_gpt2 else f"model.norm.{kind}"
        if name in state:
            put(f"{'decoder' if is_core else 'language_model.encoder'}.final_layernorm.{kind}", state[name])
    if not model.config.tie_word_embeddings:
        put(f"{prefix}output_layer.weight", state["lm_head.weight"])
    return found


CORE = {
    "ln_1": "self_attention.linear_qkv.layer_norm_{}",
    "qkv": "self_attention.linear_qkv.{}",
    "dense": "self_attention.linear_proj.{}",
    "ln_2": "mlp.linear_fc1.layer_norm_{}",
    "wide": "mlp.linear_fc1.{}",
    "narrow": "mlp.linear_fc2.{}",
}
LEGACY = {
    "ln_1": "input_layernorm.{}",
    "qkv": "self_attention.query_key_value.{}",
    "dense": "self_attention.dense.{}",
    "ln_2": "post_attention_layernorm.{}",
    "wide": "mlp.dense_h_to_4h.{}",
    "narrow": "mlp.dense_4h_to_h.{}",
}


def _layer(model: Any, state: Tensors, source: str, kind: str) -> Tensors:
    if model.config.model_type == "gpt2":
        names = {"ln_1": "ln_1", "qkv": "attn.c_attn", "dense": "attn.c_proj", "ln_2": "ln_2"}
        names |= {"wide": "mlp.c_fc", "narrow": "mlp.c_proj"}
        found = {name: state[f"{source}{stored}.{kind}"] for name, stored in names.items()}
        found = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in found.items()}
        q, k, v = found["qkv"].chunk(3)
        return {**found, "qkv": grouped(model, {"q": q, "k": k, "v": v})}
    names = {"ln_1": "input_layernorm", "dense": "self_attn.o_proj", "ln_2": "post_attention_layernorm"}
    names |= {"narrow": "mlp.down_proj", "gate": "mlp.gate_proj", "wide": "mlp.up_proj"}
    names |= {which: f"self_attn.{which}_proj" for which in "qkv"}
    found = {name: state[key] for name, stored in names.items() if (key := f"{source}{stored}.{kind}") in state}
    if "q" in found:
        found["qkv"] = grouped(model, {which: found.pop(which) for which in "qkv"})
    if "gate" in found:
        found["wide"] = torch.cat([found.pop("gate"), found["wide"]])
    return found


def split(tensors: Tensors, ranks: int, is_gated: bool) -> list[Tensors]:
    """One state a rank of tensor parallelism."""
    parts: list[Tensors] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if "layer_norm" in name or "layernorm" in name or "position" in name:
            pieces = [tensor] * ranks
        elif last in ("word_embeddings", "output_layer", "linear_qkv", "query_key_value"):
            pieces = list(tensor.chunk(ranks))
        elif last in ("linear_fc1", "dense_h_to_4h"):
            pieces = list(tensor.chunk(ranks))
            if is_gated:
                gate, up = (half.chunk(ranks) for half in tensor.chunk(2))
                pieces = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        else:
            pieces = list(tensor.chunk(ranks, dim=1)) if kind == "weight" else [tensor] * ranks
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts


def stages(tensors: Tensors, count: int, layers: int) -> list[Tensors]:
    """One state a stage of pipeline parallelism, each with layers from 0 on."""
    parts: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        before, found, after = name.partition(".layers.")
        if found:
            number, _, rest = after.partition(".")
            stage, local = divmod(int(number), layers // count)
            parts[stage][f"{before}.layers.{local}.{rest}"] = tensor
        else:
            parts[-1 if "final_layernorm" in name or "output_layer" in name else 0][name] = tensor
    return parts


def write_nemo(
    path: Path,
    model: Any,
    is_core: bool = False,
    ranks: int = 1,
    stage_count: int = 1,
    mode: str = "w",
    files: dict[str, bytes] | None = None,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """An archive.

    Args:
        files: More of them, by name.
        extra: What else the state holds.
        changes: Of the settings.
    """
    config = config_of(model, tensor_model_parallel_size=ranks, pipeline_model_parallel_size=stage_count, **changes)
    tensors = {name: tensor.to(dtype) for name, tensor in nemo_tensors(model, is_core).items()}
    contents: dict[str, bytes] = {"./model_config.yaml": yaml.safe_dump(config).encode(), **(files or {})}
    for rank, part in enumerate(split(tensors, ranks, "swiglu" in config["activation"])):
        for stage, state in enumerate(stages(part, stage_count, model.config.num_hidden_layers)):
            buffer = io.BytesIO()
            torch.save({**state, **(extra or {})}, buffer)
            folder = ""
            if stage_count > 1:
                folder = f"tp_rank_{rank:02}_pp_rank_{stage:03}/"
            elif ranks > 1:
                folder = f"mp_rank_{rank:02}/"
            contents[f"./{folder}model_weights.ckpt"] = buffer.getvalue()
    return write_tar(path, contents, mode)


def write_tar(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_nemo_lora(
    path: Path,
    model: Any,
    is_core: bool = False,
    ranks: int = 1,
    rank: int = 4,
    seed: int = 0,
    mode: str = "w",
    dtype: torch.dtype = torch.float32,
    change: Callable[[Tensors], object] | None = None,
    **changes: Any,
) -> Tensors:
    """An archive of random adapters of queries, keys and values.

    Args:
        change: What else is done with the state of each rank.
        changes: Of the settings.

    Returns:
        By their names in `write_nemo`'s archive of the model, the weights with the adapters in them, as NeMo merges
        them: what is added has the weight's own order of rows.
    """
    random = torch.Generator().manual_seed(seed)
    base, states, merged = nemo_tensors(model, is_core), [{} for _ in range(ranks)], {}  # type: ignore[var-annotated]
    for name, weight in base.items():
        module, found, _ = name.partition("linear_qkv.weight" if is_core else "query_key_value.weight")
        if not found:
            continue
        down = torch.randn(rank, weight.shape[1], generator=random).mul(weight.shape[1] ** -0.5).to(dtype)
        up = torch.randn(weight.shape[0], rank, generator=random).mul(0.3).to(dtype)
        merged[name] = weight + up.float() @ down.float()
        for way, tensor in (("in", down), ("out", up)):
            for state, piece in zip(states, tensor.chunk(ranks), strict=True):
                state[f"{module}adapter_layer.lora_kqv_adapter.linear_{way}.weight"] = piece.clone()
    settings = {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": rank, "adapter_dropout": 0.0}}
    config = config_of(model, tensor_model_parallel_size=ranks, **{"peft": settings, **changes})
    contents = {"./model_config.yaml": yaml.safe_dump(config).encode()}
    for number, state in enumerate(states):
        if change is not None:
            change(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        contents[f"./{f'mp_rank_{number:02}/' if ranks > 1 else ''}model_weights.ckpt"] = buffer.getvalue()
    write_tar(path, contents, mode)
    return merged
