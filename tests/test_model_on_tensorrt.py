"""Every variant of the model passes the verifier of the portable compiler, which stands in for TensorRT's own.

Only the verifier runs, on what nvtripy makes of the model: no pass, no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import nvtripy as tp
import pytest

from engine import model_inputs
from model import GPT, GPTConfig
from nvtripy_portable import compiler

SIZES = {"vocab_size": 12, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4}
DTYPES = ("float32", "float16", "bfloat16")
CACHES = (None, "int8", "fp8")
#: What each mode can be combined with.
HEADS = ({}, {"quant_lm_head": True}, {"quant_lm_head": True, "quant_embedding": True})
OPTIONS: dict[str | None, tuple[dict[str, bool], ...]] = {
    None: ({},),
    "int8-weight-only": tuple(head | pos for head in HEADS for pos in ({}, {"quant_position_embedding": True})),
    "int4-weight-only": tuple(head | pre for head in HEADS for pre in ({}, {"pre_quant_scale": False})),
    "fp8": HEADS,
    "int8-smoothquant": tuple(
        head | {"per_channel": channel, "per_token": token}
        for head in HEADS
        for channel, token in itertools.product((True, False), repeat=2)
    ),
}


def variants() -> Iterator[dict[str, object]]:
    """Every combination of mode, head, embeddings and scales that a configuration can be of."""
    for mode, choices in OPTIONS.items():
        for options, is_tied in itertools.product(choices, (True, False)):
            has_table = options.get("quant_embedding") and not is_tied
            if not has_table or mode == "int8-weight-only":
                yield {"quant_mode": mode, "tie_word_embeddings": is_tied, **options}


def unset_model(config: GPTConfig) -> GPT:
    """A model of ones."""
    gpt = GPT(config)
    state = gpt.state_dict()
    ones = {name: tp.copy(tp.ones(each.shape, dtype=each.dtype), tp.device("cpu")) for name, each in state.items()}
    gpt.load_state_dict(ones)
    return gpt
