"""train.py with --qat=True: what it saves, where it may begin, resuming, and its moving average."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from test_quantization import int_fake_quantize
from train_runs import make_text, tiny_config

pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")

import train
from loading.modelopt_layout import DESCRIPTION_FILE
from training import corpus, qat
from training.batches import load_dataset
from training.state import load_state
from weight_loader import open_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    corpus.prepare(make_text(600), folder, "char")
    return folder


#: Steps that do not depend on how many there will be, so that a run can be continued.
STEADY = {"bpe_dropout": 0.0, "short_share": 0.0, "lr_decay_iters": 40, "eval_interval": 20, "max_iters": 40}


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder that a quantization-aware run left, and the loss that it reported."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train.train(tiny_config(dataset, folder, **STEADY, qat=True))


@pytest.fixture(scope="module")
def in_float(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("float")
    return folder, train.train(tiny_config(dataset, folder, **STEADY))


def validation_loss(folder: Path, dataset: Path) -> float:
    """Of what a folder's integers stand for."""
    data = load_dataset(dataset, 32)
    return train.mean_nats(qat.load(folder), data.val, data.eos_token_id, 32) * data.tokens_per_char["val"]


def test_the_saved_folder_is_the_model_that_was_measured(trained: tuple[Path, float], dataset: Path) -> None:
    folder, loss = trained
    config = open_checkpoint(folder).config
    assert config.quant_mode == "int8-weight-only"
    assert config.quant_lm_head and config.quant_embedding and config.quant_position_embedding
    assert loss < 2.2, "of 3.4 nats at the start: it has learnt something"
    assert validation_loss(folder, dataset) == pytest.approx(loss, rel=1e-5)


def test_training_in_int8_learns_what_training_in_float_does(
    trained: tuple[Path, float], in_float: tuple[Path, float]
) -> None:
    assert trained[1] == pytest.approx(in_float[1], rel=0.05)


def test_the_moving_average_is_of_the_float_weights_and_rounded_once(trained: tuple[Path, float]) -> None:
    """The folder holds the roundings of the averages, not averages of roundings; the best step was the last."""
    folder, _ = trained
    state = load_state(folder)
    assert state["history"][-1][2] == state["best"]
    averages = {name.removeprefix("module."): value for name, value in state["averaged"].items() if "." in name}
    count = 0
    for name, weight in qat.load(folder).state_dict().items():
        average = averages[name].numpy()
        if average.ndim == 2:
            rounded = int_fake_quantize(average, np.abs(average).max(axis=1, keepdims=True))
            expected = rounded.T if ".h." in name else rounded  # ckpt.pt has them (out, in)
            np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-9)
            assert (np.abs(average - rounded) > 0).mean() > 0.9, "the state is not rounded"
            count += 1
    assert count == 4 + 3


def test_a_resumed_run_ends_as_an_uninterrupted_one(trained: tuple[Path, float], dataset: Path, tmp_path: Path) -> None:
    train.train(tiny_config(dataset, tmp_path, **STEADY | {"max_iters": 20}, qat=True))
    train.train(tiny_config(dataset, tmp_path, **STEADY, qat=True, init_from="resume"))
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()


def test_it_begins_with_a_float_checkpoint(in_float: tuple[Path, float], dataset: Path, tmp_path: Path) -> None:
    """One step that moves nothing leaves the float model's weights, rounded."""
    still = {"learning_rate": 1e-12, "min_lr": 1e-12, "max_iters": 1, "weight_decay": 0.0, "ema_decay": 0.0}
    config = tiny_config(dataset, tmp_path, **STEADY | still, qat=True, init_from=str(in_float[0]))
    assert train.train(config) == pytest.approx(in_float[1], rel=0.02)


def test_a_float_run_takes_the_folder_over(dataset: Path, tmp_path: Path) -> None:
    short = STEADY | {"max_iters": 1}
    train.train(tiny_config(dataset, tmp_path, **short, qat=True))
    assert (tmp_path / DESCRIPTION_FILE).is_file()
    train.train(tiny_config(dataset, tmp_path, **short))
    assert not (tmp_path / DESCRIPTION_FILE).exists()
    assert open_checkpoint(tmp_path).config.quant_mode is None


def test_what_it_took_is_said_at_the_end(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.train(tiny_config(dataset, tmp_path, **STEADY | {"max_iters": 1}, qat=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("  ")[0] for line in err.splitlines()[-4:]] == ["head", "LayerNorm", "total", "files"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def fails(config: train.TrainConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that cannot be carried out."""
    capsys.readouterr()
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if value != ""]
    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("is_qat", [True, False])
def test_a_quantized_checkpoint_is_no_beginning(
    trained: tuple[Path, float], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_qat: bool
) -> None:
    config = tiny_config(dataset, tmp_path, init_from=str(trained[0]), qat=is_qat)
    message = f"train.py: error: expected a float checkpoint to begin with, but {trained[0]} is quantized\n"
    assert fails(config, capsys) == message


def test_a_float_run_is_not_resumed_in_int8(
    in_float: tuple[Path, float], dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(dataset, in_float[0], init_from="resume", qat=True, max_iters=80)
    assert "has qat=False, but this run has qat=True" in fails(config, capsys)


def test_without_modelopt(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "training.qat")
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    message = fails(tiny_config(dataset, tmp_path, qat=True), capsys)
    assert message.startswith("train.py: error: qat=True needs the packages of requirements/quant.txt (")
    assert message.endswith("): pip install -r requirements/quant.txt\n")
