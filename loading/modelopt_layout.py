"""What a folder in ModelOpt's unified HuggingFace layout holds: its mode, its tensors, and the values they stand for.

The layout is that of `modelopt.torch.export.export_hf_checkpoint` (ModelOpt 0.47), which TensorRT-LLM, vLLM and SGLang
read. hf_quant_config.json names the algorithm. Linear weights are (out, in), those that are not quantized too, and each
quantized one has its scales beside it:

    ==================  =====================  =======================  ===========  ===============
    quant_algo          weight                 weight_scale             input_scale  pre_quant_scale
    ==================  =====================  =======================  ===========  ===============
    W8A16               int8 (out, in)         (out,)                   -            -
    W4A16_AWQ           uint8 (out / 2, in)    (out, in / group_size)   -            (in,) (**)
    FP8                 float8 E4M3 (out, in)  scalar                   scalar       -
    W8A8_SQ_PER_CHANNEL int8 (out, in)         (out,), or 1 element     scalar (*)   (in,)
    ==================  =====================  =======================  ===========  ===============

    (*) absent where inputs are scaled token by token
    (**) absent where hf_quant_config.json says so: weights that were rounded without AWQ; and of layers that share an
        input (Llama's q, k and v), where the exporter has multiplied the norm before them by it

Layers that share an input are one layer in the model. Their scales for input features, and for inputs, are equal then;
those of their rows stand one after the other. If each has one scale for its whole weight, they become scales of rows in
int8; in fp8, where TensorRT knows no such scales, they have to be equal, or to differ by powers of two.

A byte of W4A16_AWQ holds an even row in its low half and the next row in its high half. The head is weight-only and
without pre_quant_scale, except in FP8. A tied head is stored once, as the token embedding. In W8A16 either embedding
may be int8 as well: (rows, width) with a scale a row. With both and the head, everything but biases and LayerNorms is.
Everything that is wrong raises `ValueError` with a text that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loading.config import BLOCK, CheckpointConfig
from loading.containers.tensors import Stored
from loading.table import Layout, Parameter

DESCRIPTION_FILE = "hf_quant_config.json"

FLOATS = ("F32", "F16", "BF16", "F64")  # in safetensors' notation

_MODES = {
    "W8A16": "int8-weight-only",
    "W4A16_AWQ": "int4-weight-only",
    "FP8": "fp8",
    "W8A8_SQ_PER_CHANNEL": "int8-smoothquant",
}
_CACHE_DTYPES = {"INT8": "int8", "FP8": "fp8"}
#: The last parts of the names of all scales.
#: Ours: of norms that pre_quant_scale was multiplied into, by the names of their weights, what it was.
FOLDED_FILE = "folded_scales.safetensors"

SCALES = (".weight_scale", ".input_scale", ".pre_quant_scale", ".k_scale", ".v_scale")
_WEIGHT_DTYPES = {"int8-weight-only": "I8", "int4-weight-only": "U8", "fp8": "F8_E4M3", "int8-smoothquant": "I8"}


@dataclass(frozen=True)
class Spec:
    """What a stored tensor has to be: one of these types, and this shape. One element may be () or (1,)."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    of: str  # what it belongs to, by the model's names: a parameter, or a scale beside one

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape or (self.shape == () and shape == (1,))


@dataclass(frozen=True)
class Description:
    """What hf_quant_config.json says. `mode` and `kv_cache_dtype` are by the model's names, None if not quantized.

    `block_size` and `pre_quant_scale` are of int4: input features that share a scale, and whether they have one each.
    """

    mode: str | None
    kv_cache_dtype: str | None
    block_size: int = BLOCK
    pre_quant_scale: bool = True


def read_description(raw: Mapping[str, Any]) -> Description:
    """The algorithms that the JSON object in hf_quant_config.json names."""
    quantization = raw.get("quantization")
    if not isinstance(quantization, dict):
        raise ValueError("expected an object 'quantization'")
    algorithm = quantization.get("quant_algo")
    settings = quantization
    if algorithm == "MIXED_PRECISION":  # for us that is a head of another kind than the layers
        algorithm, settings = _algorithm_of_layers(quantization.get("quantized_layers"))
    if algorithm is not None and not _is_one_of(algorithm, _MODES):
        raise ValueError(f"expected quant_algo to be one of {', '.join(_MODES)} but got {algorithm!r}")
    int4: dict[str, Any] = {}
    if algorithm == "W4A16_AWQ":
        block, scaled = settings.get("group_size"), settings.get("pre_quant_scale")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"expected group_size of {algorithm} to be a positive integer but got {block!r}")
        if not isinstance(scaled, bool):
            raise ValueError(f"expected pre_quant_scale of {algorithm} to be true or false but got {scaled!r}")
        if settings.get("has_zero_point") is not False:
            raise ValueError(
                f"expected has_zero_point of {algorithm} to be False but got {settings.get('has_zero_point')!r}"
            )
        int4 = {"block_size": block, "pre_quant_scale": scaled}
    cache = quantization.get("kv_cache_quant_algo")
    if cache is not None and not _is_one_of(cache, _CACHE_DTYPES):
        expected = ", ".join(_CACHE_DTYPES)
        raise ValueError(f"expected kv_cache_quant_algo to be one of {expected} or null but got {cache!r}")
    return Description(_MODES[algorithm] if algorithm else None, _CACHE_DTYPES[cache] if cache else None, **int4)


def _is_one_of(value: object, names: Mapping[str, str]) -> bool:
    """Whether what JSON gave is a text, and one of these."""
    return isinstance(value, str) and value in names


def _algorithm_of_layers(layers: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise ValueError("expected quantized_layers to say how each layer of MIXED_PRECISION is quantized")
    in_blocks = [layer for name, layer in layers.items() if ".h." in f".{name}" or ".layers." in f".{name}"]
    algorithms = sorted({str(layer.get("quant_algo")) for layer in in_blocks})
    if len(algorithms) != 1:
        raise ValueError(f"expected all linear layers to be quantized alike but got {', '.join(algorithms) or 'none'}")
    return algorithms[0], in_blocks[0]


def config_fields(
    description: Description, tied: bool, layout: Layout, tensors: Mapping[str, Stored]
) -> dict[str, Any]:
    """What the description leaves open, seen from the tensors: values of `CheckpointConfig`'s fields for quantization.

    Args:
        tied: Whether head and embedding share their weight.
        tensors: Headers by name, without the layout's prefix.
    """
    mode = description.mode
    if mode is None:
        return {"kv_cache_dtype": description.kv_cache_dtype}

    def stored(module: str, kind: str = "weight") -> Stored | None:
        return tensors.get(f"{layout.table[module].names[0].format(0)}.{kind}") if module in layout.table else None

    def is_narrow(module: str) -> bool:
        tensor = stored(module)
        return tensor is not None and tensor.dtype not in FLOATS

    has_tables = mode == "int8-weight-only"  # of their own, which need not be the head's weight
    quant_embedding = (tied or has_tables) and is_narrow("wte")
    quant_lm_head = tied and quant_embedding if stored("lm_head") is None else is_narrow("lm_head")
    if tied and quant_embedding and not quant_lm_head:
        raise ValueError("expected a head that shares the embedding's weight to be quantized as that is")
    is_smoothquant = mode == "int8-smoothquant"
    is_joined = any(len(source.names) > 1 for source in layout.table.values())
    return {
        "quant_mode": mode,
        "kv_cache_dtype": description.kv_cache_dtype,
        "block_size": description.block_size,
        "pre_quant_scale": description.pre_quant_scale,
        "quant_lm_head": quant_lm_head,
        "quant_embedding": quant_embedding,
        "quant_position_embedding": has_tables and is_narrow("wpe"),
        "per_channel": is_joined or not (is_smoothquant and _has_tensor_scales(layout, tensors)),
        "per_token": is_smoothquant and not any(name.endswith(".input_scale") for name in tensors),
    }


def _has_tensor_scales(layout: Layout, tensors: Mapping[str, Stored]) -> bool:
    """Whether weights have one scale each, seen from the first of them."""
    scale = tensors.get(f"{layout.table['h.{}.attn.c_attn'].names[0].format(0)}.weight_scale")
    return scale is not None and scale.shape in ((), (1,))


def stored_tensors(
    config: CheckpointConfig, parameters: Iterable[Parameter], layout: Layout, stored: Mapping[str, Stored]
) -> dict[str, Spec]:
    """Every tensor that a folder of this configuration holds, by name without the layout's prefix.

    Where layers share an input, their `pre_quant_scale` may be missing: ModelOpt's export multiplies it into the norm
    before them.

    Args:
        stored: The headers of what it does hold, by name.

    Raises:
        ValueError: an int4 weight whose input features the block does not divide.
    """
    specs: dict[str, Spec] = {}
    tensor_scales = _has_tensor_scales(layout, stored)
    for parameter in parameters:
        if not is_quantized(config, parameter.name):
            specs |= {piece.name: Spec(FLOATS, piece.stored_shape, parameter.name) for piece in parameter.pieces}
            continue
        module = parameter.name.removesuffix(".weight")
        is_in_norm = len(parameter.pieces) > 1 and not any(
            f"{piece.module}.pre_quant_scale" in stored for piece in parameter.pieces
        )
        for piece in parameter.pieces:
            tensors = _layer(config, piece.shape, not parameter.is_of_layer, tensor_scales)
            for suffix, (dtypes, shape) in tensors.items():
                is_missing = suffix == "pre_quant_scale" and is_in_norm and config.quant_mode == "int4-weight-only"
                if not is_missing and (module != "wte" or suffix != "input_scale"):  # an embedding has no input
                    specs[f"{piece.module}.{suffix}"] = Spec(dtypes, shape, f"{module}.{suffix}")
    if config.kv_cache_dtype is not None:
        for number in range(config.n_layer):
            for which in ("k", "v"):
                name = layout.cache_scale.format(number, which)
                specs[name] = Spec(FLOATS, (), f"h.{number}.attn.{which}_scale")
    return specs


def is_quantized(config: CheckpointConfig, name: str) -> bool:
    """Whether a parameter is stored in a quantized type."""
    if config.quant_mode is None or not name.endswith(".weight"):
        return False
    if name.startswith("h."):
        return ".attn." in name or ".mlp." in name
    others = {
        "wte.weight": config.quant_embedding,
        "wpe.weight": config.quant_position_embedding,
        "lm_head.weight": config.quant_lm_head,
    }
    return others.get(name, False)


def _layer(
    config: CheckpointConfig, shape: tuple[int, ...], is_head: bool, has_tensor_scales: bool
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The tensors of a quantized linear layer, by the last part of their names: types and shape."""
    mode, (size_out, size_in) = config.quant_mode, shape
    assert mode is not None
    stored_out = size_out
    scale_shape: tuple[int, ...] = (size_out,)
    if mode == "int4-weight-only":
        if size_in % config.block_size:
            raise ValueError(f"expected widths that the int4 block of {config.block_size} divides but got {size_in}")
        size_out += size_out % 2  # packed in pairs; the row too many is of zeros
        stored_out, scale_shape = size_out // 2, (size_out, size_in // config.block_size)
    elif mode == "fp8" or (mode == "int8-smoothquant" and has_tensor_scales and not is_head):
        scale_shape = ()
    tensors = {
        "weight": ((_WEIGHT_DTYPES[mode],), (stored_out, size_in)),
        "weight_scale": (FLOATS, scale_shape),
    }
    if mode == "fp8" or (mode == "int8-smoothquant" and not config.per_token and not is_head):
        tensors["input_scale"] = (FLOATS, ())
    if ((mode == "int4-weight-only" and config.pre_quant_scale) or mode == "int8-smoothquant") and not is_head:
        tensors["pre_quant_scale"] = (FLOATS, (size_in,))
    return tensors
