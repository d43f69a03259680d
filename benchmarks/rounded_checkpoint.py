"""A checkpoint of float weights as a quantized one, rounded while it is loaded: nothing has to be written for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from random_weights import MODES, rounded

from loading import modelopt_layout
from weight_loader import Checkpoint, CheckpointConfig

GROUPS = (128, 64, 32)  # weights that may share a scale in int4


def rounded_config(config: CheckpointConfig, width: str) -> CheckpointConfig:
    """The settings of a model whose every matrix is rounded but learned positions, and the embedding of an untied head.

    In int4 as many weights share a scale as the model's widths allow.

    Args:
        width: "int8", "int4", or "fp16", which changes nothing.

    Raises:
        ValueError: int4, and its blocks do not divide the widths.
    """
    if width == "fp16":
        return config
    inputs = (config.n_embd, config.n_inner, config.query_width)
    group = next((size for size in GROUPS if not any(each % size for each in inputs)), None)
    if width == "int4" and group is None:
        raise ValueError(f"expected widths that 128, 64 or 32 divides but got {', '.join(map(str, inputs))}")
    return replace(
        config,
        quant_mode=MODES[width],
        quant_lm_head=True,
        quant_embedding=config.tie_word_embeddings,
        block_size=group or config.block_size,
        pre_quant_scale=False,
    )


class RoundedCheckpoint:
    """What `engine.open_engine` asks of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, width: str) -> None:
        self._checkpoint, self._width = checkpoint, width
        self.path, self.config = checkpoint.path, rounded_config(checkpoint.config, width)

    def fingerprint(self) -> str:
        return f"{self._checkpoint.fingerprint()}-{self._width}"

    def needs_float32_scales(self, dtype: str) -> bool:
        return False

    def parameters(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        """As `Checkpoint.parameters`."""
        is_int4 = self._width == "int4"
        for name, weight in self._checkpoint.parameters(dtype):
            if not modelopt_layout.is_quantized(self.config, name):
                yield name, weight
                continue
            block = self.config.block_size if is_int4 else weight.shape[1]
            numbers, scales = rounded(weight, self._width, block)
            scales[scales == 0] = 1  # of zeros
            values = (numbers * np.repeat(scales.astype(np.float32), block, axis=1)).astype(weight.dtype)
            layer = "lm_head" if name == "wte.weight" else name.removesuffix(".weight")
            yield f"{layer}.weight", np.ascontiguousarray(values.T) if is_int4 else values
            scales = scales.astype(weight.dtype)
            yield f"{layer}.weight_scale", np.ascontiguousarray(scales.T) if is_int4 else scales[:, 0]
