"""The losses of a training run: kept, drawn, and handed to TensorBoard and Weights & Biases if that is wanted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import picture
from command_line import UsageError
from training.config import TrainConfig

PLOT_FILE = "loss.png"
REQUIREMENTS = "requirements/train.txt"


@dataclass(frozen=True)
class Evaluation:
    """What is known after some steps. Losses are in nats; `val` is per character where `train` is per token."""

    step: int
    train: float
    val: float
    learning_rate: float
    tokens_per_second: float


class TrainingLog:
    """Where the evaluations of a run go: to stderr, and to what the config asks for."""

    def __init__(self, config: TrainConfig, history: list[Evaluation]) -> None:
        """Open everything, before any long work. `history` is what a resumed run has behind it.

        Raises:
            UsageError: something that is asked for is not installed.
        """
        self.history = history
        self._folder = Path(config.out_dir)
        self._plot = config.plot
        self._trackers: list[Callable[[int, dict[str, float]], None]] = []
        self._closers: list[Callable[[], Any]] = []
        if config.plot:
            picture.check(self._folder / PLOT_FILE, REQUIREMENTS, "--plot=True")
        if config.tensorboard:
            self._open_tensorboard()
        if config.wandb_log:
            self._open_wandb(config)

    def _open_tensorboard(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"--tensorboard=True needs TensorBoard ({error}): pip install tensorboard") from None
        try:
            writer = SummaryWriter(self._folder / "tensorboard")
        except Exception as error:  # TensorBoard's own and the operating system's
            raise UsageError(f"cannot log to TensorBoard: {_first_line(error)}") from None

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._trackers.append(log)
        self._closers.append(writer.close)

    def _open_wandb(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"--wandb_log=True needs Weights & Biases ({error}): pip install wandb") from None
        try:
            run = wandb.init(
                project=config.wandb_project, name=config.wandb_run_name or None, config=dataclasses.asdict(config)
            )
        except Exception as error:  # no account, no network: whatever it raises is for the user to put right
            raise UsageError(f"cannot log to Weights & Biases: {_first_line(error)}") from None
        self._trackers.append(lambda step, values: run.log(values, step=step))
        self._closers.append(run.finish)

    def add(self, evaluation: Evaluation, note: str = "") -> None:
        """Report an evaluation everywhere."""
        self.history.append(evaluation)
        e = evaluation
        say(
            f"step {e.step}: train loss {e.train:.4f} nats/token, val {e.val:.4f} nats/char, "
            f"{e.tokens_per_second:,.0f} tokens/s{note}"
        )
        values = {
            "train/loss": e.train,
            "val/loss": e.val,
            "lr": e.learning_rate,
            "tokens_per_second": e.tokens_per_second,
        }
        for track in self._trackers:
            try:
                track(e.step, values)
            except Exception as error:  # a full disk, a network that has gone: whatever a tracker makes of it
                raise UsageError(f"cannot log step {e.step}: {_first_line(error)}") from None
        if self._plot:
            self._draw()

    def _draw(self) -> None:
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats")
        steps = [e.step for e in self.history]
        axes.plot(steps, [e.train for e in self.history], label="train, per token", color="#999999")
        axes.plot(steps, [e.val for e in self.history], label="validation, per character", color="#1f77b4")
        best = min(self.history, key=lambda e: e.val)
        axes.annotate(f"{best.val:.4f}", (best.step, best.val), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.plot(best.step, best.val, "o", color="#1f77b4")
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        picture.write(figure, self._folder / PLOT_FILE)

    def close(self) -> None:
        for close in self._closers:
            close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(message: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)
