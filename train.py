"""Train a GPT-2 and write it as a HuggingFace folder.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_cpu.py [--key=value ...]
    python train.py config/custom.py --init_from=gpt2 --lora_rank=8
    torchrun --nproc-per-node=2 train.py config/shakespeare_char.py

The keys are the fields of TrainConfig; a config file assigns some of them, and --key=value wins over the file. The
model is transformers' GPT2LMHeadModel: what is trained here is exactly what every HuggingFace program loads. Two runs
with the same config, seed, number of threads and machine give the same weights, and so does a run that is killed and
resumed (--init_from=resume).
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import contextlib
import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

import command_line
import compression
from command_line import UsageError
from quantization import QuantizationError
from tokenizing.description import to_json, write_json
from training.batches import Batches, Dataset, load_dataset
from training.building import build_model, low_rank, quantization_aware
from training.config import TrainConfig, parse_config
from training.log import Evaluation, TrainingLog, say
from training.resume import FIXED_LORA, began_with, check_training, check_values, trained_tensors
from training.state import STATE_FILE, load_state, save_model, save_state
from weight_loader import CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parent

# ---- where to train --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; there is one without torchrun."""

    rank: int
    local_rank: int  # on this machine
    count: int

    def mean(self, value: float) -> float:
        """The mean of a number that each process has one of."""
        if self.count == 1:
            return value
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return sum(values) / self.count


def find_processes() -> Processes:
    """Read what torchrun tells its processes."""
    rank, local_rank, count = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return Processes(rank, local_rank, count)


def choose_device(config: TrainConfig, local_rank: int = 0) -> tuple[torch.device, torch.dtype]:
    """Return where to train and the type of the matrix products there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = config.dtype
    if dtype == "auto":
        half = device.type == "cuda"
        dtype = "float32" if not half else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    return device, getattr(torch, dtype)


@contextlib.contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """The time in which the processes can speak with each other."""
    if processes.count == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


# ---- optimizer -------------------------------------------------------------------------------------------------------


def build_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW in two groups: matrices are decayed, biases and LayerNorms are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type in ("cpu", "cuda"))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step: a linear warm-up, then half a cosine down to min_lr."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return config.learning_rate
    decay_iters = config.lr_decay_iters or config.max_iters
    progress = min(1, (step - config.warmup_iters) / max(1, decay_iters - config.warmup_iters))
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_nats(
    model: nn.Module, ids: np.ndarray, bos_token_id: int | None, stride: int, batch_size: int = 8, most: int = 0
) -> float:
    """Return the mean over all `ids` (tokens,) of each one's negative log-likelihood, in nats.

    Windows of the model's context move on by `stride` tokens, and a token is scored in the first window that holds it:
    with stride = context // 2, every token after the first window sees at least half a context. The first token of all
    is scored given `bos_token_id`, and not at all where that is None.

    Args:
        most: so many windows, at even distances; 0: all.
    """
    context = model.config.n_positions
    device = next(model.parameters()).device
    before = [] if bos_token_id is None else [bos_token_id]
    sequence = torch.from_numpy(np.concatenate([before, ids]).astype(np.int64))
    count = len(sequence) - 1
    size = min(context, count)
    starts = [*range(0, count - size, stride), count - size]  # the last window is moved back to end at the end
    if 0 < most < len(starts):
        starts = [starts[i * (len(starts) - 1) // max(1, most - 1)] for i in range(most)]
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    scored = 0  # the tokens before this one are done
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        windows = torch.stack([sequence[start : start + size + 1] for start in group]).to(device)
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()  # (windows, size, vocab)
        nats = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").cpu().double()
        for start, row in zip(group, nats, strict=True):
            new = row[max(0, scored - start) :]
            total += new.sum().item()
            tokens += len(new)
            scored = start + size
    model.train(was_training)
    return total / tokens


# ---- going on --------------------------------------------------------------------------------------------------------


def check_same(config: TrainConfig, data: Dataset, state: dict[str, Any]) -> None:
    """Refuse to resume a run of another model, or with what can only be set at the beginning. All else counts anew.

    Raises:
        UsageError: the model's shape, its tokenizer or the seed is another one.
    """
    path = Path(config.out_dir) / STATE_FILE
    keys = ["block_size", "bias", "qat", "seed"]
    if state["config"]["init_from"] == "scratch":  # else the shape is that of the checkpoint it began with
        keys = ["n_layer", "n_head", "n_embd", *keys]
    for key in (*keys, *FIXED_LORA):
        was, now = began_with(state, key), getattr(config, key)
        if was != now:
            raise UsageError(f"cannot resume: {path} has {key}={was}, but this run has {key}={now}")
    if state["tokenizer"] != fingerprint(data):
        raise UsageError(f"cannot resume: {path} was trained on a dataset with another tokenizer than {config.dataset}")


def fingerprint(data: Dataset) -> str:
    return hashlib.sha256(write_json(to_json(data.description)).encode()).hexdigest()


def val_fingerprint(data: Dataset) -> str:
    return hashlib.sha256(data.val.tobytes()).hexdigest()


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators, on which dropout depends."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# ---- training --------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> float:
    """Train, keep the best weights in out_dir, and return their validation loss in nats per character."""
    if config.threads:
        torch.set_num_threads(config.threads)
    processes = find_processes()
    device, dtype = choose_device(config, processes.local_rank)
    data = load_dataset(ROOT / "data" / config.dataset, config.block_size)
    out_dir = Path(config.out_dir)
    if config.init_from != "resume":
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {out_dir}: {error.strerror}") from None
    with joined(processes, device):
        return Run(config, data, processes, device, dtype).train()


class Run:
    """Everything that changes during a run."""

    def __init__(
        self, config: TrainConfig, data: Dataset, processes: Processes, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.data, self.processes, self.device, self.dtype = config, data, processes, device, dtype
        state = load_state(Path(config.out_dir)) if config.init_from == "resume" else None
        if state is not None:
            check_values(state, Path(config.out_dir) / STATE_FILE)
            check_same(config, data, state)
        # The random numbers are torch's own on every device, so that the same seed begins with the same weights.
        torch.manual_seed(config.seed)
        self.model = build_model(config, data, state).to(device).train()
        # Of the weights that an adapter is for, which ckpt.pt does not hold.
        self.base = low_rank(config).base_digest(self.model) if config.lora_rank else None
        if state is not None and state.get("base") != self.base:
            raise UsageError(
                f"cannot resume: {began_with(state, 'init_from')} has other weights than the run began with"
            )
        if processes.rank:
            torch.manual_seed(config.seed + processes.rank)  # each process drops other activations
        self.averaged = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
        )
        self.optimizer = build_optimizer(config, self.model, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        self.batches = Batches(config, data, processes.rank, processes.count)
        self.step = 0  # so many are done
        self.best = math.inf  # validation loss
        # What a later resume compares with: the settings that the run began with.
        self.began_as = dataclasses.asdict(config) if state is None else state["config"]
        history = [Evaluation(*entry) for entry in state["history"]] if state is not None else []
        if state is not None:
            self.restore(state)
        self.log = TrainingLog(config, history) if processes.rank == 0 else None

    @property
    def saved_model(self) -> GPT2LMHeadModel:
        """The weights that are measured and saved."""
        return self.averaged.module if self.averaged else self.model

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a run was; its model is built already."""
        if state["step"] >= self.config.max_iters:
            raise UsageError(
                f"cannot resume: {self.config.out_dir} has done {state['step']} steps; give a larger max_iters"
            )
        path = Path(self.config.out_dir) / STATE_FILE
        averaged = trained_tensors(self.averaged, self.config) if self.averaged else None
        check_training(state, averaged, self.optimizer, path)
        self.step = state["step"]
        if state.get("val") in (None, val_fingerprint(self.data)):  # else what was measured cannot be compared
            self.best = state["best"]
        # The moments of the run that was; but the settings (decay, betas) of this one.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        if state["scaler"]:  # a run in another type than float16 has none
            self.scaler.load_state_dict(state["scaler"])
        self.batches.restore(state["batches"])
        if self.averaged and state["averaged"] is not None:
            self.averaged.load_state_dict(state["averaged"], strict=not self.config.lora_rank)
        if len(state["random"]) == self.processes.count:
            try:
                restore_random_states(state["random"][self.processes.rank], self.device)
            except (RuntimeError, TypeError):
                raise UsageError(f"cannot resume: {path} is damaged (random)") from None

    def state(self) -> dict[str, Any]:
        """What `restore` needs. Every process has to call this, at the same step."""
        states: list[Any] = [random_states(self.device)]
        if self.processes.count > 1:
            states = [None] * self.processes.count
            distributed.all_gather_object(states, random_states(self.device))
        return {
            "step": self.step,
            "best": self.best,
            "config": self.began_as,
            "architecture": self.model.config.to_dict(),
            "tokenizer": fingerprint(self.data),
            "val": val_fingerprint(self.data),
            "history": [dataclasses.astuple(entry) for entry in self.log.history] if self.log else [],
            "base": self.base,
            "model": trained_tensors(self.model, self.config),
            "averaged": trained_tensors(self.averaged, self.config) if self.averaged else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state(),
            "random": states,
        }

    def train(self) -> float:
        """Take all the steps, and return the best validation loss."""
        config, processes = self.config, self.processes
        forward: nn.Module = torch.compile(self.model) if config.compile else self.model
        if processes.count > 1:
            forward = DistributedDataParallel(forward, device_ids=[self.device] if self.device.type == "cuda" else None)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        tokens_per_step = processes.count * config.gradient_accumulation_steps * config.batch_size * config.block_size
        if processes.rank == 0:
            say(
                f"{trained:,} parameters, {len(self.data.train):,} training tokens, {tokens_per_step:,} a step, "
                f"{processes.count} x {self.device.type}, {str(self.dtype).removeprefix('torch.')}"
            )
        first, began = self.step, time.monotonic()
        with tqdm(
            total=config.max_iters * tokens_per_step,
            initial=self.step * tokens_per_step,
            unit="tok",
            unit_scale=True,
            mininterval=1,
            disable=processes.rank > 0,
        ) as progress:
            while self.step < config.max_iters:
                loss = self.take_step(forward)
                self.step += 1
                progress.update(tokens_per_step)
                if self.step % 10 == 0:
                    progress.set_postfix(
                        step=self.step, loss=f"{loss.item():.3f}", best=f"{self.best:.4f}", refresh=False
                    )
                if self.step % config.eval_interval == 0 or self.step == config.max_iters:
                    seconds = time.monotonic() - began
                    self.evaluate(processes.mean(loss.item()), (self.step - first) * tokens_per_step / seconds)
        if self.log:
            self.log.close()
            if config.lora_rank:
                best = low_rank(config).load(self.model, config.out_dir).to(self.device)
            else:
                load = quantization_aware().load if config.qat else GPT2LMHeadModel.from_pretrained
                best = load(config.out_dir).to(self.device)
            say(f"best val {self.best:.4f} nats/char, test {self.measure(best, 'test'):.4f}, in {config.out_dir}")
            if config.qat:
                say(compression.table(open_checkpoint(Path(config.out_dir))))
        return self.best

    def take_step(self, forward: nn.Module) -> torch.Tensor:
        """One step of the optimizer; returns the mean loss of this process's batches, nats per token."""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.batches.begin_step(self.step)
        total = torch.zeros((), device=self.device)
        for left in reversed(range(config.gradient_accumulation_steps)):
            batch = self.batches.draw(self.step)
            # Gradients are exchanged once, with the last batch's.
            alone = left and isinstance(forward, DistributedDataParallel)
            with forward.no_sync() if alone else contextlib.nullcontext():
                with self.mixed:
                    inputs, positions = batch.inputs.to(self.device), batch.positions.to(self.device)
                    output = forward(input_ids=inputs, position_ids=positions, use_cache=False)
                    logits = output.logits.flatten(0, 1).float()  # (windows * tokens, vocab)
                    loss = F.cross_entropy(logits, batch.targets.to(self.device).flatten())
                    loss = loss / config.gradient_accumulation_steps
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update_parameters(self.model)
        return total

    def evaluate(self, train_loss: float, tokens_per_second: float) -> None:
        """Measure, save the best, and write what a resume needs."""
        if not math.isfinite(train_loss):
            raise UsageError(f"the loss is {train_loss} after {self.step} steps; lower learning_rate")
        folder = Path(self.config.out_dir)
        if self.log:
            val = self.measure(self.saved_model, "val")
            is_best = val < self.best
            if is_best:
                self.best = val
                if self.config.lora_rank:
                    save_model(self.saved_model, None, folder, low_rank(self.config).save)
                else:
                    write = quantization_aware().export if self.config.qat else GPT2LMHeadModel.save_pretrained
                    save_model(self.saved_model, self.data.description, folder, write)
            rate = learning_rate(self.config, self.step)
            entry = Evaluation(self.step, train_loss, val, rate, tokens_per_second)
            self.log.add(entry, ", saved" if is_best else "")
        state = self.state()
        if self.log:
            save_state(state, folder)

    def measure(self, model: nn.Module, part: str) -> float:
        """The loss on the validation or the test text, nats per character."""
        config, ids = self.config, getattr(self.data, part)
        with self.mixed:
            nats = mean_nats(
                model, ids, self.data.eos_token_id, config.block_size, most=config.eval_iters * config.batch_size
            )
        return nats * self.data.tokens_per_char[part]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (2: bad input, told on one line of stderr)."""
    transformers_logging.disable_progress_bar()  # one for each saved file, across ours
    transformers_logging.set_verbosity_error()
    arguments = sys.argv[1:] if argv is None else argv

    def run() -> None:
        train(parse_config(arguments))

    return command_line.main("train.py", run, QuantizationError, CheckpointError, prints=False)


if __name__ == "__main__":
    sys.exit(main())
