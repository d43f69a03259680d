"""NeMo archives, made here, against the models of transformers that have the same architecture."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nemo_archives import write_nemo, write_tar
from opened import our_logits, refusal
from random_models import logits_of, random_model
from test_model import relative_error

from tokenizing.sources import BytePairFiles, SentencePieceModel
from weight_loader import CheckpointError, open_checkpoint

IDX = np.random.default_rng(0).integers(0, 96, (2, 21)).astype(np.int32)
MODELS: dict[str, Any] = {
    "gpt2": lambda: random_model("gpt2", vocab_size=96),
    "llama": lambda: random_model("llama", vocab_size=96, num_key_value_heads=4),
    "llama, groups": lambda: random_model("llama", vocab_size=96),
    "nemotron": lambda: random_model("nemotron", vocab_size=96, num_key_value_heads=4, partial_rotary_factor=0.5),
}
CASES = [
    *[(name, is_core, 1, 1) for name in MODELS for is_core in (False, True)],
    *[("llama", is_core, 2, 1) for is_core in (False, True)],
    *[("llama, groups", True, 2, 2), ("gpt2", False, 2, 2), ("gpt2", True, 4, 1), ("nemotron", False, 2, 2)],
]


@pytest.mark.parametrize(("name", "is_core", "ranks", "stages"), CASES)
def test_models(tmp_path: Path, name: str, is_core: bool, ranks: int, stages: int) -> None:
    model = MODELS[name]()
    path = write_nemo(tmp_path / "model.nemo", model, is_core, ranks, stages)
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5
    checkpoint = open_checkpoint(path)
    assert sum(checkpoint.stored_bytes().values()) == 4 * model.num_parameters()


def test_positions_that_are_interpolated(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model = random_model("llama", vocab_size=96, rope_parameters=rope)
    path = write_nemo(tmp_path / "model.nemo", model, is_core=True, seq_len_interpolation_factor=4)
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gate_by_itself(tmp_path: Path, ranks: int) -> None:
    """Older modules can keep what a gate gates in a layer of its own."""
    model = MODELS["llama"]()
    path = write_nemo(tmp_path / "fast.nemo", model, ranks=ranks)
    contents = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            contents[member.name] = file.read()
    for name, content in contents.items():
        if name.endswith(".ckpt"):
            state = torch.load(io.BytesIO(content))
            for key in [key for key in state if "dense_h_to_4h.weight" in key]:
                state[key], other = (half.clone() for half in state[key].chunk(2))
                state[key.replace("_4h.", "_4h_2.")] = other
            buffer = io.BytesIO()
            torch.save(state, buffer)
            contents[name] = buffer.getvalue()
        else:
            contents[name] = content.replace(b"fast-swiglu", b"swiglu")
    write_tar(tmp_path / "slow.nemo", contents)
    assert relative_error(our_logits(tmp_path / "slow.nemo", IDX), logits_of(model, IDX)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, "gelu_new"),
        ({"bias_activation_fusion": False}, "gelu"),
        ({"bias_activation_fusion": False, "openai_gelu": True}, "gelu_new"),
        ({"activation": "squared-relu"}, "relu2"),
    ],
)
def test_activations(tmp_path: Path, settings: dict[str, Any], activation: str) -> None:
    """GELU that is fused with a bias is NeMo's tanh form."""
    path = write_nemo(tmp_path / "model.nemo", MODELS["gpt2"](), **settings)
    assert open_checkpoint(path).config.activation_function == activation


@pytest.mark.parametrize("mode", ["w:gz", "folder", "plain"])
def test_forms_of_archives(tmp_path: Path, mode: str) -> None:
    """Compressed, unpacked, and with a copy of the embedding in the last stage and what modules keep beside tensors."""
    model = MODELS["gpt2"]()
    extra: dict[str, Any] = {"model.decoder.layers.0.self_attention._extra_state": io.BytesIO(b"x")}
    extra |= {"model.decoder.layers.0.mlp._extra_state": None, "model.word_embeddings.weight": torch.ones(96, 32)}
    path = tmp_path / "model.nemo"
    write_nemo(path, model, True, mode=mode if mode.startswith("w") else "w", extra=extra)
    if mode == "folder":
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "folder", filter="data")
        path = tmp_path / "folder"
    assert relative_error(our_logits(path, IDX), logits_of(model, IDX)) <= 1e-5
    assert open_checkpoint(path).fingerprint() == open_checkpoint(path).fingerprint()


@pytest.mark.parametrize("number", ["1e-6", "1.0e-06", "0.000001"])
def test_numbers_with_exponents(tmp_path: Path, number: str) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"](), layernorm_epsilon="NUMBER")
    contents = members(path)
    contents["./model_config.yaml"] = contents["./model_config.yaml"].replace(b"NUMBER", number.encode())
    assert open_checkpoint(write_tar(path, contents)).config.layer_norm_epsilon == 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = MODELS["llama"]()
    path = write_nemo(tmp_path / "model.nemo", model, dtype=dtype)
    found = dict(open_checkpoint(path).parameters("float32"))
    wanted = model.model.layers[1].mlp.down_proj.weight.detach().to(dtype).float().numpy()
    np.testing.assert_array_equal(found["h.1.mlp.c_proj.weight"], wanted)


def test_tokenizers(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    files = {"./0a1b_tokenizer.model": b"a model"}
    said: dict[str, Any] = {"library": "sentencepiece", "model": "nemo:0a1b_tokenizer.model"}
    path = write_nemo(tmp_path / "a.nemo", model, files=files, tokenizer=said)
    assert open_checkpoint(path).tokenizer_source == SentencePieceModel(path, b"a model")
    vocabulary = json.dumps({"a": 0, "<|endoftext|>": 5}).encode()
    files = {"./v.json": vocabulary, "./m.txt": b"merges"}
    said = {"library": "megatron", "vocab_file": "nemo:v.json", "merge_file": "nemo:m.txt", "model": None}
    path = write_nemo(tmp_path / "b.nemo", model, files=files, tokenizer=said)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer_source == BytePairFiles(path, vocabulary, b"merges")
    assert checkpoint.config.eos_token_ids == (5,)
    assert open_checkpoint(write_nemo(tmp_path / "c.nemo", model)).tokenizer_source == tmp_path / "c.nemo"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": None}, "expected hidden_size to be an integer from 1 to 131072, got null"),
    ("llama", {"num_layers": 3}, "missing: language_model.encoder.layers.2.input_layernorm.weight"),
    ("llama", {"activation": "mish"}, 'expected activation to be one of gelu, relu, .* got "mish"'),
    ("llama", {"normalization": "batch"}, "expected normalization to be one of layernorm, layernorm1p, rmsnorm"),
    ("llama", {"position_embedding_type": "alibi"}, "position_embedding_type to be one of learned_absolute, rope"),
    ("llama", {"rotary_percentage": 1.5}, "rotary_percentage to make an even number of a head's 8 dimensions"),
    ("llama", {"transformer_block_type": "post_ln"}, 'transformer_block_type="post_ln" is not supported'),
    ("llama", {"num_moe_experts": 8}, "num_moe_experts=8 is not supported"),
    ("llama", {"megatron_legacy": True}, "megatron_legacy=true is not supported"),
    ("llama", {"target": "nemo.MegatronT5Model"}, "expected the target to be a megatron GPT model"),
    ("llama", {"ffn_hidden_size": 64}, r"dense_h_to_4h.weight \(expected \(128, 32\), got \(96, 32\)\)"),
    (
        "llama",
        {"share_embeddings_and_output_weights": "yes"},
        "share_embeddings_and_output_weights to be true or false",
    ),
    ("gpt2", {"share_embeddings_and_output_weights": False}, "missing: language_model.output_layer.weight"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[str(changes)[:50] for _, changes, _ in BAD])
def test_bad_settings(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS[name](), **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ranks", "stages", "victim", "message"),
    [
        (2, 1, "mp_rank_01", "lacks the weights of the tensor-parallel rank 1 of stage 0"),
        (2, 1, "mp_rank_00", "lacks the weights of the tensor-parallel rank 0 of stage 0"),
        (2, 2, "tp_rank_01_pp_rank_000", "lacks the weights of the tensor-parallel rank 1 of stage 0"),
        (1, 1, "model_weights", "holds no weights: expected model_weights.ckpt"),
        (1, 1, "model_config", "is not a NeMo archive: it has no model_config.yaml"),
    ],
)
def test_missing_members(tmp_path: Path, ranks: int, stages: int, victim: str, message: str) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"](), ranks=ranks, stage_count=stages)
    write_tar(path, {name: content for name, content in members(path).items() if victim not in name})
    assert message in refusal(path)


def test_ranks_of_different_shapes(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"](), ranks=2)
    contents = members(path)
    state = torch.load(io.BytesIO(contents["./mp_rank_01/model_weights.ckpt"]))
    name = "model.language_model.encoder.layers.0.self_attention.dense.weight"
    state[name] = state[name][:, :5].clone()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_tar(path, contents | {"./mp_rank_01/model_weights.ckpt": buffer.getvalue()})
    assert f"1/{name.removeprefix('model.')} (expected (32, 16), got (32, 5))" in refusal(path)


def test_distributed_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"]())
    contents = {name: content for name, content in members(path).items() if not name.endswith(".ckpt")}
    write_tar(path, contents | {"./model_weights/metadata.json": b"{}", "./model_weights/model.x/.zarray": b""})
    assert "a distributed checkpoint, which is not supported" in refusal(path)


class Malicious:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_that_want_to_execute_something(tmp_path: Path, is_zip: bool) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"]())
    payload: Any = {"model.embedding.word_embeddings.weight": Malicious(tmp_path / "touched")}
    buffer = io.BytesIO()
    if is_zip:
        torch.save(payload, buffer)
    else:
        pickle.dump(payload, buffer)
    write_tar(path, members(path) | {"./model_weights.ckpt": buffer.getvalue()})
    assert "is not a readable PyTorch file of tensors and nothing else" in refusal(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content", [b"", b"- a\n- b\n", b"a: [", b"\xff\xfe\x00\x01", b"a: !!python/object:os.x {}", b"[" * 9000]
)
def test_bad_yaml(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "model.nemo", {"model_config.yaml": content, "model_weights.ckpt": b""})
    assert "model_config.yaml" in refusal(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated(tmp_path: Path, mode: str) -> None:
    path = write_nemo(tmp_path / "model.nemo", MODELS["llama"](), mode=mode)
    content = path.read_bytes()
    for share in (0.02, 0.3, 0.7, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        assert f"{path} is not a readable tar archive: " in refusal(path) or "holds no weights" in refusal(path)


def test_a_million_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    good = write_nemo(tmp_path / "good.nemo", MODELS["llama"]())
    for seed in range(2):
        content = np.random.default_rng(seed).bytes(10**6)
        for start in (b"", b"\x1f\x8b\x08"):
            path.write_bytes(start + content)
            assert "is not a readable tar archive" in refusal(path)
        write_tar(path, members(good) | {"./model_weights.ckpt": content})
        assert "is not a readable PyTorch file of tensors and nothing else" in refusal(path)
