"""The other end of a worker (workers.py): makes an object and calls its methods, as it is told over a pipe.

    python served.py FILE-DESCRIPTOR

It may be another Python than the one that asks: it imports nothing but what the object needs.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the programs at the root

REST = 0.01  # seconds between two looks at the processor time
LONGEST_REST = 2.0  # seconds


def serve(connection: Connection) -> None:
    """Works until the other end is closed."""
    os.dup2(2, 1)  # whatever a library prints goes to standard error: standard output is the table's
    try:
        places, order = connection.recv()
        sys.path[:] = places or sys.path
        make, arguments = pickle.loads(order)
        served = make(*arguments)
        rest()
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            result = getattr(served, method)(*arguments)
            rest()
            connection.send((None, result))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass  # nobody asks any more
    except Exception as error:
        connection.send((_one_line(error), None))


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:299] + "…"


def rest() -> None:
    """Returns when the process does nothing else any more."""
    end = time.perf_counter() + LONGEST_REST
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(REST)
        if time.process_time() - used < REST / 10:
            return


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
