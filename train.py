"""Train a GPT-2 from nothing and write it as a HuggingFace folder.

    python data/shakespeare_bpe/prepare.py
    python train.py config/shakespeare_bpe.py [--key=value ...]

The keys are the fields of TrainConfig; a config file assigns some of them, and --key=value wins over the file. The
model is transformers' GPT2LMHeadModel: what is trained here is exactly what every HuggingFace program loads. Two runs
with the same config, seed, number of threads and machine give the same weights.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import os
import random
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, with its default."""

    # Where from, where to
    dataset: str = "shakespeare_bpe"  # a folder under data/ that its prepare.py has filled, or any folder's full path
    out_dir: str = "out"  # the HuggingFace folder
    # Model
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 512  # context, in tokens
    dropout: float = 0.1  # of the embeddings and the residual branches
    # Data
    batch_size: int = 8  # windows of block_size tokens in a step
    short_block_size: int = 0  # the run begins with as many tokens a step in windows of this length; 0: it does not
    short_share: float = 0.0  # of the steps
    bpe_dropout: float = 0.0  # the probability of skipping a merge, in the windows that are re-tokenized
    # AdamW
    max_iters: int = 3000
    learning_rate: float = 1e-3
    min_lr: float = 1e-4  # where the cosine ends, at max_iters
    warmup_iters: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # of the matrices; biases and LayerNorms are not decayed
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 turns it off
    ema_decay: float = 0.995  # the saved weights are this moving average's; 0 saves the last step's
    # Evaluation
    eval_interval: int = 250  # steps
    # System
    seed: int = 1337
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: the type of the matrix products; weights are float32
    compile: bool = False  # torch.compile: pays on a GPU; on two CPU cores it was slower than eager
    threads: int = 0  # CPU threads; 0 leaves torch's choice


class UserError(Exception):
    """Something that the user can put right; shown as one line, without a traceback."""


# ---- configuration ---------------------------------------------------------------------------------------------------


def parse_config(argv: list[str]) -> TrainConfig:
    """Merge the defaults, then the config files, then the --key=value pairs of `argv`, whatever their order in it.

    >>> parse_config(["--n_layer=2", "--learning_rate=1e-4"]).n_layer
    2
    """
    from_files: dict[str, Any] = {}
    from_flags: dict[str, Any] = {}
    for argument in argv:
        if not argument.startswith("--"):
            from_files |= read_config_file(Path(argument))
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            raise UserError(f"expected --key=value, not {argument!r}")
        try:
            from_flags[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            from_flags[key] = value  # a bare word, such as --device=cpu
    return make_config(from_files | from_flags)


def read_config_file(path: Path) -> dict[str, Any]:
    """Run a config file and return what it assigns; its imports and _private names are its own business."""
    try:
        assigned = runpy.run_path(str(path))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except Exception as error:  # the file is the user's program: whatever it raises is about that file
        raise UserError(f"the config file {path} fails: {type(error).__name__}: {error}") from None
    return {k: v for k, v in assigned.items() if not k.startswith("_") and not isinstance(v, ModuleType)}


def make_config(overrides: dict[str, Any]) -> TrainConfig:
    """Return the defaults with `overrides`, each checked for its name, its type and its range."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for key, value in overrides.items():
        if key not in fields:
            raise UserError(f"unknown key {key!r}; the keys are {', '.join(fields)}")
        wanted = type(fields[key].default)
        if wanted is float and type(value) is int:
            overrides[key] = value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{key} must be of type {wanted.__name__}, not {value!r}")
    config = TrainConfig(**overrides)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters", "eval_interval"):
        if getattr(config, key) < 1:
            raise UserError(f"{key} must be at least 1, not {getattr(config, key)}")
    for key in ("dropout", "bpe_dropout", "short_share", "beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError(f"{key} must be at least 0 and below 1, not {getattr(config, key)}")
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    if config.short_share and not 1 <= config.short_block_size <= config.block_size:
        raise UserError(f"short_block_size must be 1 to block_size={config.block_size}, not {config.short_block_size}")
    return config


def choose_device(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Return where to train and the type of the matrix products there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = config.dtype
    if dtype == "auto":
        half = device.type == "cuda"
        dtype = "float32" if not half else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    return device, getattr(torch, dtype)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """What prepare.py wrote: token ids (uint16) of both parts, their tokenizer, and the sizes."""

    train: np.ndarray  # (tokens,)
    val: np.ndarray  # (tokens,)
    tokenizer: Tokenizer
    vocab_size: int
    eos_token_id: int | None
    val_chars: int


def load_dataset(folder: Path, block_size: int) -> Dataset:
    """Open a folder filled by prepare.py; each part must be longer than one window."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        parts = {name: np.fromfile(folder / f"{name}.bin", dtype="<u2") for name in ("train", "val")}
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        val_chars = int(meta["val_chars"])
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; run prepare.py first") from None
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}); run prepare.py again") from None
    for name, ids in parts.items():
        if len(ids) <= block_size:
            raise UserError(
                f"{folder / name}.bin is too short: {len(ids)} tokens, but block_size={block_size} needs at least "
                f"{block_size + 1}; give a longer text or a smaller block_size"
            )
    return Dataset(
        train=parts["train"],
        val=parts["val"],
        tokenizer=tokenizer,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        val_chars=val_chars,
    )


class SubwordRegularizer:
    """BPE-dropout (Provilkov et al. 2020, arXiv:1910.13267): the same text, cut into other tokens each time.

    The `tokenizers` library has it too, but draws from a generator that cannot be seeded. Here a handful of ways to cut
    each distinct word is drawn once, and an epoch draws one of them for each occurrence of the word, which costs a few
    NumPy gathers instead of a tokenization.
    """

    VARIANTS = 24  # ways to cut a word; at p = 0.1 most words have fewer that matter

    def __init__(self, tokenizer: Tokenizer, text: str, p: float, seed: int) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        vocab: dict[str, int] = model["vocab"]
        self._merges = {
            (vocab[left], vocab[right]): (rank, vocab[left + right])
            for rank, (left, right) in enumerate(model["merges"])
        }
        self._p = p
        self._random = random.Random(seed)
        word_ids: dict[str, int] = {}
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        self._occurrences = np.array([word_ids.setdefault(word, len(word_ids)) for word in words])  # (words,)
        cuts = [self._cut([vocab[c] for c in word]) for word in word_ids for _ in range(self.VARIANTS)]
        self._pool = np.array([token for cut in cuts for token in cut], dtype=np.uint16)
        self._lengths = np.array([len(cut) for cut in cuts])  # (distinct words * VARIANTS,)
        self._starts = np.cumsum(self._lengths) - self._lengths  # of each cut, in the pool

    def _cut(self, ids: list[int]) -> list[int]:
        """Merge as BPE does, except that each candidate sits out a round with probability p."""
        while True:
            best: tuple[int, int, int] | None = None  # (rank, position, merged id): the lowest rank, then the leftmost
            for position in range(len(ids) - 1):
                merge = self._merges.get((ids[position], ids[position + 1]))
                if merge and (best is None or merge[0] < best[0]) and self._random.random() >= self._p:
                    best = (merge[0], position, merge[1])
            if best is None:
                return ids
            _, position, merged = best
            ids[position : position + 2] = [merged]

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """Return the whole text as token ids, uint16, each word cut in one of its ways."""
        chosen = self._occurrences * self.VARIANTS + rng.integers(self.VARIANTS, size=len(self._occurrences))
        lengths = self._lengths[chosen]
        ends = np.cumsum(lengths)
        shift = np.repeat(self._starts[chosen] - (ends - lengths), lengths)  # from a place in the epoch to the pool
        return self._pool[np.arange(ends[-1]) + shift]


@dataclass(frozen=True)
class Batch:
    """The windows of one step; each field is (windows, tokens) int64, a window's targets being its next tokens."""

    inputs: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def batches(config: TrainConfig, data: Dataset) -> Iterator[Batch]:
    """Yield max_iters batches of batch_size * block_size tokens, cut from the training text at random places.

    With BPE-dropout a window comes from the re-tokenized text with a probability that falls from 1 to 0 over the run:
    the end of the training is spent on the cut that the tokenizer itself makes, the only one met afterwards. One window
    in eight begins with the end-of-text token, so that a prompt of that token alone is one that the model knows.

    Short windows first, long ones at the end, is Press et al. 2020 (arXiv:2012.15832): attention over a long window is
    a quarter of the time of a small model's step, and of little use before the model knows its words. A short window
    stands at a random place of the context, so that every position's embedding is trained from the start.
    """
    rng = np.random.Generator(np.random.Philox(config.seed))
    regularizer = None
    if config.bpe_dropout:
        text = data.tokenizer.decode(data.train.tolist(), skip_special_tokens=False)
        regularizer = SubwordRegularizer(data.tokenizer, text, config.bpe_dropout, config.seed)
    tokens_per_step = config.batch_size * config.block_size
    steps_per_epoch = max(1, len(data.train) // tokens_per_step)
    recut = data.train
    for step in range(config.max_iters):
        if regularizer and step % steps_per_epoch == 0:
            recut = regularizer.epoch(rng)
        size = config.short_block_size if step < config.short_share * config.max_iters else config.block_size
        windows = np.empty((tokens_per_step // size, size + 1), dtype=np.int64)
        for row in windows:
            source = recut if rng.random() >= step / config.max_iters else data.train
            start = rng.integers(len(source) - size)
            row[:] = source[start : start + size + 1]
            if data.eos_token_id is not None and rng.random() < 1 / 8:
                row[0] = data.eos_token_id
        first = rng.integers(config.block_size - size + 1, size=(len(windows), 1))
        ids = torch.from_numpy(windows)
        yield Batch(ids[:, :-1], torch.from_numpy(first + np.arange(size)), ids[:, 1:])


# ---- model and optimizer ---------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, data: Dataset) -> GPT2LMHeadModel:
    """Return a freshly initialised GPT-2, its head tied to its token embedding."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=data.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
            attn_pdrop=0.0,  # torch's fused attention on a CPU has no dropout
            bos_token_id=data.eos_token_id,
            eos_token_id=data.eos_token_id,
        )
    )
    for block in model.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")  # the same function as the config's gelu_new, in one fused kernel
    return model


def build_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW in two groups: matrices are decayed, biases and LayerNorms are not."""
    parameters = list(model.parameters())
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
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ---- evaluation and saving -------------------------------------------------------------------------------------------


@torch.no_grad()
def total_nats(model: nn.Module, ids: np.ndarray, bos_token_id: int, stride: int, batch_size: int = 8) -> float:
    """Return the sum over all `ids` (tokens,) of each one's negative log-likelihood, in nats.

    Windows of the model's context move on by `stride` tokens, and a token is scored in the first window that holds it:
    with stride = context // 2, every token after the first window sees at least half a context. The first token of all
    is scored given `bos_token_id`. Divide by the number of characters for a loss that does not depend on the tokenizer.
    """
    context = model.config.n_positions
    device = next(model.parameters()).device
    sequence = torch.from_numpy(np.concatenate([[bos_token_id], ids]).astype(np.int64))
    count = len(ids)
    size = min(context, count)
    starts = [*range(0, count - size, stride), count - size]  # the last window is moved back to end at the end
    was_training = model.training
    model.eval()
    total = 0.0
    scored = 0  # the tokens before this one are done
    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        windows = torch.stack([sequence[start : start + size + 1] for start in group]).to(device)
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()  # (windows, size, vocab)
        nats = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").cpu().double()
        for start, row in zip(group, nats, strict=True):
            total += row[scored - start :].sum().item()
            scored = start + size
    model.train(was_training)
    return total


def save_checkpoint(model: GPT2LMHeadModel, tokenizer: Tokenizer, eos_token_id: int | None, folder: Path) -> None:
    """Write the HuggingFace folder: each file in full beside its place, then renamed, the weights last."""
    partial = folder / ".partial"
    eos = None if eos_token_id is None else tokenizer.id_to_token(eos_token_id)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.n_positions,
        **({"bos_token": eos, "eos_token": eos, "unk_token": eos} if eos else {}),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        text = json.dumps(tokenizer_config, indent=2) + "\n"
        (partial / "tokenizer_config.json").write_text(text, encoding="utf-8")
        for file in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            file.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- training --------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> float:
    """Train, keep the best average of the weights in out_dir, and return its validation loss in nats per character."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config)
    data = load_dataset(ROOT / "data" / config.dataset, config.block_size)
    torch.manual_seed(config.seed)
    model = build_model(config, data).to(device).train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = build_optimizer(config, model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    forward = torch.compile(model) if config.compile else model

    def evaluate(stride: int) -> float:
        return total_nats(averaged.module, data.val, data.eos_token_id or 0, stride) / data.val_chars

    parameters = sum(p.numel() for p in model.parameters())
    tqdm.write(f"{parameters:,} parameters, {len(data.train):,} training tokens, {device}, {dtype}", file=sys.stderr)
    tokens_per_step = config.batch_size * config.block_size
    best = math.inf
    began = time.monotonic()
    with tqdm(total=config.max_iters * tokens_per_step, unit="tok", unit_scale=True, mininterval=1) as progress:
        for step, batch in enumerate(batches(config, data)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            with mixed:
                inputs, positions = batch.inputs.to(device), batch.positions.to(device)
                output = forward(input_ids=inputs, position_ids=positions, use_cache=False)
                logits = output.logits.flatten(0, 1).float()  # (windows * tokens, vocab)
                loss = F.cross_entropy(logits, batch.targets.to(device).flatten())
            scaler.scale(loss).backward()
            if config.grad_clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            averaged.update_parameters(model)
            progress.update(tokens_per_step)
            done = step + 1
            if done % 10 == 0:
                progress.set_postfix(step=done, loss=f"{loss.item():.3f}", best=f"{best:.4f}", refresh=False)
            if done % config.eval_interval and done != config.max_iters:
                continue
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss is {loss.item()} after {done} steps; lower learning_rate")
            val = evaluate(config.block_size)
            kept = val < best
            if kept:
                best = val
                save_checkpoint(averaged.module, data.tokenizer, data.eos_token_id, Path(config.out_dir))
            report = f"step {done}: train loss {loss.item():.3f} nats/token, val {val:.4f} nats/char"
            tqdm.write(f"{report}, {time.monotonic() - began:.0f} s{', saved' if kept else ''}", file=sys.stderr)
    tqdm.write(f"best val {best:.4f} nats/char, in {config.out_dir}", file=sys.stderr)
    return best


def main(argv: list[str]) -> int:
    """Run the command line; return its exit code (2: bad input, told on one line of stderr)."""
    transformers_logging.disable_progress_bar()  # one for each saved file, across ours
    try:
        train(parse_config(argv))
    except UserError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the best checkpoint so far, if any, is in out_dir", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
