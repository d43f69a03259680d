"""Adapters, virtual tokens, searches: each gets what it gets alone, whoever is beside it, whichever slots there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_bench import Bench, results
from tiny_checkpoints import VOCABULARY, random_checkpoint

from engine import AdapterRoom, open_engine
from model import ADAPTED
from serving.adapters import Adapter, AdapterSlots
from serving.settings import BeamSettings, RequestError, SamplingSettings
from serving.speculation import PromptLookup, Speculation
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PAGE = 8
SLOTS = 2
RANKS = (3, 0, 2, 2)
VIRTUAL = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Adapter | None]]:
    """An engine with room for two adapters and some virtual tokens, and three adapters, and none."""
    checkpoint = open_checkpoint(random_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"))
    engine = open_engine(checkpoint, "float32", 1, room=AdapterRoom(SLOTS, RANKS, VIRTUAL))
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
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 40),
            st.integers(1, 2),
            st.integers(0, 4),
            st.booleans(),
            st.sampled_from([None, None, 2, 3]),
            st.integers(0, VIRTUAL),
        ),
        min_size=2,
        max_size=8,
    ),
    pages=st.sampled_from([8, 12, 40]),
    max_tokens=st.sampled_from([5, 512]),
    guesses=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_gets_what_it_gets_alone(
    model: tuple[Any, Any, list[Adapter | None]], requests: Any, pages: int, max_tokens: int, guesses: bool
) -> None:
    """More adapters than slots, prompts that begin alike, too few pages, cancellations, searches, guesses."""
    engine, tokenizer, adapters = model
    speculation = Speculation(PromptLookup(shortest=1)) if guesses else None
    busy = Bench(with_rows(engine, pages), tokenizer, max_tokens=max_tokens, speculation=speculation)
    how = SamplingSettings(max_tokens=8, seed=1, logprobs=1, ignore_eos=True, repetition_penalty=1.1)
    search = replace(how, temperature=0.0, repetition_penalty=1.0)
    asked, cancelled = [], set()
    for number, length, choices, wait, is_cancelled, beams, virtual in requests:
        settings = how if beams is None else replace(search, beams=BeamSettings(beams))
        prompt, ids = ([7, 3, 9, 1] * 10)[: length + 1], range(VOCABULARY, VOCABULARY + virtual)
        given = {"adapter": adapters[number], "virtual": ids}
        try:
            asked.append((busy.engine.submit(prompt, settings, choices, **given), prompt, settings, choices, given))
        except RequestError as error:
            assert beams is not None and "pages" in str(error)
        for _ in range(wait):
            busy.turn()
        if is_cancelled and asked:
            busy.engine.cancel(asked[0][0])
            cancelled.add(asked[0][0])
    busy.finish()
    assert busy.engine.pages.used == 0
    for ticket, prompt, settings, choices, given in asked:
        if ticket in cancelled:
            continue
        alone = Bench(with_rows(engine, 32), tokenizer, sharing=False)
        expected = alone.engine.submit(prompt, settings, choices, **given)
        alone.finish()
        assert results(busy.told[ticket]) == results(alone.told[expected])


def with_rows(engine: Any, pages: int) -> Any:
    """A decoder of the engine with embeddings of virtual tokens."""
    decoder = engine.paged(PAGE, pages)
    decoder.set_prompts(np.random.default_rng(1).normal(size=(VIRTUAL, 32)).astype(np.float32))
    return decoder


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
