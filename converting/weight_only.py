"""Weights of linear layers to integers, by rounding to nearest: what quantizing them needs no calibration for."""

from __future__ import annotations

import numpy as np

#: The model's modes → the bits of an integer.
BITS = {"int8-weight-only": 8, "int4-weight-only": 4}


def rounded(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of a weight, one scale for each output feature, which the largest weight of a row spans.

    Args:
        weight: (out, in) float32, finite.
        bits: 8 or 4.

    Returns:
        Integers from -2^(bits-1) on, (out, in) int8; scales, (out,) float32, 1 where there are zeros only.

    As ModelOpt's int8 and rounding to nearest without clipping (quantizing/gptq.py): the largest integer is 127, or 7.
    TensorRT-LLM's own script takes 128 and 8, which then cannot be represented.
    """
    largest = 2 ** (bits - 1) - 1
    scales = np.abs(weight).max(axis=1) / np.float32(largest)
    scales = np.where(scales > 0, scales, np.float32(1))
    integers = np.empty(weight.shape, np.int8)
    step = max(1, 2**20 // max(1, weight.shape[1]))  # rows at a time, so that little is held in float32 twice
    for row in range(0, len(weight), step):
        part = np.s_[row : row + step]
        integers[part] = np.clip(np.rint(weight[part] / scales[part, None]), -largest - 1, largest)
    return integers, scales
