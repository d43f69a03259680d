"""What the tests of containers and of families ask of a checkpoint: its logits, or the one line that refuses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_model import stateless_logits

from engine import config_of, load_model
from weight_loader import CheckpointError, open_checkpoint


def our_logits(path: Path, idx: np.ndarray) -> np.ndarray:
    """Of the ids [batch, tokens], in float32, by `model.py` on the portable runtime: [batch, tokens, vocabulary]."""
    checkpoint = open_checkpoint(path)
    return stateless_logits(load_model(checkpoint, config_of(checkpoint, "float32")), idx)


def refusal(path: Path) -> str:
    """What opening a checkpoint, or reading its tensors, says."""
    with pytest.raises(CheckpointError) as error:
        for _ in open_checkpoint(path).parameters("float32"):
            pass
    assert "\n" not in str(error.value)
    return str(error.value)
