"""Perplexity: how surprised a model is by each token of a text, from windows that slide over it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from generation import LogitsError

if TYPE_CHECKING:
    from model import GPT

BATCH_TOKENS = 2048  # that go through the model together: speed against memory
BATCH_LOGITS = 1 << 26  # as many logits at most, unless one window has more


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` go through the model; those from ``scored`` on predict a token that counts."""

    start: int
    stop: int
    scored: int


def windows(predictions: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that together predict each token after the first once, the earliest that can doing it.

    >>> list(windows(10, context=6, stride=3))
    [Window(start=0, stop=6, scored=0), Window(start=3, stop=9, scored=6), Window(start=6, stop=10, scored=9)]
    """
    start = done = 0
    while done < predictions:
        stop = min(start + context, predictions)
        yield Window(start, stop, done)
        done = stop
        start += stride


def negative_log_likelihoods(
    logits_of: Callable[[np.ndarray], np.ndarray],
    batch: int,
    ids: np.ndarray,
    context: int,
    stride: int,
    name: str = "",
) -> np.ndarray:
    """How unlikely the model finds each token after the first, given those before it in its window.

    Args:
        logits_of: From token ids (batch, tokens) int32 the float32 logits (batch, tokens, V). It is always given the
            same shape, shorter windows padded on the right, where a causal model does not look.
        batch: How many windows it takes together.
        ids: The text, (N,) int32.
        context: Tokens of a window, or N - 1 where that is less.
        stride: How far windows are apart, at most ``context``: all tokens but the first window's are predicted from at
            least ``context - stride + 1`` others.
        name: For the progress bar.

    Returns:
        Nats, (N - 1,) float64; infinite for a token that the model rules out.

    Raises:
        LogitsError: the logits of a token are not numbers.
    """
    from tqdm import tqdm

    size = min(context, len(ids) - 1)
    todo = list(windows(len(ids) - 1, size, stride))
    nats = np.empty(len(ids) - 1, dtype=np.float64)
    with tqdm(desc=name, total=len(nats), unit="token", leave=False, file=sys.stderr) as progress:
        for begin in range(0, len(todo), batch):
            group = todo[begin : begin + batch]
            idx = np.zeros((batch, size), dtype=np.int32)
            for row, window in enumerate(group):
                idx[row, : window.stop - window.start] = ids[window.start : window.stop]
            logits = logits_of(idx)
            for row, window in enumerate(group):
                targets = ids[window.scored + 1 : window.stop + 1]
                scored = logits[row, window.scored - window.start : window.stop - window.start]
                nats[window.scored : window.stop] = found = _cross_entropy(scored, targets)
                if np.isnan(found).any():  # of NaN, of infinity, and of nothing but minus infinity
                    raise LogitsError.because(
                        f"those after token {window.scored + int(np.isnan(found).argmax())} of the text"
                    )
                progress.update(len(targets))
    return nats


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[targets] in float64, by rows: (T, V), (T,) → (T,)."""
    result = np.empty(len(targets), dtype=np.float64)
    rows = max(1, (1 << 22) // logits.shape[1])  # some 32 MB at a time
    for begin in range(0, len(targets), rows):
        part = logits[begin : begin + rows].astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            part -= part.max(axis=1, keepdims=True)
        chosen = part[np.arange(len(part)), targets[begin : begin + rows]]
        result[begin : begin + rows] = np.log(np.exp(part).sum(axis=1)) - chosen
    return result


def perplexity(nats: np.ndarray) -> float:
    """exp of the mean; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats.mean()))


def ratio(perplexity: float, first: float) -> float | None:
    """Of a perplexity to the first; None where that is infinite, which says nothing about another."""
    return perplexity / first if math.isfinite(first) else None


def bits_per_byte(nats: np.ndarray, predicted: bytes) -> float:
    """What the predicted tokens cost, for each byte of their text: models with other tokenizers compare by it, as by
    perplexity they cannot (Gao et al. 2020, arXiv:2101.00027, section 3.1)."""
    return float(nats.sum() / math.log(2) / len(predicted))


def nats_of(gpt: GPT, ids: np.ndarray, context: int, stride: int, name: str = "") -> np.ndarray:
    """:func:`negative_log_likelihoods` of a model with its weights, which is compiled for it.

    Raises:
        tp.TripyException: it cannot be compiled.
        LogitsError: the logits of a token are not numbers.
    """
    size = min(context, len(ids) - 1)
    num_windows = sum(1 for _ in windows(len(ids) - 1, size, stride))
    logits_of, batch = stateless_model(gpt, size, num_windows)
    return negative_log_likelihoods(logits_of, batch, ids, size, stride, name)


def stateless_model(gpt: GPT, tokens: int, num_windows: int) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """The compiled stateless forward, as :func:`negative_log_likelihoods` wants it, and its batch."""
    import nvtripy as tp

    from engine import forward_of, stderr_kept

    fitting = min(BATCH_TOKENS // tokens, BATCH_LOGITS // (tokens * gpt.config.vocab_size), num_windows)
    batch = max(1, fitting)
    with stderr_kept():
        executable = tp.compile(forward_of(gpt), args=[tp.InputInfo((batch, tokens), dtype=tp.int32)])

    def logits_of(idx: np.ndarray) -> np.ndarray:
        logits = executable(tp.copy(tp.Tensor(idx), tp.device("gpu")))
        return np.from_dlpack(tp.copy(logits, tp.device("cpu")))

    return logits_of, batch
