"""parallelism/launcher.py: what launchers say of a process, and what cannot be a job."""

from __future__ import annotations

import doctest

import pytest

from command_line import UsageError
from parallelism import launcher
from parallelism.launcher import Launch, check_alone, launch, misfit


def test_examples() -> None:
    assert doctest.testmod(launcher).failed == 0


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, Launch("MPICH's mpirun", 2, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Launch("Open MPI's mpirun", 0, 2)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Launch("srun", 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # within an allocation, but not started by srun
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, None),
    ],
)
def test_what_launchers_say(environment: dict[str, str], found: Launch | None) -> None:
    assert launch(environment) == found


def test_a_job_of_separate_ones_is_explained() -> None:
    reason = misfit(Launch("Open MPI's mpirun", 0, 2), 1, "MPICH Version: 5.0.2", 2)
    assert reason is not None and reason.startswith("expected one job of 2 processes but got 2 jobs of one: Open MPI's")
    assert "mpi4py has loaded MPICH Version: 5.0.2" in reason
    assert misfit(Launch("Open MPI's mpirun", 0, 2), 2, "Open MPI", 2) is None


def test_several_that_each_would_do_the_work() -> None:
    with pytest.raises(UsageError, match="expected --tp-size 3: srun has started 3 processes"):
        check_alone({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"})
    check_alone({})
