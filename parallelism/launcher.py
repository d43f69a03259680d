"""What started this process: one of several that mpirun or srun has started, or alone.

Launchers say in the environment which process this is and how many there are. MPI says so, too; where they contradict
each other, the launcher belongs to another MPI than the library that mpi4py has loaded, and what was to be one job is
as many jobs of one process each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from collections.abc import Mapping as Variables
from dataclasses import dataclass

from command_line import UsageError

#: Launcher → its variables of a process's number and of how many there are.
_LAUNCHERS = {
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's mpirun": ("PMI_RANK", "PMI_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process."""

    launcher: str
    rank: int
    size: int


def launch(environment: Variables[str, str] = os.environ) -> Launch | None:
    """What the launcher says; None: nothing has started several processes.

    >>> launch({"PMI_RANK": "1", "PMI_SIZE": "2"})
    Launch(launcher="MPICH's mpirun", rank=1, size=2)
    >>> launch({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None
    True
    """
    for launcher, names in _LAUNCHERS.items():
        texts = [environment.get(name, "") for name in names]
        if all(text.isdecimal() for text in texts) and int(texts[1]) > 1:
            return Launch(launcher, *map(int, texts))
    return None


def check_alone(environment: Variables[str, str] = os.environ) -> None:
    """That this process is no part of a job of several.

    Raises:
        UsageError: it is: each would do the whole work.
    """
    found = launch(environment)
    if found is not None:
        raise UsageError(f"expected --tp-size {found.size}: {found.launcher} has started {found.size} processes")


class NoMpi(UsageError):
    """There is no MPI on this host, whatever the others have."""


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Before ranks know of each other: what is wrong with a command line is so on all of them, and rank 0 says it."""
    try:
        yield
    except NoMpi:
        raise
    except UsageError:
        found = launch()
        if found is None or found.rank == 0:
            raise
        raise SystemExit(2) from None


def misfit(found: Launch | None, world: int, library: str, tp_size: int) -> str | None:
    """What is wrong with the processes that there are; None: nothing.

    Args:
        found: What the launcher says.
        world: How many MPI knows of.
        library: MPI's name, for the message.
        tp_size: How many are asked for.

    >>> misfit(None, 1, "MPICH", 2)
    'expected --tp-size to be the number of processes, 1, but got 2: start it with mpirun -np 2'
    """
    if found is not None and world == 1:
        return (
            f"expected one job of {found.size} processes but got {found.size} jobs of one: {found.launcher} has "
            f"started them, but mpi4py has loaded {library}; take its mpirun, or have MPI4PY_MPIABI name the launcher's"
        )
    if world != tp_size:
        hint = "" if world > 1 else f": start it with mpirun -np {tp_size}"
        return f"expected --tp-size to be the number of processes, {world}, but got {tp_size}{hint}"
    return None
