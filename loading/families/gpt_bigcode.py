"""GPTBigCode: StarCoder (Li et al. 2023), Granite code 20B and 34B, SantaCoder in transformers' own layout.

GPT-2's names, but plain linear layers: (out, in). With multi_query the rows of c_attn are [q of all heads | k | v],
without they are [q k v] of one head after the other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loading.config import CheckpointConfig
from loading.families import gguf_settings, gpt2
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = ("GPTBigCodeForCausalLM", "GPTBigCodeModel")


def by_head(config: CheckpointConfig) -> np.ndarray:
    """Where the rows [q | k | v] of all heads are among rows that are [q k v] of one head after the other."""
    rows = np.arange(3 * config.query_width)
    return rows.reshape(config.n_head, 3, config.head_size).transpose(1, 0, 2).reshape(-1)


MULTI_QUERY = {name: replace(source, is_conv1d=False) for name, source in gpt2.TABLE.items()}
MULTI_HEAD = {**MULTI_QUERY, "h.{}.attn.c_attn": From("h.{}.attn.c_attn", order=by_head)}


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, with the defaults of transformers' GPTBigCodeConfig, and its layout."""
    given.only(add_cross_attention=False, is_encoder_decoder=False)
    config = gpt2.read_config(given)
    if given.switch("multi_query", True):
        return replace(config, n_kv_head=1), replace(gpt2.LAYOUT, table=MULTI_QUERY)
    return config, replace(gpt2.LAYOUT, table=MULTI_HEAD)


def from_gguf(metadata: gguf_settings.Metadata) -> tuple[CheckpointConfig, Layout]:
    """llama.cpp's architecture "starcoder": its rows are [q | k | v], whatever the number of heads."""
    return gpt2.from_gguf(metadata, "starcoder")
