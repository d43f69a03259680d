"""train.py that goes on: after a kill, from another checkpoint, in several processes; and what must stop it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import FILES, VOCAB, make_text, tiny_config

torch = pytest.importorskip("torch", reason="training needs requirements/train.txt")
transformers = pytest.importorskip("transformers", reason="training needs requirements/train.txt")

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


@pytest.mark.slow
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
        ({"seed": 7}, "{} has seed=1337, but this run has seed=7"),
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
    assert not (tmp_path / "out").exists(), "a resume makes no folder"
    (tmp_path / "out").mkdir()
    for content, complaint in ((b"", "is damaged"), ((trained / "ckpt.pt").read_bytes()[:5000], "is damaged")):
        (tmp_path / "out" / "ckpt.pt").write_bytes(content)
        assert complaint in run(flags(config), capsys)
    torch.save({"step": 3}, tmp_path / "out" / "ckpt.pt")
    assert "ckpt.pt lacks architecture, averaged, batches, best" in run(flags(config), capsys)


SETTINGS: dict[str, object] = {
    **{"dropout": 0.0, "attn_dropout": 0.3, "batch_size": 4, "gradient_accumulation_steps": 2, "short_block_size": 16},
    **{"short_share": 0.0, "bpe_dropout": 0.0, "learning_rate": 1e-3, "decay_lr": False, "lr_decay_iters": 1000},
    **{"min_lr": 9e-3, "warmup_iters": 50, "beta1": 0.5, "beta2": 0.5, "weight_decay": 5.0, "grad_clip": 0.01},
    **{"ema_decay": 0.1, "max_iters": 40},
}


@pytest.fixture(scope="module")
def begun(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the folder of a run of 20 steps, of which every test may make what it likes."""
    first = tmp_path_factory.mktemp("begun") / "first"
    train.train(tiny_config(dataset, first, max_iters=20, eval_interval=10))

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("begun") / "out"
        shutil.copytree(first, folder)
        return folder

    return copy


def resumed_weights(dataset: Path, folder: Path, **changes: object) -> torch.Tensor:
    """The weights after four more steps."""
    run = train.Run(
        tiny_config(dataset, folder, **{"init_from": "resume", "max_iters": 60, **changes}),
        load_dataset(dataset, 32),
        train.find_processes(),
        torch.device("cpu"),
        torch.float32,
    )
    for _ in range(4):
        run.take_step(run.model)
        run.step += 1
    return torch.cat([parameter.detach().flatten() for parameter in run.saved_model.parameters()])


def test_every_setting_of_a_resume_counts(dataset: Path, begun: Callable[..., Path]) -> None:
    """Each that is not refused when it differs: the weights are others, and not those of a run without a change."""
    folder = begun()
    as_before = resumed_weights(dataset, folder)
    assert torch.equal(as_before, resumed_weights(dataset, folder))
    for name, value in SETTINGS.items():
        assert not torch.equal(as_before, resumed_weights(dataset, folder, **{name: value})), name


def test_what_a_resume_turns_on(dataset: Path, tmp_path: Path) -> None:
    """A moving average, BPE-dropout, a matrix type that scales its gradients: the run had none of them so far."""
    plain = tiny_config(dataset, tmp_path, max_iters=6, eval_interval=3, ema_decay=0.0, bpe_dropout=0.0)
    train.train(plain)
    without = resumed_weights(dataset, tmp_path, ema_decay=0.0, bpe_dropout=0.0)
    assert not torch.equal(without, resumed_weights(dataset, tmp_path, ema_decay=0.9, bpe_dropout=0.0))
    assert not torch.equal(without, resumed_weights(dataset, tmp_path, ema_decay=0.0, bpe_dropout=0.5))
    train.train(dataclasses.replace(plain, init_from="resume", max_iters=9, dtype="float16"))


def test_losses_on_another_text_are_not_compared(dataset: Path, begun: Callable[..., Path], tmp_path: Path) -> None:
    """The same tokenizer, another dataset: the best loss so far says nothing."""
    folder = begun()
    shutil.copytree(dataset, tmp_path / "data")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save({**state, "best": 0.0}, folder / "ckpt.pt")
    config = tiny_config(tmp_path / "data", folder, init_from="resume", max_iters=21)
    assert train.train(config) == 0.0
    val = np.fromfile(tmp_path / "data" / "val.bin", "<u2")
    val[::-1].tofile(tmp_path / "data" / "val.bin")
    assert train.train(dataclasses.replace(config, max_iters=22)) > 0


def damage_value(*path: Any, to: Any = None) -> Callable[[dict[str, Any]], None]:
    """Puts something else in a place of the state; without `to` there is nothing in it."""

    def damage(state: dict[str, Any]) -> None:
        place: Any = state
        for key in path[:-1]:
            place = place[key]
        if to is None:
            del place[path[-1]]
        else:
            place[path[-1]] = to(place[path[-1]]) if callable(to) else to

    return damage


WTE = "transformer.wte.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "step": (damage_value("step", to=-1), "step"),
    "best": (damage_value("best", to=math.nan), "best"),
    "config": (damage_value("config", "seed"), "config.seed"),
    "config of another type": (damage_value("config", to=[1]), "config"),
    "history": (damage_value("history", to=[(1, 2.0)]), "history"),
    "layers": (damage_value("architecture", "n_layer", to=10**9), "architecture.n_layer"),
    "vocabulary": (damage_value("architecture", "vocab_size", to=7), "architecture.vocab_size"),
    "activation": (damage_value("architecture", "activation_function", to="none"), "architecture"),
    "epsilon": (damage_value("architecture", "layer_norm_epsilon", to="x"), "architecture.layer_norm_epsilon"),
    "no weight": (damage_value("model", "transformer.ln_f.weight"), "model.transformer.ln_f.weight"),
    "another weight": (damage_value("model", "x", to=3), "model.x"),
    "shape": (damage_value("model", "transformer.ln_f.bias", to=lambda t: t[:3]), "model.transformer.ln_f.bias"),
    "type": (damage_value("model", WTE, to=lambda t: t.double()), f"model.{WTE}"),
    "sparse": (damage_value("model", WTE, to=lambda t: t.to_sparse()), f"model.{WTE}"),
    "NaN": (damage_value("model", "transformer.ln_f.bias", to=lambda t: t / 0 * 0), "holds infinities or NaNs"),
    "average": (damage_value("averaged", "n_averaged"), "averaged.n_averaged"),
    "groups": (damage_value("optimizer", "param_groups", to=lambda g: g * 2), "optimizer.param_groups"),
    "other groups": (damage_value("optimizer", "param_groups", 0, "params", to=[0]), "optimizer.param_groups"),
    "moments": (damage_value("optimizer", "state", 0), "optimizer.state"),
    "moment": (damage_value("optimizer", "state", 0, "exp_avg", to=torch.zeros(2)), "optimizer.state.0.exp_avg"),
    "negative": (damage_value("optimizer", "state", 0, "exp_avg_sq", to=lambda t: -t - 1), "is negative"),
    "scaler": (damage_value("scaler", to={"scale": 1.0}), "scaler.growth_factor"),
    "generator": (damage_value("batches", "rng", "buffer_pos", to=99), "batches"),
    "no batches": (damage_value("batches", to={}), "batches"),
    "random": (damage_value("random", 0, "cpu", to=lambda t: t[:9]), "random"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_a_line(
    name: str, dataset: Path, begun: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """None of these may be unpickled into a traceback, or into a run that goes on with something else."""
    folder = begun()
    damage, complaint = DAMAGES[name]
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    damage(state)
    torch.save(state, folder / "ckpt.pt")
    capsys.readouterr()
    error = run(flags(tiny_config(dataset, folder), init_from="resume"), capsys)
    assert f"cannot resume: {folder / 'ckpt.pt'} is damaged (" in error and complaint in error


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
        (
            {"init_from": "/no/such/folder"},
            "expected a checkpoint folder or file at '/no/such/folder', but nothing is there",
        ),
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


@pytest.mark.slow
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
