"""NeMo's LoRA archives against models that have the same adapters in their weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason=".nemo archives need requirements/checkpoints.txt")
pytest.importorskip("yaml", reason=".nemo archives need requirements/checkpoints.txt")

from lora_models import logits_of_ours  # noqa: E402
from nemo_archives import Tensors, write_nemo, write_nemo_lora, write_tar  # noqa: E402
from random_models import logits_of, random_model  # noqa: E402
from test_model import relative_error  # noqa: E402
from tiny_checkpoints import CONTEXT, VOCABULARY, random_checkpoint  # noqa: E402

import example  # noqa: E402
from adapters.lora import read_lora  # noqa: E402
from loading.errors import CheckpointError  # noqa: E402
from serving.http.adapters import AdapterNames  # noqa: E402
from weight_loader import open_checkpoint  # noqa: E402

IDX = np.random.default_rng(0).integers(0, 96, (1, 20)).astype(np.int32)


def model_of(family: str, **settings: Any) -> Any:
    return random_model(family, vocab_size=96, **settings)


@pytest.mark.parametrize("base", ["nemo", "huggingface"])
@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        ("gpt2", {}, {}),
        ("gpt2", {}, {"is_core": True, "rank": 1}),
        ("llama", {}, {"is_core": True}),
        ("llama", {"num_key_value_heads": 4}, {}),
        ("llama", {"num_key_value_heads": 1}, {"is_core": True, "mode": "w:gz"}),
        ("llama", {}, {"ranks": 2, "is_core": True}),
        ("nemotron", {}, {"ranks": 2, "dtype": torch.bfloat16}),
    ],
    ids=["gpt2", "gpt2 core", "llama groups", "llama heads", "llama one group", "llama 2 ranks", "nemotron 2 ranks"],
)
def test_logits_equal_those_of_the_merged_model(
    family: str, settings: dict[str, Any], options: dict[str, Any], base: str, tmp_path: Path
) -> None:
    """The adapter of an archive, beside a base of either container; NeMo adds the product to the weight as it is."""
    model = model_of(family, **settings)
    merged = write_nemo_lora(tmp_path / "adapter.nemo", model, **options)
    is_core = options.get("is_core", False)
    write_nemo(tmp_path / "merged.nemo", model, is_core, extra=merged)
    if base == "nemo":
        path = write_nemo(tmp_path / "base.nemo", model, is_core)
    else:
        path = tmp_path / "base"
        model.save_pretrained(path)
    ids = IDX[0].tolist()
    expected = logits_of_ours(tmp_path / "merged.nemo", ids)
    assert relative_error(expected, logits_of(model, IDX)[0]) > 0.05, "the adapter does nothing"
    assert relative_error(logits_of_ours(path, ids, tmp_path / "adapter.nemo"), expected) < 1e-5


def drop(layer: int, way: str) -> Callable[[Tensors], object]:
    return lambda state: state.pop(next(n for n in state if f"layers.{layer}." in n and f"linear_{way}" in n))


def put(name: str, tensor: Any) -> Callable[[Tensors], object]:
    return lambda state: state.update({name: tensor})


FIRST = "model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": drop(1, "out")}, "but they differ in linear_out of layer 1"),
        ({"change": put(FIRST.replace("layers.0", "layers.7"), torch.ones(4, 32))}, "differ in linear_in of layer 7"),
        ({"change": put(FIRST, torch.ones(4, 31))}, r"but got \(4, 31\) and \(96, 4\)"),
        ({"change": put(FIRST, torch.ones(3, 32))}, r"but got \(3, 32\) and \(96, 4\)"),
        ({"change": put(FIRST, torch.ones(32))}, "to be a matrix of rows but got"),
        ({"change": put(FIRST, torch.full((4, 32), torch.nan))}, "expected finite numbers"),
        ({"change": put(FIRST, torch.ones(4, 32, dtype=torch.int64))}, "to be of floats but got int64"),
        (
            {"change": put("model.language_model.encoder.layers.0.mlp.adapter_layer.x.weight", torch.ones(1))},
            "lora_kqv_adapter of each layer only but got language_model.encoder.layers.0.mlp.adapter_layer.x.weight",
        ),
        ({"change": lambda state: state.clear()}, "but they differ in linear_in of layer 0"),
        ({"peft": {"lora_tuning": {"adapter_dim": 4, "alpha": 8}}}, "to be adapter_dim, or none, but got 8"),
    ],
)
def test_bad_archives(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = model_of("gpt2")
    model.save_pretrained(tmp_path / "base")
    write_nemo_lora(tmp_path / "adapter.nemo", model, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora(tmp_path / "adapter.nemo", open_checkpoint(tmp_path / "base"))
    assert "\n" not in str(caught.value) and "adapter.nemo" in str(caught.value)


def test_an_archive_for_another_model(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    write_nemo_lora(tmp_path / "adapter.nemo", model_of("gpt2"))
    with pytest.raises(CheckpointError, match=r"by .*base, but got \(4, 32\) and \(96, 4\)"):
        read_lora(tmp_path / "adapter.nemo", open_checkpoint(tmp_path / "base"))
    (tmp_path / "adapter.nemo").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"adapter\.nemo is not a readable tar archive"):
        read_lora(tmp_path / "adapter.nemo", open_checkpoint(tmp_path / "base"))
    write_tar(tmp_path / "adapter.nemo", {"./model_weights.ckpt": b""})
    with pytest.raises(CheckpointError, match=r"it has no model_config\.yaml"):
        read_lora(tmp_path / "adapter.nemo", open_checkpoint(tmp_path / "base"))


def test_the_programs_take_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """example.py's --lora, and what the server reads for its clients."""
    random_checkpoint(tmp_path / "base")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    write_nemo_lora(tmp_path / "adapter.nemo", random_model("gpt2", **sizes))
    texts = []
    for more in ([], [f"--lora={tmp_path / 'adapter.nemo'}"]):
        arguments = [f"--model-type={tmp_path / 'base'}", "--no-engine-cache", "--seed=1", "--max-new-tokens=20", *more]
        monkeypatch.setattr(sys, "argv", ["example.py", "--input-text=The", *arguments])
        assert example.main() == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    names = AdapterNames(open_checkpoint(tmp_path / "base"), (4, 4, 4, 4), 2, tmp_path)
    assert names.read_for_client("one", "adapter.nemo").adapter.name == "one"
    with pytest.raises(CheckpointError, match=r"of --lora-dir, or a \.nemo file, but got 'other.nemo'"):
        names.read_for_client("one", "other.nemo")
