"""What programs have in common: one line for bad input, exit codes, and an output that may go away."""

from __future__ import annotations

import argparse
import doctest
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import command_line

ROOT = Path(__file__).resolve().parent.parent


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "prints", "expected", "told"),
    [
        (lambda: None, True, 0, ""),
        (lambda: 1, True, 1, ""),
        (raising(command_line.UsageError("expected\n  this")), True, 2, "p.py: error: expected this\n"),
        (raising(LookupError("that")), True, 2, "p.py: error: that\n"),
        (raising(KeyboardInterrupt()), True, 130, ""),
        (raising(FileNotFoundError(errno.ENOENT, "gone", "a.txt")), True, 2, "p.py: error: a.txt: gone\n"),
        (raising(OSError(errno.ENOSPC, "full")), True, 2, "p.py: error: standard output: full\n"),
        (raising(OSError(errno.ENOSPC, "full")), False, 2, f"p.py: error: [Errno {errno.ENOSPC}] full\n"),
        (raising(BrokenPipeError(errno.EPIPE, "pipe")), True, 1, ""),
    ],
)
def test_exit_codes(
    command: Callable[[], int | None], prints: bool, expected: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main("p.py", command, LookupError, prints=prints) == expected
    assert capfd.readouterr().err == told


def test_a_mistake_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        command_line.main("p.py", raising(ZeroDivisionError()))


def run(command: str, tail: str = "") -> subprocess.CompletedProcess[str]:
    """A program with that command, started by a shell, with what follows it there."""
    program = f"import command_line, sys; sys.exit(command_line.main('p.py', lambda: {command}))"
    shell = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {tail}', sys.executable, program]
    return subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = run("print('x' * 10**6)", "| true")
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_or_full_standard_output_is_told() -> None:
    done = run("print('x')", ">&-")
    assert (done.returncode, done.stderr) == (2, "p.py: error: standard output is closed\n")
    if os.path.exists("/dev/full"):
        done = run("print('x')", "> /dev/full")
        assert (done.returncode, done.stderr) == (2, "p.py: error: standard output: No space left on device\n")


def test_text_is_written_as_utf_8_whatever_the_locale() -> None:
    done = run("print(chr(0x21d2))", "| od -An -tx1")
    assert done.stdout.split() == ["e2", "87", "92", "0a"]


def test_it_starts_fast() -> None:
    """Nothing but the standard library, and of that nothing that takes time."""
    script = "import sys; before = set(sys.modules); import command_line; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()} - {"command_line", "interrupt"}
    assert packages <= sys.stdlib_module_names and not packages & {"asyncio", "subprocess", "multiprocessing"}


def test_a_home_folder_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert command_line.path("~/engines") == Path("/home/me/engines")
    assert command_line.path("a/~/b") == Path("a/~/b")


def test_too_little_memory_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line.main("p.py", raising(MemoryError())) == 2
    assert capfd.readouterr().err == "p.py: error: there is not enough memory\n"


def test_numbers_have_two_ends() -> None:
    options = argparse.Namespace(threads=1 << 40, runs=None)
    command_line.check_range(options, threads=(1, None), runs=(1, 2))
    with pytest.raises(command_line.UsageError, match=f"expected --threads to be at most 1024 but got {1 << 40}"):
        command_line.check_range(options, threads=(1, command_line.MAX_THREADS))


PROGRAMS = ("example.py", "evaluate.py", "demo.py", "quantization.py", "train.py", "data/custom/prepare.py")


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_in_the_first_imports(program: str) -> None:
    """At any moment after the first import of ours: no traceback, and 130, which at the very end is the signal."""
    delays = [0.0, *np.random.default_rng(0).uniform(0.0, 0.5, 3)]
    for delay in delays:
        command = [sys.executable, "-X", "importtime", program, "--help"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
            assert run.stderr is not None
            for line in run.stderr:
                if line.rstrip().endswith("| interrupt"):
                    break
            run.stderr.readline()  # of the next import: the handler is there by then
            time.sleep(delay)
            run.send_signal(signal.SIGINT)
            told = [line for line in run.stderr if not line.startswith("import time:")]
        is_over = program != "train.py" and run.returncode in (0, -signal.SIGINT)  # --help was quicker
        assert is_over or run.returncode == 130, f"after {delay:.3f} s: {run.returncode}, {told}"
        assert not told


def test_ctrl_c_is_an_exception_within_a_command() -> None:
    program = """
import interrupt, os, signal, sys
interrupt.end_quietly()
import command_line
def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaned up")
sys.exit(command_line.main("p.py", command))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "")


def test_docstrings() -> None:
    results = doctest.testmod(command_line)
    assert results.attempted == 2 and results.failed == 0
