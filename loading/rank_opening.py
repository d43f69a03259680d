"""A folder in TensorRT-LLM's format → its configuration and its tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from loading.config import CheckpointConfig
from loading.containers.safetensors_file import SafetensorsFile
from loading.errors import CheckpointError, shown
from loading.families import tensorrt_llm
from loading.families.tensorrt_llm import ALGORITHMS, CACHES, LAYOUT
from loading.modelopt_layout import FLOATS, Description
from loading.rank_folder import RankFolder, open_ranks
from loading.settings import Settings
from parallelism.mapping import Mapping

_MOST_RANKS = 2**12


def open_rank_folder(folder: Path, given: Settings) -> tuple[CheckpointConfig, RankFolder, Description | None]:
    """What is in such a folder; nothing but headers is read.

    Args:
        given: Its config.json.

    Raises:
        CheckpointError: it cannot be read, is incomplete, or is nothing that the model can run.
    """
    mapping = read_mapping(given)
    files = open_ranks(folder, mapping)
    config = tensorrt_llm.read_config(given, _biases(files[0], files[-1]))
    head = files[-1].tensors.get("lm_head.weight")
    algorithm, config, description = _quantization(given, config, mapping)
    if head is not None and head.dtype not in FLOATS:
        config = replace(config, quant_lm_head=algorithm is not None)
    try:
        mapping.check(config)
    except ValueError as error:
        raise given.refuse(str(error)) from None
    tensors = RankFolder(folder, files, mapping, config, ALGORITHMS[algorithm], has_head_copy=head is not None)
    return config, tensors, description


def read_mapping(given: Settings) -> Mapping:
    """How ranks share a checkpoint, as its config.json says.

    Raises:
        CheckpointError: in a way that is not possible.
    """
    value = given.value("mapping")
    if not isinstance(value, dict):
        raise given.refuse(f"expected mapping to be an object, got {shown(value)}")
    inner = Settings(f"{given.source}: mapping", value)
    inner.neutral(cp_size=1)
    tp_size, pp_size = (inner.integer(name, default=1, limit=_MOST_RANKS) for name in ("tp_size", "pp_size"))
    world_size = inner.integer("world_size", default=tp_size * pp_size, limit=_MOST_RANKS)
    if world_size != tp_size * pp_size:
        raise inner.refuse(f"expected world_size to be tp_size times pp_size, {tp_size} x {pp_size}, got {world_size}")
    dimension = given.value("embedding_sharding_dim", default=0)
    if isinstance(dimension, bool) or dimension not in (0, 1):
        raise given.refuse(f"expected embedding_sharding_dim to be 0 or 1, got {shown(dimension)}")
    is_parallel = given.switch("use_parallel_embedding", False)
    return Mapping(tp_size, pp_size, embedding_sharding_dim=dimension if is_parallel else None)


def _biases(first: SafetensorsFile, last: SafetensorsFile) -> dict[str, bool]:
    """Whether a model has biases, seen from its first layer and its last norm."""
    layer = f"{LAYOUT.prefix}layers.0"
    return {
        "norm": f"{LAYOUT.prefix}ln_f.bias" in last.tensors,
        "attention": f"{layer}.attention.qkv.bias" in first.tensors,
        "mlp": f"{layer}.mlp.fc.bias" in first.tensors,
    }


def _quantization(
    given: Settings, config: CheckpointConfig, mapping: Mapping
) -> tuple[str | None, CheckpointConfig, Description | None]:
    """The quant_algo, the configuration with it, and what ModelOpt's description would say of it."""
    value = given.value("quantization")
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise given.refuse(f"expected quantization to be an object or null, got {shown(value)}")
    inner = Settings(f"{given.source}: quantization", value)
    name, cache = (inner.value(key) for key in ("quant_algo", "kv_cache_quant_algo"))
    if not isinstance(name, str | None) or name not in ALGORITHMS:
        known = ", ".join(str(each) for each in ALGORITHMS if each)
        raise inner.refuse(f"expected quant_algo to be one of {known} or null, got {shown(name)}")
    if not isinstance(cache, str | None) or cache not in CACHES:
        known = ", ".join(str(each) for each in CACHES if each)
        raise inner.refuse(f"expected kv_cache_quant_algo to be one of {known} or null, got {shown(cache)}")
    algorithm = ALGORITHMS[name]
    if algorithm.mode is None and CACHES[cache] is None:
        return None, config, None
    description = Description(algorithm.mode, CACHES[cache])
    if algorithm.mode == "int4-weight-only":
        inner.only(has_zero_point=False)
        description = replace(
            description,
            block_size=_block(inner, config, mapping, algorithm.has_blocks),
            pre_quant_scale=algorithm.has_blocks and inner.switch("pre_quant_scale", False),
        )
    quantized = replace(
        config,
        quant_mode=description.mode,
        kv_cache_dtype=description.kv_cache_dtype,
        block_size=description.block_size,
        pre_quant_scale=description.pre_quant_scale,
    )
    return name, quantized, description


def _block(inner: Settings, config: CheckpointConfig, mapping: Mapping, has_blocks: bool) -> int:
    """Input features that share a scale. Where all of a row do: the largest block that divides any rank's."""
    widths = (config.n_embd, config.query_width // mapping.tp_size, config.n_inner // mapping.tp_size)
    if not has_blocks:
        return max(1, math.gcd(*widths))
    size = inner.integer("group_size", default=64, limit=2**20)
    if any(width % size for width in widths):
        raise CheckpointError(
            f"{inner.source}: expected group_size to divide the widths of a rank, {', '.join(map(str, widths))}, "
            f"got {size}"
        )
    return size
