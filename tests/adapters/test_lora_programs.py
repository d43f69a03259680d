"""Adapters on the command line of example.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_folders import write_lora
from tiny_checkpoints import random_checkpoint

import example

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and two adapters of it."""
    folder = tmp_path_factory.mktemp("lora")
    random_checkpoint(folder / "base")
    write_lora(folder / "a", {"h.0.attn.c_attn": (32, 96)}, rank=3, seed=1)
    write_lora(folder / "b", {"h.0.attn.c_attn": (32, 96), "h.0.mlp.c_fc": (32, 128)}, rank=5, seed=2)
    return folder


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Ask:
    def run(*arguments: object) -> tuple[int, str, str]:
        common = [f"--model-type={folder / 'base'}", f"--engine-dir={folder / 'engines'}", "--seed=1"]
        monkeypatch.setattr(sys, "argv", ["example.py", *common, "--max-new-tokens=20", *map(str, arguments)])
        code = example.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_each_prompt_has_its_adapter(ask: Ask, folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a", folder / "b"
    alone = [ask("--input-text", "The", *more)[1] for more in (["--lora", a], [], ["--lora", b])]
    assert len(set(alone)) == 3, "an adapter does nothing"
    assert ask("--input-text", "The", "--lora", a, b, "--lora-task-ids", -1)[1] == alone[1]
    (tmp_path / "prompts").write_text("The\nThe\nThe\n")
    code, out, err = ask("--batch", tmp_path / "prompts", "--lora", a, b, "--lora-task-ids", 0, -1, 1)
    assert (code, err) == (0, "") and out == f"{'-' * 16}\n".join(alone)
    (tmp_path / "jobs").write_text(
        "".join(json.dumps({"prompt": "The", "lora_task_id": each}) + "\n" for each in (1, -1, 0, 1))
        + '{"prompt": "The"}\n'
    )
    code, out, err = ask("--batch", tmp_path / "jobs", "--jsonl", "--lora", a, b)
    assert (code, err) == (0, "")
    texts = ["The" + json.loads(line)["choices"][0]["text"] + "\n" for line in out.splitlines()]
    assert texts == [alone[2], alone[1], alone[0], alone[2], alone[1]]


def test_an_engine_with_adapters_is_saved_and_opened(ask: Ask, folder: Path) -> None:
    first = ask("--input-text", "A", "--lora", folder / "a")
    [file] = (folder / "engines").glob("*adapters1*.engine")
    saved = file.stat().st_mtime_ns
    assert ask("--input-text", "A", "--lora", folder / "a") == first
    assert file.stat().st_mtime_ns == saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "{a}", "{b}"], "expected --lora-task-ids with 2 adapters"),
        (["--lora", "{a}", "--lora-task-ids", "1"], "expected --lora-task-ids to be -1 (none) to 0 but got 1"),
        (["--lora-task-ids", "0"], "to be -1 (none), as there is no --lora, but got 0"),
        (["--lora", "{a}", "--lora-task-ids", "0", "0"], "to be one number, or 1, one a prompt, but got 2"),
        (["--lora", "{base}"], "with an adapter_config.json, but it has none"),
        (["--lora", "nowhere"], "expected an adapter's folder at 'nowhere', but nothing is there"),
        (["--lora", "/nowhere/at/all"], "expected an adapter's folder at '/nowhere/at/all', but nothing is there"),
        (["--lora", "{wrong}"], "is for another model than"),
        (["--lora", "{wide}"], "to have lora_A (2, 32) and lora_B (96, 2)"),
    ],
)
def test_bad_input(ask: Ask, folder: Path, arguments: list[str], message: str) -> None:
    write_lora(folder / "wrong", {"layers.0.self_attn.q_proj": (32, 32)}, rank=2, seed=0)
    write_lora(folder / "wide", {"h.0.attn.c_attn": (64, 96)}, rank=2, seed=0)
    names = {each: str(folder / each) for each in ("a", "b", "base", "wrong", "wide")}
    code, out, err = ask("--input-text", "The", *(each.format(**names) for each in arguments))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_line_that_names_no_adapter(ask: Ask, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('{"prompt": "A"}\n{"prompt": "A", "lora_task_id": 3}\n')
    code, out, err = ask("--batch", tmp_path / "jobs", "--jsonl", "--lora", folder / "a")
    assert code == 2 and out == ""
    assert "expected lora_task_id to be -1 (none) to 0 on line 2 of" in err and "but got 3" in err
    code, _, err = ask("--batch", tmp_path / "jobs", "--jsonl", "--lora", folder / "a", "--lora-task-ids", 0)
    assert code == 2 and "expected --lora-task-ids without --jsonl" in err


def test_results_know_which_adapters_they_are_of(ask: Ask, folder: Path, tmp_path: Path) -> None:
    """A run that was interrupted goes on with the same adapters only."""
    (tmp_path / "jobs").write_text('{"prompt": "A"}\n{"prompt": "B"}\n')
    arguments = ["--batch", tmp_path / "jobs", "--jsonl", "--output", tmp_path / "out"]
    assert ask(*arguments, "--lora", folder / "a")[0] == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    code, _, _ = ask(*arguments, "--lora", folder / "b")
    assert code == 0 and (tmp_path / "out").read_text() != (tmp_path / "whole").read_text()
    (tmp_path / "out").rename(tmp_path / "out.partial")
    code, _, err = ask(*arguments, "--lora", folder / "a")
    assert code == 2 and "out.partial" in err
