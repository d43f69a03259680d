"""Several models answer a prompt in turns: each says what it says alone, and its clock is its own."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import CONTEXT, EOS, random_checkpoint, reciting_checkpoint, script_of

from command_line import UsageError
from engine import open_engine
from generation import Sampler, generate
from response import Response
from tokenizer import load_tokenizer
from web import side_by_side
from web.side_by_side import Answer, Comparison, Model, Sampling, State, answers, sampling_of
from weight_loader import open_checkpoint

SCRIPT = "Whether 'tis nobler — said he — in the mind to suffer"


def model_of(folder: Path) -> Model:
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder, checkpoint.config.vocab_size)
    return Model(folder.name, open_engine(checkpoint, "float32", 1), tokenizer, checkpoint.config.eos_token_ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """One that recites, and two whose answers depend on the seed."""
    folder = tmp_path_factory.mktemp("models")
    reciting = reciting_checkpoint(folder / "reciting", script_of(SCRIPT))
    return [model_of(reciting), *(model_of(random_checkpoint(folder / f"random{n}", n)) for n in range(2))]


def alone(model: Model, prompt: str, sampling: Sampling) -> str:
    """What the model says alone, by the decode loop that example.py uses."""
    response, text, done = Response(model.tokenizer, (), model.eos_ids), "", set[int]()
    ids = model.tokenizer.encode(prompt)
    for drawn in generate(model.engine, [ids], [sampling.sampler()], sampling.max_new_tokens, done):
        text += response.push(drawn[0][1])
        if response.is_done:
            done.add(0)
    return text + response.finish()


@pytest.mark.parametrize("turn", [0.0, 0.05, 1e9])
@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(7, 1.5, 0, 20), Sampling(2**64 - 1, 0.0), Sampling(3, max_new_tokens=1)]
)
def test_each_says_what_it_says_alone(
    models: list[Model], sampling: Sampling, turn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "TURN_SECONDS", turn)
    prompt = SCRIPT[:5]
    *growing, last = answers(models, prompt, sampling, Event())
    assert [answer.text for answer in last] == [alone(model, prompt, sampling) for model in models]
    assert all(answer.is_done and not answer.is_stopped for answer in last)
    for before, after in zip(growing, [*growing[1:], last], strict=True):
        assert all(
            new.text.startswith(old.text) and new.tokens >= old.tokens for old, new in zip(before, after, strict=True)
        )
    if sampling.max_new_tokens == 200:
        assert last[0].text == SCRIPT[5:] and last[0].tokens == len(SCRIPT.encode()) - 5 + 1, "it ends by itself"
        assert last[1].tokens == CONTEXT - 5 + 1, "what fits the context"


class Clocked:
    """A model whose steps take a time of their own on a clock that only they move."""

    batch, context = 1, 32

    def __init__(self, clock: list[float], seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def start(self) -> None:
        pass

    def step(self, idx: np.ndarray, position: np.ndarray, last: np.ndarray) -> np.ndarray:
        self._clock[0] += self._seconds * idx.size
        return np.eye(257, dtype=np.float32)[[65]]


def test_a_clock_runs_in_its_models_own_turns(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    tokenizer = models[0].tokenizer
    fast, slow = (Model(f"{seconds}", Clocked(clock, seconds), tokenizer, (EOS,)) for seconds in (2**-8, 0.25))
    found = list(answers([slow, fast], "four", Sampling(0, max_new_tokens=11), Event()))
    first, second = found[-1]
    assert (first.first_token_seconds, second.first_token_seconds) == (1.0, 2**-6), "four tokens of prompt"
    assert (first.decode_seconds, second.decode_seconds) == (2.5, 10 * 2**-8)
    assert (first.tokens_per_second, second.tokens_per_second) == (4.0, 256.0)
    turns = [second.tokens for _, second in found[1::2]]
    assert turns[0] == 10, "until its clock has run for the time of a turn"
    assert [first.tokens for first, _ in found[:4:2]] == [1, 2], "a token at least"
    assert Answer(tokens=1, first_token_seconds=1.0).tokens_per_second is None


class Failing(Clocked):
    """A model whose numbers are not finite from its third token on."""

    def step(self, idx: np.ndarray, position: np.ndarray, last: np.ndarray) -> np.ndarray:
        return super().step(idx, position, last) * np.float32(np.nan if position[0] >= 5 else 1)


def test_a_model_without_numbers_is_done_and_the_others_go_on(models: list[Model]) -> None:
    tokenizer = models[0].tokenizer
    failing = Model("failing", Failing([0.0], 0.0), tokenizer, ())
    *_, (first, second) = answers([failing, models[0]], SCRIPT[:4], Sampling(0, max_new_tokens=20), Event())
    assert first.is_done and first.tokens == 2 and first.text == "AA"
    assert first.error is not None and "not finite" in first.error
    assert second.error is None and second.text == SCRIPT[4:][: len(second.text)] and second.tokens == 20
    states = list(Comparison([failing, models[0]]).start("page", SCRIPT[:4], 1, 0.0, 5, 20))
    assert not any(state.is_error for state in states) and states[-1].answers is not None
    assert states[-1].answers[0].error == first.error


def test_stopped_answers_stay_as_they_are(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TURN_SECONDS", 0.0)
    stop = Event()
    growing = answers(models, "To", Sampling(1), stop)
    seen = [next(growing) for _ in range(7)][-1]
    stop.set()
    *_, last = growing
    assert [answer.tokens for answer in last] == [answer.tokens for answer in seen] == [3, 2, 2]
    assert all(answer.is_done and answer.is_stopped for answer in last)
    *_, again = answers(models, "To", Sampling(1, max_new_tokens=3), Event())
    assert [answer.tokens for answer in again] == [3, 3, 3], "the engines can be used again"


def test_prompts_that_cannot_be_used(models: list[Model]) -> None:
    def refused(prompt: str, some: list[Model]) -> str:
        with pytest.raises(UsageError) as caught:
            next(answers(some, prompt, Sampling(1), Event()))
        return str(caught.value)

    assert "expected a prompt but got an empty one" in refused("", models)
    assert refused("x" * 65, models[:1]) == "expected a prompt of at most 64 tokens, the model's context, but got 65"
    assert refused("x" * 65, models).startswith("reciting: expected a prompt of at most 64 tokens")

    class Alphabet:
        def encode(self, text: str) -> list[int]:
            raise ValueError("the character '€' is not among the 65")

    few: Any = Model("few", models[0].engine, Alphabet(), None)  # type: ignore[arg-type]
    assert refused("€", [models[0], few]) == "few: the character '€' is not among the 65"


@pytest.mark.parametrize(
    ("controls", "expected"),
    [
        ((None, 0.8, 5, None), "expected the number of new tokens to be a number but got nothing"),
        ((1, None, 5, 9), "expected the temperature to be a number but got nothing"),
        ((1, "hot", 5, 9), "expected the temperature to be a number but got 'hot'"),
        ((1.5, 0.8, 5, 9), "expected the seed to be a whole number but got 1.5"),
        ((-1, 0.8, 5, 9), "expected a seed from 0 to 18446744073709551615 but got -1"),
        ((float("inf"), 0.8, 5, 9), "expected the seed to be a whole number but got inf"),
        ((1, float("nan"), 5, 9), "expected a finite temperature of at least 0 but got nan"),
        ((1, 0.8, -1, 9), "expected top-k to be at least 0 but got -1"),
        ((1, 0.8, 5, 0), "expected the number of new tokens to be at least 1 but got 0"),
        ((1, 0.8, True, 9), "expected the top-k to be a number but got True"),
    ],
)
def test_controls_that_cannot_be_used(controls: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(UsageError, match=expected.replace("(", r"\(")):
        sampling_of(*controls)


def test_controls_as_a_browser_sends_them() -> None:
    assert sampling_of(1.0, 1, 0.0, 9.0) == Sampling(1, 1.0, 0, 9)
    seeds = {sampling_of(None, 0.8, 5, 9).seed for _ in range(9)}
    assert len(seeds) > 1 and all(0 <= seed < 1 << 32 for seed in seeds)
    assert sampling_of(3, 0.0, 0, 1).sampler() is not None and isinstance(Sampling(1).sampler(), Sampler)


CONTROLS = (1, 0.8, 5, 40)


@pytest.fixture
def every_token_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are of one token, and the page gets a state after each."""
    monkeypatch.setattr(side_by_side, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(side_by_side, "TURN_SECONDS", 0.0)


@pytest.mark.usefixtures("every_token_shows")
def test_states_of_a_page(models: list[Model]) -> None:
    *running, last = Comparison(models).start("page", "To be", *CONTROLS)
    assert running and all(state.is_running and not state.is_error for state in running)
    assert not last.is_running and last.line == "Seed 1"
    assert last.answers is not None
    assert [answer.text for answer in last.answers] == [
        alone(model, "To be", Sampling(1, max_new_tokens=40)) for model in models
    ]


def test_states_come_at_intervals(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "REFRESH_SECONDS", 1e9)
    (only,) = Comparison(models).start("page", "To be", *CONTROLS)
    assert not only.is_running


@pytest.mark.parametrize("prompt", ["", None, "x" * 100, "x" * 100_001])
def test_what_is_wrong_is_a_line(models: list[Model], prompt: str | None) -> None:
    (only,) = Comparison(models).start("page", prompt, *CONTROLS)
    assert only.is_error and only.answers is None and not only.is_running and "expected a prompt" in only.line


def test_a_failing_model_is_a_line(models: list[Model], capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Clocked):
        def step(self, *arguments: Any) -> np.ndarray:
            raise RuntimeError("out of order")

    broken = Model("broken", Broken([0.0], 1.0), models[0].tokenizer, None)
    (only,) = Comparison([broken]).start("page", "To be", *CONTROLS)
    assert only == State("the models failed: RuntimeError: out of order", is_error=True)
    assert "Traceback" in capsys.readouterr().err, "for whoever runs the program"


@pytest.mark.usefixtures("every_token_shows")
def test_only_a_page_itself_stops_its_answers(models: list[Model]) -> None:
    comparison = Comparison(models)
    states = comparison.start("one", "To be", *CONTROLS)
    next(states)
    comparison.stop("another")
    assert next(states).is_running and next(states).is_running
    comparison.stop("one")
    *_, last = states
    assert last.answers is not None and all(answer.is_stopped for answer in last.answers)


@pytest.mark.usefixtures("every_token_shows")
def test_a_page_that_has_gone_does_not_disturb_the_next(models: list[Model]) -> None:
    comparison = Comparison(models)
    gone = comparison.start("gone", "Other words", *CONTROLS)
    next(gone)
    *_, last = comparison.start("next", "To be", *CONTROLS)
    assert last.answers is not None
    assert last.answers[1].text == alone(models[1], "To be", Sampling(1, max_new_tokens=40))
    *_, last = gone
    assert last.answers is not None and all(answer.is_stopped for answer in last.answers)
