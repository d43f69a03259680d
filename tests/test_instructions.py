"""benchmarks/instructions.py: what a product takes is the difference of two runs, counted until it comes out twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import instructions
import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_difference_of_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []

    def executed(program: Path, processor: str, arguments: list[str]) -> int:
        runs.append(arguments)
        longer_log = len(runs) == 2
        return 1000 + instructions.WEIGHTS * 3 * int(arguments[-1]) + longer_log

    monkeypatch.setattr(instructions, "executed", executed)
    assert instructions.per_weight(Path("p"), "aarch64", "i8mm", "i4", "prompt", 6) == 0.5
    # The second run of one product has a longer log, so it takes two more.
    assert [arguments[-1] for arguments in runs] == ["1"] * 4 + ["2"] * 2


def test_without_an_emulator_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "instructions.py", "--build", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "on the path, but" in done.stderr and "Traceback" not in done.stderr
