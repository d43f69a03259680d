"""LoRA on every family against peft's own models; many adapters at the same time, each as if it were alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_models import adapted, decoder_with, logits_with, room_of
from random_models import logits_of, random_model
from safetensors.numpy import load_file, save_file
from test_model import relative_error

from adapters.errors import AdapterError
from adapters.lora import Lora, read_lora
from engine import AdapterRoom, Engine, compile_model, config_of, load_model, open_engine
from nvtripy_portable.decoder import Decoder, Piece
from weight_loader import open_checkpoint

peft = pytest.importorskip("peft", reason="peft is not installed (requirements/test.txt)")

IDX = np.random.default_rng(0).integers(0, 97, (1, 20)).astype(np.int32)
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}

#: Family, settings of the model, and what peft's configuration of the adapter says.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2, everything": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, patterns": (
        "gpt2",
        {},
        {
            "target_modules": ["c_attn", "c_fc"],
            "rank_pattern": {"h.1.attn.c_attn": 5, "c_fc": 2},
            "alpha_pattern": {"c_attn": 32},
            "fan_in_fan_out": True,
        },
    ),
    "multi-query": ("gpt_bigcode", {}, {"target_modules": ["c_attn", "c_proj"]}),
    "multi-head": ("gpt_bigcode", {"multi_query": False}, {"target_modules": ["c_attn", "c_fc"], "use_rslora": True}),
    "starcoder2": ("starcoder2", {}, {"target_modules": ["q_proj", "v_proj", "c_fc", "c_proj"]}),
    "llama": ("llama", {}, {"target_modules": "all-linear"}),
    "llama, keys": ("llama", {}, {"target_modules": ["k_proj", "up_proj", "down_proj"], "lora_alpha": 3}),
    "mistral": ("mistral", {"sliding_window": 7}, {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    "nemotron": ("nemotron", {}, {"target_modules": ["up_proj", "down_proj", "v_proj"]}),
    "stablelm": ("stablelm", {}, {"target_modules": ["q_proj", "gate_proj"]}),
    "layers": ("llama", {}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts(case: str, dtype: str, tmp_path: Path) -> None:
    """Stateless, and over pages; without the adapter the base's."""
    family, sizes, config = CASES[case]
    base = random_model(family, **sizes)
    if dtype != "float32":  # as in test_relatives.py: what a rounding does to the logits grows with the weights
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                    parameter.mul_(0.5)
    base.save_pretrained(tmp_path / "base")
    plain = logits_of(base, IDX)
    model = adapted(base, tmp_path / "adapter", 1, **config)
    expected = logits_of(model, IDX)
    assert relative_error(expected, plain) > 0.05, "the adapter does nothing"
    checkpoint = open_checkpoint(tmp_path / "base")
    lora = read_lora(tmp_path / "adapter", checkpoint)
    decoder = decoder_with(checkpoint, dtype, [lora])
    assert relative_error(logits_with(decoder, IDX[0].tolist(), 1), expected[0]) < TOLERANCES[dtype]
    assert relative_error(logits_with(decoder, IDX[0].tolist(), 0), plain[0]) < TOLERANCES[dtype]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Lora]]:
    """A checkpoint, and adapters of different ranks for it."""
    folder = tmp_path_factory.mktemp("several")
    base = random_model("llama")
    base.save_pretrained(folder / "base")
    checkpoint = open_checkpoint(folder / "base")
    loras = []
    for number, targets in enumerate((["q_proj", "v_proj"], ["k_proj", "gate_proj", "down_proj"], ["o_proj"])):
        model = adapted(base, folder / str(number), number, r=2 + 3 * number, target_modules=targets)
        base = model.unload()
        loras.append(read_lora(folder / str(number), checkpoint))
    return checkpoint, loras


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@given(
    chosen=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    cut=st.integers(1, 20),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_batch_of_adapters_equals_each_alone(
    several: tuple[Any, list[Lora]], dtype: str, chosen: list[tuple[int, int]], seed: int, cut: int
) -> None:
    """Bit for bit: prompts cut anywhere, generated tokens, whoever is beside them."""
    decoder = decoders(several, dtype)
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 97, length).tolist() for _, length in chosen]
    alone = []
    for text, (slot, _) in zip(texts, chosen, strict=True):
        pages = decoder.pool.take(3)
        first = decoder.step([Piece(text, 0, pages, slot=slot)])
        alone.append((first, decoder.step([Piece([5], len(text), pages, generated=True, slot=slot)])))
        decoder.pool.release(pages)
    tables = [decoder.pool.take(3) for _ in texts]
    here = [Piece(text[:cut], 0, t, slot=s) for text, t, (s, _) in zip(texts, tables, chosen, strict=True)]
    found = [[row] for row in decoder.step(here)]
    rest = [n for n, text in enumerate(texts) if len(text) > cut]
    if rest:
        pieces = [Piece(texts[n][cut:], cut, tables[n], slot=chosen[n][0]) for n in rest]
        for n, row in zip(rest, decoder.step(pieces), strict=True):
            found[n] = [row]
    last = [Piece([5], len(t), p, generated=True, slot=s) for t, p, (s, _) in zip(texts, tables, chosen, strict=True)]
    for n, row in enumerate(decoder.step(last)):
        assert np.array_equal(found[n][0], alone[n][0][0]) and np.array_equal(row, alone[n][1][0])
    for pages in tables:
        decoder.pool.release(pages)


_DECODERS: dict[str, Decoder] = {}


def decoders(several: tuple[Any, list[Lora]], dtype: str) -> Decoder:
    if dtype not in _DECODERS:
        _DECODERS[dtype] = decoder_with(several[0], dtype, several[1])
    return _DECODERS[dtype]


def test_an_adapter_in_more_room_than_it_needs_is_the_same(several: tuple[Any, list[Lora]]) -> None:
    """Larger ranks and more slots are filled up with zeros: the same bits."""
    checkpoint, loras = several
    own = decoder_with(checkpoint, "float32", loras[:1])
    wide = decoder_with(checkpoint, "float32", loras[:1], AdapterRoom(5, (64, 16, 32, 8)))
    ids = IDX[0].tolist()
    assert np.array_equal(logits_with(own, ids, 1), logits_with(wide, ids, 1))
    wide.set_adapter(4, loras[0].tables((64, 16, 32, 8)))
    assert np.array_equal(logits_with(own, ids, 1), logits_with(wide, ids, 4))
    wide.set_adapter(1, None)
    assert np.array_equal(logits_with(own, ids, 0), logits_with(wide, ids, 1))
    with pytest.raises(ValueError, match="expected a slot from 1 to 5 but got 6"):
        wide.set_adapter(6, None)
    with pytest.raises(ValueError, match="expected a matrix of at most"):
        own.set_adapter(1, [np.zeros((2, 99, 32), np.float32)] * len(loras[0].tables(loras[0].ranks)))


def test_slots_beyond_the_room_are_refused(several: tuple[Any, list[Lora]]) -> None:
    decoder = decoders(several, "float32")
    pages = decoder.pool.take(1)
    with pytest.raises(ValueError, match="gather of adapters"):
        decoder.step([Piece([1], 0, pages, slot=4)])
    plain = open_engine(several[0], "float32", 1).paged(8, 8)
    assert plain is not None and plain.slots == 0
    with pytest.raises(ValueError, match="no adapters"):
        plain.step([Piece([1], 0, plain.pool.take(1), slot=1)])
    decoder.pool.release(pages)


def test_numpy_computes_the_same(several: tuple[Any, list[Lora]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused operations' plain functions, and the graph without any pass, within rounding of float32."""
    checkpoint, loras = several
    ids = IDX[0].tolist()
    native = logits_with(decoders(several, "float32"), ids, 2)
    monkeypatch.setenv("NVTRIPY_PORTABLE_NATIVE", "0")
    assert relative_error(logits_with(decoder_with(checkpoint, "float32", loras), ids, 2), native) < 1e-5


def test_rows_of_a_batch_choose(several: tuple[Any, list[Lora]]) -> None:
    """The engine's own step, as generation.py calls it."""
    checkpoint, loras = several
    room = room_of(loras)
    config = replace(config_of(checkpoint, "float32"), adapters=room.count, adapter_ranks=room.ranks)
    engine = Engine(compile_model(load_model(checkpoint, config), 3), config, 3)
    for slot, lora in enumerate(loras, 1):
        engine.set_adapter(slot, lora.tables(room.ranks))
    engine.choose([2, 0, 3])
    idx = np.repeat(IDX, 3, axis=0)
    found = engine.step(idx, np.zeros(3, np.int32), np.full(3, IDX.shape[1] - 1, np.int32))
    for row, slot in zip(found, (2, 0, 3), strict=True):
        assert np.array_equal(row, logits_last(decoders(several, "float32"), slot))


def logits_last(decoder: Decoder, slot: int) -> np.ndarray:
    pages = decoder.pool.take(3)
    found: np.ndarray = decoder.step([Piece(IDX[0].tolist(), 0, pages, slot=slot)])[0]
    decoder.pool.release(pages)
    return found


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = random_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    adapted(base, tmp_path / "adapter", 1, target_modules=["c_attn"], fan_in_fan_out=True)
    return tmp_path


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        read_lora(folder / "adapter", open_checkpoint(folder / "base"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, 'expected peft_type to be LORA but got "PREFIX_TUNING"'),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, 'expected bias to be none but got "lora_only"'),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"something_new": 3}, "something_new is not supported"),
        ({"r": 5}, r"expected transformer.h.0.attn.c_attn to have lora_A \(5, 32\)"),
        ({"r": "4"}, 'expected r to be a positive integer but got "4"'),
        ({"lora_alpha": None}, "expected lora_alpha to be a number but got null"),
        ({"rank_pattern": {"(": 2}}, r"expected rank_pattern to have regular expressions but got \"\(\""),
        ({"rank_pattern": [1]}, "expected rank_pattern to map patterns"),
    ],
)
def test_settings_that_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuse(folder, message)


def test_tensors_that_are_refused(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    a = next(name for name in tensors if "lora_A" in name)
    for changed, message in [
        (
            {**tensors, "base_model.model.lm_head.lora_A.weight": tensors[a]},
            "expected lora_A and lora_B of each module",
        ),
        ({**tensors, a.replace("lora_A", "lora_magnitude_vector"): tensors[a]}, "of linear layers only"),
        ({**tensors, a: tensors[a][:, :7].copy()}, "to have lora_A"),
        ({**tensors, a: np.full_like(tensors[a], np.nan)}, "expected finite numbers"),
        ({**tensors, a: tensors[a].astype(np.int8)}, "to be of floats"),
        ({}, "of each module but got none"),
    ]:
        save_file(changed or {"x": np.zeros(1)}, file) if changed else save_file({}, file)
        refuse(folder, message)
    file.write_bytes(b"nonsense")
    with pytest.raises(Exception, match="adapter_model") as caught:
        read_lora(folder / "adapter", open_checkpoint(folder / "base"))
    assert type(caught.value).__name__ in ("AdapterError", "CheckpointError")
    file.unlink()
    refuse(folder, "holds no adapter")
    (folder / "adapter" / "adapter_config.json").unlink()
    refuse(folder, "expected an adapter in")


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    base = random_model("llama")
    adapted(base, tmp_path / "adapter", 1, target_modules=["q_proj"])
    refuse(folder, "is for another model than")
