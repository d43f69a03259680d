"""What a decoder tells those that follow it is all they need to take the same steps."""

from __future__ import annotations

import numpy as np
import pytest
from compared_ranks import decoder_of, logits_of
from small_configs import GPT2

from nvtripy_portable.decoder import Decoder, Piece

pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")


class Replayed:
    """Takes the steps on another decoder of the same model, and keeps what comes out."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.logits = decoder, list[np.ndarray]()

    def step(self, tokens: np.ndarray, segments: np.ndarray, tables: np.ndarray, rows: np.ndarray) -> None:
        self.logits.append(self.decoder.run(*(each.copy() for each in (tokens, segments, tables, rows))))

    def copy(self, source: int, target: int) -> None:
        self.decoder.copy(source, target)


def test_steps_are_announced_with_all_that_they_take() -> None:
    leader, follower = decoder_of(GPT2, None), Replayed(decoder_of(GPT2, None))
    leader.followers = follower
    assert np.array_equal(logits_of(leader, GPT2.vocab_size), np.concatenate(follower.logits))


def test_copied_pages_are_announced() -> None:
    leader, follower = decoder_of(GPT2, None), Replayed(decoder_of(GPT2, None))
    leader.followers = follower
    first, second = leader.pool.take(2)
    leader.step([Piece([1, 2, 3], 0, [first])])
    leader.copy(first, second)
    last = leader.step([Piece([4], 3, [second], generated=True)])
    assert np.array_equal(last, follower.logits[-1])
