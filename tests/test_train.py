"""train.py and the checkpoint that it made."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs requirements-train.txt")
transformers = pytest.importorskip("transformers", reason="training needs requirements-train.txt")
tokenizers = pytest.importorskip("tokenizers", reason="training needs requirements-train.txt")

import corpus  # noqa: E402  they import the three above
import train  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "shakespeare"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
VOCAB = 320
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def make_text(sentences: int) -> str:
    """Return sentences with a rule to learn: each subject has a verb of its own."""
    draw = random.Random(7)
    verbs = {"The king": "commands", "My lady": "whispers", "A fool": "sings", "The café owner": "waits"}
    places = ["in the castle", "by the river", "at midnight", "before the storm", "without a crown"]
    lines = []
    for _ in range(sentences):
        subject = draw.choice(list(verbs))
        lines.append(f"{subject} {verbs[subject]} {draw.choice(places)}.\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a small text."""
    folder = tmp_path_factory.mktemp("dataset")
    corpus.prepare(make_text(900), folder, "bpe", VOCAB)
    return folder


def tiny_config(dataset: Path, out_dir: Path, **changes: object) -> train.TrainConfig:
    """A model of a few thousand parameters that learns the small text in a second or two."""
    settings = {
        "dataset": str(dataset),
        "out_dir": str(out_dir),
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 8,
        "short_block_size": 8,
        "short_share": 0.5,
        "bpe_dropout": 0.1,
        "max_iters": 60,
        "learning_rate": 1e-2,
        "warmup_iters": 5,
        "ema_decay": 0.8,
        "eval_interval": 30,
        "device": "cpu",
        "threads": 1,
    }
    return train.make_config({**settings, **changes})


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a tiny trained model, and the loss that its training reported."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.train(tiny_config(dataset, folder))


def run(module: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail as bad input does; return its one line of stderr."""
    assert module.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("import math\n_half = 0.5\nn_layer = 2\nn_head = 2 * 4\nlearning_rate = 1\n")
    config = train.parse_config(["--n_layer=3", str(tmp_path / "c.py"), "--device=cpu", "--compile=True"])
    assert (config.n_layer, config.n_head, config.n_embd) == (3, 8, 256)
    assert config.learning_rate == 1.0
    assert config.compile is True
    assert config.device == "cpu"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    assert train.parse_config([str(path)]) != train.TrainConfig()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--n_layers=2"], "unknown key 'n_layers'; the keys are dataset, out_dir, n_layer, n_head"),
        (["--n_layer"], "expected --key=value, not '--n_layer'"),
        (["--n_layer=two"], "n_layer must be of type int, not 'two'"),
        (["--n_layer=2.5"], "n_layer must be of type int, not 2.5"),
        (["--n_layer=0"], "n_layer must be at least 1, not 0"),
        (["--dropout=1"], "dropout must be at least 0 and below 1, not 1.0"),
        (["--n_head=3"], "n_embd=256 must be a multiple of n_head=3"),
        (["--short_share=0.5"], "short_block_size must be 1 to block_size=512, not 0"),
        (["no_such_config.py"], "cannot read the config file no_such_config.py"),
        (["--dataset=/no/such/folder"], "/no/such/folder/meta.json: No such file or directory; run prepare.py first"),
        (["--device=warp"], "device 'warp' cannot be used"),
        (["--dtype=int8"], "dtype must be auto, float32, bfloat16 or float16, not 'int8'"),
    ],
)
def test_train_tells_bad_settings_in_one_line(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = run(train, argv, capsys)
    assert error.startswith("train.py: error: ")
    assert complaint in error


def test_a_config_file_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.py").write_text("n_layer = 1 / 0\n")
    assert "c.py fails: ZeroDivisionError: division by zero" in run(train, [str(tmp_path / "c.py")], capsys)


def test_text_shorter_than_a_window_is_told_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = run(train, [f"--dataset={dataset}", "--block_size=100000", "--device=cpu"], capsys)
    assert "train.bin is too short" in error
    assert "needs at least 100001" in error


def test_a_damaged_dataset_is_told_in_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in dataset.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta.json").write_text('{"vocab_size": 320}')
    assert "is damaged (KeyError: 'val_chars')" in run(train, [f"--dataset={tmp_path}", "--device=cpu"], capsys)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_subwords_without_dropout_are_the_tokenizers_own(dataset: Path) -> None:
    data = train.load_dataset(dataset, 32)
    text = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
    regularizer = train.SubwordRegularizer(data.tokenizer, text, p=0.0, seed=1)
    np.testing.assert_array_equal(regularizer.epoch(np.random.default_rng(0)), data.train)


def test_subwords_with_dropout_spell_the_same_text_another_way_each_epoch(dataset: Path) -> None:
    data = train.load_dataset(dataset, 32)
    text = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
    epochs = []
    for _ in range(2):
        regularizer = train.SubwordRegularizer(data.tokenizer, text, p=0.2, seed=1)
        rng = np.random.default_rng(0)
        epochs.append([regularizer.epoch(rng) for _ in range(2)])
    for ids in epochs[0]:
        assert len(ids) > len(data.train)
        assert data.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert not np.array_equal(epochs[0][0], epochs[0][1])
    for ours, again in zip(*epochs, strict=True):
        np.testing.assert_array_equal(ours, again)


def test_batches_are_windows_of_the_text_short_ones_first(dataset: Path) -> None:
    data = train.load_dataset(dataset, 32)
    config = tiny_config(dataset, Path("unused"), bpe_dropout=0.0, max_iters=4)
    shapes = []
    for batch in train.batches(config, data):
        shapes.append(tuple(batch.inputs.shape))
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert torch.equal(batch.positions[:, 1:], batch.positions[:, :-1] + 1)
        assert 0 <= batch.positions.min() <= batch.positions.max() < config.block_size
        text = data.train.tobytes()
        assert all(row.numpy().astype("<u2").tobytes() in text for row in batch.targets)
    assert shapes == [(32, 8), (32, 8), (8, 32), (8, 32)]


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
    expected = -log_p[before, ids].sum()
    assert train.total_nats(model, ids, bos_token_id=0, stride=stride, batch_size=3) == pytest.approx(expected, 1e-5)


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    config = train.TrainConfig(max_iters=1000, warmup_iters=100, learning_rate=1e-3, min_lr=1e-4)
    rates = [train.learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-3 / 101)
    assert rates[100] == max(rates) == 1e-3
    assert rates[550] == pytest.approx(5.5e-4)
    assert rates[1000] == pytest.approx(1e-4)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_learns(dataset: Path, trained: tuple[Path, float]) -> None:
    meta = json.loads((dataset / "meta.json").read_text())
    untrained = math.log(VOCAB) * meta["val_tokens"] / meta["val_chars"]
    assert trained[1] < 0.5 * untrained


def test_the_folder_holds_the_model_whose_loss_was_reported(dataset: Path, trained: tuple[Path, float]) -> None:
    folder, reported = trained
    assert {file.name for file in folder.iterdir()} == FILES
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (type(model).__name__, model.config.activation_function) == ("GPT2LMHeadModel", "gelu_new")
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    data = train.load_dataset(dataset, 32)
    loss = train.total_nats(model, data.val, data.eos_token_id, stride=32) / data.val_chars
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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_checkpoint(
    failure: BaseException, trained: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in trained[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    def save_half(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(model, "save_pretrained", save_half)
    with pytest.raises(train.UserError if isinstance(failure, OSError) else KeyboardInterrupt):
        train.save_checkpoint(model, tokenizer, 0, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


# ---- the embedded checkpoint -----------------------------------------------------------------------------------------


def test_embedded_checkpoint_is_small_and_complete() -> None:
    sizes = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert set(sizes) == FILES | {"README.md", "calibration.txt", "held-out.txt"}
    assert sum(sizes.values()) <= 16e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["n_embd"] % 128 == 0
    assert config["n_embd"] // config["n_head"] == 64
    assert (config["activation_function"], config["layer_norm_epsilon"]) == ("gelu_new", 1e-5)


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
    nats = train.total_nats(model, ids, tokenizer.eos_token_id, stride=model.config.n_positions * 3 // 4)
    print(f"{nats / len(val):.4f} nats per character")
    assert nats / len(val) <= 1.55
