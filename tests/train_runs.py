"""A small text and a model of a few thousand parameters that learns it in a second or two."""

from __future__ import annotations

import random
from pathlib import Path

from training.config import TrainConfig, make_config

VOCAB = 320
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def make_text(sentences: int) -> str:
    """Sentences with a rule to learn: each subject has a verb of its own."""
    draw = random.Random(7)
    verbs = {"The king": "commands", "My lady": "whispers", "A fool": "sings", "The café owner": "waits"}
    places = ["in the castle", "by the river", "at midnight", "before the storm", "without a crown"]
    lines = []
    for _ in range(sentences):
        subject = draw.choice(list(verbs))
        lines.append(f"{subject} {verbs[subject]} {draw.choice(places)}.\n")
    return "".join(lines)


def tiny_config(dataset: Path, out_dir: Path, **changes: object) -> TrainConfig:
    settings = {
        "dataset": str(dataset),
        "out_dir": str(out_dir),
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 8,
        "dropout": 0.1,
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
    return make_config({**settings, **changes})
