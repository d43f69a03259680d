"""lora.py merge: the folder computes what base and adapter compute together, by ours, peft and transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="merging needs requirements/train.txt")
transformers = pytest.importorskip("transformers", reason="merging needs requirements/train.txt")
peft = pytest.importorskip("peft", reason="merging needs requirements/train.txt")

from lora_folders import write_lora  # noqa: E402
from lora_models import adapted, logits_of_ours  # noqa: E402
from nanogpt_files import nano_model, write_ckpt  # noqa: E402
from nemo_archives import write_nemo, write_nemo_lora  # noqa: E402
from quantized_folders import quantized_folder  # noqa: E402
from random_models import logits_of, random_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_model import relative_error  # noqa: E402
from tiny_checkpoints import random_checkpoint  # noqa: E402

import lora  # noqa: E402
from adapters.lora import read_lora  # noqa: E402
from adapters.places import LINEARS  # noqa: E402
from weight_loader import open_checkpoint  # noqa: E402

IDX = np.random.default_rng(0).integers(0, 65, (1, 20)).astype(np.int32)
IDS: list[int] = IDX[0].tolist()


def write_gguf(path: Path, model: Any) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: requirements/checkpoints.txt")
    import gguf_files

    words = ["<s>", *(chr(code) for code in range(33, 33 + model.config.vocab_size - 1))]
    changes = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["! !"]}
    return gguf_files.write_gguf(path, model, **changes)


def merged(folder: Path, base: Path, *more: str, adapter: Path | None = None) -> Path:
    """The folder that the program writes."""
    arguments = [f"--model-type={base}", f"--lora={adapter or folder / 'adapter'}", f"--output={folder / 'merged'}"]
    assert lora.main(["merge", *arguments, *more]) == 0
    return folder / "merged"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line about bad input."""
    capsys.readouterr()
    assert lora.main(["merge", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("lora.py: error: ") and captured.err.count("\n") == 1
    return captured.err


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, patterns": (
        "gpt2",
        {"tie_word_embeddings": False},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"h.1.attn.c_attn": 5}, "fan_in_fan_out": True},
    ),
    "multi-query": ("gpt_bigcode", {}, {"target_modules": ["c_attn", "c_proj"]}),
    "multi-head": ("gpt_bigcode", {"multi_query": False}, {"target_modules": ["c_attn"], "use_rslora": True}),
    "starcoder2": ("starcoder2", {}, {"target_modules": ["q_proj", "v_proj", "c_fc", "c_proj"]}),
    "llama": ("llama", {}, {"target_modules": "all-linear"}),
    "stablelm": ("stablelm", {}, {"target_modules": ["q_proj", "gate_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_the_same(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, sizes, config = CASES[case]
    model = random_model(family, **sizes)
    model.save_pretrained(tmp_path / "base")
    plain = logits_of(model, IDX)
    both = adapted(model, tmp_path / "adapter", 1, **config)
    expected = logits_of(both.merge_and_unload(), IDX)
    folder = merged(tmp_path, tmp_path / "base")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(f"wrote {folder}: float32, ")
    assert relative_error(expected, plain) > 0.05, "the adapter does nothing"
    found = logits_of_ours(folder, IDS)
    assert relative_error(found, expected[0]) < 1e-5
    assert relative_error(found, logits_of_ours(tmp_path / "base", IDS, tmp_path / "adapter")) < 1e-5
    theirs = type(model).from_pretrained(folder)
    assert relative_error(logits_of(theirs, IDX), expected) < 1e-5
    assert (folder.stat().st_mode & 0o777, (folder / "model.safetensors").stat().st_mode & 0o777) == (0o755, 0o644)


CONTAINERS: dict[str, tuple[Callable[[], Any], Callable[[Path, Any], Path], dict[str, Any]]] = {
    "gguf, llama": (
        lambda: random_model("llama"),
        lambda path, model: write_gguf(path / "base.gguf", model),
        {"target_modules": "all-linear"},
    ),
    "gguf, gpt2": (
        lambda: random_model("gpt2"),
        lambda path, model: write_gguf(path / "base.gguf", model),
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "nemo, llama": (
        lambda: random_model("llama", vocab_size=96),
        lambda path, model: write_nemo(path / "base.nemo", model, is_core=True, ranks=2),
        {"target_modules": "all-linear"},
    ),
    "nanoGPT": (
        nano_model,
        lambda path, model: write_ckpt(path / "ckpt.pt", model),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_bases_that_transformers_does_not_open(container: str, tmp_path: Path) -> None:
    make, write, config = CONTAINERS[container]
    model = make()
    base = write(tmp_path, model)
    expected = logits_of(adapted(model, tmp_path / "adapter", 1, **config).merge_and_unload(), IDX)[0]
    folder = merged(tmp_path, base)
    assert relative_error(logits_of_ours(folder, IDS), expected) < 1e-5
    assert relative_error(logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder), IDX)[0], expected) < 1e-5


def test_an_archive_of_nemos(tmp_path: Path) -> None:
    model = random_model("llama", vocab_size=96)
    base = write_nemo(tmp_path / "base.nemo", model, is_core=True)
    weights = write_nemo_lora(tmp_path / "adapter.nemo", model, is_core=True)
    write_nemo(tmp_path / "expected.nemo", model, is_core=True, extra=weights)
    folder = merged(tmp_path, base, adapter=tmp_path / "adapter.nemo")
    assert relative_error(logits_of_ours(folder, IDS), logits_of_ours(tmp_path / "expected.nemo", IDS)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_of_the_weights(dtype: str, tmp_path: Path) -> None:
    """The sum is made in float32, and rounded once."""
    model = random_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "adapter", 1, target_modules="all-linear")
    wide = load_file(merged(tmp_path, tmp_path / "base") / "model.safetensors")
    (tmp_path / "merged").rename(tmp_path / "wide")
    narrow = load_file(merged(tmp_path, tmp_path / "base", f"--dtype={dtype}") / "model.safetensors")
    assert narrow.keys() == wide.keys()
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    """The tokenizer and the tokens that end a text are the base's; transformers' guesses are not there."""
    base = random_checkpoint(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [256, 3]}')
    write_lora(tmp_path / "adapter", {"h.0.attn.c_attn": (32, 96)}, rank=3, seed=1)
    folder = merged(tmp_path, base)
    same = [
        name
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        if (base / name).is_file()
    ]
    assert "tokenizer.json" in same
    for name in same:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    settings = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in settings and "quantization_config" not in settings


# ---- more than plain LoRA: peft's work -------------------------------------------------------------------------------

MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DoRA": ("llama", {}, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA, gpt2": ("gpt2", {}, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "a head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "an embedding": ("llama", {"tie_word_embeddings": False}, {"target_modules": ["embed_tokens", "v_proj"]}),
}


def changed(model: Any, folder: Path, config: dict[str, Any]) -> Any:
    """peft's model, in which everything that it can train is random, saved."""
    both = adapted(model, folder, 1, **config)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    both.save_pretrained(folder, save_embedding_layers=False)
    return both


@pytest.mark.parametrize("case", MORE)
def test_more_than_plain_lora(case: str, tmp_path: Path) -> None:
    family, sizes, config = MORE[case]
    model = random_model(family, **sizes)
    model.save_pretrained(tmp_path / "base")
    plain = logits_of(model, IDX)
    expected = logits_of(changed(model, tmp_path / "adapter", config), IDX)
    assert relative_error(expected, plain) > 0.02, "the adapter does nothing"
    folder = merged(tmp_path, tmp_path / "base")
    assert relative_error(logits_of_ours(folder, IDS), expected[0]) < 1e-5
    assert relative_error(logits_of(type(model).from_pretrained(folder), IDX), expected) < 1e-5


def test_what_cannot_be_merged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of an embedding that is also the head, which the adapter leaves as it is."""
    model = random_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    changed(model, tmp_path / "adapter", {"target_modules": ["embed_tokens"]})
    error = fails(
        capsys, "--model-type", tmp_path / "base", "--lora", tmp_path / "adapter", "--output", tmp_path / "merged"
    )
    assert "cannot be merged" in error and "lora_embedding_A" in error
    assert not (tmp_path / "merged").exists()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = random_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "adapter", 1, target_modules=["q_proj"])
    return tmp_path


def arguments(folder: Path, **changes: Path) -> list[str]:
    paths = {"model-type": folder / "base", "lora": folder / "adapter", "output": folder / "merged", **changes}
    return [f"--{name}={path}" for name, path in paths.items()]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    quantized_folder(folder / "base" / "int8", "int8-weight-only")
    for changes, complaint in [
        ({"output": folder / "base"}, f"expected {folder / 'base'} not to exist but it does"),
        ({"lora": folder / "nowhere"}, "expected an adapter's folder at"),
        ({"lora": folder / "base"}, "with an adapter_config.json, but it has none"),
        ({"model-type": folder / "nowhere"}, "nowhere"),
        ({"model-type": folder / "base" / "int8"}, "expected a float checkpoint to merge into but"),
        ({"output": folder / "adapter" / "adapter_config.json" / "x"}, "cannot write"),
    ]:
        assert complaint in fails(capsys, *arguments(folder, **changes))
    assert "--lora" in fails(capsys, "--output", folder / "merged")
    assert sorted(folder.iterdir()) == before, "something is left"
    write_lora(folder / "other", {"h.0.attn.c_attn": (32, 96)}, rank=3, seed=1)
    assert "is for another model than" in fails(capsys, *arguments(folder, lora=folder / "other"))


def test_adapters_that_nobody_merges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(folder, something_new=3)
    assert "does not know something_new" in fails(capsys, *arguments(folder))
    edit(folder, something_new=None, use_dora=True)  # and no magnitudes are there
    assert "it does not agree with it on base_model.model.model.layers.0" in fails(capsys, *arguments(folder))
    edit(folder, use_dora=False, peft_type="IA3")
    assert 'expected peft_type to be LORA but got "IA3"' in fails(capsys, *arguments(folder))
    edit(folder, peft_type="LORA")
    large = {name: tensor * 1e4 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file({name: tensor * 1e4 if "lora_B" in name else tensor for name, tensor in large.items()}, file)
    error = fails(capsys, *arguments(folder), "--dtype=float16")
    assert "expected finite numbers in float16 but model.layers.0.self_attn.q_proj.weight has others" in error
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def test_without_the_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert lora.main(["merge", *arguments(folder, output=folder / "plain")]) == 0, "plain LoRA needs no peft"
        edit(folder, bias="lora_only")
        assert "needs the packages of requirements/train.txt" in fails(capsys, *arguments(folder))
    edit(folder, bias="none")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs the packages of requirements/train.txt" in fails(capsys, *arguments(folder))


def test_what_an_adapter_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks of layers that are stored in parts add up; the norm is that of what is added."""
    base, adapter = folder / "base", folder / "adapter"
    assert lora.main(["show", f"--model-type={base}", f"--lora={adapter}"]) == 0
    out, err = capsys.readouterr()
    found = read_lora(adapter, open_checkpoint(base))
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert err == "" and rows
    for name, pair in zip(LINEARS, found.matrices, strict=True):
        assert (pair is None) == (name not in rows)
        if pair is not None:
            norm = np.linalg.norm(np.einsum("lri,lro->lio", *pair))
            assert [int(rows[name][0]), float(rows[name][2])] == [pair[0].shape[1], pytest.approx(norm, rel=1e-3)]
    assert lora.main(["show", f"--model-type={base}", f"--lora={adapter}", "--output=x"]) == 2
    assert "expected --output with merge, and not with show" in capsys.readouterr().err
