"""Generation against its definitions: cached equals stateless, greedy equals transformers, sampling follows its
distribution."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import save_random, stateless_logits
from transformers import GPT2LMHeadModel

from engine import Engine, compile_model, config_of, load_model
from generation import MAX_SEED, LogitsError, Sampler, generate
from weight_loader import open_checkpoint

CONTEXT = 230
NEW_TOKENS = 200


class Checkpoint:
    """One small model with random weights, in every form that the tests compare."""

    def __init__(self, folder: Path) -> None:
        # Weights large enough that tokens depend on their context, so that a wrong cache shows at once.
        self.reference: GPT2LMHeadModel = save_random(
            folder, n_layer=2, n_head=4, n_embd=32, vocab_size=97, n_positions=CONTEXT, initializer_range=0.5
        )
        checkpoint = open_checkpoint(folder)
        self.config = config_of(checkpoint, "float32")
        self.gpt = load_model(checkpoint, self.config)
        self.engines = {batch: Engine(compile_model(self.gpt, batch), self.config, batch) for batch in (1, 3)}

    def generate(self, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], count: int) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in prompts]
        engine = self.engines[1 if len(prompts) == 1 else 3]
        for drawn in generate(engine, prompts, samplers, count, set()):
            for row, token in drawn:
                results[row].append(token)
        return results

    def transformers_greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        # The mask is given because transformers would take tokens that equal the padding token for padding.
        found = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("generation"))


def greedy() -> Sampler:
    return Sampler(temperature=0.0)


PROMPT = [5, 17, 3, 88, 42, 42, 0, 96, 11, 60]


@pytest.mark.parametrize(
    "make_sampler", [greedy, lambda: Sampler(seed=7, top_k=None), lambda: Sampler(seed=8, top_p=0.9)]
)
def test_cached_equals_stateless(checkpoint: Checkpoint, make_sampler: type[Sampler]) -> None:
    """200 tokens one at a time, each checked against the stateless forward on everything before it."""
    (tokens,) = checkpoint.generate([PROMPT], [make_sampler()], NEW_TOKENS)
    assert len(tokens) == NEW_TOKENS
    logits = stateless_logits(checkpoint.gpt, np.array([PROMPT + tokens], np.int32))[0]
    sampler = make_sampler()
    assert [sampler(row) for row in logits[len(PROMPT) - 1 : -1]] == tokens


def test_every_split_of_prompt_and_continuation(checkpoint: Checkpoint) -> None:
    """Where the prompt ends and the continuation begins makes no difference to what comes."""
    (tokens,) = checkpoint.generate([PROMPT], [greedy()], NEW_TOKENS)
    sequence = PROMPT + tokens
    for split in range(1, len(sequence)):
        # From each split on, a few tokens: the cache then holds a prefill of `split` tokens.
        count = min(3, len(sequence) - split)
        (found,) = checkpoint.generate([sequence[:split]], [greedy()], count)
        if split >= len(PROMPT):
            assert found == sequence[split : split + count], split
        else:
            assert found == checkpoint.transformers_greedy(sequence[:split], count), split


def test_greedy_equals_transformers(checkpoint: Checkpoint) -> None:
    (tokens,) = checkpoint.generate([PROMPT], [greedy()], NEW_TOKENS)
    assert tokens == checkpoint.transformers_greedy(PROMPT, NEW_TOKENS)


def test_a_batch_equals_its_prompts_alone(checkpoint: Checkpoint) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:8] * 4]
    alone = [checkpoint.generate([prompt], [Sampler(seed=1, sample=i)], 60)[0] for i, prompt in enumerate(prompts)]
    together = checkpoint.generate(prompts, [Sampler(seed=1, sample=i) for i in range(3)], 60)
    assert together == alone


def test_a_full_context_ends_a_row_and_not_its_neighbours(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    nearly_full = rng.integers(0, 97, CONTEXT - 4).tolist()
    found = checkpoint.generate([nearly_full, PROMPT], [greedy(), greedy()], 20)
    assert len(found[0]) == 5  # four that fit, and the one that follows the last
    assert found[1] == checkpoint.generate([PROMPT], [greedy()], 20)[0]


def test_rows_that_the_caller_ends_draw_no_more(checkpoint: Checkpoint) -> None:
    done: set[int] = set()
    steps = []
    for drawn in generate(checkpoint.engines[3], [PROMPT, PROMPT], [greedy(), greedy()], 50, done):
        steps.append([row for row, _ in drawn])
        if len(steps) == 3:
            done.add(0)
        if len(steps) == 5:
            done.add(1)
    assert steps == [[0, 1]] * 3 + [[1]] * 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "1 to 1 prompts but got 0"),
        ([[1], [2]], "but got 2"),
        ([[]], "tokens but got 0"),
        ([[1] * 231], "but got 231"),
    ],
)
def test_impossible_prompts_are_refused(checkpoint: Checkpoint, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(checkpoint.engines[1], prompts, [greedy()] * len(prompts), 1, set()))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_seeds_and_samples_are_independent_streams() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int, sample: int) -> list[int]:
        sampler = Sampler(seed, sample, top_k=None)
        return [sampler(logits) for _ in range(20)]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, sample)) for seed in (0, 1, MAX_SEED) for sample in (0, 1, 2)}) == 9


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50),
    st.integers(1, 60),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.floats(0.05, 5.0),
    st.integers(0, MAX_SEED),
)
def test_only_candidates_are_drawn(
    values: list[float], top_k: int, top_p: float | None, temperature: float, seed: int
) -> None:
    """By the definitions of top-k and top-p, spelled out on sorted probabilities."""
    logits = np.array(values, np.float32)
    order = sorted(range(len(values)), key=lambda i: (-logits[i], i))[:top_k]
    weights = [float(np.exp((float(logits[i]) - float(logits[order[0]])) / temperature)) for i in order]
    allowed, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        allowed.append(i)
        mass += weight
        # A hair's breadth of slack: whether a sum reaches the bar exactly is a matter of rounding.
        if top_p is not None and mass >= top_p * sum(weights) * (1 + 1e-12):
            break
    sampler = Sampler(seed, 0, temperature, top_k, top_p)
    assert all(sampler(logits) in allowed for _ in range(5))


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0], np.float32)
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    sampler = Sampler(3, 0, temperature=0.7, top_k=None)
    count = 20000
    found = np.bincount([sampler(logits) for _ in range(count)], minlength=4)
    # Chi-squared with three degrees of freedom: 16.3 is exceeded once in a thousand seeds, and the seed is fixed.
    assert ((found - count * expected) ** 2 / (count * expected)).sum() < 16.3


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([1.0, 3.0, 3.0, 3.0, 2.0], np.float32)
    assert greedy()(logits) == 1
    drawn = {Sampler(seed, 0, top_k=2)(logits) for seed in range(50)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1e-308, 0.8])
@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_logits_that_are_no_numbers_give_no_token(temperature: float, top_k: int | None) -> None:
    for bad, message in ((np.nan, "token 400 is nan"), (np.inf, "token 400 is inf")):
        logits = np.linspace(-5, 5, 1000, dtype=np.float32)
        logits[400] = bad
        with pytest.raises(LogitsError, match=rf"not finite \(the logit of {message}\): .* bfloat16 or float32"):
            Sampler(0, 0, temperature, top_k)(logits)
    with pytest.raises(LogitsError, match="all logits are -inf"):
        Sampler(0, 0, temperature, top_k)(np.full(9, -np.inf, np.float32))
    masked = np.array([-np.inf, 2, -np.inf], np.float32)
    assert Sampler(0, 0, temperature, top_k)(masked) == 1


def test_the_error_crosses_processes() -> None:
    error = LogitsError.because("the logit of token 1 is nan")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_prompt_that_fills_the_context_is_continued_by_one_token(checkpoint: Checkpoint) -> None:
    full = np.random.default_rng(1).integers(0, 97, CONTEXT).tolist()
    (found,) = checkpoint.generate([full], [greedy()], 20)
    assert found == checkpoint.transformers_greedy(full, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed from 0"),
        ({"seed": MAX_SEED + 1}, "seed from 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)  # type: ignore[arg-type]
