"""Serving many requests: each gets what it gets alone, to the last bit, whatever is computed beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stepped import Bench, results
from tiny_checkpoints import VOCABULARY, random_checkpoint

from engine import open_engine
from serving.settings import RequestError, SamplingSettings
from serving.speculation import PromptLookup, Speculation
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PAGE = 8
CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(random_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"))
    engine = open_engine(checkpoint, "float32", batch=1)
    return engine, load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)


REQUESTS = st.builds(
    lambda prompt, choices, salt, **more: (prompt, choices, salt, SamplingSettings(**more)),
    prompt=st.builds(
        lambda common, own: ([7, 3, 9, 1] * 10)[:common] + own,
        st.integers(0, 40),
        st.lists(st.integers(0, 255), min_size=1, max_size=12),
    ),
    choices=st.integers(1, 3),
    salt=st.sampled_from([b"", b"other"]),
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([None, 1, 5]),
    top_p=st.sampled_from([None, 0.9]),
    min_p=st.sampled_from([None, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {65: 5.0}]),
    max_tokens=st.integers(0, 12),
    stop=st.sampled_from([(), ("A",)]),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
)


@given(
    requests=st.lists(
        st.tuples(REQUESTS, st.integers(0, 6), st.sampled_from([None, None, None, 2])), min_size=2, max_size=8
    ),
    pages=st.sampled_from([8, 10, 40]),
    max_tokens=st.sampled_from([4, 16, 512]),
    max_sequences=st.sampled_from([2, 4, 64]),
    guesses=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_gets_what_it_gets_alone(
    model: tuple[Any, Any], requests: Any, pages: int, max_tokens: int, max_sequences: int, guesses: bool
) -> None:
    """Random arrivals, cancellations, prompts that begin alike, pools so small that sequences are put aside."""
    engine, tokenizer = model
    busy = Bench(
        engine.paged(PAGE, pages),
        tokenizer,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        speculation=Speculation(PromptLookup(), most=4) if guesses else None,
    )
    tickets, cancelled = [], set()
    for (prompt, choices, salt, how), wait, cancel in requests:
        tickets.append(busy.engine.submit(prompt, how, choices, salt=salt))
        for _ in range(wait):
            busy.turn()
        if cancel is not None:
            busy.engine.cancel(tickets[0])
            cancelled.add(tickets[0])
    busy.finish()
    assert busy.engine.pages.used == 0
    for (request, _, _), ticket in zip(requests, tickets, strict=True):
        if ticket in cancelled:
            continue
        prompt, choices, salt, how = request
        alone = Bench(engine.paged(PAGE, 16), tokenizer, max_sequences=64, max_tokens=512, sharing=False)
        expected = alone.engine.submit(prompt, how, choices, salt=salt)
        alone.finish()
        assert results(busy.told[ticket]) == results(alone.told[expected])


def alone(model: tuple[Any, Any], prompt: list[int], how: SamplingSettings) -> list[tuple[Any, ...]]:
    engine, tokenizer = model
    bench = Bench(engine.paged(PAGE, 16), tokenizer, sharing=False)
    ticket = bench.engine.submit(prompt, how)
    bench.finish()
    return results(bench.told[ticket])


def test_whoever_is_put_aside_goes_on_as_if_nothing_had_been(model: tuple[Any, Any]) -> None:
    engine, tokenizer = model
    bench = Bench(engine.paged(PAGE, 10), tokenizer)
    how = SamplingSettings(max_tokens=40, seed=4, ignore_eos=True, logprobs=1)
    prompts = [[number, *range(10)] for number in range(4)]
    tickets = [bench.engine.submit(prompt, how) for prompt in prompts]
    bench.finish()
    assert bench.engine.scheduler.preemptions > 2 and bench.engine.pages.used == 0
    for prompt, ticket in zip(prompts, tickets, strict=True):
        assert results(bench.told[ticket]) == alone(model, prompt, how)


def test_guesses_that_are_right_save_steps(model: tuple[Any, Any]) -> None:
    """Greedy, with a bias that makes the text repeat itself: most guesses are right."""
    engine, tokenizer = model
    how = SamplingSettings(max_tokens=40, temperature=0.0, ignore_eos=True, logit_bias={65: 100.0})
    bench = Bench(engine.paged(PAGE, 16), tokenizer, speculation=Speculation(PromptLookup(), most=8))
    ticket = bench.engine.submit([1, 65, 65, 65], how)
    bench.finish()
    assert bench.engine.counters.accepted_tokens > 25 and bench.engine.counters.steps < 15
    assert results(bench.told[ticket]) == alone(model, [1, 65, 65, 65], how)


def test_a_static_batch_serves_the_same(model: tuple[Any, Any], tmp_path: Path) -> None:
    """The slots that stand in for pages where NVIDIA's runtime runs the model: the same tokens, row by row."""
    from serving.slots import SlotDecoder

    _, tokenizer = model
    checkpoint = open_checkpoint(random_checkpoint(tmp_path / "checkpoint"))  # of the same seed
    static = SlotDecoder(open_engine(checkpoint, "float32", batch=3), VOCABULARY)
    bench = Bench(static, tokenizer, max_sequences=3, sharing=False)
    how = SamplingSettings(max_tokens=20, seed=2, ignore_eos=True, prompt_logprobs=0)
    prompts = [[number] * (3 + 9 * number) for number in range(5)]
    tickets = [bench.engine.submit(prompt, how) for prompt in prompts]
    bench.finish()
    for prompt, ticket in zip(prompts, tickets, strict=True):
        (found,), (expected,) = results(bench.told[ticket]), alone(model, prompt, how)
        assert found[:3] == expected[:3]


def test_pages_that_are_there_are_not_computed_again(model: tuple[Any, Any]) -> None:
    engine, tokenizer = model
    bench = Bench(engine.paged(PAGE, 40), tokenizer)
    prompt = [*range(40)]
    for expected in (40, 40 + 8, 40 + 8 + 40):
        salt = b"" if expected < 80 else b"another"
        bench.engine.submit(prompt, SamplingSettings(max_tokens=2), salt=salt)
        bench.finish()
        assert bench.engine.counters.prompt_tokens == expected
    assert (bench.engine.pages.queried, bench.engine.pages.hit) == (120, 32)


def test_the_random_numbers_are_those_of_example(model: tuple[Any, Any]) -> None:
    """The same seed gives the text that example.py writes."""
    from generation import Sampler, generate

    engine, tokenizer = model
    prompt = [10, 20, 30]
    samplers = [Sampler(5, 0, 0.8, 5)]
    expected = [token for step in generate(engine, [prompt], samplers, 30, set()) for _, token in step]
    bench = Bench(engine.paged(PAGE, 40), tokenizer)
    ticket = bench.engine.submit(
        prompt, SamplingSettings(seed=5, temperature=0.8, top_k=5, max_tokens=30, ignore_eos=True)
    )
    bench.finish()
    assert bench.told[ticket][0].ids == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature to be at least 0"),
        ({"top_p": 0.0}, "top_p to be above 0"),
        ({"min_tokens": 20}, "min_tokens to be at least 0 and at most 16"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias to have token ids"),
        ({"allowed_token_ids": ()}, "at least one id"),
        ({"max_tokens": 100}, "max_tokens is 100"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused(model: tuple[Any, Any], changes: dict[str, Any], message: str) -> None:
    engine, tokenizer = model
    bench = Bench(engine.paged(PAGE, 40), tokenizer)
    with pytest.raises(RequestError, match=message):
        bench.engine.submit([1, 2], replace(SamplingSettings(), **changes))
