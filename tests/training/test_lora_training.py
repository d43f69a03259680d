"""train.py --lora_rank: nothing but an adapter learns, and everybody reads the folder alike."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs requirements/train.txt")
transformers = pytest.importorskip("transformers", reason="training needs requirements/train.txt")
peft = pytest.importorskip("peft", reason="training needs requirements/train.txt")

from lora_models import logits_of_ours  # noqa: E402
from random_models import logits_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_model import relative_error  # noqa: E402
from train_runs import VOCAB, make_text, tiny_config  # noqa: E402

import train  # noqa: E402
from training import corpus  # noqa: E402
from training.config import TrainConfig  # noqa: E402

LORA: dict[str, object] = {"lora_rank": 4, "lora_alpha": 16, "lora_targets": "c_attn,mlp.c_proj,c_fc", "max_iters": 48}
IDX = np.random.default_rng(0).integers(0, VOCAB, (1, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows which verb each subject has."""
    folder = tmp_path_factory.mktemp("base")
    corpus.prepare(make_text(900), folder / "data", "bpe", VOCAB)
    train.train(tiny_config(folder / "data", folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def dataset(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same subjects with other verbs."""
    folder = tmp_path_factory.mktemp("dataset")
    text = make_text(900)
    for old, new in (("commands", "#"), ("sings", "commands"), ("#", "sings"), ("whispers", "waits")):
        text = text.replace(old, new)
    corpus.prepare(text, folder, str(base))
    return folder


def lora_config(dataset: Path, base: Path, out_dir: Path, **changes: object) -> TrainConfig:
    settings = {"init_from": str(base), "eval_interval": 16, "lora_dropout": 0.05, **LORA}
    return tiny_config(dataset, out_dir, **{**settings, **changes})


@pytest.fixture(scope="module")
def trained(dataset: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    train.train(lora_config(dataset, base, folder))
    return folder


def flags(config: TrainConfig, **changes: object) -> list[str]:
    return [f"--{key}={value}" for key, value in {**dataclasses.asdict(config), **changes}.items()]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of stderr about bad input."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(entry[:3]) for entry in torch.load(folder / "ckpt.pt", weights_only=True)["history"]]


def test_the_loss_goes_down(trained: Path, base: Path, dataset: Path) -> None:
    data = train.load_dataset(dataset, 32)
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)
    before = train.mean_nats(plain, data.val, data.eos_token_id, 32) * data.tokens_per_char["val"]
    first, *_, last = [entry[2] for entry in losses(trained)]
    assert last < first < before and last < 0.95 * before, (before, first, last)


def test_the_folder_is_an_adapter_of_the_base(trained: Path, base: Path) -> None:
    assert {each.name for each in trained.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ckpt.pt",
    }
    settings = json.loads((trained / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 16, 0.05)
    assert settings["target_modules"] == ["c_attn", "c_fc", "mlp.c_proj"]
    tensors = load_file(trained / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 and all("lora_" in name for name in tensors)
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    assert len(state["model"]) == 2 * 3, "the base is in ckpt.pt"


def test_nothing_else_learns(dataset: Path, base: Path, tmp_path: Path) -> None:
    config = lora_config(dataset, base, tmp_path, max_iters=4)
    run = train.Run(config, train.load_dataset(dataset, 32), train.find_processes(), torch.device("cpu"), torch.float32)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for _ in range(4):
        run.take_step(run.model)
        run.step += 1
    for model in (run.model, run.saved_model):
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) == (".lora_" not in name), name
    stored = load_file(base / "model.safetensors")
    for name, value in stored.items():
        found = [kept for kept in before if kept.replace(".base_layer", "") == f"base_model.model.{name}"]
        assert len(found) == 1 and torch.equal(before[found[0]], value), name
    assert {p for group in run.optimizer.param_groups for p in group["params"]} == {
        p for name, p in run.model.named_parameters() if ".lora_" in name
    }


def test_ours_and_pefts_read_the_same(trained: Path, base: Path, dataset: Path) -> None:
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)
    without = logits_of(plain.eval(), IDX)
    model = peft.PeftModel.from_pretrained(plain, trained).eval()
    expected = logits_of(model, IDX)
    assert relative_error(expected, without) > 0.01, "the adapter does nothing"
    assert relative_error(logits_of_ours(base, IDX[0].tolist(), trained), expected[0]) < 1e-5
    data = train.load_dataset(dataset, 32)
    nats = train.mean_nats(model, data.val, data.eos_token_id, 32) * data.tokens_per_char["val"]
    assert nats == pytest.approx(min(entry[2] for entry in losses(trained)), rel=1e-5)


def test_an_interrupted_run_ends_as_if_nothing_had_happened(
    dataset: Path, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(dataset, base, tmp_path / "part")
    take_step = train.Run.take_step

    def interrupted(run: train.Run, forward: torch.nn.Module) -> torch.Tensor:
        if run.step == 29:
            raise KeyboardInterrupt
        return take_step(run, forward)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "take_step", interrupted)
        assert train.main(flags(config)) == 130
    torch.manual_seed(5)
    train.train(dataclasses.replace(config, init_from="resume"))
    assert losses(tmp_path / "part") == losses(trained)
    name = "adapter_model.safetensors"
    assert (tmp_path / "part" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora_rank": 3}, "has lora_rank=4, but this run has lora_rank=3"),
        ({"lora_rank": 0}, "lora_dropout=0.05 is for an adapter: give lora_rank, too"),
        ({"lora_alpha": 9}, "has lora_alpha=16.0, but this run has lora_alpha=9.0"),
        ({"lora_targets": "c_fc"}, "has lora_targets=c_attn,mlp.c_proj,c_fc, but this run has lora_targets=c_fc"),
    ],
)
def test_another_adapter_is_not_resumed(
    changes: dict[str, object],
    complaint: str,
    dataset: Path,
    base: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert complaint in fails(flags(lora_config(dataset, base, trained), init_from="resume", **changes), capsys)


def test_a_full_run_does_not_go_on_with_an_adapter(
    dataset: Path, base: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_config(dataset, trained, init_from="resume")
    assert "has lora_rank=4, but this run has lora_rank=0" in fails(flags(plain), capsys)
    adapter = lora_config(dataset, base, base)
    assert "has lora_rank=0, but this run has lora_rank=4" in fails(flags(adapter, init_from="resume"), capsys)


def test_a_base_that_has_changed_is_noticed(
    dataset: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = lora_config(dataset, tmp_path / "base", tmp_path / "out", max_iters=2, eval_interval=2)
    train.train(config)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    resume = flags(config, init_from="resume", max_iters=4)
    assert f"{tmp_path / 'base'} has other weights than the run began with" in fails(resume, capsys)
    shutil.rmtree(tmp_path / "base")
    assert str(tmp_path / "base") in fails(resume, capsys)


def test_a_damaged_state_is_told_in_one_line(
    dataset: Path, base: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.load(trained / "ckpt.pt", weights_only=True)
    name = next(iter(whole["model"]))
    config = lora_config(dataset, base, tmp_path, init_from="resume", max_iters=60)
    for changes, complaint in [
        ({"model": {**whole["model"], name: whole["model"][name][:1]}}, f"is damaged (model.{name})"),
        ({"model": {}}, "is damaged (model.base_model"),
        ({"averaged": {"n_averaged": torch.tensor(3)}}, "is damaged (averaged.module.base_model"),
        ({"config": {**whole["config"], "init_from": "scratch"}}, "is damaged (config.init_from)"),
        ({"config": {**whole["config"], "lora_rank": "4"}}, "is damaged (config.lora_rank)"),
    ]:
        torch.save({**whole, **changes}, tmp_path / "ckpt.pt")
        assert complaint in fails(flags(config), capsys)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora_rank": -1}, "lora_rank must be at least 1, or 0 for no adapter, not -1"),
        ({"lora_rank": 2000}, "lora_rank must be at most 1024, not 2000"),
        ({"lora_rank": 4, "qat": True, "init_from": "gpt2"}, "expected lora_rank or qat=True, not both"),
        ({"lora_rank": 4}, "lora_rank=4 needs init_from, the checkpoint that the adapter is for"),
        ({"lora_rank": 4, "lora_alpha": 0, "init_from": "gpt2"}, "lora_alpha must be above 0, not 0.0"),
        ({"lora_rank": 4, "lora_dropout": 1, "init_from": "gpt2"}, "lora_dropout must be at least 0 and below 1"),
        ({"lora_rank": 4, "lora_targets": "c_attn,lm_head", "init_from": "gpt2"}, "mlp.c_proj, not 'lm_head'"),
        ({"lora_rank": 4, "lora_targets": "", "init_from": "gpt2"}, "mlp.c_proj, not ''"),
        ({"lora_dropout": 0.1, "init_from": "gpt2"}, "lora_dropout=0.1 is for an adapter: give lora_rank, too"),
    ],
)
def test_settings_that_make_no_sense(
    changes: dict[str, object], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in fails([f"--{key}={value}" for key, value in changes.items()], capsys)


def test_without_peft(
    dataset: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "training.lora", raising=False)
    error = fails(flags(lora_config(dataset, base, tmp_path / "out")), capsys)
    assert "lora_rank=4 needs the packages of requirements/train.txt" in error
    assert "pip install -r requirements/train.txt" in error
    train.train(tiny_config(dataset, tmp_path / "full", max_iters=1, eval_interval=1))


def test_bfloat16_products_and_a_shorter_context(dataset: Path, base: Path, tmp_path: Path) -> None:
    """The adapter is for the whole base, whatever it was trained with."""
    config = lora_config(dataset, base, tmp_path, block_size=16, max_iters=4, eval_interval=2, dtype="bfloat16")
    train.train(config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert logits_of_ours(base, [3] * 30, tmp_path).shape == (30, VOCAB)
