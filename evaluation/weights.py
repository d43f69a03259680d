"""What the weights take: the bytes of a checkpoint's tensors on disk, and of a compiled model's constants in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weight_loader import Checkpoint, CheckpointConfig, parameter_shapes

if TYPE_CHECKING:
    import nvtripy as tp


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights; ``layers`` are those of the quantized layers, or of the blocks' linear ones if none is.

    With their scales, without their biases. None where it cannot be told.
    """

    total: int | None = None
    layers: int | None = None
    num_weights: int = 0  # of those layers

    @property
    def to_float16(self) -> float | None:
        """The layers' bytes relative to the same weights at two bytes each."""
        return None if self.layers is None else self.layers / (2 * self.num_weights)

    @property
    def bits(self) -> float | None:
        """Of one weight of the layers, its share of the scales included."""
        return None if self.layers is None else 8 * self.layers / self.num_weights


def _linear_layers(config: CheckpointConfig) -> dict[str, int]:
    """How many weights each linear layer of the blocks has, by HuggingFace's names, in the order of the data."""
    return {
        name.removesuffix(".weight"): math.prod(shape)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("h.") and len(shape) == 2
    }


def stored_weight_bytes(checkpoint: Checkpoint) -> WeightBytes:
    """The tensors in a checkpoint's files."""
    if checkpoint.weight_files[0].suffix == ".bin":  # PyTorch's own files, which are never quantized
        return WeightBytes(sum(path.stat().st_size for path in checkpoint.weight_files))
    tensors = checkpoint.stored_bytes()
    layers = _linear_layers(checkpoint.config)
    scaled = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    if scaled:
        config = checkpoint.config
        head, positions = config.vocab_size * config.n_embd, config.n_positions * config.n_embd
        layers |= {"wte": head, "lm_head": head, "wpe": positions}
        layers = {name: layers[name] for name in scaled}
    parts = ("weight", "weight_scale", "input_scale", "pre_quant_scale")
    in_layers = sum(tensors.get(f"{layer}.{part}", 0) for layer in layers for part in parts)
    return WeightBytes(sum(tensors.values()), in_layers, sum(layers.values()))


def compiled_weight_bytes(executable: tp.Executable, config: CheckpointConfig) -> WeightBytes:
    """The constants of a compiled model. The portable runtime's executables can be looked into, TensorRT's cannot."""
    try:
        from nvtripy_portable.executable import FormatError, deserialize
    except ImportError:
        return WeightBytes()
    try:
        graph = deserialize(executable.serialized_tensorrt_engine).graph
    except FormatError:
        return WeightBytes()
    constants = [operation.results[0] for operation in graph.operations if operation.kind == "constant"]
    total = sum(map(_constant_bytes, constants))
    sizes = list(_linear_layers(config).values())
    layers = [operation for operation in graph.operations if operation.kind == "linear"]
    if [_num_weights(layer) for layer in layers[: len(sizes)]] != sizes:
        return WeightBytes(total)  # the runtime has left some layers in pieces
    # The blocks' layers come in the order of the data, the head last. It counts if it is quantized.
    layers = [layer for place, layer in enumerate(layers) if place < len(sizes) or layer.operands[2] is not None]
    counted = set()
    for layer in layers:
        _, weight, weight_scale, _, _, pre_scale, input_scale, _ = layer.operands
        counted.update({weight, weight_scale, pre_scale, input_scale} - {None})
    return WeightBytes(total, sum(map(_constant_bytes, counted)), sum(map(_num_weights, layers)))


def _num_weights(linear: Any) -> int:
    """How many weights a linear layer of the compiled graph has: rows, one an output feature, of its width."""
    return linear.operands[1].type.shape[0] * linear.attributes["width"]


def _constant_bytes(value: Any) -> int:
    bits = 4 if value.type.dtype == "i4" else 8 * value.constant.dtype.itemsize
    return int((value.constant.size * bits + 7) // 8)
