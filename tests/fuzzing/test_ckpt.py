"""Damaged ckpt.pt: a run that goes on, or one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import fuzzing, mutated_bytes, mutated_tree
from train_runs import VOCAB, make_text, tiny_config

torch = pytest.importorskip("torch", reason="training needs requirements/train.txt")
pytest.importorskip("transformers", reason="training needs requirements/train.txt")

import train  # noqa: E402
from command_line import UsageError  # noqa: E402
from training import corpus  # noqa: E402
from training.batches import Dataset, load_dataset  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.state import KEYS, STATE_FILE  # noqa: E402

pytestmark = pytest.mark.slow

_WORDS = """
state param_groups params exp_avg exp_avg_sq lr betas weight_decay fused rng epoch_began bit_generator Philox buffer
buffer_pos counter key has_uint32 uinteger cpu cuda n_layer n_head n_embd n_positions vocab_size init_from block_size
qat scale n_averaged transformer.wte.weight transformer.h.0.attn.c_attn.bias module.lm_head.weight gelu_new
"""
WORDS = [
    *KEYS,
    *_WORDS.split(),
    torch.zeros(2),
    torch.full((32,), float("nan")),
    torch.ones(3, 3, dtype=torch.int8),
    torch.tensor(1e300),
    torch.zeros(0, dtype=torch.uint8),
    torch.zeros(5056, dtype=torch.uint8),
    torch.zeros((320, 32), dtype=torch.float16),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Dataset]:
    """A run that may be resumed, and its data."""
    folder, out_dir = tmp_path_factory.mktemp("dataset"), tmp_path_factory.mktemp("stopped")
    corpus.prepare(make_text(900), folder, "bpe", VOCAB)
    config = tiny_config(folder, out_dir, max_iters=4, eval_interval=2, eval_iters=1)
    train.train(config)
    return dataclasses.replace(config, init_from="resume", max_iters=8), load_dataset(folder, config.block_size)


def goes_on(config: TrainConfig, data: Dataset) -> bool:
    """Whether the run was resumed; each that is takes a step. What cannot be is refused in one line."""
    torch.manual_seed(0)
    try:
        run = train.Run(config, data, train.find_processes(), torch.device("cpu"), torch.float32)
    except UsageError as error:
        assert str(error) and "\n" not in str(error)
        return False
    run.take_step(run.model)
    return True


def test_trees(stopped: tuple[TrainConfig, Dataset]) -> None:
    config, data = stopped
    path = Path(config.out_dir) / STATE_FILE
    sound = torch.load(path, weights_only=True)
    accepted = 0

    @fuzzing(3000)
    @given(st.data())
    def fuzz(draw: st.DataObject) -> None:
        nonlocal accepted
        torch.save(mutated_tree(draw.draw, sound, WORDS), path)
        accepted += goes_on(config, data)

    content = path.read_bytes()
    try:
        fuzz()
    finally:
        path.write_bytes(content)
    assert accepted > 100


def test_bytes(stopped: tuple[TrainConfig, Dataset]) -> None:
    config, data = stopped
    path = Path(config.out_dir) / STATE_FILE
    sound = path.read_bytes()

    @fuzzing(1500)
    @given(st.data())
    def fuzz(draw: st.DataObject) -> None:
        path.write_bytes(mutated_bytes(draw.draw, sound))
        goes_on(config, data)

    try:
        fuzz()
    finally:
        path.write_bytes(sound)
