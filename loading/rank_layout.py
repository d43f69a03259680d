"""What the files of a checkpoint in TensorRT-LLM's format hold: a model's tensors, and each rank's part of them.

    config.json           families/tensorrt_llm.py; `mapping` says how many ranks of either kind there are
    rank0.safetensors     the tensors of rank 0, layers numbered from 0 in each stage
    rank1.safetensors     ...

Weights of linear layers that are quantized have scales beside them, by quant_algo:

    ==========  ========================  ==========================  =======================  =========================
    quant_algo  weight                    its scales                  of the layer's input     of input features
    ==========  ========================  ==========================  =======================  =========================
    W8A16       int8 (out, in)            per_channel_scale (out,)    -                        -
    W4A16       int8 (out / 2, in)        per_channel_scale (out,)    -                        -
    W4A16_AWQ   int8 (out / 2, in)        weights_scaling_factor      -                        prequant_scaling_factor
                                          (out, in / group_size)                               (in,) (*)
    FP8         float8 E4M3 (out, in)     weights_scaling_factor (1,) activation_scaling_-     -
                                                                      factor (1,)
    ==========  ========================  ==========================  =======================  =========================

    (*) absent where config.json's pre_quant_scale is false

A byte of int4 has an even row in its low half and the next row in its high half. Integers stand as they are: the order
in which NVIDIA's kernels want those of W8A16 and W4A16, another for each generation of GPUs, is no part of the format
as it is documented. Scales of output features are those of whole rows, also where ranks share a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loading.config import CheckpointConfig
from loading.families.tensorrt_llm import LAYOUT, Algorithm, layout_of
from loading.modelopt_layout import FLOATS, is_quantized
from loading.table import parameters
from parallelism.mapping import Mapping
from parallelism.splitting import Cut, axis_of, cut_of

_WEIGHTS = {"int8-weight-only": "I8", "int4-weight-only": "I8", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class Whole:
    """A tensor of the whole model, before ranks share it.

    Attributes:
        module: The stored one, layers numbered throughout, without the prefix: "layers.3.mlp.gate".
        kind: What it is of the module, by the model's names: "weight", "bias", "weight_scale", "k_scale", ...
        stored_kind: The same by the format's.
        of: The parameter or scale of the model that it is, or is a part of: "h.3.mlp.c_fc.weight".
        begin: Where along the outputs of the model's layer those of this module begin.
        shape: Of its values, (out, in) those of linear weights.
        dtypes: What it may be stored as.
        is_packed: Whether rows are stored in pairs, two to a byte.
        outputs, inputs: Of the module, if it has them.
    """

    module: str
    kind: str
    stored_kind: str
    of: str
    begin: int
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_packed: bool = False
    outputs: int = 0

    @property
    def name(self) -> str:
        """As messages and the loader have it."""
        return f"{self.module}.{self.kind}"

    @property
    def is_norm(self) -> bool:
        return "layernorm" in self.module or self.module == "ln_f"

    def stored_name(self, mapping: Mapping, n_layer: int) -> str:
        """The name in a rank's file: layers numbered from 0 in its stage, and the prefix."""
        prefix, module = "" if self.module == "lm_head" else LAYOUT.prefix, self.module
        if module.startswith("layers."):
            layers, number, rest = module.split(".", 2)
            module = f"{layers}.{int(number) - mapping.layers(n_layer).start}.{rest}"
        return f"{prefix}{module}.{self.stored_kind}"

    def cut(self, config: CheckpointConfig, mapping: Mapping) -> tuple[int, Cut] | None:
        """Along which axis of the values a rank has which part; None: it has them all."""
        cut = cut_of(self.of.rpartition(".")[0], config, mapping)
        axis = None if cut is None else axis_of(self.kind, cut.dimension, len(self.shape))
        if cut is None or axis is None or (self.shape[axis] == 1 and cut.size > 1):
            return None
        if self.outputs and axis == 0 and self.kind != "pre_quant_scale":
            cut = cut.within(self.begin, self.begin + self.outputs)
        return axis, cut.scaled(self.shape[axis])

    def part_shape(self, config: CheckpointConfig, mapping: Mapping) -> tuple[int, ...]:
        """The shape of a rank's values."""
        found = self.cut(config, mapping)
        if found is None:
            return self.shape
        axis, cut = found
        return (*self.shape[:axis], cut.length, *self.shape[axis + 1 :])

    def stored_shape(self, config: CheckpointConfig, mapping: Mapping) -> tuple[int, ...]:
        """The shape of what a rank stores of it."""
        shape = self.part_shape(config, mapping)
        return (-(-shape[0] // 2), *shape[1:]) if self.is_packed else shape


def wholes(config: CheckpointConfig, algorithm: Algorithm, has_head_copy: bool) -> Iterator[Whole]:
    """Every tensor of a model, in the order of `Checkpoint.parameters`.

    Args:
        config: Its quantization included.
        has_head_copy: Whether a tied head is stored beside the embedding.
    """
    for parameter in parameters(config, layout_of(config), has_conv1d=False):
        begin = 0
        layer, _, kind = parameter.name.rpartition(".")
        for piece in parameter.pieces:
            yield from _tensors(config, algorithm, layer, kind, piece.module, piece.shape, begin)
            begin += piece.shape[0]
    if config.tie_word_embeddings and has_head_copy:
        shape = (config.vocab_size, config.n_embd)
        yield from _tensors(config, algorithm, "lm_head", "weight", "lm_head", shape, 0)
    if config.kv_cache_dtype is not None:
        for number in range(config.n_layer):
            for which in ("k", "v"):
                module, _, kind = LAYOUT.cache_scale.format(number, which).rpartition(".")
                yield Whole(module, kind, kind, f"h.{number}.attn.{which}_scale", 0, (1,), FLOATS)


def held(wholes: list[Whole], config: CheckpointConfig, mapping: Mapping) -> Iterator[Whole]:
    """Those of which a rank has a part, or all."""
    return (whole for whole in wholes if mapping.is_of_stage(whole.of, config.n_layer))


def _tensors(
    config: CheckpointConfig,
    algorithm: Algorithm,
    layer: str,
    kind: str,
    module: str,
    shape: tuple[int, ...],
    begin: int,
) -> Iterator[Whole]:
    """A weight or a bias and, where it is quantized, its scales."""
    if not is_quantized(config, f"{layer}.{kind}"):
        yield Whole(module, kind, kind, f"{layer}.{kind}", begin, shape, FLOATS, outputs=shape[0])
        return
    size_out, size_in = shape
    assert algorithm.mode is not None
    yield Whole(
        module,
        "weight",
        "weight",
        f"{layer}.weight",
        begin,
        shape,
        (_WEIGHTS[algorithm.mode],),
        is_packed=algorithm.mode == "int4-weight-only",
        outputs=size_out,
    )
    by_row = (size_out, size_in // config.block_size) if algorithm.has_blocks else (size_out,)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_scale": (1,) if algorithm.mode == "fp8" else by_row,
        "input_scale": (1,),
        "pre_quant_scale": (size_in,),
    }
    for scale, stored in algorithm.scales.items():
        if scale == "pre_quant_scale" and (not config.has_pre_quant_scale or layer == "lm_head"):
            continue
        yield Whole(module, scale, stored, f"{layer}.{scale}", begin, shapes[scale], FLOATS, outputs=size_out)
