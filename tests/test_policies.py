"""benchmarks/policies.py: when it says that the policy that was chosen is wrong; and kernel_speed.py's command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import policies
import pytest
from policies import Turns

ROOT = Path(__file__).resolve().parent.parent


def turns(**seconds: Sequence[float]) -> Turns:
    return Turns(
        {name: list(each) for name, each in seconds.items()},
        {name: [1.0] * len(each) for name, each in seconds.items()},
    )


def test_shares_and_leads() -> None:
    measured = Turns({"a": [2.0, 4.0, 2.0], "b": [1.0, 2.0, 2.0]}, {"a": [0.1, 0.3, 0.2], "b": [0.2, 0.2, 0.1]})
    assert measured.share("a", 10) == 0.5  # rounds: 10 / 2 * 0.1, 10 / 4 * 0.2, 10 / 2 * 0.1
    assert measured.lead("b", "a") == 2 and measured.lead("a", "b") == 0.5
    assert measured.best("a") == measured.best("b") == "b"
    assert turns(a=[1], b=[1]).best("b") == "b"


def test_they_take_turns() -> None:
    events: list[str] = []

    def step() -> float:
        events.append("step")
        return float(len(events))

    def read() -> float:
        events.append("read")
        return 1.0

    measured = policies.measure(["a", "b"], events.append, step, read, 2)
    one = ["read", "step", "step", "step"]
    assert events == ["b", *one, "a", *one, "a", *one, "b", *one]
    assert measured.steps == {"a": [8.0, 13.0], "b": [3.0, 18.0]}  # the shortest of three
    assert measured.reads == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("first", "later", "wrong", "measured"),
    [
        (1.05, [], False, 0),  # not far enough behind
        (1.5, [1.02], False, 1),  # chance
        (1.5, [1.5, 1.02], False, 2),
        (1.2, [1.11, 1.11], True, 2),
    ],
)
def test_a_choice_is_wrong_where_it_stays_behind(first: float, later: list[float], wrong: bool, measured: int) -> None:
    asked: list[Sequence[str]] = []
    coming = iter(later)

    def again(names: Sequence[str]) -> Turns:
        asked.append(names)
        return turns(chosen=[next(coming)], best=[1.0])

    assert policies.is_wrong(turns(other=[1.3], chosen=[first], best=[1.0]), "chosen", again) == wrong
    assert asked == [["chosen", "best"]] * measured


def test_a_policy_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")
    monkeypatch.setenv("NVTRIPY_PORTABLE_PREFETCH", "t3")
    command = [sys.executable, ROOT / "benchmarks" / "kernel_speed.py", "--only", "i4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kernel_speed.py: error: expected NVTRIPY_PORTABLE_PREFETCH to be t0, t1 or nta, ")
    assert done.stderr.endswith("but got 't3'\n")
