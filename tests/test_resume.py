"""train.py that goes on: after a kill, from another checkpoint, in several processes; and what must stop it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import FILES, VOCAB, make_text, tiny_config

torch = pytest.importorskip("torch", reason="training needs requirements-train.txt")
transformers = pytest.importorskip("transformers", reason="training needs requirements-train.txt")

import train  # noqa: E402
from training import corpus  # noqa: E402
from training.batches import load_dataset  # noqa: E402
from training.config import TrainConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    corpus.prepare(make_text(900), folder, "bpe", VOCAB)
    return folder


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained")
    train.train(tiny_config(dataset, folder, eval_interval=10))
    return folder


def flags(config: TrainConfig, **changes: object) -> list[str]:
    return [f"--{key}={value}" for key, value in {**dataclasses.asdict(config), **changes}.items()]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail as bad input does; return its one line of stderr."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train.py: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, train loss, validation loss) of each evaluation."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return [tuple(entry[:3]) for entry in state["history"]]


# ---- resuming --------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys, train
take_step = train.Run.take_step
def killed(run, forward):
    if run.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(run, forward)
train.Run.take_step = killed
train.main(sys.argv[2:])
"""


def test_a_killed_run_ends_as_if_nothing_had_happened(dataset: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, moving average, every reported loss; with dropout, BPE-dropout and short windows."""
    step = int(np.random.default_rng().integers(11, 59))
    config = tiny_config(dataset, tmp_path, eval_interval=10)
    script = [sys.executable, "-c", KILLED_AT, str(step), *flags(config)]
    killed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert losses(tmp_path)[-1][0] == step // 10 * 10
    train.train(dataclasses.replace(config, init_from="resume"))
    assert losses(tmp_path) == losses(trained), f"killed at step {step}"
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.0, "gradient_accumulation_steps": 2, "short_share": 0.0},
        {"bpe_dropout": 0.0, "attn_dropout": 0.1, "bias": False, "dtype": "float16"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(
    settings: dict[str, object], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_config(dataset, tmp_path / "whole", max_iters=24, eval_interval=6, **settings)
    train.train(whole)
    torch.manual_seed(5)  # where the resumed process happens to be must not matter
    part = dataclasses.replace(whole, out_dir=str(tmp_path / "part"))
    take_step = train.Run.take_step

    def interrupted(run: train.Run, forward: torch.nn.Module) -> torch.Tensor:
        if run.step == 15:
            raise KeyboardInterrupt
        return take_step(run, forward)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "take_step", interrupted)
        assert train.main(flags(part)) == 130
    train.train(dataclasses.replace(part, init_from="resume"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_layer": 2}, "cannot resume: {} has n_layer=1, but this run has n_layer=2"),
        ({"n_embd": 64}, "{} has n_embd=32, but this run has n_embd=64"),
        ({"n_head": 4}, "{} has n_head=2, but this run has n_head=4"),
        ({"block_size": 16}, "{} has block_size=32, but this run has block_size=16"),
        ({"bias": False}, "{} has bias=True, but this run has bias=False"),
        ({"max_iters": 60}, "has done 60 steps; give a larger max_iters"),
    ],
)
def test_another_shape_is_not_resumed(
    changes: dict[str, object], complaint: str, dataset: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run(flags(tiny_config(dataset, trained), init_from="resume", **changes), capsys)
    assert complaint.format(trained / "ckpt.pt") in error


def test_a_run_is_not_resumed_from_something_else(
    dataset: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.prepare(make_text(900), tmp_path / "other", "char")
    error = run(flags(tiny_config(tmp_path / "other", trained), init_from="resume", bpe_dropout=0.0), capsys)
    assert "was trained on a dataset with another tokenizer" in error
    config = tiny_config(dataset, tmp_path / "out", init_from="resume")
    assert "out/ckpt.pt: No such file" in run(flags(config), capsys)
    for content, complaint in ((b"", "is damaged"), ((trained / "ckpt.pt").read_bytes()[:5000], "is damaged")):
        (tmp_path / "out" / "ckpt.pt").write_bytes(content)
        assert complaint in run(flags(config), capsys)
    torch.save({"step": 3}, tmp_path / "out" / "ckpt.pt")
    assert "ckpt.pt lacks architecture, averaged, batches, best" in run(flags(config), capsys)


# ---- finetuning ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_finetuned_on_another_text(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The first loss is that of the checkpoint, far below that of random weights; its context is cut."""
    text = make_text(950)[-20000:]
    (tmp_path / "text").write_text(text, encoding="utf-8")
    custom = corpus.Corpus(tmp_path / "data", "a text")
    assert corpus.main(custom, ["--input", str(tmp_path / "text"), "--tokenizer", str(trained)]) == 0
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    plain = {"short_share": 0.0, "bpe_dropout": 0.0, "ema_decay": 0.0, "dropout": 0.0}
    settings = {"block_size": 16, "n_layer": 3, "max_iters": 2, "eval_interval": 1, "learning_rate": 1e-5, "min_lr": 0}
    source = shutil.copytree(trained, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')  # of texts that end otherwise
    config = tiny_config(tmp_path / "data", tmp_path / "out", init_from=str(source), **plain, **settings)
    loss = train.train(config)
    data = load_dataset(tmp_path / "data", 16)
    model = transformers.GPT2LMHeadModel.from_pretrained(trained)
    model.config.n_positions = 16
    before = train.mean_nats(model, data.val, data.eos_token_id, 16) * data.tokens_per_char["val"]
    assert loss == pytest.approx(before, rel=0.01)
    finetuned = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert (finetuned.config.n_layer, finetuned.config.n_positions) == (1, 16)
    assert finetuned.generation_config.eos_token_id == finetuned.config.eos_token_id == data.eos_token_id
    assert finetuned.transformer.wpe.weight.shape == (16, 32)
    # It resumes too, although the config says nothing of the checkpoint's shape.
    assert train.train(dataclasses.replace(config, init_from="resume", max_iters=3)) <= loss


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"init_from": "/no/such/folder"}, "cannot open /no/such/folder: "),
        ({"block_size": 64}, "has a context of 32, but block_size=64"),
        ({"bias": False}, "bias=False, but the checkpoint has biases that are not zero"),
    ],
)
def test_what_cannot_be_finetuned(
    changes: dict[str, object],
    complaint: str,
    dataset: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(dataset, tmp_path / "out")
    assert complaint in run(flags(config, **{"init_from": str(trained), **changes}), capsys)


def test_finetuning_needs_the_checkpoints_tokenizer(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.prepare(make_text(900), tmp_path / "data", "char")
    config = tiny_config(tmp_path / "data", tmp_path / "out", init_from=str(trained), bpe_dropout=0.0)
    assert f"prepare the text with --tokenizer {trained}" in run(flags(config), capsys)


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit() -> Iterator[Any]:
    """Set how many bytes a file of this process may have: writing more fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "ckpt.pt"])
def test_a_full_disk_leaves_the_old_files(
    file: str, dataset: Path, trained: Path, tmp_path: Path, file_limit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert sizes["tokenizer.json"] < sizes["model.safetensors"] < sizes["ckpt.pt"]
    file_limit(sizes[file] - 1000)
    assert train.main(flags(tiny_config(dataset, out, max_iters=1))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"train.py: error: cannot write to {out}: ")
    assert "large" in error.lower() or file == "ckpt.pt", error
    assert {path.name for path in out.iterdir()} == old.keys()
    kept = FILES | {"ckpt.pt"} if file == "model.safetensors" else {"ckpt.pt"}
    assert all((out / name).read_bytes() == old[name] for name in kept)


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_doubled_batch(dataset: Path, tmp_path: Path) -> None:
    """With torchrun and gloo, on a CPU. Losses and weights agree to 1e-4: sums in another order, over a few steps."""
    settings = {"dropout": 0.0, "max_iters": 12, "eval_interval": 6, "gradient_accumulation_steps": 2}
    two = tiny_config(dataset, tmp_path / "two", **settings, batch_size=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run([*launch, *flags(two)], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("step 6: ") == 1 and "2 x cpu" in done.stderr
    train.train(tiny_config(dataset, tmp_path / "one", **settings, batch_size=8))
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    models = [transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name) for name in ("two", "one")]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # And resumes in one process or two; here, that the state of both is there.
    state = torch.load(tmp_path / "two" / "ckpt.pt", weights_only=True)
    assert len(state["random"]) == 2
    assert json.loads((tmp_path / "two" / "config.json").read_text())["n_positions"] == 32
