"""Beam search: what transformers finds, whatever is computed beside it, and however few pages there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import random_model
from serving_bench import Bench, results
from tiny_checkpoints import random_checkpoint

from command_line import EMBEDDED_CHECKPOINT
from engine import open_engine
from generation import LogitsError
from serving.beams import BeamSearch
from serving.settings import BeamSettings, RequestError, SamplingSettings
from serving.speculation import PromptLookup, Speculation
from tokenizer import Tokenizer, load_tokenizer
from weight_loader import open_checkpoint

PAGE = 4
FAMILIES: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": {}, "starcoder2": {"sliding_window": 7}}

PROMPTS = st.lists(st.integers(2, 96), min_size=1, max_size=14)
MOST_BEAMS = 8
BEAMS = st.builds(
    BeamSettings,
    beams=st.integers(1, MOST_BEAMS),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other 50 times as long as these models take, where others use the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    checkpoint = open_checkpoint(random_checkpoint(tmp_path_factory.mktemp("tokenizer") / "checkpoint"))
    return load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """transformers' model, and the engine of the same weights."""
    folder = tmp_path_factory.mktemp("model")
    model = random_model(request.param, **FAMILIES[request.param])
    model.save_pretrained(folder)
    return model, open_engine(open_checkpoint(folder), "float32", batch=1)


def searching(beams: BeamSettings, **more: Any) -> SamplingSettings:
    return SamplingSettings(**{"temperature": 0.0, "beams": beams, "ignore_eos": True, **more})


def search(engine: Any, tokenizer: Tokenizer, prompt: list[int], how: SamplingSettings, choices: int) -> list[Any]:
    """The answers, (ids, score), alone on an engine with room for all."""
    bench = Bench(engine.paged(PAGE, 80), tokenizer, frozenset())
    ticket = bench.engine.submit(prompt, how, choices)
    bench.finish()
    assert bench.engine.pages.used == 0
    return [(bench.told[ticket][choice].ids, bench.told[ticket][choice].search_score) for choice in range(choices)]


@given(
    prompt=PROMPTS,
    beams=BEAMS,
    most=st.integers(1, 16),
    ends=st.lists(st.integers(0, 40), max_size=3),
    choices=st.integers(1, MOST_BEAMS),
)
@settings(max_examples=60, deadline=None)
def test_it_finds_what_transformers_finds(
    models: tuple[Any, Any],
    tokenizer: Tokenizer,
    prompt: list[int],
    beams: BeamSettings,
    most: int,
    ends: list[int],
    choices: int,
) -> None:
    """The endings are tokens of the answer without them, so that they do occur."""
    model, engine = models
    choices = min(choices, beams.beams)
    plain = [id for ids, _ in search(engine, tokenizer, prompt, searching(beams, max_tokens=most), 1) for id in ids]
    endings = sorted({plain[index % len(plain)] for index in ends})
    how = searching(beams, max_tokens=most, stop_token_ids=tuple(endings))
    found = search(engine, tokenizer, prompt, how, choices)
    expected = transformers_search(model, prompt, beams, most, endings, choices)
    assert len(found) == len(expected)
    for (ids, score), (their_ids, their_score) in zip(found, expected, strict=True):
        if beams.beams > 1:
            assert score == pytest.approx(their_score, rel=1e-5, abs=1e-4)  # sums of float32
        # Where two are worth the same, float32 and float64 may put them the other way round.
        assert ids == their_ids or any(other == ids and abs(their - score) < 1e-4 for other, their in expected)


def transformers_search(
    model: Any, prompt: list[int], beams: BeamSettings, most: int, endings: list[int], choices: int
) -> list[tuple[list[int], float]]:
    how: dict[str, Any] = {"eos_token_id": endings or None, "pad_token_id": 0}
    if beams.beams > 1:
        how |= {"length_penalty": beams.length_penalty, "early_stopping": beams.early_stopping}
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=beams.beams,
        max_new_tokens=most,
        num_return_sequences=choices,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )
    scores = [0.0] if beams.beams == 1 else output.sequences_scores.tolist()
    return [
        (without_padding(ids[len(prompt) :], endings), score)
        for ids, score in zip(output.sequences.tolist(), scores, strict=True)
    ]


def without_padding(ids: list[int], endings: list[int]) -> list[int]:
    end = next((place for place, id in enumerate(ids) if id in endings), len(ids))
    return ids[: end + 1]


@given(
    searches=st.lists(st.tuples(PROMPTS, BEAMS, st.integers(1, 16), st.integers(0, 5)), min_size=1, max_size=4),
    others=st.lists(st.tuples(PROMPTS, st.integers(1, 16)), max_size=4),
    pages=st.sampled_from([24, 30, 200]),
    most=st.sampled_from([6, 512]),
    guesses=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_search_finds_what_it_finds_alone(
    models: tuple[Any, Any], tokenizer: Tokenizer, searches: Any, others: Any, pages: int, most: int, guesses: bool
) -> None:
    """To the last bit, beside others, in pools so small that whole searches are put aside."""
    _, engine = models
    busy = Bench(
        engine.paged(PAGE, pages),
        tokenizer,
        frozenset({5, 6}),
        max_sequences=MOST_BEAMS,
        max_tokens=most,
        speculation=Speculation(PromptLookup(), most=4) if guesses else None,
    )
    asked = []
    for prompt, beams, tokens, wait in searches:
        how = searching(beams, max_tokens=tokens, ignore_eos=False, logprobs=1, prompt_logprobs=0)
        try:
            asked.append((busy.engine.submit(prompt, how, beams.beams), prompt, how, beams.beams))
        except RequestError as error:
            assert "pages" in str(error)
        for _ in range(wait):
            busy.turn()
    for prompt, tokens in others:
        how = SamplingSettings(seed=1, max_tokens=tokens)
        asked.append((busy.engine.submit(prompt, how), prompt, how, 1))
    busy.finish()
    assert busy.engine.pages.used == 0 and not busy.engine._ticket_of
    for ticket, prompt, how, choices in asked:
        alone = Bench(engine.paged(PAGE, 80), tokenizer, frozenset({5, 6}), sharing=False)
        expected = alone.engine.submit(prompt, how, choices)
        alone.finish()
        assert results(busy.told[ticket]) == results(alone.told[expected])


@pytest.mark.parametrize("rest", [[9, 8, 7, 6], [9, 8, 7]], ids=["a page and more", "a page"])
def test_searches_are_put_aside_as_a_whole(models: tuple[Any, Any], tokenizer: Tokenizer, rest: list[int]) -> None:
    """One or two of them fill the pages: the one that came first is never put aside."""
    _, engine = models
    bench = Bench(engine.paged(PAGE, 36), tokenizer, frozenset())
    how = searching(BeamSettings(4), max_tokens=30, logprobs=0)
    tickets = [bench.engine.submit([number, *rest], how, 4) for number in range(2, 8)]
    groups = [ticket.sequences[0].group for ticket in tickets]
    while bench.engine.has_work:
        bench.turn()
        for group in groups:
            running = [beam in bench.engine.scheduler.running for beam in group.beams]
            assert all(running) or not any(running)
        assert bench.told[tickets[0]] or all(beam.pages for beam in groups[0].beams)
    assert bench.engine.scheduler.preemptions > 0 and bench.engine.pages.used == 0
    for ticket, number in zip(tickets, range(2, 8), strict=True):
        alone = Bench(engine.paged(PAGE, 80), tokenizer, frozenset())
        expected = alone.engine.submit([number, *rest], how, 4)
        alone.finish()
        assert alone.engine.scheduler.preemptions == 0
        assert results(bench.told[ticket]) == results(alone.told[expected])


@given(turns=st.sets(st.integers(0, 60), max_size=8), most=st.sampled_from([4, 7, 512]))
@settings(max_examples=25, deadline=None)
def test_it_may_be_put_aside_at_any_moment(
    models: tuple[Any, Any], tokenizer: Tokenizer, turns: set[int], most: int
) -> None:
    """Even while it is computed again, when some beams have their logits and others have not."""
    _, engine = models
    prompt, how = [2, 9, 8, 7, 6], searching(BeamSettings(4), max_tokens=12, logprobs=0)
    bench = Bench(engine.paged(PAGE, 40), tokenizer, frozenset(), max_sequences=4, max_tokens=most)
    ticket = bench.engine.submit(prompt, how, 4)
    turn = 0
    while bench.engine.has_work:
        beam = ticket.sequences[0].group.beams[0]  # type: ignore[union-attr]
        if turn in turns and beam in bench.engine.scheduler.running:
            bench.engine.scheduler._preempt(beam)
        bench.turn()
        turn += 1
    alone = Bench(engine.paged(PAGE, 40), tokenizer, frozenset())
    expected = alone.engine.submit(prompt, how, 4)
    alone.finish()
    assert bench.engine.pages.used == 0 and results(bench.told[ticket]) == results(alone.told[expected])


def test_beams_share_the_pages_of_what_they_have_in_common(models: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    _, engine = models
    bench = Bench(engine.paged(PAGE, 80), tokenizer, frozenset())
    bench.engine.submit([*range(2, 35)], searching(BeamSettings(5), max_tokens=2), 5)
    most = 0
    while bench.engine.has_work:
        bench.turn()
        most = max(most, bench.engine.pages.used)
    prompt = 33 // PAGE if engine.paged(PAGE, 1).window is None else 3
    assert most <= 33 // PAGE + 5 and most >= prompt + 5 - 3


def test_a_cancelled_search_leaves_nothing(models: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    _, engine = models
    for turns in range(4):
        bench = Bench(engine.paged(PAGE, 80), tokenizer, frozenset())
        ticket = bench.engine.submit([2, 3, 4], searching(BeamSettings(3), max_tokens=9), 2)
        for _ in range(turns):
            bench.turn()
        bench.engine.cancel(ticket, 0)
        bench.turn()
        assert bench.told[ticket][0].finish_reason == "cancelled" and bench.engine.has_work
        bench.engine.cancel(ticket)
        bench.turn()
        assert bench.told[ticket][1].finish_reason == "cancelled" and not bench.engine.has_work
        assert bench.engine.pages.used == 0 and not bench.engine._ticket_of


def test_the_scores_are_those_of_the_tokens(models: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    _, engine = models
    bench = Bench(engine.paged(PAGE, 80), tokenizer, frozenset())
    ticket = bench.engine.submit([2, 3], searching(BeamSettings(3, length_penalty=0.5), max_tokens=9, logprobs=2), 3)
    bench.finish()
    worth = [bench.told[ticket][choice].search_score for choice in range(3)]
    assert worth == sorted(worth, reverse=True)
    for choice, told in bench.told[ticket].items():
        assert [each.id for each in told.scores] == told.ids and all(len(each.top) == 2 for each in told.scores)
        total = sum(each.logprob for each in told.scores)
        assert bench.told[ticket][choice].search_score == pytest.approx(total / 9**0.5)


def test_the_embedded_checkpoint(tmp_path: Path) -> None:
    """Four beams find what is likelier than the greedy text, and what transformers finds."""
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(EMBEDDED_CHECKPOINT)
    engine = open_engine(checkpoint, "float32", batch=1)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_CHECKPOINT).float().eval()
    prompt, beams = tokenizer.encode("To be, or not to be"), BeamSettings(4)
    found = search(engine, tokenizer, prompt, searching(beams, max_tokens=24), 4)
    expected = transformers_search(model, prompt, beams, 24, [], 4)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_equals_keep_their_order() -> None:
    """The earlier beam first, then the lower id; what ended earlier before what is worth the same."""
    search = BeamSearch(BeamSettings(2), frozenset({3}), max_tokens=3)
    row = np.zeros(8, np.float32)
    assert search.advance([row]) == [0, 0] and [each.ids for each in search.live] == [[0], [1]]
    assert search.advance([row, row]) == [0, 0] and [each.ids for each in search.live] == [[0, 0], [0, 1]]
    search.advance([row, row])
    assert [each.hypothesis.ids for each in search.found] == [[0, 0, 0], [0, 0, 1]] and search.is_over


def test_an_ending_counts_among_the_likeliest_only() -> None:
    row = np.array([3, 2, 1, 0, -1, -2], np.float32)
    search = BeamSearch(BeamSettings(2), frozenset({2}), max_tokens=5)
    search.advance([row])  # the third
    assert not search.found and [each.ids for each in search.live] == [[0], [1]]
    search = BeamSearch(BeamSettings(2), frozenset({1}), max_tokens=5)
    search.advance([row])  # the second
    assert [each.hypothesis.ids for each in search.found] == [[1]]
    assert [each.ids for each in search.live] == [[0], [2]]


def test_logits_that_are_no_numbers_end_it() -> None:
    row = np.array([1, np.nan, 0, 0], np.float32)
    with pytest.raises(LogitsError, match="not finite"):
        BeamSearch(BeamSettings(2), frozenset(), max_tokens=5).advance([row])


@pytest.mark.parametrize(
    ("beams", "changes", "message"),
    [
        (BeamSettings(0), {}, "num_beams to be at least 1 and at most 64 but got 0"),
        (BeamSettings(65), {}, "num_beams to be at least 1 and at most 64 but got 65"),
        (BeamSettings(2, length_penalty=float("nan")), {}, "length_penalty to be at least -10"),
        (BeamSettings(2, early_stopping="maybe"), {}, "true, false or 'never' but got 'maybe'"),  # type: ignore[arg-type]
        (BeamSettings(2), {"temperature": 0.7}, "temperature has no meaning with beams"),
        (BeamSettings(2), {"top_k": 3}, "top_k has no meaning with beams"),
        (BeamSettings(2), {"stop": ("x",)}, "stop has no meaning with beams"),
        (BeamSettings(2), {"logit_bias": {3: 1.0}}, "logit_bias has no meaning with beams"),
        (BeamSettings(2), {}, "at most 2 answers, one of each beam, but got 3"),
        (BeamSettings(7), {}, "at most 6 beams, as many as are computed together, but got 7"),
        (BeamSettings(6), {"max_tokens": 40}, "6 beams of 2 and 40 tokens may need 66 pages of 4 tokens, but"),
        (BeamSettings(6), {"stop_token_ids": tuple(range(20))}, "at most 4 beams, for 97 tokens and 20 endings"),
    ],
)
def test_what_cannot_be_done_is_refused(
    models: tuple[Any, Any], tokenizer: Tokenizer, beams: BeamSettings, changes: dict[str, Any], message: str
) -> None:
    _, engine = models
    bench = Bench(engine.paged(PAGE, 40), tokenizer, frozenset(), max_sequences=6)
    with pytest.raises(RequestError, match=message):
        bench.engine.submit([2, 3], searching(beams, **changes), 3)
