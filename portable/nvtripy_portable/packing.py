"""int4 as it is stored: two elements a byte, the first in the low half."""

from __future__ import annotations

import numpy as np


def pack_int4(values: np.ndarray) -> np.ndarray:
    """(..., K) int4 or int8 within [-8, 7] → (..., ceil(K / 2)) uint8."""
    nibbles = values.view(np.uint8) & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate((nibbles, np.zeros((*nibbles.shape[:-1], 1), np.uint8)), axis=-1)
    high = nibbles[..., 1::2]
    high <<= 4
    return nibbles[..., 0::2] | high


def unpack_int4(packed: np.ndarray, length: int) -> np.ndarray:
    """(..., ceil(length / 2)) uint8 → (..., length) int8."""
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    # Shifting a signed byte left and back right repeats the sign bit of the half that is wanted.
    signed = packed.view(np.int8)
    values[..., 0::2] = (signed << 4) >> 4
    values[..., 1::2] = signed >> 4
    return values[..., :length]
