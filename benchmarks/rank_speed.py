"""What it costs that ranks share a model: decoding by all of them, beside the whole model on as many threads.

    mpirun -np 2 python benchmarks/rank_speed.py --width int8

Both take turns in one job, so that what else the machine does is done to both. Rank 0 has the whole model, too, and
computes it with as many threads as there are ranks while the others wait.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the programs at the root

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import model_files
import numpy as np
from bench import set_threads
from native_runtime import native_module
from report import shown, table

import command_line
from engine import open_engine
from nvtripy_portable.decoder import Decoder, Piece
from parallelism.following import shared
from parallelism.launcher import launch
from parallelism.mapping import Mapping
from parallelism.team import Team, guarded, team_of
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

PROGRAM = "rank_speed.py"
CONTEXT = 64  # tokens that the sequence has when decoding begins
STEPS = 24


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser(PROGRAM, "Measure what sharing a model among ranks costs.")
    parser.add_argument("--shape", choices=tuple(model_files.SHAPES), default="124m", help="(default %(default)s)")
    parser.add_argument("--width", choices=model_files.WIDTHS, default="fp16", help="(default %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=15, help="(default %(default)s)")
    parser.add_argument("--cache", metavar="DIR", type=command_line.path, default=model_files.cache_folder())
    options = parser.parse_args(arguments)
    command_line.check_range(options, rounds=(1, None))
    return options


def decoder_of(checkpoint: Checkpoint, mapping: Mapping | None) -> Decoder:
    """With pages for one sequence."""
    return shared(open_engine(checkpoint, "float16", 1, mapping=mapping).paged(CONTEXT, 2))


def rate(decoder: Decoder, threads: int) -> float:
    """Tokens/s, over a few steps of a sequence that has a prompt."""
    native_module().set_threads(threads)
    for step in range(-2, STEPS):  # the first ones find nothing in the caches
        if step == 0:
            begin = time.perf_counter()
        decoder.step([Piece([step + 2], CONTEXT + max(step, 0), [0, 1], generated=True)])
    return STEPS / (time.perf_counter() - begin)


def measure(team: Team, checkpoint: Checkpoint, rounds: int) -> None:
    """What rank 0 does: prints a table."""
    ranks = team.mapping.tp_size
    together, whole = decoder_of(checkpoint, team.mapping), decoder_of(checkpoint, None)
    team.lead(together)
    for decoder in (together, whole):
        decoder.step([Piece(np.arange(CONTEXT, dtype=np.int32), 0, [0])])
    rates = [(rate(whole, ranks), rate(together, 1)) for _ in range(rounds)]
    team.dismiss()
    alone, parted = (list(each) for each in zip(*rates, strict=True))
    ratios = [second / first for first, second in rates]
    rows = [
        [f"one process, {ranks} threads", shown(alone), ""],
        [f"{ranks} ranks of one thread", shown(parted), shown(ratios, 2)],
    ]
    print(table(["decoding", "tokens/s", "of it"], rows, markdown=False, left=1), flush=True)


def carry_out(options: argparse.Namespace) -> int:
    """Measures and prints, or follows the rank that does."""
    native_module()
    found = launch()
    if found is None:
        raise command_line.UsageError("expected several processes: start it with mpirun -np 2")
    team = team_of(found.size, None, 60, PROGRAM)
    with guarded(team, CheckpointError):
        set_threads(1)  # before the runtime is first used
        checkpoint = open_checkpoint(model_files.checkpoint_folder(options.shape, options.width, options.cache))
        if team.is_leader:
            measure(team, checkpoint, options.rounds)
        else:
            team.follow(decoder_of(checkpoint, team.mapping))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.main(PROGRAM, lambda: carry_out(parse_arguments()), CheckpointError))
