"""Writes a checkpoint of random weights, of any size, as a HuggingFace folder: for benchmarks, and tests of shapes.

    python random_checkpoint.py --preset gpt2-xl --dtype float16 --output /tmp/gpt2-xl
    python random_checkpoint.py --architecture LlamaForCausalLM --n-layer 2 --n-embd 64 --n-head 4 --output /tmp/tiny
    python random_checkpoint.py --preset gpt-175b --dtype float16 --tp-size 8 --output /tmp/gpt-175b

The folder has config.json, generation_config.json and safetensors files, with an index where there are several; it has
no tokenizer. With `--tp-size` or `--pp-size` it has config.json and a file for each rank, as convert_checkpoint.py
writes them. The weights are drawn as GPT-2's are before training: normal, of deviation 0.02, divided by the root of
twice the number of layers where they add to the residual stream (Radford et al. 2019); norms are 1. Biases are drawn,
too, so that a lost one is noticed. The same seed gives the same bytes, on any number of threads.

Every block of numbers is drawn, converted and written by itself, so that the memory it takes does not depend on the
size: a checkpoint of 175 billion parameters (--preset gpt-175b) is as large as the disk allows. It is written beside
the folder that is asked for, which it becomes in the end.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import command_line
from command_line import UsageError
from conversion import PARAMETER_DTYPES, numpy_dtype
from converting import arguments as rank_arguments
from converting import random_ranks
from converting.random_numbers import BLOCK, Draw, drawn
from converting.ranks import STORED
from loading.containers.safetensors_file import header_of
from loading.opening import FAMILIES
from loading.rank_layout import Whole
from loading.settings import Settings
from output_folder import in_bytes, written_beside
from parallelism.mapping import Mapping

PROGRAM = "random_checkpoint.py"
DEVIATION = 0.02
_LARGEST = 2**31 - 1  # of a size


@dataclass(frozen=True)
class Shape:
    """What a checkpoint's weights are.

    Attributes:
        architecture: HuggingFace's name of the model.
        n_layer, n_embd, n_head: as in model.py.
        n_kv_head: key-value heads; None: as many as heads, or GPTBigCode's one.
        n_inner: width within an MLP; None: 4 times n_embd.
        n_positions: longest text.
        vocab_size: rows of the embedding.
        tied: whether the embedding is also the head.
        window: of StarCoder2's attention; None: none.
        rope_theta: of those with rotary positions.
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int | None = None
    n_inner: int | None = None
    n_positions: int = 1024
    vocab_size: int = 50257
    tied: bool = True
    window: int | None = None
    rope_theta: float = 10000.0

    @property
    def inner(self) -> int:
        """Width within an MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        if self.n_kv_head is not None:
            return self.n_kv_head
        return 1 if self.architecture == "GPTBigCodeForCausalLM" else self.n_head

    @property
    def kv_width(self) -> int:
        """Numbers that a token's keys have, and its values."""
        return self.n_embd // self.n_head * self.kv_heads


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: normal numbers of a deviation, or ones."""

    name: str
    shape: tuple[int, ...]
    deviation: float | None  # None: ones

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


PRESETS = {
    "gpt2": Shape("GPT2LMHeadModel", 12, 768, 12),
    "gpt2-xl": Shape("GPT2LMHeadModel", 48, 1600, 25),
    "santacoder": Shape("GPTBigCodeForCausalLM", 24, 2048, 16, n_positions=2048, vocab_size=49280),
    "starcoder2-3b": Shape(
        "Starcoder2ForCausalLM",
        n_layer=30,
        n_embd=3072,
        n_head=24,
        n_kv_head=2,
        n_positions=16384,
        vocab_size=49152,
        window=4096,
        rope_theta=999999.4420358813,
    ),
    "gpt-175b": Shape("GPT2LMHeadModel", 96, 12288, 96, n_positions=2048),
}


# ---- what each architecture stores -----------------------------------------------------------------------------------


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors of a checkpoint, in the order in which they are stored."""
    yield from _FAMILIES[shape.architecture][0](shape)


def _gpt2(shape: Shape) -> Iterator[Tensor]:
    """GPT2LMHeadModel, whose matrices are (in, out), and GPTBigCode, which has the same names and (out, in)."""
    is_gpt2 = shape.architecture == "GPT2LMHeadModel"
    width, inner = shape.n_embd, shape.inner

    def linear(name: str, fan_in: int, fan_out: int, deviation: float = DEVIATION) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (fan_in, fan_out) if is_gpt2 else (fan_out, fan_in), deviation)
        yield Tensor(f"{name}.bias", (fan_out,), DEVIATION)

    yield Tensor("transformer.wte.weight", (shape.vocab_size, width), DEVIATION)
    yield Tensor("transformer.wpe.weight", (shape.n_positions, width), DEVIATION)
    for layer in range(shape.n_layer):
        block = f"transformer.h.{layer}"
        yield from _norm(f"{block}.ln_1", width)
        yield from linear(f"{block}.attn.c_attn", width, width + 2 * shape.kv_width)
        yield from linear(f"{block}.attn.c_proj", width, width, _residual(shape))
        yield from _norm(f"{block}.ln_2", width)
        yield from linear(f"{block}.mlp.c_fc", width, inner)
        yield from linear(f"{block}.mlp.c_proj", inner, width, _residual(shape))
    yield from _norm("transformer.ln_f", width)
    yield from _head(shape)


def _llama(shape: Shape) -> Iterator[Tensor]:
    """LlamaForCausalLM, and StarCoder2, which has LayerNorm, biases, and an MLP of two matrices."""
    has_bias = shape.architecture == "Starcoder2ForCausalLM"
    width, inner = shape.n_embd, shape.inner

    def linear(name: str, fan_in: int, fan_out: int, deviation: float = DEVIATION) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (fan_out, fan_in), deviation)
        if has_bias:
            yield Tensor(f"{name}.bias", (fan_out,), DEVIATION)

    yield Tensor("model.embed_tokens.weight", (shape.vocab_size, width), DEVIATION)
    for layer in range(shape.n_layer):
        block = f"model.layers.{layer}"
        yield from _norm(f"{block}.input_layernorm", width, has_bias)
        yield from linear(f"{block}.self_attn.q_proj", width, width)
        yield from linear(f"{block}.self_attn.k_proj", width, shape.kv_width)
        yield from linear(f"{block}.self_attn.v_proj", width, shape.kv_width)
        yield from linear(f"{block}.self_attn.o_proj", width, width, _residual(shape))
        yield from _norm(f"{block}.post_attention_layernorm", width, has_bias)
        if has_bias:
            yield from linear(f"{block}.mlp.c_fc", width, inner)
            yield from linear(f"{block}.mlp.c_proj", inner, width, _residual(shape))
        else:
            yield from linear(f"{block}.mlp.gate_proj", width, inner)
            yield from linear(f"{block}.mlp.up_proj", width, inner)
            yield from linear(f"{block}.mlp.down_proj", inner, width, _residual(shape))
    yield from _norm("model.norm", width, has_bias)
    yield from _head(shape)


def _norm(name: str, width: int, has_bias: bool = True) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), None)
    if has_bias:
        yield Tensor(f"{name}.bias", (width,), DEVIATION)


def _head(shape: Shape) -> Iterator[Tensor]:
    if not shape.tied:
        yield Tensor("lm_head.weight", (shape.vocab_size, shape.n_embd), DEVIATION)


def _residual(shape: Shape) -> float:
    return DEVIATION / math.sqrt(2 * shape.n_layer)


def _gpt2_config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "n_positions": shape.n_positions,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": shape.inner,
        "layer_norm_epsilon": 1e-5,
    }
    if shape.architecture == "GPT2LMHeadModel":
        return {"model_type": "gpt2", "activation_function": "gelu_new", **config}
    is_multi_query = shape.kv_heads == 1
    return {
        "model_type": "gpt_bigcode",
        "activation_function": "gelu_pytorch_tanh",
        **config,
        "multi_query": is_multi_query,
    }


def _llama_config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_position_embeddings": shape.n_positions,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "rope_theta": shape.rope_theta,
    }
    if shape.architecture == "LlamaForCausalLM":
        return {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, **config}
    own = {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": shape.window}
    return {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", **config, **own}


_FAMILIES = {
    "GPT2LMHeadModel": (_gpt2, _gpt2_config),
    "GPTBigCodeForCausalLM": (_gpt2, _gpt2_config),
    "Starcoder2ForCausalLM": (_llama, _llama_config),
    "LlamaForCausalLM": (_llama, _llama_config),
}
ARCHITECTURES = tuple(_FAMILIES)


def config(shape: Shape, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    end = shape.vocab_size - 1 if shape.architecture == "GPT2LMHeadModel" else 0
    return {
        "architectures": [shape.architecture],
        **_FAMILIES[shape.architecture][1](shape),
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "initializer_range": DEVIATION,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": dtype,
    }


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(shape: Shape, folder: Path, dtype: str = "float32", seed: int = 0, shard_bytes: int = 4 * 10**9) -> None:
    """Writes a checkpoint to a folder that is not there yet.

    Args:
        shape: what it is.
        folder: is there in the end, complete, or not at all.
        dtype: of the weights: "float32", "float16" or "bfloat16".
        seed: of the random numbers.
        shard_bytes: files are no larger, unless one tensor is.

    Raises:
        UsageError: there is something at `folder`, or too little space on its disk.
    """
    size = sum(tensor.count for tensor in tensors(shape)) * numpy_dtype(dtype).itemsize
    with written_beside(folder, size, "--output") as scratch:
        _write_weights(shape, scratch, dtype, seed, shard_bytes, size)
        for name, content in (
            ("config.json", config(shape, dtype)),
            ("generation_config.json", _generation(config(shape, dtype))),
        ):
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _generation(config: dict[str, Any]) -> dict[str, Any]:
    return {"_from_model_config": True, **{key: config[key] for key in ("bos_token_id", "eos_token_id")}}


def _write_weights(shape: Shape, folder: Path, dtype: str, seed: int, shard_bytes: int, size: int) -> None:
    from tqdm import tqdm

    itemsize = numpy_dtype(dtype).itemsize
    shards = list(_shards(shape, itemsize, shard_bytes))
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    numbers = itertools.count()
    with tqdm(total=size, desc=PROGRAM, unit="B", unit_scale=True, unit_divisor=1000) as progress:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                sized = ((each.name, STORED[dtype], each.shape, each.count * itemsize) for each in shard)
                file.write(header_of(sized))
                for block in _blocks(shard, numbers, dtype, seed):
                    file.write(block.data)
                    progress.update(block.nbytes)
    if len(shards) > 1:
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(shape: Shape, itemsize: int, shard_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors by file: as many in each as fit, at least one."""
    shard: list[Tensor] = []
    taken = 0
    for tensor in tensors(shape):
        if shard and taken + tensor.count * itemsize > shard_bytes:
            yield shard
            shard, taken = [], 0
        shard.append(tensor)
        taken += tensor.count * itemsize
    yield shard


def _blocks(shard: Sequence[Tensor], numbers: Iterator[int], dtype: str, seed: int) -> Iterator[np.ndarray]:
    """The bytes of tensors one after the other, block by block."""

    def draws() -> Iterator[Draw[None]]:
        for tensor in shard:
            number = next(numbers)
            for block, begin in enumerate(range(0, tensor.count, BLOCK)):
                yield Draw(None, min(BLOCK, tensor.count - begin), tensor.deviation, (seed, number, block))

    return (block for _, block in drawn(draws(), dtype))


def write_ranks(shape: Shape, folder: Path, mapping: Mapping, dtype: str = "float32", seed: int = 0) -> None:
    """Writes a file for each rank to a folder that is not there yet: the same model, however many ranks share it.

    Args:
        mapping: Of any of the ranks.

    Raises:
        UsageError: the model cannot be shared so, there is something at `folder`, or too little space on its disk.
    """
    said = config(shape, dtype)
    settings, _ = FAMILIES[said["model_type"]][1](Settings("config.json", said))
    try:
        mapping.check(settings)
    except ValueError as error:
        raise UsageError(str(error)) from None

    def deviation_of(whole: Whole) -> float | None:
        if whole.is_norm and whole.kind == "weight":
            return None
        return _residual(shape) if whole.of.endswith("c_proj.weight") else DEVIATION

    random_ranks.write(settings, mapping, folder, dtype, seed, _generation(said), deviation_of)


# ---- the command line ------------------------------------------------------------------------------------------------

#: Options that say what the checkpoint is, with what each is for.
_SIZES = {
    "n_layer": "layers",
    "n_embd": "width",
    "n_head": "attention heads",
    "n_kv_head": "key-value heads (default: one for GPTBigCode, else as many as heads)",
    "n_inner": "width within an MLP (default: 4 times the width)",
    "n_positions": "longest text (default: 1024)",
    "vocab_size": "rows of the embedding (default: 50257)",
    "window": "sliding window of StarCoder2's attention (default: none)",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Shape, argparse.Namespace]:
    """The command line.

    Raises:
        UsageError: an unknown option, a value out of its range, or sizes that do not go together.
    """
    parser = command_line.Parser(PROGRAM, "Write a checkpoint of random weights, of any size.")
    parser.add_argument("--preset", choices=PRESETS, help="sizes that exist; options given beside it change them")
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    for name, text in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.add_argument("--untied", action="store_true", help="the head has weights of its own")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, default="float32", help="default: float32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="largest file, without ranks (default: 4)")
    rank_arguments.add_arguments(parser)
    parser.add_argument("--output", type=command_line.path, metavar="DIR", required=True, help="a folder to be made")
    options = parser.parse_args(arguments)
    command_line.check_range(options, **dict.fromkeys(_SIZES, (1, _LARGEST)) | {"n_layer": (1, 9999)})
    command_line.check_range(options, seed=(0, 2**64 - 1))
    if options.shard_gb is not None and rank_arguments.are_given(options):
        raise UsageError("expected --shard-gb without ranks only: each of them has one file")
    if options.shard_gb is None:
        options.shard_gb = 4.0
    if not 1e-6 <= options.shard_gb < 1e9:
        raise UsageError(f"expected --shard-gb to be at least 0.000001 but got {options.shard_gb}")
    return _shape(options), options


def _shape(options: argparse.Namespace) -> Shape:
    given = {name: value for name in ("architecture", *_SIZES) if (value := getattr(options, name)) is not None}
    if options.preset is None:
        absent = [name for name in ("architecture", "n_layer", "n_embd", "n_head") if name not in given]
        if absent:
            missing = ", ".join(f"--{name.replace('_', '-')}" for name in absent)
            raise UsageError(f"expected --preset, or --architecture and sizes, but {missing} is missing")
        shape = Shape(**given)
    else:
        shape = replace(PRESETS[options.preset], **given)
    if options.untied:
        shape = replace(shape, tied=False)
    _check(shape)
    return shape


def _check(shape: Shape) -> None:
    """Refuses sizes that do not go together."""
    if shape.n_embd % shape.n_head:
        raise UsageError(f"expected --n-head to divide --n-embd, but got {shape.n_head} and {shape.n_embd}")
    if shape.n_head % shape.kv_heads:
        raise UsageError(f"expected --n-kv-head to divide --n-head, but got {shape.kv_heads} and {shape.n_head}")
    allowed = {"GPT2LMHeadModel": (shape.n_head,), "GPTBigCodeForCausalLM": (1, shape.n_head)}.get(shape.architecture)
    if allowed is not None and shape.kv_heads not in allowed:
        several = " or ".join(map(str, sorted(set(allowed))))
        raise UsageError(f"expected --n-kv-head to be {several} for {shape.architecture} but got {shape.kv_heads}")
    if allowed is None and shape.n_embd // shape.n_head % 2:
        raise UsageError(
            f"expected heads of an even width for {shape.architecture}, whose positions are rotary, but got "
            f"{shape.n_embd // shape.n_head}"
        )
    if shape.window is not None and shape.architecture != "Starcoder2ForCausalLM":
        raise UsageError(f"--window is for Starcoder2ForCausalLM, but the architecture is {shape.architecture}")


def run(arguments: Sequence[str] | None = None) -> None:
    """Carries out the command line."""
    shape, options = parse_arguments(arguments)
    if rank_arguments.are_given(options):
        write_ranks(shape, options.output, rank_arguments.mapping_of(options), options.dtype, options.seed)
    else:
        write(shape, options.output, options.dtype, options.seed, int(options.shard_gb * 1e9))
    count = sum(tensor.count for tensor in tensors(shape))
    size = count * numpy_dtype(options.dtype).itemsize
    command_line.report(f"{options.output}: {count:,} parameters in {options.dtype}, {in_bytes(size)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    return command_line.main(PROGRAM, lambda: run(arguments), prints=False)


if __name__ == "__main__":
    sys.exit(main())
