"""Jobs of several processes, by the launcher of the MPI that this Python has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_BESIDE = Path(sys.executable).with_name("mpiexec")
LAUNCHER = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")

needs_mpi = pytest.mark.skipif(
    LAUNCHER is None or importlib.util.find_spec("mpi4py") is None,
    reason="there is no MPI: pip install -r requirements/distributed.txt",
)

#: Open MPI refuses to run as root, and more processes than cores, unless it is told; MPICH knows none of these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def command(ranks: int, *arguments: object) -> list[str]:
    assert LAUNCHER is not None
    return [LAUNCHER, "-n", str(ranks), sys.executable, *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **_OPEN_MPI, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **changes}


def start(ranks: int, *arguments: object, **changes: str) -> subprocess.Popen[str]:
    """A job whose standard input is a pipe."""
    pipe: Any = subprocess.PIPE
    return subprocess.Popen(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(**changes),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def run(ranks: int, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def errors(stderr: str) -> list[str]:
    """The lines that are the program's own: launchers add theirs."""
    return [line for line in stderr.splitlines() if line.startswith("example.py: ")]
