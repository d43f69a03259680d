"""train.py and the modules that it is made of; the checkpoint that it made.

Resuming, finetuning and several processes: test_resume.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs requirements/train.txt")
transformers = pytest.importorskip("transformers", reason="training needs requirements/train.txt")
tokenizers = pytest.importorskip("tokenizers", reason="training needs requirements/train.txt")

from train_runs import FILES, VOCAB, make_text, tiny_config  # noqa: E402

import train  # noqa: E402
from command_line import UsageError  # noqa: E402
from tokenizing.files import read  # noqa: E402
from training import corpus  # noqa: E402  they import the three above
from training.batches import Batch, Batches, SubwordRegularizer, load_dataset  # noqa: E402
from training.config import TrainConfig, make_config, parse_config  # noqa: E402
from training.log import Evaluation, TrainingLog  # noqa: E402
from training.state import save_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "shakespeare"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a small text."""
    folder = tmp_path_factory.mktemp("dataset")
    corpus.prepare(make_text(900), folder, "bpe", VOCAB)
    return folder


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a tiny trained model, and the loss that its training reported."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.train(tiny_config(dataset, folder))


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail as bad input does; return its one line of stderr."""
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("import math\n_half = 0.5\nn_layer = 2\nn_head = 2 * 4\nlearning_rate = 1\n")
    config = parse_config(["--n_layer=3", str(tmp_path / "c.py"), "--device=cpu", "--compile=True"])
    assert (config.n_layer, config.n_head, config.n_embd) == (3, 8, 256)
    assert config.learning_rate == 1.0
    assert config.compile is True
    assert config.device == "cpu"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    assert parse_config([str(path)]) != TrainConfig()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--n_layers=2"], "unknown key 'n_layers'; the keys are dataset, out_dir, init_from, n_layer, n_head"),
        (["--n_layer"], "expected --key=value, not '--n_layer'"),
        (["--n_layer=two"], "n_layer must be of type int, not 'two'"),
        (["--n_layer=2.5"], "n_layer must be of type int, not 2.5"),
        (["--n_layer=0"], "n_layer must be at least 1, not 0"),
        (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps must be at least 1, not 0"),
        (["--eval_iters=-1"], "eval_iters must be at least 0, not -1"),
        (["--dropout=1"], "dropout must be at least 0 and below 1, not 1.0"),
        (["--n_head=3"], "n_embd=256 must be a multiple of n_head=3"),
        (["--threads=1099511627776"], "threads must be at most 1024, not 1099511627776"),
        (["--n_layer=2000000000"], "n_layer must be at most 1024, not 2000000000"),
        ([f"--seed={1 << 64}"], f"seed must be below {1 << 63}, not {1 << 64}"),
        ([f"--max_iters={10**30}"], f"max_iters must be below {1 << 63}, not {10**30}"),
        ([f"--learning_rate={10**400}"], "learning_rate must be of type float, not 1"),
        (["--learning_rate=1e400"], "learning_rate must be a finite number, not inf"),
        (["--weight_decay=-0.1"], "weight_decay must be at least 0, not -0.1"),
        (["--grad_clip=-1"], "grad_clip must be at least 0, not -1"),
        (["--short_share=0.5"], "short_block_size must be 1 to block_size=256, not 0"),
        (["no_such_config.py"], "cannot read the config file no_such_config.py"),
        (["--dataset=/no/such/folder"], "/no/such/folder/meta.json: No such file or directory; run prepare.py first"),
        (["--device=warp"], "device 'warp' cannot be used"),
        (["--dtype=int8"], "dtype must be auto, float32, bfloat16 or float16, not 'int8'"),
    ],
)
def test_train_tells_bad_settings_in_one_line(
    dataset: Path, argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run([f"--dataset={dataset}", "--block_size=32", *argv] if "--d" in argv[0][:3] else argv, capsys)
    assert error.startswith("train.py: error: ")
    assert complaint in error


def test_a_config_file_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.py").write_text("n_layer = 1 / 0\n")
    assert "c.py fails: ZeroDivisionError: division by zero" in run([str(tmp_path / "c.py")], capsys)


def test_text_shorter_than_a_window_is_told_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = run([f"--dataset={dataset}", "--block_size=100000", "--device=cpu"], capsys)
    assert "train.bin is too short" in error
    assert "needs at least 100001" in error


def test_a_damaged_dataset_is_told_in_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in dataset.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta.json").write_text('{"vocab_size": 320}')
    assert "is damaged (KeyError: 'train_tokens')" in run([f"--dataset={tmp_path}", "--device=cpu"], capsys)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_subwords_without_dropout_are_the_tokenizers_own(dataset: Path) -> None:
    data = load_dataset(dataset, 32)
    regularizer = SubwordRegularizer(data, p=0.0, seed=1)
    np.testing.assert_array_equal(regularizer.epoch(np.random.default_rng(0)), data.train)


def test_subwords_with_dropout_spell_the_same_text_another_way_each_epoch(dataset: Path) -> None:
    data = load_dataset(dataset, 32)
    text = data.tokenizer.decode(data.train.tolist())
    epochs = []
    for _ in range(2):
        regularizer = SubwordRegularizer(data, p=0.2, seed=1)
        rng = np.random.default_rng(0)
        epochs.append([regularizer.epoch(rng) for _ in range(2)])
    for ids in epochs[0]:
        assert len(ids) > len(data.train)
        assert data.tokenizer.decode(ids.tolist()) == text
    assert not np.array_equal(epochs[0][0], epochs[0][1])
    for ours, again in zip(*epochs, strict=True):
        np.testing.assert_array_equal(ours, again)


def test_batches_are_windows_of_the_text_short_ones_first(dataset: Path) -> None:
    data = load_dataset(dataset, 32)
    config = tiny_config(dataset, Path("unused"), bpe_dropout=0.0, max_iters=4)
    shapes = []
    batches = Batches(config, data)
    for step in range(4):
        batch = batches.draw(step)
        shapes.append(tuple(batch.inputs.shape))
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert torch.equal(batch.positions[:, 1:], batch.positions[:, :-1] + 1)
        assert 0 <= batch.positions.min() <= batch.positions.max() < config.block_size
        text = data.train.tobytes()
        assert all(row.numpy().astype("<u2").tobytes() in text for row in batch.targets)
    assert shapes == [(32, 8), (32, 8), (8, 32), (8, 32)]


@pytest.mark.parametrize("changes", [{"n_embd": 1 << 24}, {"batch_size": 1 << 40}], ids=str)
def test_what_no_memory_holds(
    changes: dict[str, int], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.asdict(tiny_config(dataset, tmp_path)) | changes
    assert "GiB of memory, but this machine has" in run([f"--{key}={value}" for key, value in settings.items()], capsys)


@pytest.mark.parametrize("bpe_dropout", [0.0, 0.1])
def test_batches_go_on_where_they_were(dataset: Path, bpe_dropout: float) -> None:
    data = load_dataset(dataset, 32)
    config = tiny_config(dataset, Path("unused"), bpe_dropout=bpe_dropout, max_iters=300, batch_size=32)

    def steps(batches: Batches, first: int, last: int) -> list[object]:
        drawn = []
        for step in range(first, last):
            batches.begin_step(step)
            batch = batches.draw(step)
            drawn += [batch.inputs.tolist(), batch.positions.tolist(), batch.targets.tolist()]
        return drawn

    whole = Batches(config, data)
    steps(whole, 0, 17)  # an epoch is 11 steps: the 17th is amid the second
    again = Batches(config, data)
    again.restore(json.loads(json.dumps(whole.state())))
    assert steps(whole, 17, 40) == steps(again, 17, 40)


def test_an_alphabet_has_no_merges_to_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.prepare(make_text(900), tmp_path / "data", "char")
    settings = dataclasses.asdict(tiny_config(tmp_path / "data", tmp_path / "out"))
    assert "bpe_dropout=0.1 needs a dataset with a BPE" in run([f"--{k}={v}" for k, v in settings.items()], capsys)


def test_processes_share_what_one_would_draw(dataset: Path) -> None:
    data = load_dataset(dataset, 32)
    one = Batches(tiny_config(dataset, Path("unused"), batch_size=16), data)
    two = [Batches(tiny_config(dataset, Path("unused"), batch_size=8), data, rank, 2) for rank in range(2)]
    for batches in (one, *two):
        batches.begin_step(0)
    for step in (0, 59):  # short windows, long windows
        whole, parts = one.draw(step), [batches.draw(step) for batches in two]
        for field in ("inputs", "positions", "targets"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))


def test_an_alphabet_has_no_end_to_begin_with(tmp_path: Path) -> None:
    corpus.prepare(make_text(900), tmp_path, "char")
    data = load_dataset(tmp_path, 32)
    assert data.eos_token_id is None
    config = tiny_config(tmp_path, Path("unused"), bpe_dropout=0.0, short_share=0.0)
    text = data.train.tobytes()
    batch = Batches(config, data).draw(0)
    assert all(row.numpy().astype("<u2").tobytes() in text for row in batch.inputs)


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Bigram(torch.nn.Module):
    """A model whose prediction depends on one token only, so that its loss cannot depend on the windows."""

    def __init__(self, vocab: int, context: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3)))
        self.config = SimpleNamespace(n_positions=context)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 61])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_token_is_scored_once(count: int, stride: int) -> None:
    ids = np.random.default_rng(count).integers(11, size=count)
    model = Bigram(11, context=8)
    before = np.concatenate([[0], ids[:-1]])
    log_p = torch.log_softmax(model.table.double(), dim=1).detach().numpy()
    nats = -log_p[before, ids]
    assert train.mean_nats(model, ids, 0, stride, batch_size=3) == pytest.approx(nats.mean(), 1e-5)
    if count > 1:  # without a token to begin with, the first is not scored
        assert train.mean_nats(model, ids, None, stride, batch_size=3) == pytest.approx(nats[1:].mean(), 1e-5)


def test_a_part_of_the_windows_is_at_even_distances() -> None:
    ids = np.random.default_rng(1).integers(11, size=80)
    model = Bigram(11, context=8)
    before = np.concatenate([[0], ids[:-1]])
    nats = -torch.log_softmax(model.table.double(), dim=1).detach().numpy()[before, ids]
    windows = nats.reshape(10, 8).mean(axis=1)
    assert train.mean_nats(model, ids, 0, 8, most=3) == pytest.approx(windows[[0, 4, 9]].mean(), 1e-5)
    assert train.mean_nats(model, ids, 0, 8, most=50) == pytest.approx(nats.mean(), 1e-5)


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    config = TrainConfig(max_iters=1000, warmup_iters=100, learning_rate=1e-3, min_lr=1e-4)
    rates = [train.learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-3 / 101)
    assert rates[100] == max(rates) == 1e-3
    assert rates[550] == pytest.approx(5.5e-4)
    assert rates[1000] == pytest.approx(1e-4)
    sooner = dataclasses.replace(config, lr_decay_iters=500)
    assert [train.learning_rate(sooner, step) for step in (300, 500, 999)] == pytest.approx([5.5e-4, 1e-4, 1e-4])
    assert train.learning_rate(dataclasses.replace(config, decay_lr=False), 999) == 1e-3


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_learns(dataset: Path, trained: tuple[Path, float]) -> None:
    meta = json.loads((dataset / "meta.json").read_text())
    untrained = math.log(VOCAB) * meta["val_tokens"] / meta["val_chars"]
    assert trained[1] < 0.5 * untrained


def test_the_folder_holds_the_model_whose_loss_was_reported(dataset: Path, trained: tuple[Path, float]) -> None:
    folder, reported = trained
    assert {file.name for file in folder.iterdir()} == FILES | {"ckpt.pt"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (type(model).__name__, model.config.activation_function) == ("GPT2LMHeadModel", "gelu_new")
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    data = load_dataset(dataset, 32)
    loss = train.mean_nats(model, data.val, data.eos_token_id, stride=32) * data.tokens_per_char["val"]
    assert loss == pytest.approx(reported, abs=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The king sings: 日本語\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", model.config.eos_token_id)


def test_one_seed_one_result(dataset: Path, trained: tuple[Path, float], tmp_path: Path) -> None:
    for seed, same in ((1337, True), (1338, False)):
        train.train(tiny_config(dataset, tmp_path / str(seed), seed=seed))
        again = (tmp_path / str(seed) / "model.safetensors").read_bytes()
        assert (again == (trained[0] / "model.safetensors").read_bytes()) is same


def test_a_run_that_diverges_says_so(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dataclasses.asdict(tiny_config(dataset, tmp_path / "out", learning_rate=1e20, grad_clip=0.0))
    assert train.main([f"--{key}={value}" for key, value in settings.items()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: the loss is ")
    assert last.endswith("lower learning_rate")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_checkpoint(
    failure: BaseException, trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in trained[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    tokenizer = read(tmp_path)

    def save_half(_: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    with pytest.raises(UsageError if isinstance(failure, OSError) else KeyboardInterrupt):
        save_model(model, tokenizer, tmp_path, save_half)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_without_biases_they_stay_zero_and_the_runtime_runs_it(tmp_path: Path) -> None:
    """config/pico_*: 4 heads of 48; config/tinystories_6x192: 6 heads of 32."""
    for heads in (4, 6):
        data, folder = tmp_path / "data", tmp_path / f"out{heads}"
        corpus.prepare(make_text(900), data, "char")
        shape = {"n_head": heads, "n_embd": 192, "bias": False, "bpe_dropout": 0.0, "ema_decay": 0.0}
        train.train(tiny_config(data, folder, **shape, max_iters=6, eval_interval=6))
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        fresh = transformers.GPT2LMHeadModel(model.config)
        biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
        assert len(biases) == 7  # of one layer and the last LayerNorm
        assert not any(p.any() for p in biases.values())
        assert not torch.equal(model.transformer.ln_f.weight, fresh.transformer.ln_f.weight)
        command = [
            sys.executable,
            "example.py",
            "--model-type",
            str(folder),
            "--input-text=The king",
            "--temperature=0",
        ]
        done = subprocess.run([*command, "--max-new-tokens=8"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("The king", return_tensors="pt").input_ids
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert done.stdout == tokenizer.decode(greedy[0]) + "\n"


def test_decay_is_for_matrices(dataset: Path) -> None:
    config = tiny_config(dataset, Path("unused"), bias=False)
    model = train.build_model(config, load_dataset(dataset, 32))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = train.build_optimizer(config, model, torch.device("cpu")).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert {names[id(p)] for p in others["params"]} == {
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_2.weight",
        "transformer.ln_f.weight",
    }


def test_accumulated_batches_are_one_large_batch(dataset: Path, tmp_path: Path) -> None:
    """The same gradient, but for the order of sums in float32."""
    data = load_dataset(dataset, 32)
    config = tiny_config(dataset, tmp_path, dropout=0.0, short_share=0.0, grad_clip=0.0)
    whole = Batches(config, data).draw(0)
    parts = [
        Batch(whole.inputs[rows], whole.positions[rows], whole.targets[rows]) for rows in (slice(0, 4), slice(4, 8))
    ]
    gradients = []
    for batches in ([whole], parts):
        accumulated = dataclasses.replace(config, gradient_accumulation_steps=len(batches))
        run = train.Run(accumulated, data, train.Processes(0, 0, 1), torch.device("cpu"), torch.float32)
        left = list(batches)
        run.batches.draw = lambda step, left=left: left.pop(0)  # type: ignore[method-assign, misc]
        run.optimizer.zero_grad = lambda set_to_none: None  # type: ignore[method-assign, misc]
        run.take_step(run.model)
        gradients.append([p.grad for p in run.model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns(dataset: Path, tmp_path: Path, dtype: str, trained: tuple[Path, float]) -> None:
    loss = train.train(tiny_config(dataset, tmp_path, dtype=dtype))
    assert loss == pytest.approx(trained[1], rel=0.05)  # bfloat16 has 8 bits


# ---- reports ---------------------------------------------------------------------------------------------------------


def report_two(folder: Path, **settings: object) -> None:
    log = TrainingLog(make_config({"out_dir": str(folder), **settings}), [Evaluation(1, 3.0, 3.5, 1e-3, 10.0)])
    log.add(Evaluation(2, 2.0, 2.5, 1e-4, 10.0), ", saved")
    log.close()


def test_the_losses_are_drawn_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report_two(tmp_path, plot=True)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    expected = "step 2: train loss 2.0000 nats/token, val 2.5000 nats/char, 10 tokens/s, saved\n"
    assert capsys.readouterr().err == expected


def test_tensorboard_and_wandb_get_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the calls that the packages document: neither is needed to train, nor installed to test."""
    calls: list[tuple[object, ...]] = []
    writer = SimpleNamespace(
        add_scalar=lambda *values: calls.append(("scalar", *values)), flush=lambda: None, close=lambda: None
    )
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    wandb = ModuleType("wandb")
    run = SimpleNamespace(log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(()))
    wandb.init = lambda project, name, config: calls.append((project, name)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    report_two(tmp_path, tensorboard=True, wandb_log=True, wandb_run_name="first")
    values = {"train/loss": 2.0, "val/loss": 2.5, "lr": 1e-4, "tokens_per_second": 10.0}
    scalars = [("scalar", name, value, 2) for name, value in values.items()]
    assert calls == [("nanogpt-tripy", "first"), *scalars, ("log", 2, values), ()]


@pytest.mark.parametrize(
    ("flag", "module"), [("plot", "matplotlib"), ("tensorboard", "torch.utils.tensorboard"), ("wandb_log", "wandb")]
)
def test_a_report_that_needs_more_says_so_before_any_work(
    flag: str, module: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    settings = dataclasses.asdict(tiny_config(dataset, tmp_path / "out", **{flag: True}))
    error = run([f"--{key}={value}" for key, value in settings.items()], capsys)
    assert f"--{flag}=True needs" in error and "pip install" in error


# ---- the embedded checkpoint -----------------------------------------------------------------------------------------


def test_embedded_checkpoint_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert set(sizes) == FILES | {"README.md", "calibration.txt", "held-out.txt"}
    assert sum(sizes.values()) <= 16e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["n_embd"] % 128 == 0
    assert config["n_embd"] // config["n_head"] == 64
    assert (config["activation_function"], config["layer_norm_epsilon"]) == ("gelu_new", 1e-5)


@pytest.mark.slow
def test_embedded_checkpoint_knows_its_plays() -> None:
    """At most 1.55 nats per character of the last 10 % of the text, which neither tokenizer nor weights have seen.

    Every token is scored once; windows of the whole context move on by three quarters of it, so that each token but the
    first window's sees at least a quarter.
    """
    if not SHAKESPEARE.exists():
        pytest.skip(f"{SHAKESPEARE} is not here")
    text = SHAKESPEARE.read_text(encoding="utf-8")
    val = text[int(len(text) * 0.9) :]
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ids = np.array(tokenizer(val, verbose=False).input_ids)
    assert tokenizer.decode(ids) == val
    stride = model.config.n_positions * 3 // 4
    nats = train.mean_nats(model, ids, tokenizer.eos_token_id, stride) * len(ids) / len(val)
    print(f"{nats:.4f} nats per character")
    assert nats <= 1.55
