"""SantaCoder (Ben Allal et al. 2023) in its original layout: a GPT-2 with multi-query attention, by code of its own.

Queries come from one Conv1D, the keys and values of the one head that all queries share from another.
"""

from __future__ import annotations

from dataclasses import replace

from loading.config import CheckpointConfig
from loading.errors import shown
from loading.families import gpt2
from loading.settings import Settings
from loading.table import From, Layout

ARCHITECTURES = ("GPT2LMHeadCustomModel", "GPT2CustomModel")

TABLE = {
    **gpt2.TABLE,
    "h.{}.attn.c_attn": From(("h.{}.attn.q_attn", "h.{}.attn.kv_attn"), ("q", "kv"), is_conv1d=True),
}
LAYOUT = replace(gpt2.LAYOUT, table=TABLE)


def is_meant(given: Settings) -> bool:
    """Whether a config.json that says model_type "gpt2" is of this family."""
    architectures = given.values.get("architectures")
    is_named = isinstance(architectures, list) and any(each in ARCHITECTURES for each in architectures)
    return is_named or "attention_head_type" in given.values


def from_huggingface(given: Settings) -> tuple[CheckpointConfig, Layout]:
    """The configuration in a config.json, and how the tensors beside it are named."""
    config, layout = gpt2.from_huggingface(given)
    kind = given.value("attention_head_type", default="multihead")
    if kind == "multihead":
        return config, layout
    if kind != "multiquery":
        raise given.refuse(f"expected attention_head_type to be multihead or multiquery, got {shown(kind)}")
    return replace(config, n_kv_head=1), LAYOUT
