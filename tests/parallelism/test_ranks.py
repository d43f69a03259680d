"""Models that ranks share: their logits are those of the whole model, and so are the texts that example.py draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compared_ranks import CASES
from mpi_jobs import ROOT, errors, needs_mpi, run

pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")
pytestmark = needs_mpi

COMPARED = ROOT / "tests" / "compared_ranks.py"
PROMPT = ("--input-text", "Good morrow", "--seed", 1, "--max-new-tokens", 24, "--dtype", "float32")


def apart(ranks: int, *cases: str) -> dict[str, float]:
    done = run(ranks, COMPARED, *cases, NVTRIPY_PORTABLE_THREADS="1")
    assert done.returncode == 0, done.stderr
    return {each["case"]: each["apart"] for each in map(json.loads, done.stdout.splitlines())}


def test_two_ranks_compute_the_same() -> None:
    found = apart(2, "gpt2, embeddings by rows", "llama, embeddings by columns", "int8")
    assert max(found.values()) < 1e-6 and len(found) == 3, found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_and_mode(ranks: int) -> None:
    cases = [name for name in CASES if ranks == 2 or name != "int4"]  # whose blocks four ranks would cut
    found = apart(ranks, *cases)
    assert max(found.values()) < 1e-6 and list(found) == cases, found


def text(*arguments: object) -> str:

    command = [sys.executable, "example.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="one text"),
        pytest.param(("--num-samples", 3), id="several"),
        pytest.param(("--num-beams", 3), id="beams"),
        pytest.param(("--speculate", "prompt-lookup"), id="guesses"),
    ],
)
def test_a_text_is_the_same(arguments: tuple[object, ...], tmp_path: Path) -> None:
    cache = ("--engine-dir", tmp_path)
    shared = ("--tp-size", 2, "--use-parallel-embedding")
    for _ in range(2):  # compiled, and from what was saved
        done = run(2, "example.py", *PROMPT, *arguments, *cache, *shared)
        assert done.returncode == 0, done.stderr
        assert done.stdout == text(*PROMPT, *arguments, *cache)
    assert len({path.name.split("-rank")[1][0] for path in tmp_path.glob("*-rank*.engine")}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [("--use-parallel-embedding",), ("--quant-mode", "int8-weight-only"), ("--quant-mode", "int4-weight-only")]
)
def test_ranks_read_their_own_files(how: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    convert = [sys.executable, "convert_checkpoint.py", "--tp-size", "2", *how, "--output-dir", str(folder)]
    subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
    model = ("--model-type", folder, "--no-engine-cache")
    embedding = [each for each in how if each == "--use-parallel-embedding"]
    done = run(2, "example.py", *PROMPT, *model, "--tp-size", 2, *embedding)
    assert done.returncode == 0, done.stderr
    assert done.stdout == text(*PROMPT, *model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tp-size", 3), "expected --tp-size to be the number of processes, 2, but got 3"),
        ((), "expected --tp-size 2: "),
        (("--tp-size", 2, "--lora", "x"), "expected --tp-size or --lora but got both"),
        (("--tp-size", 2, "--embedding-sharding-dim", 1), "expected --use-parallel-embedding with"),
    ],
)
def test_one_line_says_what_cannot_be(arguments: tuple[object, ...], message: str) -> None:
    done = run(2, "example.py", *PROMPT, *arguments)
    [line] = errors(done.stderr)
    assert done.returncode == 2 and message in line and not done.stdout


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    done = run(3, "example.py", *PROMPT, "--tp-size", 3, "--no-engine-cache")
    [line] = errors(done.stderr)
    assert done.returncode == 2 and "would do" in line, done.stderr


def test_padding_is_no_token() -> None:
    """Five words on four ranks of two rows each: the logits are five."""
    assert np.isfinite(list(apart(2, "five words").values())).all()
