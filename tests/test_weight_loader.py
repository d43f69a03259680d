"""weight_loader.py on checkpoints that transformers itself saved, and on damaged ones."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import weight_loader
from loading import fingerprint
from weight_loader import Checkpoint, CheckpointError, open_checkpoint, parameter_shapes

TINY: dict[str, Any] = {"vocab_size": 61, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 12}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def tiny_model(cls: Any = GPT2LMHeadModel, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random GPT-2 whose biases and LayerNorms are random too, so that a mix-up of two of them shows."""
    torch.manual_seed(0)
    model = cls(GPT2Config(**{**TINY, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny tied checkpoint."""
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def expected_parameters(model: Any, dtype: str) -> dict[str, np.ndarray]:
    """What the loader should give, computed with torch."""
    tied = model.config.tie_word_embeddings
    expected = {}
    for stored_name, tensor in model.state_dict().items():
        name = stored_name.removeprefix("transformer.")
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith(CONV1D):
            tensor = tensor.T
        target = "float32" if "ln_" in name else dtype
        tensor = tensor.to(getattr(torch, target)).contiguous()
        bits = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if target == "bfloat16" else tensor.numpy()
        expected[name] = bits
    return expected


def check_equal(path: Path, model: Any, dtype: str = "float32") -> None:
    checkpoint = open_checkpoint(path)
    found = dict(checkpoint.parameters(dtype))
    expected = expected_parameters(model, dtype)
    assert {name: array.shape for name, array in found.items()} == parameter_shapes(checkpoint.config)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and array.flags.c_contiguous and array.flags.owndata, name
        assert array.tobytes() == expected[name].tobytes(), name


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(path: Path | str) -> str:
    """The one line that opening a checkpoint fails with."""
    with pytest.raises(CheckpointError) as error:
        for _ in open_checkpoint(path).parameters("float32"):
            pass
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_to_every_dtype(tmp_path: Path, source: torch.dtype, dtype: str) -> None:
    model = tiny_model(dtype=source)
    model.save_pretrained(tmp_path)
    check_equal(tmp_path, model, dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [{}, {"n_inner": 20}, {"n_layer": 12}])
def test_shapes(tmp_path: Path, tied: bool, config: dict[str, int]) -> None:
    model = tiny_model(tie_word_embeddings=tied, **config)
    model.save_pretrained(tmp_path)
    check_equal(tmp_path, model)


@pytest.mark.parametrize("tied", [True, False])
def test_shards(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(tmp_path, model)


def test_without_prefix(tmp_path: Path) -> None:
    """The hub's gpt2 is stored so: as GPT2Model saves it."""
    model = tiny_model(GPT2Model)
    model.save_pretrained(tmp_path)
    check_equal(tmp_path, model)


def test_old_buffers_are_ignored(folder: Path) -> None:
    def add_masks(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, add_masks)
    check_equal(folder, tiny_model())


def test_tied_head_that_is_stored_too(folder: Path) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edit_tensors(folder, store_head)
    check_equal(folder, tiny_model())
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][60, 11].add_(1))
    assert "ties lm_head.weight to wte.weight, but the stored values differ" in refusal(folder)


def test_tied_embedding_that_is_stored_as_the_head_alone(folder: Path) -> None:
    """Of tensors that share memory, safetensors' save_model keeps the first by name."""
    save_model(tiny_model(), folder / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    check_equal(folder, GPT2LMHeadModel.from_pretrained(folder))
    check_equal(folder, tiny_model())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_tensor_in_two_shards(tmp_path: Path, kind: str) -> None:
    """That of the last file counts, whatever the index says, as in transformers."""
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    twice = "transformer.wpe.weight"
    for number, file in enumerate(files):
        shard = {name: tensor for name, tensor in state.items() if weight_map[name] == file}
        shard[twice] = torch.full_like(state[twice], number)
        if kind == "safetensors":
            save_file(shard, tmp_path / file, metadata={"format": "pt"})
        else:
            torch.save(shard, tmp_path / file)
    index = {"metadata": {}, "weight_map": {**weight_map, twice: files[0]}}
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert (theirs.transformer.wpe.weight == 1).all()
    check_equal(tmp_path, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_bin(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    model = tiny_model(dtype=dtype)
    model.config.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    check_equal(tmp_path, model)
    check_equal(tmp_path, model, "bfloat16")


def test_sharded_pytorch_bin(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    weight_map = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_equal(tmp_path, model)


def test_bin_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch==2.13.0" in refusal(folder)


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_float16_overflow_is_named(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][3, 4].fill_(value))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"h.1.mlp.c_fc.weight holds .* overflows float16"):
        list(checkpoint.parameters("float16"))
    list(checkpoint.parameters("bfloat16"))


def test_float16_keeps_what_rounds_down(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors["transformer.wpe.weight"][0, :2].copy_(torch.tensor([65519.0, -65519]))
    )
    found = dict(open_checkpoint(folder).parameters("float16"))["wpe.weight"][0, :2]
    np.testing.assert_array_equal(found, np.array([65504, -65504], np.float16))


def test_the_types_that_hold_what_overflows_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["transformer.ln_f.bias"][3].fill_(1.55e5))
    list(open_checkpoint(folder).parameters("float16"))  # LayerNorms are float32 throughout
    edit_tensors(folder, lambda tensors: tensors["transformer.h.0.attn.c_attn.bias"][3].fill_(1.55e5))
    with pytest.raises(CheckpointError, match=r"c_attn.bias holds 155000, .*; float32 or bfloat16 would hold it"):
        list(open_checkpoint(folder).parameters("float16"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, source: torch.dtype, value: float) -> None:
    """In tensors of every kind, at their first and their last place, whatever the types."""
    tiny_model(dtype=source).save_pretrained(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    for name in ("wte.weight", "h.1.mlp.c_fc.weight", "h.0.attn.c_attn.bias", "h.0.ln_1.weight", "ln_f.bias"):
        for place in (0, -1):
            (tmp_path / "model.safetensors").write_bytes(good)
            edit_tensors(tmp_path, lambda t, n=name, p=place: t[f"transformer.{n}"].view(-1)[p].fill_(value))
            for dtype in ("float32", "float16", "bfloat16"):
                with pytest.raises(CheckpointError, match=rf"{name} holds {value}: expected finite numbers"):
                    list(open_checkpoint(tmp_path).parameters(dtype))


def test_a_number_that_no_type_holds(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float64).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["transformer.wte.weight"][0, 0].fill_(1e39))
    assert "wte.weight holds 1e+39, which overflows float32 (its largest value is 3.40282e+38)" in refusal(tmp_path)


def test_a_stored_head_that_is_not_finite_is_not_called_another(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.wte.weight"][0, 0] = torch.nan
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edit_tensors(folder, spoil)
    assert "wte.weight holds nan" in refusal(folder)


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ValueError, match="'int8'"):
        next(open_checkpoint(folder).parameters("int8"))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """What is allocated beyond the array that is yielded stays within one tensor's conversion copy."""
    import tracemalloc

    tiny_model(vocab_size=5000, n_embd=128, n_layer=4).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    list(checkpoint.parameters("float16"))  # so that modules are imported
    tracemalloc.start()
    for _name, _array in checkpoint.parameters("float16"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 5000 * 128 * 2  # of the largest tensor; all of them are 2.3 times that in float32


# --- config.json -----------------------------------------------------------------------------------------------------


def test_config(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False, activation_function="gelu_pytorch_tanh", eos_token_id=7)
    model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config.as_dict() == {
        **{**TINY, "n_inner": 48, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
        **{"tie_word_embeddings": False, "eos_token_ids": (7,)},
        **{"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        **{"quant_mode": None, "quant_lm_head": False, "quant_embedding": False, "quant_position_embedding": False},
        **{"per_channel": True, "per_token": False, "kv_cache_dtype": None},
        **{"block_size": 128, "pre_quant_scale": True},
        **{"n_kv_head": None, "head_dim": None, "gated_mlp": False, "norm": "layer", "norm_bias": True},
        **{"attention_bias": True, "mlp_bias": True, "position_embedding": "learned", "window": None},
        **{"rotary_base": 10000.0, "rotary_fraction": 1.0, "rotary_interpolation": 1.0},
    }
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, eos_token_id=50256)
    assert open_checkpoint(tmp_path).config.eos_token_ids == ()


ABSENT = object()
ENDINGS = (ABSENT, None, 3, [3, 5], [5], [], 9999, [9999, 5], -1)


@pytest.mark.parametrize("generation", ["no file", *ENDINGS])
def test_endings_are_those_of_transformers(folder: Path, generation: Any) -> None:
    """generation_config.json counts alone where there is one, also where it names none."""
    (folder / "generation_config.json").unlink()
    if generation != "no file":
        entries = {} if generation is ABSENT else {"eos_token_id": generation}
        (folder / "generation_config.json").write_text(json.dumps(entries))
    for ending in ENDINGS:
        edit_config(folder, eos_token_id=ending) if ending is not ABSENT else drop_from_config(folder, "eos_token_id")
        found = GPT2LMHeadModel.from_pretrained(folder).generation_config.eos_token_id
        expected = found if isinstance(found, list) else [] if found is None else [found]
        assert open_checkpoint(folder).config.eos_token_ids == tuple(sorted(i for i in expected if 0 <= i < 61))


def test_endings_do_not_change_what_is_computed(folder: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2, 1]}')
    assert open_checkpoint(folder).config.eos_token_ids == (1, 2)
    assert open_checkpoint(folder).fingerprint() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json is not valid JSON"),
        ("[]", "expected a JSON object in .*generation_config.json"),
        ('{"eos_token_id": "x"}', 'generation_config.json: expected eos_token_id to be an integer, a list .*"x"'),
        ('{"eos_token_id": [true]}', "generation_config.json: expected eos_token_id"),
        ('{"eos_token_id": 1.5}', "generation_config.json: expected eos_token_id"),
        ('{"eos_token_id": [[1]]}', "generation_config.json: expected eos_token_id"),
    ],
)
def test_damaged_generation_config(folder: Path, content: str, message: str) -> None:
    (folder / "generation_config.json").write_text(content)
    assert re.search(message, refusal(folder))


def drop_from_config(folder: Path, name: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"n_layer": "x"}, 'n_layer to be an integer from 1 to 4096, got "x"'),
    ({"n_layer": 10**12}, "n_layer to be an integer from 1 to 4096, got 1000000000000"),
    ({"n_layer": True}, "n_layer to be an integer"),
    ({"n_embd": 12.0}, "n_embd to be an integer"),
    ({"n_embd": None}, "n_embd to be an integer"),
    ({"vocab_size": 0}, "vocab_size to be an integer"),
    ({"n_positions": -1}, "n_positions to be an integer"),
    ({"n_inner": "4x"}, "n_inner to be an integer"),
    ({"n_head": 5}, "n_embd (12) is not a multiple of n_head (5)"),
    ({"hidden_size": 24}, "n_embd and its synonym hidden_size contradict each other: 12 and 24"),
    (
        {"activation_function": "mish"},
        "gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, relu, relu2, silu, swish, got",
    ),
    ({"activation_function": ["gelu"]}, "activation_function"),
    ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"model_type": "bloom"}, "expected model_type to be one of 'gpt2', 'gpt_bigcode', "),
    ({"model_type": "llama"}, "expected architectures to be LlamaForCausalLM or LlamaModel, got"),
    ({"model_type": ["gpt2"]}, "expected model_type to be one of"),
    ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}, '"gptj"'),
    ({"model_type": None, "architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
    ({"model_type": None, "architectures": None}, "'granite', got null"),
    ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
    ({"architectures": "GPT2LMHeadModel"}, "architectures"),
    ({"scale_attn_weights": 0}, "scale_attn_weights to be true or false, got 0"),
    ({"scale_attn_by_inverse_layer_idx": None}, "scale_attn_by_inverse_layer_idx to be true or false, got null"),
    ({"add_cross_attention": True}, "add_cross_attention=true is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[str(c)[:60] for c, _ in BAD_CONFIGS])
def test_bad_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000, b'{"n_layer": 1' + b"0" * 5000 + b"}"]
)
def test_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_activations(folder: Path, activation: str) -> None:
    edit_config(folder, activation_function=activation)
    assert open_checkpoint(folder).config.activation_function == activation


# --- tensors that do not fit -----------------------------------------------------------------------------------------


def test_all_misfits_in_one_message(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.ln_f.weight"]
        tensors["transformer.h.2.ln_1.bias"] = torch.zeros(12)
        tensors["score.weight"] = torch.zeros(2, 12)
        tensors["transformer.h.1.attn.c_attn.weight"] = torch.zeros(36, 12)
        tensors["transformer.wpe.weight"] = torch.zeros(16, 12, dtype=torch.int64)

    edit_tensors(folder, damage)
    message = refusal(folder)
    assert "missing: h.0.ln_1.bias, ln_f.weight;" in message
    assert "score.weight" in message and "transformer.h.2.ln_1.bias" in message
    assert "transformer.h.1.attn.c_attn.weight (expected (12, 36), got (36, 12))" in message
    assert "transformer.wpe.weight (expected F32, F16, BF16, F64, got I64)" in message


def test_untied_without_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    assert "missing: lm_head.weight" in refusal(folder)


def test_tensor_stored_under_both_names(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"wte.weight": torch.zeros(61, 12)}))
    assert "wte.weight is stored twice" in refusal(folder)


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 8, 100, 2000, -1])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "is not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_random_bytes(folder: Path, file: str, seed: int) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(np.random.default_rng(seed).bytes(10_000))
    assert f"{file} is not a readable" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}}",
        b'{"a": 3}',
        b'{"wte.weight": {"dtype": "F32", "shape": [61, 12], "data_offsets": [0, 99999999999999]}}',
        b'{"wte.weight": {"dtype": "F32", "shape": [61, 12], "data_offsets": [-4, 0]}}',
        b'{"wte.weight": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
        b'{"wte.weight": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_hostile_safetensors_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "is not a readable safetensors file" in refusal(folder)


class Malicious:
    """Unpickled, it creates the file `touched`."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("wrapped", [True, False])
def test_malicious_pickle_is_not_run(folder: Path, wrapped: bool) -> None:
    (folder / "model.safetensors").unlink()
    payload = {"transformer.wte.weight": Malicious(folder / "touched")}
    if wrapped:
        torch.save(payload, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload))
    assert "is not a readable PyTorch file of tensors and nothing else" in refusal(folder)
    assert not (folder / "touched").exists()


@pytest.mark.parametrize("state", [[1, 2], {"a": 3}, {1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}])
def test_bin_of_something_else(folder: Path, state: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    shutil.rmtree(folder)
    tiny_model().save_pretrained(folder, max_shard_size="6KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_missing_shard(folder: Path) -> None:
    sharded(folder)
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert f"names shards that are missing: {victim.name}" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "a\\b.safetensors"]
)
def test_index_that_points_elsewhere(folder: Path, name: str) -> None:
    index, content = sharded(folder)
    content["weight_map"]["transformer.wte.weight"] = name
    index.write_text(json.dumps(content))
    assert "expected the name of a .safetensors file beside it" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}']
)
def test_damaged_index(folder: Path, content: str) -> None:
    index, _ = sharded(folder)
    index.write_text(content)
    assert index.name in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights: expected one of model.safetensors" in refusal(folder)


def test_no_config(tmp_path: Path) -> None:
    assert "is not a checkpoint: it has no config.json" in refusal(tmp_path)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "./gone",
        "../gone",
        "/gone/away",
        "a/b/c",
        "~/gone",
        "gone/",
        "",
        "a\\b",
        "./" + "x" * 5000,
        "gone.gguf",
        "gone/it.nemo",
    ],
)
def test_paths_are_not_looked_for_at_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder or file at .* nothing is there"):
        open_checkpoint(name)


def test_pathlike_is_never_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="expected a checkpoint folder or file at 'gpt2'"):
        open_checkpoint(Path("gpt2"))


def test_unknown_bare_name() -> None:
    with pytest.raises(CheckpointError, match=r"no model 'gpt5': expected a checkpoint folder, gpt2, .* distilgpt2"):
        open_checkpoint("gpt5")


def test_file_instead_of_folder(folder: Path) -> None:
    assert "expected a checkpoint folder, or a file of the kind .gguf" in refusal(folder / "config.json")


def test_folder_with_a_hub_name_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder, folder.parent / "gpt2", dirs_exist_ok=True)
    try:
        assert open_checkpoint("gpt2").config.n_embd == 12
    finally:
        shutil.rmtree(folder.parent / "gpt2")


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="a revision"):
        open_checkpoint(folder, revision="main")


# --- fingerprint and start-up ----------------------------------------------------------------------------------------


def test_fingerprint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    original = open_checkpoint(folder).fingerprint()
    copy = tmp_path_factory.mktemp("copy")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / file, copy / file)
    assert open_checkpoint(copy).fingerprint() == original
    edit_config(copy, layer_norm_epsilon=1e-6)
    changed_config = open_checkpoint(copy).fingerprint()
    edit_config(copy, layer_norm_epsilon=1e-5, task_specific_params={})  # of no effect on the computation
    assert open_checkpoint(copy).fingerprint() == original
    edit_tensors(copy, lambda tensors: tensors["transformer.ln_f.bias"][0].add_(1))
    assert len({original, changed_config, open_checkpoint(copy).fingerprint()}) == 3


def test_fingerprint_of_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_FULLY_HASHED", 1000)
    monkeypatch.setattr(fingerprint, "_SAMPLE_BYTES", 64)
    path = folder / "model.safetensors"
    checkpoint = open_checkpoint(folder)
    original = checkpoint.fingerprint()
    assert checkpoint.fingerprint() == original
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(path, ns=(times[0], times[1] + 1))
    assert checkpoint.fingerprint() != original
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert Checkpoint(folder).fingerprint() != original


def test_reading_imports_no_framework(folder: Path) -> None:
    code = (
        "import sys, weight_loader\n"
        "assert not {'safetensors', 'ml_dtypes'} & set(sys.modules)\n"
        "print(sum(a.size for n, a in weight_loader.open_checkpoint(sys.argv[1] + '/').parameters('bfloat16')))\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'tiktoken', 'nvtripy') if m in sys.modules])\n"
    )
    root = Path(weight_loader.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[:2] == [str(tiny_model().num_parameters()), "[]"]


# --- files that may not be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors", "hf_quant_config.json"])
def test_what_may_not_be_read_is_not_absent(folder: Path, file: str) -> None:
    """A link to itself, as no permission stops the superuser."""
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(folder / file)
    assert f"cannot read {folder / file}: Too many levels of symbolic links" in refusal(folder)
    (folder / file).unlink()
    (folder / file).mkdir()
    assert f"cannot read {folder / file}: Is a directory" in refusal(folder)


def test_a_folder_that_may_not_be_looked_at_is_not_absent(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop" / "model")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_without_permission(folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors itself says that there is no such file."""
    (folder / "model.safetensors").rename(folder / file)
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path.name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(folder) == f"cannot read {folder / file}: Permission denied"
