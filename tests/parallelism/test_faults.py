"""Jobs whose ranks fail, fall silent, differ or are ended: all of it ends, soon, and one line says why."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from mpi_jobs import needs_mpi, run, start

pytestmark = needs_mpi

#: Each rank writes its process id; one waits in C then, deaf to Python's signals, for a sum that rank 0 never joins.
STUCK = """
    import os, sys, time
    from pathlib import Path

    import numpy as np

    from parallelism.team import guarded, team_of

    team = team_of(2, None, 2, "job.py")
    Path(sys.argv[1], f"{team.mapping.rank}.writing").write_text(str(os.getpid()))
    Path(sys.argv[1], f"{team.mapping.rank}.writing").rename(Path(sys.argv[1], str(team.mapping.rank)))
    with guarded(team):
        if team.mapping.rank:
            team._gathered(np.zeros(2, np.float32))
        time.sleep(60)
"""
FAILING = """
    import sys, time

    import numpy as np

    from command_line import UsageError
    from parallelism.team import guarded, team_of

    team = team_of(2, None, 30, "job.py")
    rank, kind = int(sys.argv[1]), {"usage": UsageError, "bug": ZeroDivisionError, "exit": SystemExit}[sys.argv[2]]
    with guarded(team):
        if team.mapping.rank == rank:
            raise kind("something is wrong")
        team._gathered(np.zeros(2, np.float32))
"""
DIFFERENT = """
    from parallelism.team import guarded, team_of

    team = team_of(2, None, 30, "job.py")
    with guarded(team):
        team.compare({"program": "1", "checkpoint fingerprint": f"{team.mapping.rank + 7}"})
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "job.py"
    path.write_text(dedent(text))
    return path


def lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("job.py: ")]


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A job, and its ranks' process ids; nothing of it is left afterwards."""
    job = start(2, script(tmp_path, STUCK), tmp_path)
    ranks = [tmp_path / "0", tmp_path / "1"]
    try:
        until = time.monotonic() + 30
        while not all(path.exists() for path in ranks):
            assert job.poll() is None and time.monotonic() < until, "the job has not begun"
            time.sleep(0.02)
        time.sleep(0.3)
        yield job, [int(path.read_text()) for path in ranks]
    finally:
        for path in ranks:
            with contextlib.suppress(OSError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        job.kill()
        job.communicate()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "has not answered for 2 s"), (signal.SIGTERM, "has ended")],
)
def test_a_rank_that_is_lost(
    stuck: tuple[subprocess.Popen[str], list[int]], rank: int, number: signal.Signals, reason: str
) -> None:
    job, pids = stuck
    begin = time.monotonic()
    os.kill(pids[rank], number)
    stdout, stderr = job.communicate(timeout=20)
    assert time.monotonic() - begin < (2 if number == signal.SIGSTOP else 0) + 5
    assert job.returncode != 0
    found = lines(stderr)
    if number == signal.SIGSTOP or found:
        [line] = found
        assert line.startswith(f"job.py: error: rank {rank} on ") and line.endswith(reason)
    else:  # the launcher has ended the others before they could say it, and says it itself
        assert stdout or stderr
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_is_told_to_end(stuck: tuple[subprocess.Popen[str], list[int]], number: signal.Signals) -> None:
    job, pids = stuck
    begin = time.monotonic()
    job.send_signal(number)
    job.communicate(timeout=20)
    assert time.monotonic() - begin < 5 and job.returncode != 0
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    """Whether a process computes or waits: one that its parent has not asked for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("usage", 2, "something is wrong"),
        ("bug", 1, "ZeroDivisionError: something is wrong"),
        ("exit", 1, "has ended before the others"),
    ],
)
def test_a_rank_that_raises(tmp_path: Path, rank: int, kind: str, code: int, reason: str) -> None:
    begin = time.monotonic()
    done = run(2, script(tmp_path, FAILING), rank, kind)
    assert time.monotonic() - begin < 10
    assert len(lines(done.stderr)) == 1, (done.returncode, done.stdout, done.stderr)
    [line] = lines(done.stderr)
    assert line.startswith(f"job.py: error: rank {rank} on ") and line.endswith(reason)
    assert done.returncode == code


def test_ranks_that_differ(tmp_path: Path) -> None:
    done = run(2, script(tmp_path, DIFFERENT))
    [line] = lines(done.stderr)
    assert "expected all ranks to have the same checkpoint fingerprint, but rank 1 on " in line
    assert " has 8, and rank 0 on " in line and line.endswith(" 7") and done.returncode == 2


def test_alone_it_says_how_to_start(tmp_path: Path) -> None:
    arguments = [sys.executable, "example.py", "--input-text", "x", "--tp-size", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 2
    reason = "expected --tp-size to be the number of processes, 1, but got 2: start it with mpirun -np 2"
    assert done.stderr == f"example.py: error: {reason}\n"
