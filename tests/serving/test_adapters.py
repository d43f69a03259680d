"""Requests with adapters: each gets what it gets alone, whoever is beside it, and whichever slots there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_bench import Bench, results
from tiny_checkpoints import random_checkpoint

from engine import AdapterRoom, open_engine
from model import ADAPTED
from serving.adapters import Adapter, AdapterSlots
from serving.settings import SamplingSettings
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PAGE = 8
SLOTS = 2
RANKS = (3, 0, 2, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Adapter | None]]:
    """An engine with room for two adapters, and three of them, and none."""
    checkpoint = open_checkpoint(random_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"))
    engine = open_engine(checkpoint, "float32", 1, room=AdapterRoom(SLOTS, RANKS))
    random = np.random.default_rng(0)
    config = checkpoint.config
    widths = {
        "c_attn": (config.n_embd, config.query_width + 2 * config.key_width),
        "c_fc": (config.n_embd, config.n_inner),
        "mlp.c_proj": (config.n_inner, config.n_embd),
    }

    def matrices(least: int) -> list[np.ndarray | None]:
        shapes = [(rank, width) for name, rank in zip(ADAPTED, RANKS, strict=True) if rank for width in widths[name]]
        return [
            (0.5 * random.standard_normal((config.n_layer, max(rank - least, 1), width))).astype(np.float32)
            for rank, width in shapes
        ]

    adapters: list[Adapter | None] = [None, *(Adapter(str(number), matrices(number)) for number in range(3))]
    return engine, load_tokenizer(checkpoint.tokenizer_source, config.vocab_size), adapters


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 2), st.integers(0, 4), st.booleans()),
        min_size=2,
        max_size=8,
    ),
    pages=st.sampled_from([8, 12, 40]),
    max_tokens=st.sampled_from([5, 512]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_gets_what_it_gets_alone(
    model: tuple[Any, Any, list[Adapter | None]], requests: Any, pages: int, max_tokens: int
) -> None:
    """More adapters than slots, prompts that begin alike, too few pages, cancellations."""
    engine, tokenizer, adapters = model
    busy = Bench(engine.paged(PAGE, pages), tokenizer, max_tokens=max_tokens)
    how = SamplingSettings(max_tokens=8, seed=1, logprobs=1, ignore_eos=True)
    tickets = []
    for number, length, choices, wait, is_cancelled in requests:
        adapter = adapters[number]
        tickets.append(busy.engine.submit(([7, 3, 9, 1] * 10)[: length + 1], how, choices, adapter=adapter))
        for _ in range(wait):
            busy.turn()
        if is_cancelled:
            busy.engine.cancel(tickets[0])
    busy.finish()
    assert busy.engine.pages.used == 0
    for place, ((number, length, choices, _, _), ticket) in enumerate(zip(requests, tickets, strict=True)):
        if place == 0 and any(each[4] for each in requests):
            continue
        alone = Bench(engine.paged(PAGE, 16), tokenizer, sharing=False)
        expected = alone.engine.submit(([7, 3, 9, 1] * 10)[: length + 1], how, choices, adapter=adapters[number])
        alone.finish()
        assert results(busy.told[ticket]) == results(alone.told[expected])


def test_prompts_share_pages_with_those_of_the_same_adapter_only(
    model: tuple[Any, Any, list[Adapter | None]],
) -> None:
    engine, tokenizer, adapters = model
    bench = Bench(engine.paged(PAGE, 60), tokenizer)
    for number, cached in [(1, 0), (1, 32), (2, 0), (0, 0), (1, 32), (0, 32)]:
        before = bench.engine.pages.hit
        bench.engine.submit([*range(40)], SamplingSettings(max_tokens=1), adapter=adapters[number])
        bench.finish()
        assert bench.engine.pages.hit - before == cached


class Decoder:
    """What slots need of one."""

    slots = 2

    def __init__(self) -> None:
        self.set: list[tuple[int, Any]] = []

    def set_adapter(self, slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        self.set.append((slot, matrices))


def test_who_was_not_used_for_the_longest_time_makes_room() -> None:
    decoder = Decoder()
    slots = AdapterSlots(decoder)
    a, b, c = (Adapter(name, [np.full((1, 1, 1), number)]) for number, name in enumerate("abc"))
    assert [slots.hold(each) for each in (None, a, b, a)] == [0, 1, 2, 1]
    assert slots.hold(c) is None, "both are in use"
    slots.release(b)
    assert slots.hold(c) == 2
    slots.release(a)
    assert slots.hold(b) is None, "one of a's sequences runs still"
    slots.release(a)
    assert slots.hold(b) == 1 and [slot for slot, _ in decoder.set] == [1, 2, 2, 1]
    assert len({each.key for each in (a, b, c)}) == 3
