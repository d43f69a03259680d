"""benchmarks/serve_bench.py: servers are asked the same, answers are counted right, and who fails costs a line."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import serve_bench
from load.clients import Answered, Load
from load.lexicon import ENDING, lexicon, text_of, write_tokenizer
from load.requests import Asked, material_of, requests_of
from load.servers import KINDS, OURS, Kind
from tokenizers import Tokenizer

from command_line import UsageError
from nvtripy_portable.cpu import native
from tokenizer import load_tokenizer


@pytest.mark.parametrize("vocabulary", [428, 1000, 50257])
def test_a_text_has_as_many_tokens_as_words(vocabulary: int, tmp_path: Path) -> None:
    """By the tokenizers package, and by ours."""
    write_tokenizer(tmp_path, vocabulary)
    theirs, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path, vocabulary)
    assert theirs.get_vocab_size() == vocabulary and theirs.token_to_id(ENDING) == vocabulary - 1
    words = lexicon(vocabulary).words
    some = [words[number * 37 % len(words)] for number in range(100)]
    ids = theirs.encode(text_of(some)).ids
    assert len(ids) == 100 and ours.encode(text_of(some)) == ids and ours.decode(ids) == text_of(some)


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 428 tokens but got 427"):
        lexicon(427)


def test_the_same_client_asks_the_same(tmp_path: Path) -> None:
    for material in (material_of("tiny", tmp_path), material_of("embedded", tmp_path)):
        first, again, other = (list(itertools.islice(requests_of(number, material), 20)) for number in (3, 3, 4))
        assert first == again and first != other
        half = material.context // 2
        assert all(16 <= each.length <= min(half, 512) and 16 <= each.new <= min(half, 256) for each in first)
        assert len({each.key for each in first + other}) == 40


def test_only_what_is_in_the_window_counts() -> None:
    asked = Asked((0, 0), "", 1, 4)
    before = Answered(asked, 0.0, [5.0, 9.0, 11.0, 12.0], "", 4, True)  # two of four pieces
    double = Answered(asked, 11.0, [12.0, 14.0], "", 4, True)  # pieces of two tokens
    late = Answered(asked, 19.0)
    after = Answered(asked, 21.0, [22.0], "", 1)
    load = Load(10.0, [before, double, late, after], 1.0, 10.0)
    assert load.tokens() == 2 + 4
    assert load.first_tokens() == [1.0, 1.0]  # the second waits
    assert load.between() == [1.0, 2.0]


def test_bad_arguments(tmp_path: Path) -> None:
    for arguments, message in [
        (["--clients", "0"], "--clients"),
        (["--seconds", "nan"], "--seconds"),
        (["--warm-up", "-1"], "--warm-up"),
        (["--plot", str(tmp_path / "x.png"), "--scenario", "prefix"], "--scenario closed"),
        (["--json", str(tmp_path / "no" / "x.json")], "--json"),
    ]:
        with pytest.raises(UsageError, match=message):
            serve_bench.parse_arguments(arguments)


@pytest.mark.slow
def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model, beside a server that does not come up."""

    def fails(*arguments: object) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no server today')"]

    monkeypatch.setitem(KINDS, "llama-cpp-python", Kind(fails, KINDS[OURS].checkpoint, ("fp16",)))
    arguments = ["--shapes", "tiny", "--widths", "fp16", "--runs", "1", "--seconds", "2", "--warm-up", "0.5"]
    arguments += ["--scenario", "closed", "open", "prefix", "single", "lookup", "--clients", "1", "3", "--rates", "4"]
    arguments += ["--servers", "llama-cpp-python", "--cache", str(tmp_path / "cache")]
    arguments += ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.svg")]
    assert serve_bench.carry_out(serve_bench.parse_arguments(arguments)) == 1
    output = capsys.readouterr().out
    assert "llama-cpp-python has ended: no server today" in output
    run = json.loads((tmp_path / "x.json").read_text())
    assert [row["load"] for row in run["rows"]] == ["1 client", "3 clients", "4 requests/s"]
    for row in run["rows"]:
        assert row["rate"][0] > 0 and row["whole"] > 0 and row["changed"] == 0 and row["memory"] > 1 << 20
    assert len(run["answers"]) == 3 and "the same text" in output
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_numpys_speed_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(UsageError, match="the native executor is not built"):
        serve_bench.carry_out(serve_bench.parse_arguments(["--shapes", "tiny"]))
