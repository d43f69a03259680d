"""example.py --num-beams: texts that are searched for, alone, in batches and in files of requests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import EOS, random_checkpoint, reciting_checkpoint

import example

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model with a choice: "ab" or "ac", each followed by what is likely, then by the end."""
    folder = tmp_path_factory.mktemp("model")
    script = [b"p", b"ab", b"cd", b"ef", [EOS]]
    checkpoint = reciting_checkpoint(folder / "checkpoint", script)
    return [f"--model-type={checkpoint}", f"--engine-dir={folder / 'engines'}", "--dtype=float32"]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], common: list[str]) -> Ask:
    """Runs main() in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["example.py", *common, *map(str, arguments)])
        code = example.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_best_ones_come_first(ask: Ask) -> None:
    """The logits of each choice are one apart: of equals the one that has left the likeliest last."""
    code, out, err = ask("--input-text=p", "--num-beams=4", "--num-return-sequences=3")
    assert (code, err) == (0, "")
    assert out == f"pace\n{example.SEPARATOR}\npacf\n{example.SEPARATOR}\npade\n"


def test_a_batch_is_what_each_prompt_gets(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("p\nq\npa\n")
    code, out, _ = ask("--batch", tmp_path / "prompts", "--num-beams=2", "--length-penalty=0.5")
    alone = [ask(f"--input-text={prompt}", "--num-beams=2", "--length-penalty=0.5")[1] for prompt in ("p", "q", "pa")]
    assert code == 0 and out == f"{example.SEPARATOR}\n".join(alone)


def test_a_file_of_requests(ask: Ask, tmp_path: Path) -> None:
    """Lines say of themselves what they are; what draws elsewhere does not speak of a search."""
    (tmp_path / "jobs").write_text(
        '{"prompt": "p", "num_beams": 4, "n": 2, "early_stopping": "never", "length_penalty": 0}\n'
        '{"prompt": "p", "num_beams": 1}\n'
        '{"prompt": "p", "temperature": 0}\n'
        '{"prompt": "p", "num_beams": 3, "early_stopping": true, "max_tokens": 2}\n'
    )
    code, out, err = ask("--batch", tmp_path / "jobs", "--jsonl", "--seed=1", "--top-k=2", "--stop=zz")
    assert (code, err) == (0, "")
    first, second, third, fourth = map(json.loads, out.splitlines())
    assert [choice["text"] for choice in first["choices"]] == ["ace", "acf"]
    assert first["choices"][0]["score"] > first["choices"][1]["score"]
    assert first["choices"][0]["finish_reason"] == "stop" and first["usage"]["completion_tokens"] == 8
    assert second["choices"] == third["choices"] == [{"index": 0, "text": "ace", "finish_reason": "stop"}]
    assert fourth["choices"][0]["text"] == "ac" and fourth["choices"][0]["finish_reason"] == "length"


def test_beams_are_the_usual_of_a_file(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('{"prompt": "p"}\n{"prompt": "p", "num_beams": 2, "n": 2}\n')
    code, out, _ = ask("--batch", tmp_path / "jobs", "--jsonl", "--num-beams=4", "--num-return-sequences=3")
    assert code == 0
    assert [len(json.loads(line)["choices"]) for line in out.splitlines()] == [3, 2]


def test_a_context_is_filled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As many beams as there may be have room for whole contexts."""
    folder = random_checkpoint(tmp_path / "checkpoint")
    arguments = [f"--model-type={folder}", "--no-engine-cache", "--input-text=abc", "--num-beams=64"]
    monkeypatch.setattr(sys, "argv", ["example.py", *arguments])
    assert example.main() == 0
    assert len(capsys.readouterr().out) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams=2", "--temperature=0.5"], "expected --num-beams or --temperature but got both"),
        (["--num-beams=2", "--top-k=3"], "expected --num-beams or --top-k but got both"),
        (["--num-beams=2", "--top-p=0.5"], "expected --num-beams or --top-p but got both"),
        (["--num-beams=2", "--stop=x"], "expected --num-beams or --stop but got both"),
        (["--num-beams=2", "--stream"], "expected --num-beams or --stream but got both"),
        (["--num-beams=2", "--speculate=prompt-lookup"], "expected --num-beams or --speculate but got both"),
        (["--num-beams=2", "--num-samples=2"], "expected --num-return-sequences with --num-beams but got"),
        (["--num-beams=2", "--num-return-sequences=3"], "to be at most --num-beams (2) but got 3"),
        (["--num-return-sequences=3"], "expected --num-beams with --num-return-sequences"),
        (["--length-penalty=1"], "expected --num-beams with --length-penalty"),
        (["--early-stopping=never"], "expected --num-beams with --early-stopping"),
        (["--num-beams=0"], "expected --num-beams to be at least 1 and at most 64 but got 0"),
        (["--num-beams=2", "--length-penalty=nan"], "expected --length-penalty to be at least -10 and at most 10"),
    ],
)
def test_what_does_not_go_together(ask: Ask, options: list[str], message: str) -> None:
    code, out, err = ask("--input-text=p", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "num_beams": 2, "n": 3}', "expected n to be at most num_beams (2) but got 3 on line 1"),
        ('{"prompt": "p", "num_beams": 2, "temperature": 0.5}', "temperature has no meaning with beams"),
        ('{"prompt": "p", "num_beams": 2, "stop": "x"}', "stop has no meaning with beams"),
        ('{"prompt": "p", "early_stopping": true}', "expected num_beams with early_stopping on line 1"),
        ('{"prompt": "p", "num_beams": 2, "early_stopping": "x"}', "true, false or 'never' but got 'x' on line 1"),
        ('{"prompt": "p", "num_beams": true}', "expected num_beams to be an integer on line 1"),
    ],
)
def test_lines_that_are_refused(ask: Ask, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "jobs").write_text(line)
    code, out, err = ask("--batch", tmp_path / "jobs", "--jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
