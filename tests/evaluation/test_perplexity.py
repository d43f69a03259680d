"""Perplexity against transformers, window by window."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_nats import reference_nats
from test_model import save_random
from transformers import GPT2LMHeadModel

from engine import config_of, load_model
from evaluation import perplexity
from generation import LogitsError
from weight_loader import open_checkpoint


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_predict_each_token_once_with_enough_before_it(predictions: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context))
    predicted = []
    for number, window in enumerate(perplexity.windows(predictions, context, stride)):
        assert 0 <= window.start <= window.scored < window.stop <= min(predictions, window.start + context)
        assert window.start == number * stride
        assert number == 0 or window.scored - window.start >= context - stride
        predicted += range(window.scored, window.stop)
    assert predicted == list(range(predictions))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Any]:
    """A random GPT-2 in transformers, and loaded for nvtripy."""
    folder = tmp_path_factory.mktemp("random")
    model = save_random(folder, n_layer=2, n_head=4, n_embd=32, vocab_size=160, n_positions=24)
    checkpoint = open_checkpoint(folder)
    return model, load_model(checkpoint, config_of(checkpoint, "float32"))


@pytest.mark.parametrize(
    ("tokens", "context", "stride"),
    [
        (101, 24, 24),
        (101, 24, 12),
        (101, 24, 7),
        (60, 10, 3),
        (40, 24, 1),
        (25, 24, 24),
        (26, 24, 5),
        (9, 24, 12),
        (2, 24, 1),
    ],
)
def test_nats_are_those_of_transformers(random_model: Any, tokens: int, context: int, stride: int) -> None:
    """Every token's, to 1e-4: both compute in float32, in another order."""
    model, gpt = random_model
    ids = np.random.default_rng(tokens).integers(0, 160, tokens).astype(np.int32)
    size = min(context, tokens - 1)
    logits_of, batch = perplexity.stateless_model(
        gpt, size, sum(1 for _ in perplexity.windows(tokens - 1, size, stride))
    )
    found = perplexity.negative_log_likelihoods(logits_of, batch, ids, context, stride)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, reference_nats(model, ids, context, stride), rtol=1e-4, atol=1e-4)


def test_what_the_padding_predicts_does_not_count() -> None:
    """A batch that the windows do not fill, and a last window that is shorter."""
    shapes = []

    def logits_of(idx: np.ndarray) -> np.ndarray:
        shapes.append(idx.shape)
        logits = np.zeros((*idx.shape, 5), np.float32)
        np.put_along_axis(logits, (idx[..., None] + 1) % 5, 30.0, axis=2)  # sure that one more follows
        return logits

    ids = (np.arange(1, 24) % 5).astype(np.int32)
    nats = perplexity.negative_log_likelihoods(logits_of, 4, ids, context=8, stride=4)
    assert set(shapes) == {(4, 8)}
    assert nats.shape == (22,) and (nats < 1e-6).all()


def test_nats_of_extreme_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [0.0, 0.0, 0.0]], np.float32)
    assert perplexity._cross_entropy(logits, np.array([1, 1, 2])).tolist() == [2e4, 0.0, np.log(3.0)]
    assert perplexity.perplexity(np.array([800.0])) == np.inf
    assert perplexity.ratio(3.0, 2.0) == 1.5 and perplexity.ratio(np.inf, 2.0) == np.inf
    assert perplexity.ratio(np.inf, np.inf) is None and perplexity.ratio(2.0, np.inf) is None


def test_docstrings() -> None:
    results = doctest.testmod(perplexity)
    assert results.attempted >= 1 and results.failed == 0


@pytest.mark.parametrize(("bad", "refused"), [(np.nan, True), (np.inf, True), (-np.inf, False)])
def test_logits_that_are_no_numbers_are_refused(bad: float, refused: bool) -> None:
    """Minus infinity rules a token out: it costs nothing unless the text has it."""

    def logits_of(idx: np.ndarray) -> np.ndarray:
        logits = np.zeros((*idx.shape, 5), np.float32)
        logits[idx == 3, 4] = bad
        return logits

    ids = np.array([0, 1, 2, 3, 0, 1], np.int32)
    if refused:
        with pytest.raises(LogitsError, match="those after token 3 of the text"):
            perplexity.negative_log_likelihoods(logits_of, 1, ids, 4, 2)
    else:
        nats = perplexity.negative_log_likelihoods(logits_of, 1, ids, 4, 2)
        np.testing.assert_allclose(nats, np.log([5, 5, 5, 4, 5]))
