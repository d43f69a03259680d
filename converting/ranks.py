"""A checkpoint of any kind → a folder of ranks' files in TensorRT-LLM's format, a parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion import convert, numpy_dtype
from converting.rank_writer import RankWriter
from converting.weight_only import BITS, rounded
from loading.config import CheckpointConfig
from loading.families.tensorrt_llm import ALGORITHMS, settings_of
from loading.modelopt_layout import FLOATS, is_quantized
from loading.rank_layout import Whole, wholes
from output_folder import written_beside
from parallelism.mapping import Mapping
from tokenizing.export import files_of
from weight_loader import GENERATION_FILE, Checkpoint, CheckpointError

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names
#: Of a checkpoint that is quantized, what it becomes, by its mode.
_KEPT = {"int8-weight-only": "W8A16", "int4-weight-only": "W4A16_AWQ", "fp8": "FP8"}
#: Of one that is quantized here.
_MADE = {"int8-weight-only": "W8A16", "int4-weight-only": "W4A16"}


class ConversionError(Exception):
    """A checkpoint cannot be shared, or not stored, as asked. The text is one line, ready to be shown to the user."""


@dataclass(frozen=True)
class Conversion:
    """What is written.

    Attributes:
        checkpoint: The source.
        config: Its settings as they are written.
        mapping: Of any of the ranks.
        dtype: Of the tensors that are not quantized.
        algorithm: One of `ALGORITHMS`, None: nothing is quantized.
        rounds: Whether it is quantized here.
    """

    checkpoint: Checkpoint
    config: CheckpointConfig
    mapping: Mapping
    dtype: str
    algorithm: str | None
    rounds: bool

    @property
    def has_head_copy(self) -> bool:
        """Whether a tied head is stored beside the embedding."""
        return self.config.tie_word_embeddings and not self.mapping.shares_embedding(self.config)


def planned(checkpoint: Checkpoint, mapping: Mapping, dtype: str | None = None, mode: str | None = None) -> Conversion:
    """What a checkpoint becomes; nothing is read yet.

    Args:
        mapping: How ranks share it.
        dtype: Of what is not quantized; None: the type that it is stored in.
        mode: How to quantize one that is not: one of `BITS`.

    Raises:
        ConversionError: it cannot be shared or stored so.
    """
    config = checkpoint.config
    if config.quant_mode is not None and config.quant_mode not in _KEPT:
        raise ConversionError(
            f"expected a checkpoint that is not quantized, or in {', '.join(_KEPT)}, but {checkpoint.path} is in "
            f"{config.quant_mode}"
        )
    if config.quant_embedding or config.quant_position_embedding:
        raise ConversionError(f"expected embeddings that are not quantized, but those of {checkpoint.path} are")
    if mode is not None and (config.quant_mode is not None or config.kv_cache_dtype is not None):
        raise ConversionError(f"expected a checkpoint that is not quantized yet, but {checkpoint.path} is")
    if mode is not None:  # one scale a row: there are no blocks that ranks would have to share
        config = replace(config, quant_mode=mode, pre_quant_scale=False, block_size=1)
    algorithm = _KEPT[config.quant_mode] if config.quant_mode is not None else None
    if mode is not None:
        algorithm = _MADE[mode]
    if config.norm == "layer1p":
        config = replace(config, norm="layer")
    try:
        mapping.check(config)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    return Conversion(checkpoint, config, mapping, dtype or checkpoint.stored_dtype, algorithm, mode is not None)


def write(conversion: Conversion, folder: Path) -> int:
    """Writes the folder, all of it or nothing, and says on standard error how far it is.

    Returns:
        Bytes of the ranks' files.

    Raises:
        ConversionError: a number is not in the type that is asked for.
        CheckpointError: the checkpoint or its tokenizer cannot be used.
        UsageError: there is something at `folder`, or too little space on its disk.
        OSError: it cannot be written.
    """
    from tqdm import tqdm

    kept = _kept_files(conversion.checkpoint)
    plan = list(wholes(conversion.config, ALGORITHMS[conversion.algorithm], conversion.has_head_copy))
    norms = _dtype_of_norms(conversion)
    writer = RankWriter(plan, conversion.config, conversion.mapping, lambda whole: _stored(whole, conversion, norms))
    with written_beside(folder, writer.size, "--output-dir") as scratch:
        with (
            writer.opened(scratch),
            tqdm(total=writer.size, desc="convert_checkpoint.py", unit="B", unit_scale=True) as progress,
        ):
            for whole, values in _tensors(conversion, plan):
                progress.update(writer.write(whole, values))
        said = config_json(conversion.config, conversion.mapping, conversion.dtype, conversion.algorithm)
        (scratch / "config.json").write_text(json.dumps(said, indent=4) + "\n", encoding="utf-8")
        for name, content in kept.items():
            (scratch / name).write_bytes(content)
    return writer.size


def config_json(config: CheckpointConfig, mapping: Mapping, dtype: str, algorithm: str | None) -> dict[str, Any]:
    """The content of config.json."""
    sizes = {"world_size": mapping.world_size, "tp_size": mapping.tp_size, "pp_size": mapping.pp_size}
    return {
        **settings_of(config, dtype, algorithm),
        "mapping": sizes,
        "use_parallel_embedding": mapping.embedding_sharding_dim is not None,
        "embedding_sharding_dim": mapping.embedding_sharding_dim or 0,
        "share_embedding_table": mapping.shares_embedding(config),
    }


def _stored(whole: Whole, conversion: Conversion, norms: str) -> str:
    """What a tensor is stored as. Scales are in float32, so that the integers are those that they were made with."""
    if whole.dtypes != FLOATS:
        return whole.dtypes[0]
    if whole.kind not in ("weight", "bias"):
        return "F32"
    return STORED[norms if whole.is_norm else conversion.dtype]


def _dtype_of_norms(conversion: Conversion) -> str:
    """The type of norms: the others', unless it would round one of their numbers, with which the model computes in
    float32."""
    dtype = numpy_dtype(conversion.dtype)
    for name, values in conversion.checkpoint.norms():
        values = _norm(conversion.checkpoint, name, values)
        with np.errstate(over="ignore"):
            if not np.array_equal(values.astype(dtype).astype(np.float32), values):
                return "float32"
    return conversion.dtype


def _norm(checkpoint: Checkpoint, name: str, values: np.ndarray) -> np.ndarray:
    """A norm's weights as the format has them: what it multiplies by."""
    adds_one = checkpoint.config.norm == "layer1p" and name.endswith(".weight")
    return values + np.float32(1) if adds_one else values


def _tensors(conversion: Conversion, plan: list[Whole]) -> Iterator[tuple[Whole, np.ndarray]]:
    """Every tensor of the whole model as it is stored, but for the ranks' parts of it."""
    of: dict[str, list[Whole]] = {}
    for whole in plan:
        of.setdefault(whole.of, []).append(whole)
    for name, values in _parameters(conversion):
        if name == "wte.weight" and conversion.has_head_copy and not conversion.config.quant_lm_head:
            yield of["lm_head.weight"][0], values
        for whole in of[name]:
            # Of several stored modules each has its rows, but all have the scales of what goes into them.
            is_by_row = whole.kind != "pre_quant_scale" and values.ndim > 0 and len(values) > whole.shape[0]
            yield whole, values[whole.begin : whole.begin + whole.outputs] if is_by_row else values


def _parameters(conversion: Conversion) -> Iterator[tuple[str, np.ndarray]]:
    """The model's parameters and scales, by their names: integers for weights that are quantized, (out, in)."""
    checkpoint, config = conversion.checkpoint, conversion.config
    quantizes = conversion.algorithm is not None or config.kv_cache_dtype is not None
    dtype = numpy_dtype(conversion.dtype)
    weight: np.ndarray | None = None  # that waits for its scale
    for name, values in checkpoint.parameters("float32" if quantizes else conversion.dtype):
        module, _, kind = name.rpartition(".")
        is_norm = ".ln_" in name or name.startswith("ln_f.")
        if kind == "weight" and is_quantized(config, name):
            if conversion.rounds:
                integers, scales = rounded(values, BITS[str(config.quant_mode)])
                yield name, integers
                yield f"{module}.weight_scale", scales
            else:
                weight = values
        elif kind == "weight_scale":
            assert weight is not None
            yield name.replace("_scale", ""), _numbers(weight, values, config)
            yield name, values.T if values.ndim == 2 else values
        elif is_norm:
            yield name, _norm(checkpoint, name, values)
        elif quantizes and kind in ("weight", "bias"):
            yield name, _converted(conversion, name, values, dtype)
        else:
            yield name, values


def _converted(conversion: Conversion, name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        return convert(name, values, dtype)
    except ValueError as error:
        raise CheckpointError(f"{conversion.checkpoint.path}: {error}") from None


def _numbers(weight: np.ndarray, scale: np.ndarray, config: CheckpointConfig) -> np.ndarray:
    """The numbers of a quantized weight before scaling, (out, in), from what they stand for."""
    if config.quant_mode == "fp8":
        return (weight / scale).astype(numpy_dtype("float8_e4m3fn"))
    if scale.ndim == 2:  # of blocks: both are (in, out) here
        by_block = weight.T.reshape(weight.shape[1], scale.shape[0], -1) / scale.T[:, :, None]
        return np.rint(by_block).astype(np.int8).reshape(weight.shape[::-1])
    return np.rint(weight / scale[:, None]).astype(np.int8)


def _kept_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer, and what ends a text: read before the work, which would be in vain without.

    Raises:
        CheckpointError: they cannot be read.
    """
    contents, path = files_of(checkpoint.tokenizer_source), checkpoint.path / GENERATION_FILE
    try:
        if path.is_file():
            contents[GENERATION_FILE] = path.read_bytes()
        elif checkpoint.config.eos_token_ids:
            ends = {"eos_token_id": list(checkpoint.config.eos_token_ids)}
            contents[GENERATION_FILE] = (json.dumps(ends, indent=2) + "\n").encode()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return contents
