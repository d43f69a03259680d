"""The ranks of one model: rank 0 leads, the others follow.

Rank 0 does everything that a program does; it reads, decides and prints. Each step that its decoder takes is announced
to the others before, with all that a decoder takes: tokens, where they stand, and which pages they are in. The others
take the same steps with their part of the model, and keep nothing else. So whatever schedules a decoder's steps runs on
any number of ranks as it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from collections.abc import Mapping as Description
from typing import Any, NoReturn

import numpy as np

from command_line import UsageError
from nvtripy_portable import collectives
from nvtripy_portable.decoder import Decoder
from parallelism import launcher
from parallelism.mapping import Mapping
from parallelism.watch import Watch

_STEP, _COPY, _VALUE, _END = range(4)
_SIZES = 5  # what it is, and how much follows
_NUMBERS = 1024  # int32 of an announcement, at least: a step of one token fits
_AWAKE = 0.002  # seconds that a rank looks for the next announcement before it takes naps
_NAP = 0.0002

#: Of MPICH and Open MPI: a rank that waits lets others have its core. Where somebody else needs it, the rank among them
#: that is waited for, sums take milliseconds otherwise.
_YIELDING = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}


class Team:
    """The ranks of one model. Made by :func:`team_of`.

    Attributes:
        mapping: Which rank this is, of how many.
        threads: How many threads it should have, so that the ranks of a host share its cores.
    """

    def __init__(self, mapping: Mapping, timeout: float, program: str) -> None:
        from mpi4py import MPI

        self._mpi, self._world, self._sums = MPI, MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
        self.mapping = mapping
        places = self._world.allgather((socket.gethostname(), sorted(_cores())))
        self.threads = max(1, len(_cores()) // places.count(places[mapping.rank]))
        self._hosts = [host for host, _ in places]
        self._watch = Watch(mapping.rank, self._hosts, self._world.bcast, timeout, program)
        collectives.register(mapping.tp_size, self._gathered, self._functions())

    @property
    def is_leader(self) -> bool:
        return self.mapping.rank == 0

    def _gathered(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array."""
        received = np.empty((self.mapping.tp_size, *array.shape), array.dtype)
        sent = np.ascontiguousarray(array)
        self._sums.Allgather([sent.view(np.uint8), self._mpi.BYTE], [received.view(np.uint8), self._mpi.BYTE])
        return list(received)

    def _functions(self) -> collectives.MpiFunctions:
        """Where C finds them: in the library that mpi4py has loaded, whichever it is."""
        import ctypes

        library = ctypes.CDLL(self._mpi.__file__)

        def address(function: Any) -> int:
            return ctypes.cast(function, ctypes.c_void_p).value or 0

        return collectives.MpiFunctions(
            all_gather=address(library.MPI_Allgather),
            error_string=address(library.MPI_Error_string),
            communicator=self._mpi._addressof(self._sums),
            byte_type=self._mpi._addressof(self._mpi.BYTE),
            handle_bytes=self._mpi._sizeof(self._mpi.Comm),
        )

    def compare(self, description: Description[str, str]) -> None:
        """That all ranks are about to run the same model, by what describes it.

        Raises:
            UsageError: the first rank that differs from rank 0, and in what, on every rank.
        """
        first, *others = self._world.allgather(dict(description))
        for rank, other in enumerate(others, 1):
            for what, wanted in first.items():
                if other.get(what) != wanted:
                    raise UsageError(
                        f"expected all ranks to have the same {what}, but rank {rank} on {self._hosts[rank]} has "
                        f"{other.get(what)}, and rank 0 on {self._hosts[0]} {wanted}"
                    )

    # --- what rank 0 says ---------------------------------------------------------------------------------------------

    def lead(self, decoder: Decoder) -> None:
        """Announces a decoder's steps from now on."""
        decoder.followers = self

    def step(self, tokens: np.ndarray, segments: np.ndarray, tables: np.ndarray, rows: np.ndarray) -> None:
        """Announces one, with the arguments of ``Decoder.run``."""
        sizes = (len(tokens), len(segments), tables.shape[1], len(rows))
        self._announce(_STEP, sizes, [tokens, segments, tables, rows])

    def copy(self, source: int, target: int) -> None:
        """Announces that a page is copied."""
        self._announce(_COPY, (source, target))

    def dismiss(self) -> None:
        """Tells the others that there are no more steps."""
        self._announce(_END, ())

    def _announce(self, what: int, sizes: tuple[int, ...], arrays: list[np.ndarray] | None = None) -> None:
        numbers = np.zeros(_SIZES, np.int32)
        numbers[0], numbers[1 : 1 + len(sizes)] = what, sizes
        message = np.concatenate([numbers, *(each.reshape(-1) for each in arrays or ())])
        first = np.zeros(_NUMBERS, np.int32)
        first[: len(message)] = message[:_NUMBERS]
        self._world.Ibcast(first, 0).Wait()
        if len(message) > _NUMBERS:
            self._world.Ibcast(message[_NUMBERS:], 0).Wait()

    # --- what the others hear -----------------------------------------------------------------------------------------

    def follow(self, decoder: Decoder) -> None:
        """Takes the steps that rank 0 announces until there are no more."""
        while True:
            what, sizes, numbers = self._heard()
            if what == _END:
                return
            if what == _COPY:
                decoder.copy(sizes[0], sizes[1])
                continue
            tokens, segments, pages, rows = sizes
            ends = np.cumsum([tokens, 4 * segments, segments * pages, rows])
            parts = [np.ascontiguousarray(each) for each in np.split(numbers, ends)[:4]]
            # What is wrong with a step rank 0 finds as well, before anything is computed, and says it to whoever asked.
            with contextlib.suppress(ValueError):
                decoder.run(parts[0], parts[1].reshape(-1, 4), parts[2].reshape(segments, pages), parts[3])

    def share(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; the others may wait for it as long as it takes."""
        if self.is_leader:
            self._announce(_VALUE, ())
        else:
            self._heard()
        return self._world.bcast(value, 0)

    def _heard(self) -> tuple[int, list[int], np.ndarray]:
        first = np.empty(_NUMBERS, np.int32)
        request, begin = self._world.Ibcast(first, 0), time.perf_counter()
        while not request.Test():
            if time.perf_counter() - begin > _AWAKE:
                time.sleep(_NAP)
        what, *sizes = first[:_SIZES].tolist()
        count = _SIZES
        if what == _STEP:
            tokens, segments, pages, rows = sizes
            count += tokens + 4 * segments + segments * pages + rows
        if count <= _NUMBERS:
            return what, sizes, first[_SIZES:count]
        rest = np.empty(count - _NUMBERS, np.int32)
        self._world.Ibcast(rest, 0).Wait()
        return what, sizes, np.concatenate([first[_SIZES:], rest])

    # --- the end ------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The job has ended well."""
        self._watch.leave()

    def fail(self, code: int, reason: str) -> NoReturn:
        """Ends the whole job, with one line that names this rank."""
        self._watch.fail(code, reason)


def team_of(tp_size: int, embedding_sharding_dim: int | None, timeout: float, program: str) -> Team:
    """The ranks that a launcher has started.

    Args:
        tp_size: How many are expected.
        timeout: Seconds after which a silent rank is given up.
        program: For messages.

    Raises:
        UsageError: there are other processes than expected.
        NoMpi: there is no MPI.
    """
    for name, value in _YIELDING.items():
        os.environ.setdefault(name, value)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the package is missing, or the library that it loads
        raise launcher.NoMpi(
            f"expected mpi4py and an MPI for --tp-size ({' '.join(str(error).split())}): "
            "pip install -r requirements/distributed.txt"
        ) from None
    # Python's handlers have to wait for MPI to return.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    world, library = MPI.COMM_WORLD.size, MPI.Get_library_version().partition(",")[0].split("\n")[0].strip("\0 ")
    wrong = launcher.misfit(launcher.launch(), world, " ".join(library.split()), tp_size)
    if wrong is not None:
        raise UsageError(wrong)
    return Team(Mapping(tp_size, 1, MPI.COMM_WORLD.rank, embedding_sharding_dim), timeout, program)


@contextlib.contextmanager
def guarded(team: Team, *expected: type[Exception]) -> Iterator[None]:
    """Whatever is raised within ends the whole job: with exit code 2 where it is one of ``expected``, else 1."""
    unusable: tuple[type[Exception], ...] = (UsageError, OSError, MemoryError, *expected)
    try:
        yield
    except unusable as error:
        team.fail(2, str(error))
    except SystemExit:
        team.fail(1, "has ended before the others")
    except Exception as error:
        team.fail(1, f"{type(error).__name__}: {error}")
    team.leave()


def _cores() -> set[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
