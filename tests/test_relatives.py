"""GPT-2's relatives against transformers' own classes: half precision, pages, and long greedy texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import logits_of, random_model
from selection import partly_slow
from test_model import relative_error, stateless_logits

from engine import Engine, compile_model, config_of, load_model
from generation import Sampler, generate
from nvtripy_portable.decoder import Decoder, Piece
from weight_loader import open_checkpoint

CONTEXT = 256
#: Half precision is compared with float32, and has a dozen roundings a layer. What a rounding does to the logits grows
#: with the weights: those of `random_model` are halved then, three times what training starts from still.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
SIZES = {"hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": CONTEXT, "num_attention_heads": 6}
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_positions": CONTEXT}),
    "multi-query": ("gpt_bigcode", {"n_positions": CONTEXT, "n_embd": 48, "n_head": 6}),
    "multi-head": ("gpt_bigcode", {"n_positions": CONTEXT, "multi_query": False}),
    "starcoder2": ("starcoder2", SIZES | {"sliding_window": 37}),
    "starcoder2, one token": ("starcoder2", SIZES | {"sliding_window": 1, "use_bias": False}),
    "llama": ("llama", SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "llama, one group": ("llama", SIZES | {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    "mistral": ("mistral", SIZES | {"sliding_window": 100}),
    "nemotron": ("nemotron", SIZES | {"num_key_value_heads": 3}),
    "stablelm": ("stablelm", SIZES | {"num_key_value_heads": 3, "partial_rotary_factor": 0.5}),
}


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' model, and the checkpoint of it."""
    family, settings = RELATIVES[request.param]
    model = random_model(family, **settings)
    model.save_pretrained(tmp_path)
    return model, open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("checkpoint", partly_slow(RELATIVES, ["llama", "starcoder2"]), indirect=True)
def test_logits(checkpoint: tuple[Any, Any], dtype: str) -> None:
    """Stateless, cached, and in pieces over pages; relative to the norm of transformers' logits in float32."""
    model, source = checkpoint
    if dtype != "float32":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                    parameter.mul_(0.5)
        model.save_pretrained(source.path)
        source = open_checkpoint(source.path)
    idx = np.random.default_rng(0).integers(0, 97, (2, 90)).astype(np.int32)
    expected = logits_of(model, idx)
    config = config_of(source, dtype)
    gpt = load_model(source, config)
    assert relative_error(stateless_logits(gpt, idx), expected) <= TOLERANCES[dtype]

    executable = compile_model(gpt, 2)
    engine, zero = Engine(executable, config, 2), np.zeros(2, np.int32)
    steps = [engine.step(idx[:, :60], zero, zero + 59)]
    steps += [engine.step(idx[:, at : at + 1], zero + at, zero) for at in range(60, 90)]
    assert relative_error(np.stack(steps, axis=1), expected[:, 59:]) <= TOLERANCES[dtype]

    decoder = Decoder.of(executable, page_tokens=7)
    assert decoder is not None
    tables = [decoder.pool.take(-(-90 // 7)) for _ in range(2)]
    found = [[], []]
    for begin, end, row in ((0, 11, 0), (0, 50, 1), (11, 12, 0), (12, 70, 0), (50, 70, 1)):
        piece = Piece(idx[row, begin:end], begin, tables[row], rows=range(end - begin))
        found[row].extend(decoder.step([piece]))
    for at in range(70, 90):
        for row, logits in enumerate(
            decoder.step([Piece(idx[row, at : at + 1], at, tables[row], generated=True) for row in range(2)])
        ):
            found[row].append(logits)
    assert relative_error(np.array(found), expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("checkpoint", partly_slow(RELATIVES, ["starcoder2"]), indirect=True)
def test_greedy_text_is_that_of_generate(checkpoint: tuple[Any, Any]) -> None:
    """Of 200 tokens, which is beyond every window."""
    model, source = checkpoint
    prompt = np.random.default_rng(0).integers(2, 97, 10).tolist()
    model.generation_config.eos_token_id = None
    # Without a cache: transformers' own keeps all keys for a window of one token.
    settings = {"max_new_tokens": 200, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), **settings)[0, 10:].tolist()
    config = config_of(source, "float32")
    engine = Engine(compile_model(load_model(source, config), 1), config, 1)
    greedy = Sampler(temperature=0)
    assert [token for step in generate(engine, [prompt], [greedy], 200, set()) for _, token in step] == expected
