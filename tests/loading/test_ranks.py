"""Folders of ranks' files: what convert_checkpoint.py writes is the checkpoint, whoever shares it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf
from nanogpt_files import nano_model, write_ckpt
from nemo_archives import write_nemo
from opened import refusal
from quantized_folders import quantized_folder
from random_models import FAMILIES, random_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from santacoder_files import santacoder
from selection import partly_slow
from tiny_checkpoints import byte_vocabulary, random_checkpoint

from converting.ranks import ConversionError, planned, write
from converting.weight_only import rounded
from loading.modelopt_layout import is_quantized
from parallelism.mapping import Mapping
from parallelism.splitting import part_of
from weight_loader import Checkpoint, open_checkpoint

#: Of every family what its settings can change about the tensors, and how they are shared.
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3},
    "gpt_bigcode": {"n_layer": 3},
    "gpt_bigcode, multi-head": {"multi_query": False},
    "gpt2, untied": {"tie_word_embeddings": False, "vocab_size": 101, "n_inner": 20},
    "gpt2, unscaled": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "starcoder2": {"num_hidden_layers": 3, "sliding_window": 7},
    "starcoder2, without biases": {"use_bias": False, "vocab_size": 101},
    "llama": {"num_hidden_layers": 3, "vocab_size": 101, "head_dim": 6, "tie_word_embeddings": True},
    "llama, with biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "llama, interpolated": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5}},
    "mistral": {"sliding_window": 9},
    "nemotron": {"num_hidden_layers": 3, "partial_rotary_factor": 0.5},
    "stablelm": {"num_hidden_layers": 3, "partial_rotary_factor": 0.25},
    "granite": {"attention_multiplier": 1.0},
}
GRID = [(tp_size, pp_size, dimension) for tp_size in (1, 2, 4) for pp_size in (1, 2) for dimension in (None, 0, 1)]


def convert(source: Path | Checkpoint, folder: Path, mapping: Mapping, **how: Any) -> Checkpoint:
    """The checkpoint that is read back."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    write(planned(checkpoint, mapping, **how), folder)
    return open_checkpoint(folder)


def expected_parameters(checkpoint: Checkpoint, dtype: str) -> dict[str, np.ndarray]:
    """Those of the source, norms with the 1 added that the format has added."""
    found = dict(checkpoint.parameters(dtype))
    if checkpoint.config.norm == "layer1p":
        found |= {name: found[name] + np.float32(1) for name in found if "ln_" in name and name.endswith("weight")}
    return found


def check_equal(found: Checkpoint, expected: dict[str, np.ndarray], dtype: str) -> None:
    read = dict(found.parameters(dtype))
    assert list(read) == list(expected)
    for name, values in read.items():
        assert values.dtype == expected[name].dtype and np.array_equal(values, expected[name]), name


@pytest.mark.parametrize("family", partly_slow(SETTINGS, ["gpt2", "llama", "nemotron"]))
def test_every_family_is_read_back_as_it_was(family: str, tmp_path: Path) -> None:
    random_model(family.partition(",")[0], **SETTINGS[family]).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    expected = expected_parameters(source, "float32")
    config = replace(source.config, norm="layer") if source.config.norm == "layer1p" else source.config
    for tp_size, pp_size, dimension in GRID:
        mapping, folder = Mapping(tp_size, pp_size, 0, dimension), tmp_path / f"{tp_size}{pp_size}{dimension}"
        found = convert(source, folder, mapping)
        said, wanted = found.config.as_dict(), config.as_dict()
        for same in (said, wanted):  # what means the same
            same["n_kv_head"] = same["n_kv_head"] or same["n_head"]
            same["head_dim"] = same["head_dim"] or same["n_embd"] // same["n_head"]
            same["norm_bias"] = same["norm_bias"] and same["norm"] != "rms"
        assert said == wanted
        check_equal(found, expected, "float32")
        check_ranks(source, found, folder, mapping)


def check_ranks(source: Checkpoint, found: Checkpoint, folder: Path, mapping: Mapping) -> None:
    """Each file has its part and no more, and the source's own parts are the same numbers."""
    sizes = []
    for rank in range(mapping.world_size):
        each = mapping.of_rank(rank)
        parts = dict(found.rank_parameters("float32", each))
        of_source = dict(source.rank_parameters("float32", each))
        assert parts.keys() == of_source.keys()
        if source.config.norm != "layer1p":
            assert all(np.array_equal(parts[name], of_source[name]) for name in parts)
        held = sum(part.nbytes for part in parts.values())
        with safe_open(folder / f"rank{rank}.safetensors", "numpy") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert sum(values.nbytes for values in stored.values()) == held
        sizes.append(held)
        is_last, layers = each.is_last_stage, each.layers(source.config.n_layer)
        assert ("transformer.ln_f.weight" in stored) == is_last
        assert ("transformer.vocab_embedding.weight" in stored) == each.is_first_stage
        assert {name.split(".")[2] for name in stored if ".layers." in name} == set(map(str, range(len(layers))))
    assert len(set(sizes[: mapping.tp_size])) == 1


class Watched(np.ndarray):
    """An array that adds up how many of its numbers were asked for."""

    asked = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Watched.asked += found.size
        return found.view(np.ndarray)


@pytest.mark.parametrize("family", ["gpt2", "llama", "starcoder2"])
def test_a_rank_reads_its_part_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a HuggingFace folder the numbers that it needs; of a folder of ranks its own file."""
    random_model(family).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    read = source._read
    monkeypatch.setattr(source, "_read", lambda name: read(name).view(Watched))
    for rank in range(4):
        mapping = Mapping(2, 2, rank, embedding_sharding_dim=1)
        Watched.asked = 0
        held = sum(part.size for _, part in source.rank_parameters("float32", mapping))
        padding = (-97 % 2) * 32 if rank == 3 else 0
        assert Watched.asked == held - padding
    monkeypatch.undo()
    mapping = Mapping(2, 2, 2, embedding_sharding_dim=1)
    found = convert(source, tmp_path / "made", mapping.of_rank(0))
    for rank in (0, 1, 3):
        path = tmp_path / "made" / f"rank{rank}.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with path.open("r+b") as file:
            file.seek(header)
            file.write(b"\xff" * (path.stat().st_size - header))
    expected = dict(source.rank_parameters("float32", mapping))
    for name, part in found.rank_parameters("float32", mapping):
        assert np.array_equal(part, expected[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", partly_slow(["gpt2", "llama", "nemotron", "gpt_bigcode"], ["llama"]))
def test_a_type_computes_what_the_source_does_in_it(family: str, dtype: str, tmp_path: Path) -> None:
    """Also norms, which stay in float32 where the type would round them."""
    random_model(family).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    found = convert(source, tmp_path / "made", Mapping(2, 2), dtype=dtype)
    check_equal(found, expected_parameters(source, dtype), dtype)
    with safe_open(tmp_path / "made" / "rank0.safetensors", "numpy") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    wanted = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    assert {kind for name, kind in kinds.items() if "layernorm" not in name} == {wanted}
    assert {kind for name, kind in kinds.items() if "layernorm" in name} == {"F32"}
    again = convert(found, tmp_path / "again", Mapping(4))
    check_equal(again, expected_parameters(source, dtype), dtype)


def test_norms_that_a_type_holds_are_in_it(tmp_path: Path) -> None:
    random_model("gpt2").half().save_pretrained(tmp_path / "source")
    found = convert(tmp_path / "source", tmp_path / "made", Mapping(2))
    with safe_open(tmp_path / "made" / "rank1.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "float16"
    check_equal(found, dict(open_checkpoint(tmp_path / "source").parameters("float16")), "float16")


def test_whatever_the_loader_reads_is_converted(tmp_path: Path) -> None:
    """Rows in other orders, layers of several ranks, tokenizers of other kinds: a GGUF file, NeMo's and nanoGPT's."""
    llama = random_model("llama", vocab_size=258, num_key_value_heads=4)
    tokens = {"model": "gpt2", "pre": "gpt-2", "tokens": [*byte_vocabulary(), "Ġt", "<|endoftext|>"], "merges": ["Ġ t"]}
    sources = [
        write_gguf(tmp_path / "model.gguf", llama, **{f"tokenizer.ggml.{key}": value for key, value in tokens.items()}),
        write_nemo(tmp_path / "legacy.nemo", llama, ranks=2),
        write_nemo(tmp_path / "core.nemo", llama, is_core=True, ranks=2, stage_count=2),
        write_ckpt(tmp_path / "ckpt.pt", nano_model(False)),
        santacoder(random_model("gpt_bigcode"), tmp_path / "santacoder"),
    ]
    for number, path in enumerate(sources):
        source = open_checkpoint(path)
        mapping = Mapping(2, 2)
        whole = dict(source.parameters("float32"))
        check_equal(convert(source, tmp_path / f"{number}", mapping), whole, "float32")
        for rank in range(4):
            each = mapping.of_rank(rank)
            for name, part in source.rank_parameters("float32", each):
                values = whole.get(name, whole["wte.weight"])
                assert np.array_equal(part, part_of(name, values, source.config, each))


NAMES = {
    "transformer.vocab_embedding.weight": (97, 32),
    "transformer.position_embedding.weight": (48, 32),
    "transformer.layers.0.input_layernorm.weight": (32,),
    "transformer.layers.0.input_layernorm.bias": (32,),
    "transformer.layers.0.attention.qkv.weight": (48, 32),
    "transformer.layers.0.attention.qkv.bias": (48,),
    "transformer.layers.0.attention.dense.weight": (32, 16),
    "transformer.layers.0.attention.dense.bias": (32,),
    "transformer.layers.0.post_layernorm.weight": (32,),
    "transformer.layers.0.post_layernorm.bias": (32,),
    "transformer.layers.0.mlp.fc.weight": (64, 32),
    "transformer.layers.0.mlp.fc.bias": (64,),
    "transformer.layers.0.mlp.proj.weight": (32, 64),
    "transformer.layers.0.mlp.proj.bias": (32,),
    "transformer.ln_f.weight": (32,),
    "transformer.ln_f.bias": (32,),
    "lm_head.weight": (49, 32),
}


def test_names_and_shapes_are_tensorrt_llms(tmp_path: Path) -> None:
    random_model("gpt2", n_layer=1).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made", Mapping(2))
    source = load_file(tmp_path / "source" / "model.safetensors")
    qkv = source["transformer.h.0.attn.c_attn.weight"].T.reshape(3, 4, 8, 32)
    for rank in (0, 1):
        stored = load_file(tmp_path / "made" / f"rank{rank}.safetensors")
        assert {name: values.shape for name, values in stored.items()} == NAMES
        heads = qkv[:, 2 * rank : 2 * rank + 2]
        assert np.array_equal(stored["transformer.layers.0.attention.qkv.weight"], heads.reshape(48, 32))
        out = source["transformer.h.0.mlp.c_proj.weight"].T
        assert np.array_equal(stored["transformer.layers.0.mlp.proj.weight"], out[:, 64 * rank : 64 * rank + 64])
    assert (stored["lm_head.weight"][-1] == 0).all() and (stored["lm_head.weight"][-2] != 0).any()


def test_a_gate_is_fc_and_what_it_multiplies_is_gate(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made", Mapping(2))
    source = load_file(tmp_path / "source" / "model.safetensors")
    stored = load_file(tmp_path / "made" / "rank1.safetensors")
    for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj")):
        whole = source[f"model.layers.1.mlp.{theirs}.weight"]
        assert np.array_equal(stored[f"transformer.layers.1.mlp.{ours}.weight"], whole[24:])


# ---- weight-only -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only"])
@pytest.mark.parametrize("family", partly_slow(SETTINGS, ["llama", "gpt2"]))
def test_rounding_does_not_depend_on_who_shares_a_row(family: str, mode: str, tmp_path: Path) -> None:
    random_model(family.partition(",")[0], **SETTINGS[family]).save_pretrained(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source")
    expected = expected_parameters(source, "float32")
    for tp_size, pp_size, dimension in [(1, 1, None), (2, 2, 0), (4, 1, 1)]:
        folder = tmp_path / f"{tp_size}"
        found = convert(source, folder, Mapping(tp_size, pp_size, 0, dimension), mode=mode)
        assert found.config.quant_mode == mode and not found.config.has_pre_quant_scale
        read = dict(found.parameters("float32"))
        for name, values in expected.items():
            if not is_quantized(found.config, name):
                assert np.array_equal(read[name], values), name
                continue
            integers, scales = rounded(values, 8 if "int8" in mode else 4)
            assert np.array_equal(
                read[name], (integers * scales[:, None]).T if "int4" in mode else integers * scales[:, None]
            )
        stored = load_file(folder / "rank0.safetensors")
        qkv = stored["transformer.layers.0.attention.qkv.weight"]
        assert qkv.dtype == np.int8 and "transformer.layers.0.mlp.proj.per_channel_scale" in stored


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_nearest_without_clipping(bits: int) -> None:
    import torch

    from quantizing import gptq

    weight = np.random.default_rng(0).normal(size=(33, 40)).astype(np.float32)
    weight[7] = 0
    layer = gptq.quantize(torch.from_numpy(weight), None, gptq.Grid(bits, None, is_searched=False))
    integers, scales = rounded(weight, bits)
    assert np.array_equal(integers, layer.integers.numpy()) and np.array_equal(scales, layer.scales.numpy()[:, 0])


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only", "fp8"])
def test_a_quantized_folder_keeps_its_integers_and_scales(mode: str, tmp_path: Path) -> None:
    source = open_checkpoint(quantized_folder(tmp_path / "source", mode))
    for tp_size, dimension in ((1, None), (2, 0), (2, 1)):
        if mode == "int4-weight-only" and tp_size > 1:
            with pytest.raises(
                ConversionError, match="expected tp_size to leave whole int4 blocks of 128 of 128 input"
            ):
                planned(source, Mapping(tp_size))
            continue
        found = convert(source, tmp_path / f"{tp_size}{dimension}", Mapping(tp_size, 1, 0, dimension))
        assert found.config == source.config
        for dtype in ("float32", "float16"):
            check_equal(found, dict(source.parameters(dtype)), dtype)


@pytest.mark.parametrize("has_pre_quant_scale", [True, False])
def test_blocks_are_shared_and_so_are_the_caches_scales(has_pre_quant_scale: bool, tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "source", "int4-weight-only")
    random = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = random.uniform(0.01, 0.02, (len(tensors[name]), 4 * tensors[name].shape[1])).astype(np.float32)
    for which in ("k", "v"):
        tensors[f"transformer.h.0.attn.{which}_proj.{which}_scale"] = np.float32([random.uniform()])
    kept = {name: values for name, values in tensors.items() if has_pre_quant_scale or "pre_quant" not in name}
    save_file(kept, folder / "model.safetensors")
    how = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "INT8", "group_size": 32, "has_zero_point": False}
    description = {"quantization": how | {"pre_quant_scale": has_pre_quant_scale}}
    (folder / "hf_quant_config.json").write_text(json.dumps(description))
    source = open_checkpoint(folder)
    found = convert(source, tmp_path / "made", Mapping(2, 1, 0, 0))
    assert found.config == source.config and found.config.kv_cache_dtype == "int8"
    for dtype in ("float32", "bfloat16"):
        check_equal(found, dict(source.parameters(dtype)), dtype)
    stored = load_file(tmp_path / "made" / "rank1.safetensors")
    assert stored["transformer.layers.0.mlp.proj.weights_scaling_factor"].shape == (128, 8)
    assert ("transformer.layers.0.mlp.proj.prequant_scaling_factor" in stored) == has_pre_quant_scale
    again = convert(found, tmp_path / "again", Mapping())
    check_equal(again, dict(source.parameters("float32")), "float32")


def test_a_cache_that_is_quantized_alone(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    random_model("gpt2").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name: values.T.copy() if "weight" in name and ("attn" in name or "mlp" in name) else values
        for name, values in tensors.items()
    }
    scales = {f"transformer.h.{n}.attn.{w}_proj.{w}_scale": np.float32([1 / (3 + n)]) for n in (0, 1) for w in "kv"}
    save_file({**tensors, **scales}, folder / "model.safetensors")
    description = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(description))
    source = open_checkpoint(folder)
    found = convert(source, tmp_path / "made", Mapping(2, 2), dtype="float16")
    assert found.config.kv_cache_dtype == "fp8" and found.config.quant_mode is None
    for dtype in ("float16", "float32"):
        read, expected = dict(found.parameters(dtype)), dict(source.parameters("float16"))
        assert all(np.array_equal(read[name], expected[name]) for name in expected if not name.endswith("_scale"))
    read, expected = dict(found.parameters("float32")), dict(source.parameters("float32"))
    assert all(np.array_equal(read[name], expected[name]) for name in expected if name.endswith("_scale"))


def test_an_odd_number_of_rows_in_int4(tmp_path: Path) -> None:
    """MLP widths of 3 for each of two ranks: of the rows in pairs, the last is by itself."""
    random_model("gpt2", n_inner=6).save_pretrained(tmp_path / "source")
    one = convert(tmp_path / "source", tmp_path / "one", Mapping(), mode="int4-weight-only")
    two = convert(tmp_path / "source", tmp_path / "two", Mapping(2), mode="int4-weight-only")
    assert one.config.block_size == 2 and two.config.block_size == 1
    whole, shared = dict(one.parameters("float32")), dict(two.parameters("float32"))
    for name, values in whole.items():
        if name.endswith("weight_scale"):
            assert np.array_equal(values[0], shared[name][0])
        else:
            assert np.array_equal(values, shared[name])


def test_parts_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    source = open_checkpoint(quantized_folder(tmp_path / "source", "int8-weight-only"))
    whole = dict(source.parameters("float16"))
    assert source.config.tie_word_embeddings and "lm_head.weight" not in whole
    for rank in range(2):
        mapping = Mapping(2, rank=rank)
        parts = dict(source.rank_parameters("float16", mapping))
        assert parts.keys() == {*whole, "lm_head.weight"}
        for name, part in parts.items():
            values = whole.get(name, whole["wte.weight"])
            assert np.array_equal(part, part_of(name, values, source.config, mapping)), name
            assert part.shape != (1,) or values.shape == (1,)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    random_checkpoint(folder / "source")
    convert(folder / "source", folder / "made", Mapping(2))
    return folder / "made"


@pytest.fixture
def made(ranks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ranks, tmp_path / "made"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EDITS: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "BloomForCausalLM"}, "expected architecture to be one of LlamaForCausalLM, "),
    ({"mapping": None}, "expected mapping to be an object, got null"),
    ({"mapping": {"tp_size": 3}}, "lacks rank2.safetensors: expected the files of 3 x 1 ranks"),
    ({"mapping": {"tp_size": 1}}, "holds rank1.safetensors, but the mapping in its config.json speaks of 1 ranks"),
    ({"mapping": {"world_size": 4, "tp_size": 2}}, "expected world_size to be tp_size times pp_size, 2 x 1, got 4"),
    ({"mapping": {"pp_size": 2}}, "expected pp_size to be at most 1, the number of layers, but got 2"),
    ({"mapping": {"tp_size": "2"}}, 'expected tp_size to be an integer from 1 to 4096, got "2"'),
    ({"quantization": {"quant_algo": "W4A8_AWQ"}}, "expected quant_algo to be one of W8A16, W4A16, W4A16_AWQ, FP8"),
    ({"quantization": {"kv_cache_quant_algo": "FP4"}}, "expected kv_cache_quant_algo to be one of INT8, FP8 or null"),
    ({"quantization": {"quant_algo": "W8A16"}}, "missing: transformer.layers.0.attention.qkv.per_channel_scale"),
    (
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        "expected tp_size to divide the 1 heads but got 2: 1 would do",
    ),
    ({"intermediate_size": 64}, "those that config.json implies for rank 0 of 2 x 1: of a wrong shape or dtype: "),
    ({"use_parallel_embedding": True}, "transformer.vocab_embedding.weight (expected (129, 32), got (257, 32))"),
    ({"embedding_sharding_dim": 2}, "expected embedding_sharding_dim to be 0 or 1, got 2"),
    ({"num_hidden_layers": 2}, "missing: transformer.layers.1.input_layernorm.weight"),
    ({"hidden_act": "swiglu"}, "missing: transformer.layers.0.mlp.gate.weight"),
    ({"position_embedding_type": "alibi"}, "expected position_embedding_type to be learned_absolute or rope_gpt_neox"),
    ({"q_scaling": 3.0}, "expected q_scaling to be 1 or 0.25, got 3"),
    ({"moe": {"num_experts": 8}}, "is not supported: the model has no experts"),
]


@pytest.mark.parametrize(("changes", "message"), EDITS, ids=[message for _, message in EDITS])
def test_settings_that_do_not_fit_are_refused(made: Path, changes: dict[str, Any], message: str) -> None:
    edit(made, **changes)
    assert message in refusal(made)


def test_files_that_do_not_fit_are_refused(made: Path) -> None:
    path = made / "rank1.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(content[:-10])
    assert f"{path} is not a readable safetensors file" in refusal(made)
    save_file({**tensors, "transformer.ln_f.bias": tensors["transformer.ln_f.bias"] + 1}, path)
    assert "expected the copies of ln_f.bias to be equal, but rank 1 of the stage has another" in refusal(made)
    save_file({**tensors, "transformer.ln_f.bias": tensors["transformer.ln_f.bias"].astype(np.float16)}, path)
    assert "expected transformer.ln_f.bias to be of one dtype in all ranks, got F16 and F32" in refusal(made)
    save_file({**tensors, "transformer.ln_f.bias": tensors["transformer.ln_f.bias"][1:]}, path)
    assert "for rank 1 of 2 x 1: of a wrong shape or dtype: transformer.ln_f.bias (expected (32,)" in refusal(made)
    del tensors["transformer.layers.0.mlp.proj.bias"]
    save_file({**tensors, "other": np.zeros(1)}, path)
    assert "for rank 1 of 2 x 1: missing: transformer.layers.0.mlp.proj.bias; unexpected: other" in refusal(made)
    path.unlink()
    assert "lacks rank1.safetensors" in refusal(made)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    random_model("gpt2").save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made", Mapping(2))
    path = tmp_path / "made" / "rank1.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, path)
    assert "ties lm_head.weight to vocab_embedding.weight, but the stored values differ" in refusal(tmp_path / "made")


def test_all_families_are_here() -> None:
    assert {name.partition(",")[0] for name in SETTINGS} == set(FAMILIES)
