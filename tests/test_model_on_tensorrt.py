"""Every variant of the model passes the verifier of the portable compiler, which stands in for TensorRT's own.

Only the verifier runs, on what nvtripy makes of the model: no pass, no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import nvtripy as tp
import pytest
import torch

from engine import _inputs, _prompts, even_columns, linear_layers
from model import GPT, GPTConfig
from nvtripy_portable import compiler, verify

SIZES = {"vocab_size": 13, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4}
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


def model_of_ones(config: GPTConfig) -> GPT:
    """Its parameters are all one; those of no shape are scalars."""
    gpt = GPT(config)
    torch_dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    gpt.load_state_dict(
        {
            name: tp.Tensor(torch.ones(tuple(each.shape or ()), dtype=torch_dtype[each.dtype.name]))
            for name, each in gpt.state_dict().items()
        }
    )
    return gpt


def assert_accepted(inputs: str = "cached", **options: object) -> None:
    """Traces a model and has it verified, with no pass after that."""
    config = GPTConfig(**SIZES, **options)  # type: ignore[arg-type]
    infos = {
        "stateless": [tp.InputInfo((2, (1, 3, 8)), dtype=tp.int32)],
        "without last": _inputs(config, 2)[:3],
        "cached": _inputs(config, 2),
    }
    sizes: list[int] = []
    verified = verify.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "PASSES", ())
        patch.setattr(verify, "run", lambda graph: (verified(graph), sizes.append(len(graph.operations))))
        tp.compile(model_of_ones(config), args=infos[inputs], kwargs=_prompts(config))
    assert max(sizes) > 150  # the model's, beside those of what nvtripy evaluates for it


@pytest.mark.parametrize("mode", OPTIONS)
def test_modes_are_accepted(mode: str | None) -> None:
    """The fullest configuration of each mode, in half precision and with a cache; all of them are below."""
    *_, options = (each for each in variants() if each["quant_mode"] == mode)
    for rows in (0, 3):  # of prompts
        assert_accepted(dtype="float16", kv_cache_dtype=None if mode else "int8", prompt_rows=rows, **options)


@pytest.mark.parametrize("inputs", ["stateless", "without last", "cached"])
@pytest.mark.parametrize(("dtype", "cache"), list(zip(DTYPES, CACHES, strict=True)))
@pytest.mark.slow
def test_caches_and_types_are_accepted(dtype: str, cache: str | None, inputs: str) -> None:
    assert_accepted(inputs, dtype=dtype, kv_cache_dtype=cache)


@pytest.mark.slow
@pytest.mark.parametrize("options", list(variants()), ids=lambda each: "-".join(map(str, each.values())))
def test_every_variant_is_accepted(options: dict[str, object]) -> None:
    for dtype, cache in itertools.product(DTYPES, CACHES):
        assert_accepted(dtype=dtype, kv_cache_dtype=cache, **options)
    for dtype, cache in zip(DTYPES, CACHES, strict=True):
        assert_accepted("stateless", dtype=dtype, kv_cache_dtype=cache, **options)
    assert_accepted("without last", **options)


def test_odd_int4_weights_get_a_column() -> None:
    """TensorRT packs two int4 of a row into a byte; what an odd vocabulary lacks is not seen in the logits."""
    config = GPTConfig(**SIZES, dtype="float32", quant_mode="int4-weight-only", quant_lm_head=True)  # type: ignore[arg-type]
    gpt = GPT(config)
    assert config.vocab_size % 2 == 1
    assert tuple(gpt.lm_head.weight.shape) == (8, 14) and tuple(gpt.lm_head.weight_scale.shape) == (2, 14)
    layers = dict(linear_layers(gpt))
    assert [name for name, layer in layers.items() if layer.is_padded] == ["lm_head"]
    weight = np.arange(8 * 13, dtype=np.float32).reshape(8, 13)
    for array in (weight, weight[:2]):
        padded = even_columns(array, layers["lm_head"])
        assert padded.shape == (len(array), 14) and np.array_equal(padded[:, :13], array)
    for name in ("h.0.attn.c_attn", "wte"):
        assert even_columns(weight, layers.get(name)) is weight
    assert even_columns(weight[:, :12], layers["lm_head"]).shape == (8, 12)  # which is an error of the checkpoint's
