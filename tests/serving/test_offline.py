"""Many prompts on the scheduler that serves: the texts of the decode loop, in the prompts' order, however many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import CONTEXT, EOS, VOCABULARY, random_checkpoint

from command_line import UsageError
from engine import Engine, open_engine
from generation import LogitsError, Sampler, generate
from nvtripy_portable.decoder import Piece
from response import Response
from serving import offline
from serving.draft_model import DraftModel
from serving.jobs import JobFile, Prompts, Request
from serving.offline import OfflineEngine
from serving.opening import OpenedModel, open_draft, open_model
from serving.settings import SamplingSettings
from serving.speculation import PromptLookup, Speculation
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PAGE = 8
PROMPTS = [f"{'ab' * (number % 9)}{number}" for number in range(30)]
HOW = SamplingSettings(seed=7, temperature=0.9, top_k=5, max_tokens=12, stop=("4",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    checkpoint = open_checkpoint(random_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint"))
    return open_engine(checkpoint, "float32", batch=1), load_tokenizer(checkpoint.tokenizer_source, VOCABULARY)


@pytest.fixture(scope="module")
def expected(model: tuple[Engine, Any]) -> Callable[[Request, int], str]:
    """The text by the decode loop, one prompt alone."""
    engine, tokenizer = model

    def text(request: Request, sample: int) -> str:
        how = request.settings
        response, done = Response(tokenizer, how.stop, {EOS}), set[int]()
        sampler = Sampler(how.seed, sample, how.temperature, how.top_k, how.top_p)
        found = ""
        for drawn in generate(engine, [request.ids], [sampler], how.max_tokens, done):
            found += response.push(drawn[0][1])
            if response.is_done:
                done.add(0)
        return found + response.finish()

    return text


def offline_engine(
    model: tuple[Engine, Any], pages: int = 200, speculation: Speculation | None = None, together: int = 64
) -> OfflineEngine:
    engine, tokenizer = model
    opened = OpenedModel(engine.paged(PAGE, pages), True)  # type: ignore[arg-type]
    return OfflineEngine(opened, tokenizer, [EOS], together, speculation)


def requests_of(model: tuple[Engine, Any], prompts: Sequence[str], choices: int = 1) -> list[Request]:
    return list(Prompts(prompts, HOW, choices, None).requests(model[1], CONTEXT, VOCABULARY))


def draft(folder: Path, seed: int) -> Speculation:
    opened = open_model(
        open_checkpoint(random_checkpoint(folder, seed)), "float32", 4, None, None, lambda message: None
    )
    return Speculation(DraftModel(opened.decoder))


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize(("pages", "together"), [(200, 64), (10, 64), (200, 2), (8, 1)])
def test_the_texts_of_the_decode_loop_in_order(
    model: tuple[Engine, Any], expected: Callable[[Request, int], str], pages: int, together: int, choices: int
) -> None:
    """With room for all of them, with so few pages that answers are put aside, a few together, one by one."""
    requests = requests_of(model, PROMPTS, choices)
    answers = offline_engine(model, pages, together=together).answers(requests)
    found = [(answer.request.index, answer.sample, "".join(answer.pieces())) for answer in answers]
    assert found == [
        (request.index, sample, expected(request, sample)) for request in requests for sample in range(choices)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("guesses", ["lookup", "same model", "another model"])
def test_guesses_change_nothing(
    model: tuple[Engine, Any],
    expected: Callable[[Request, int], str],
    tmp_path: Path,
    guesses: str,
    temperature: float,
) -> None:
    speculation = Speculation(PromptLookup()) if guesses == "lookup" else draft(tmp_path / "d", int(guesses[0] == "a"))
    requests = [
        replace(each, settings=replace(each.settings, temperature=temperature, max_tokens=40, stop=()))
        for each in requests_of(model, PROMPTS[:6])
    ]
    engine = offline_engine(model, speculation=speculation, together=4)
    assert ["".join(each.pieces()) for each in engine.answers(requests)] == [expected(each, 0) for each in requests]
    drafted, accepted = engine.counters.drafted_tokens, engine.counters.accepted_tokens
    assert drafted > 0 and (accepted == drafted if guesses == "same model" else accepted < drafted)


def test_a_static_batch_gives_the_same(
    model: tuple[Engine, Any], expected: Callable[[Request, int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where NVIDIA's runtime runs the model, whose batch is fixed: rows are refilled."""
    monkeypatch.setattr(Engine, "paged", lambda *arguments: None)
    checkpoint = open_checkpoint(random_checkpoint(tmp_path / "checkpoint"))  # of the same seed
    opened = open_model(checkpoint, "float32", 3, None, None, lambda message: None)
    requests = requests_of(model, PROMPTS[:8])
    answers = OfflineEngine(opened, model[1], [EOS], 3).answers(requests)
    assert ["".join(each.pieces()) for each in answers] == [expected(each, 0) for each in requests]


def test_requests_are_asked_for_as_they_are_needed(model: tuple[Engine, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without end, with a first answer that takes longest: the others wait for it, but not all of them."""
    monkeypatch.setattr(offline, "MAX_AHEAD", 20)
    made = 0

    def endless() -> Iterator[Request]:
        nonlocal made
        while True:
            [request] = requests_of(model, ["x"])
            yield replace(request, settings=replace(HOW, stop=(), max_tokens=2 if made else 60), index=made)
            made += 1

    answers = offline_engine(model, together=4).answers(endless())
    for number in range(50):
        answer = next(answers)
        "".join(answer.pieces())
        assert answer.request.index == number and number < made <= number + 22


def test_an_answer_comes_in_pieces(model: tuple[Engine, Any]) -> None:
    """The first while others are still computed, each as soon as it is certain."""
    engine = offline_engine(model)
    first = next(engine.answers(requests_of(model, PROMPTS)))
    pieces = first.pieces()
    next(pieces)
    assert first.finish_reason is None and engine.first_token > 0
    assert "".join(pieces) and first.finish_reason in ("stop", "length")


class Failing:
    """A decoder of which one prompt's logits are no numbers, or which fails altogether."""

    def __init__(self, decoder: Any, error: Exception | None = None) -> None:
        self._decoder, self._error = decoder, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, pieces: Sequence[Piece]) -> np.ndarray:
        if self._error is not None:
            raise self._error
        logits: np.ndarray = self._decoder.step(pieces)
        row = 0
        for piece in pieces:
            if list(piece.tokens)[:1] == [ord("!")]:
                logits[row] = np.nan
            row += len(piece.wanted())
        return logits


def test_an_answer_that_has_no_numbers_ends_alone(
    model: tuple[Engine, Any], expected: Callable[[Request, int], str]
) -> None:
    opened = OpenedModel(Failing(model[0].paged(PAGE, 200)), True)
    requests = requests_of(model, ["good", "!bad", "fine"])
    good, bad, fine = OfflineEngine(opened, model[1], [EOS]).answers(requests)
    with pytest.raises(LogitsError, match="not finite"):
        "".join(bad.pieces())
    assert bad.finish_reason == "error"
    assert ["".join(each.pieces()) for each in (good, fine)] == [expected(requests[each], 0) for each in (0, 2)]


def test_a_guess_that_has_no_numbers_is_none(
    model: tuple[Engine, Any], expected: Callable[[Request, int], str]
) -> None:
    """It is the smaller model's trouble, and nobody else's."""
    speculation = Speculation(DraftModel(Failing(model[0].paged(PAGE, 32))))
    requests = requests_of(model, ["!bad", "fine"])
    answers = offline_engine(model, speculation=speculation).answers(requests)
    assert ["".join(each.pieces()) for each in answers] == [expected(each, 0) for each in requests]


def test_any_other_error_is_the_callers(model: tuple[Engine, Any]) -> None:
    """Memory that is lacking has a line of its own, and a fault its traceback."""
    opened = OpenedModel(Failing(model[0].paged(PAGE, 200), MemoryError()), True)
    [answer] = OfflineEngine(opened, model[1], [EOS]).answers(requests_of(model, ["x"]))
    with pytest.raises(MemoryError):
        "".join(answer.pieces())


# --- files of requests -----------------------------------------------------------------------------------------------


def job_file(folder: Path, content: bytes) -> JobFile:
    path = folder / "jobs"
    path.write_bytes(content)
    return JobFile(path, HOW, 2)


def test_what_a_line_says(model: tuple[Engine, Any], tmp_path: Path) -> None:
    """With Windows's line ends and its byte-order mark; what it does not say is the usual."""
    jobs = job_file(
        tmp_path,
        b'\xef\xbb\xbf{"prompt": "a"}\r\n'
        b'{"prompt": "\\u00e9", "custom_id": "x", "n": 1, "max_tokens": 1000, "temperature": 0, "top_k": 0, '
        b'"top_p": 0.5, "min_p": 0.1, "seed": 18446744073709551615, "stop": "b", "presence_penalty": null}\n'
        b'{"prompt": "c", "custom_id": 7, "stop": ["d", "e"], "frequency_penalty": 1, "repetition_penalty": 1.1}',
    )
    jobs.check(model[1], CONTEXT, VOCABULARY)
    assert (jobs.count, jobs.answers) == (3, 5)
    usual, own, last = jobs.requests(model[1], CONTEXT, VOCABULARY)
    assert usual == Request("a", [ord("a")], HOW, 2, 0)
    changed = replace(HOW, max_tokens=CONTEXT - 1, temperature=0, top_k=None, top_p=0.5, min_p=0.1, seed=2**64 - 1)
    assert own == Request("é", [*"é".encode()], replace(changed, stop=("b",)), 1, 1, "x")
    assert last.settings == replace(HOW, stop=("d", "e"), frequency_penalty=1, repetition_penalty=1.1)
    assert [last] == list(jobs.requests(model[1], CONTEXT, VOCABULARY, start=2))


BAD_LINES: dict[bytes, str] = {
    b"": "expected a JSON object on line 2 of .*jobs but it is not valid JSON",
    b"prompt": "line 2 of .* but it is not valid JSON: Expecting value",
    b'{"prompt": "a"': "line 2 of .* but it is not valid JSON",
    b"[" * 100_000: "line 2 of .* but it is not valid JSON",
    b'{"seed": ' + b"1" * 5000 + b"}": "line 2 of .* but it is not valid JSON",
    b'"a"': 'expected a JSON object on line 2 of .* but got "a"',
    b'{"temperature": 1}': "expected a prompt on line 2 of .* but it has none",
    b'{"prompt": null}': "expected a prompt on line 2 of .* but it has none",
    b'{"prompt": ""}': "expected a prompt but got an empty one on line 2",
    b'{"prompt": 3}': "expected prompt to be a text on line 2 of .* but got 3",
    b'{"prompt": "\\ud800"}': "expected prompt to be Unicode text on line 2",
    b'{"prompt": "\xff"}': "expected UTF-8 text in line 2 of .*jobs but byte 12 is not",
    b'{"prompt": "' + b"x" * (CONTEXT + 1) + b'"}': "at most 64 tokens, the model's context, but got 65 on line 2 of",
    b'{"prompt": "a", "max_new_tokens": 3}': 'unknown field "max_new_tokens" on line 2 of .*: expected prompt, custom',
    b'{"prompt": "a", "n": 0}': "expected n to be 1 to 1024 on line 2 of .* but got 0",
    b'{"prompt": "a", "n": true}': "expected n to be an integer on line 2 of .* but got true",
    b'{"prompt": "a", "custom_id": []}': "expected custom_id to be a text or an integer",
    b'{"prompt": "a", "temperature": -1}': "expected temperature to be at least 0 .* but got -1 on line 2 of",
    b'{"prompt": "a", "temperature": NaN}': "not valid JSON: NaN is no number",
    b'{"prompt": "a", "temperature": 1e999}': "expected temperature to be at least 0 .* but got inf",
    b'{"prompt": "a", "top_p": 0}': "expected top_p to be above 0 and at most 1 but got 0 on line 2",
    b'{"prompt": "a", "seed": -1}': "expected seed to be at least 0",
    b'{"prompt": "a", "stop": [1]}': "expected stop to be a text or a list of texts on line 2 of .* but got \\[1\\]",
    b'{"prompt": "a", "stop": ""}': "expected stop to be texts but got an empty one on line 2",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40].decode("latin-1"))
def test_a_line_that_is_no_request(model: tuple[Engine, Any], tmp_path: Path, line: bytes) -> None:
    jobs = job_file(tmp_path, b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=BAD_LINES[line]) as error:
        jobs.check(model[1], CONTEXT, VOCABULARY)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_lines_are_read_one_by_one(model: tuple[Engine, Any], tmp_path: Path) -> None:
    jobs = job_file(tmp_path, b'{"prompt": "a"}\n' + b"no JSON\n")
    assert next(jobs.requests(model[1], CONTEXT, VOCABULARY)).prompt == "a"


# --- models that guess for others ------------------------------------------------------------------------------------


def test_a_model_with_another_vocabulary_guesses_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(random_checkpoint(tmp_path / "target"))
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, VOCABULARY)
    same, other = random_checkpoint(tmp_path / "same", 1), random_checkpoint(tmp_path / "other", 1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"a": 97', '"a": 98!').replace('"b": 98', '"b": 97').replace("98!", "98")
    )
    assert open_draft("prompt-lookup", checkpoint, tokenizer) is None
    assert open_draft(str(same), checkpoint, tokenizer) is not None
    with pytest.raises(UsageError, match=r"token 97 is b'a', but in .*other it is b'b'"):
        open_draft(str(other), checkpoint, tokenizer)
