"""example.py --jsonl: files of requests, files of results, and what happens to them when a run is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import overflowing_checkpoint, random_checkpoint

import example

ROOT = Path(__file__).resolve().parent.parent

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of all runs: a model that says arbitrary bytes, and its engine."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = random_checkpoint(folder / "checkpoint")
    return [f"--model-type={checkpoint}", f"--engine-dir={folder / 'engines'}", "--dtype=float32", "--jsonl"]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], common: list[str]) -> Ask:
    """Runs main() in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["example.py", *common, *map(str, arguments)])
        code = example.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def jobs(folder: Path, count: int = 12) -> Path:
    """Requests of all kinds."""
    numbers = random.Random(1)
    path = folder / "jobs.jsonl"
    with path.open("w") as file:
        for number in range(count):
            more: dict[str, Any] = {"max_tokens": numbers.randint(1, 30)}
            if number % 3 == 0:
                more |= {"n": 2, "custom_id": f"é{number}"}
            if number % 4 == 0:
                more |= {"temperature": 0, "seed": number, "top_k": 0}
            file.write(json.dumps({"prompt": "ab" * numbers.randint(1, 15), **more}) + "\n")
    return path


def test_a_line_for_each_request_in_their_order(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text(
        '{"prompt": "The", "custom_id": "x"}\n{"prompt": "An", "n": 2, "max_tokens": 2}\n{"prompt": "The", "seed": 2}\n'
    )
    code, out, err = ask("--batch", tmp_path / "jobs", "--seed=1", "--max-new-tokens=9")
    assert (code, err) == (0, "")
    first, second, third = map(json.loads, out.splitlines())
    assert list(first) == ["index", "custom_id", "choices", "usage"]
    assert (first["index"], first["custom_id"], second["index"], second["custom_id"]) == (0, "x", 1, None)
    assert [choice["index"] for choice in second["choices"]] == [0, 1]
    assert first["choices"][0]["finish_reason"] == "length"
    assert second["usage"] == {"prompt_tokens": 2, "completion_tokens": 4}
    assert first["choices"] != third["choices"]


def test_the_texts_are_those_of_a_text(
    ask: Ask, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").write_text('{"prompt": "The"}\n{"prompt": "To be"}\n')
    more = ["--seed=1", "--num-samples=2", "--max-new-tokens=20", "--stop=e"]
    _, out, _ = ask("--batch", tmp_path / "jobs", *more)
    (tmp_path / "prompts").write_text("The\nTo be\n")
    monkeypatch.setattr(sys, "argv", ["example.py", *common[:-1], f"--batch={tmp_path / 'prompts'}", *more])
    assert example.main() == 0
    expected = capsys.readouterr().out[:-1].split(f"\n{'-' * 16}\n")
    found = [choice["text"] for line in out.splitlines() for choice in json.loads(line)["choices"]]
    assert [prompt + text for prompt, text in zip(["The"] * 2 + ["To be"] * 2, found, strict=True)] == expected


def test_a_pipe_is_a_file_too(ask: Ask, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = '{"prompt": "The"}\n' * 3
    with subprocess.Popen(["sh", "-c", f'printf "%s" "$0" > {tmp_path}/pipe', content]):
        code, out, _ = ask("--batch", tmp_path / "pipe", "--max-new-tokens=1")
    assert code == 0 and out.count("\n") == 3


#: Runs example.py with a model whose steps take 30 ms.
SLOWED = f"""
import runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from nvtripy_portable.decoder import Decoder
step = Decoder.step
def slow(*arguments):
    time.sleep(0.03)
    return step(*arguments)
Decoder.step = slow
sys.argv = ["example.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "example.py")!r}, run_name="__main__")
"""


def test_killed_and_gone_on_with(ask: Ask, common: list[str], tmp_path: Path) -> None:
    """As often as it is killed: the file is that of a run that was not, and the seed the one of the first."""
    source, whole, output = jobs(tmp_path, 100), tmp_path / "whole.jsonl", tmp_path / "output.jsonl"
    partial = tmp_path / "output.jsonl.partial"
    counts = [0]
    for wait in (3, 8):
        given = [*common, f"--batch={source}", f"--output={output}"]
        process = subprocess.Popen([sys.executable, "-c", SLOWED, *given], stderr=subprocess.PIPE)
        until = time.monotonic() + 60
        while not partial.exists() or partial.read_bytes().count(b"\n") < counts[-1] + wait:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not output.exists()
        if process.stderr is not None:
            process.stderr.close()
        counts.append(partial.read_bytes().count(b"\n"))
        with partial.open("ab") as file:
            file.write(f'{{"index": {counts[-1]}, "cust'.encode())  # as if it had been killed while it wrote
    assert 0 < counts[1] < counts[2] < 100
    kept = partial.read_bytes()
    seed = json.loads((tmp_path / "output.jsonl.partial.job").read_text())["seed"]
    assert ask("--batch", source, "--output", output) == (0, "", "")
    assert ask("--batch", source, "--output", whole, f"--seed={seed}") == (0, "", "")
    assert output.read_bytes() == whole.read_bytes()
    assert output.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert {path.name for path in tmp_path.iterdir()} == {"jobs.jsonl", "output.jsonl", "whole.jsonl"}


def begun(ask: Ask, tmp_path: Path, lines: int = 5) -> tuple[Path, Path, bytes]:
    """A run that was interrupted after some lines; its input, its output, and what that is to become."""
    source, output = jobs(tmp_path), tmp_path / "output"
    assert ask("--batch", source, "--output", output, "--seed=3")[0] == 0
    expected = output.read_bytes()
    output.unlink()
    job = {"seed": 3}
    # What the run was begun with is taken from one that is interrupted at once.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.offline.OfflineEngine.turn", _interrupt)
        assert ask("--batch", source, "--output", output, "--seed=3")[0] == 130
    assert json.loads((tmp_path / "output.partial.job").read_text()).items() >= job.items()
    (tmp_path / "output.partial").write_bytes(b"".join(expected.splitlines(keepends=True)[:lines]))
    return source, output, expected


def _interrupt(self: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("torn", [b"", b'{"index": 5', b"\0" * 100, b'{"index": 7}\n', b'{"index": 5}\n{"index": 6}\n'])
def test_what_is_no_result_is_made_again(ask: Ask, tmp_path: Path, torn: bytes) -> None:
    source, output, expected = begun(ask, tmp_path)
    with (tmp_path / "output.partial").open("ab") as file:
        file.write(torn)
    assert ask("--batch", source, "--output", output) == (0, "", "")
    assert output.read_bytes() == expected


def test_a_last_line_without_its_end_is_made_again(ask: Ask, tmp_path: Path) -> None:
    source, output, expected = begun(ask, tmp_path)
    partial = tmp_path / "output.partial"
    os.truncate(partial, partial.stat().st_size - 1)
    assert ask("--batch", source, "--output", output, "--speculate=prompt-lookup", "--threads=1") == (0, "", "")
    assert output.read_bytes() == expected


def test_all_lines_were_there_already(ask: Ask, tmp_path: Path) -> None:
    source, output, expected = begun(ask, tmp_path, lines=100)
    code, _, err = ask("--batch", source, "--output", output, "--verbose")
    assert code == 0 and re.search(r"compile or open \d+\.\d\d s, 0 tokens, no rate, peak", err)
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=0.5"], "was begun with another temperature, 0.8, not 0.5"),
        (["--seed=4"], "was begun with another seed, 3, not 4"),
        (["--num-samples=2"], "was begun with another n, 1, not 2"),
        (["--dtype=float16"], "was begun with another dtype, float32, not float16"),
        (["--stop=x"], r"was begun with another stop, \[\], not \['x'\]"),
    ],
)
def test_another_job_is_refused(ask: Ask, tmp_path: Path, options: list[str], message: str) -> None:
    source, output, _ = begun(ask, tmp_path)
    code, out, err = ask("--batch", source, "--output", output, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and re.search(message, err)
    assert "remove" in err and not output.exists()


def test_another_input_is_refused(ask: Ask, tmp_path: Path) -> None:
    source, output, _ = begun(ask, tmp_path)
    before = (tmp_path / "output.partial").read_bytes()
    with source.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    code, _, err = ask("--batch", source, "--output", output)
    assert code == 2 and "was begun with another input" in err and err.count("\n") == 1
    (tmp_path / "output.partial.job").unlink()
    code, _, err = ask("--batch", source, "--output", output)
    assert code == 2 and "is there, but not what it was begun with" in err and err.count("\n") == 1
    assert (tmp_path / "output.partial").read_bytes() == before


def test_a_file_that_is_there_stays_as_it_is(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("precious")
    code, out, err = ask("--batch", jobs(tmp_path), "--output", tmp_path / "output")
    expected = f"example.py: error: expected --output to name a new file, but {tmp_path}/output is there already\n"
    assert (code, out, err) == (2, "", expected)
    assert (tmp_path / "output").read_text() == "precious"


def test_one_process_at_a_time(ask: Ask, common: list[str], tmp_path: Path) -> None:
    source, output = jobs(tmp_path, 100), tmp_path / "output"
    given = [*common, f"--batch={source}", f"--output={output}"]
    with subprocess.Popen([sys.executable, "-c", SLOWED, *given]) as process:
        while not (tmp_path / "output.partial.job").exists():
            time.sleep(0.01)
        code, _, err = ask("--batch", source, "--output", output)
        process.kill()
    assert (code, err) == (2, f"example.py: error: another process is writing {output}.partial\n")


def test_a_folder_that_cannot_be_written(ask: Ask, tmp_path: Path) -> None:
    code, out, err = ask("--batch", jobs(tmp_path), "--output", tmp_path / "none" / "output")
    assert (code, out) == (2, "")
    assert err == f"example.py: error: cannot write {tmp_path}/none/output.partial: No such file or directory\n"


def test_an_answer_that_cannot_be_computed_is_a_result(ask: Ask, tmp_path: Path) -> None:
    """The others are computed; the exit code tells."""
    folder = overflowing_checkpoint(tmp_path / "overflowing")
    (tmp_path / "jobs").write_text('{"prompt": "To be", "n": 2}\n{"prompt": "a"}\n')
    given = ["--batch", tmp_path / "jobs", "--output", tmp_path / "output", f"--model-type={folder}", "--dtype=float16"]
    code, out, err = ask(*given)
    results = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines()]
    assert [result["index"] for result in results] == [0, 1]
    for choice in results[0]["choices"]:
        assert choice["finish_reason"] == "error" and "not finite" in choice["error"]
    assert (code, out) == (2, "")
    assert err == "example.py: error: 2 of 2 prompts ended in an error, which their results tell\n"
