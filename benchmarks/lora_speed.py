"""What adapters (LoRA) cost: a batch with them, without them, and on an engine that has no room for them.

    python benchmarks/lora_speed.py
    python benchmarks/lora_speed.py --shape 124m --width int8 --sequences 1 16 --rank 16

The three take turns, step by step, in one process. Also how long the steps of others wait while an adapter is put into
its slot.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
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
import machine
from adapters.places import ranks_for
from engine import AdapterRoom, config_of, open_engine
from nvtripy_portable.decoder import Decoder, Piece
from weight_loader import Checkpoint, open_checkpoint

PAGE_TOKENS = 64
CONTEXT = 64  # tokens of each sequence when decoding begins
STEPS = 24
ADAPTERS = 8


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser("lora_speed.py", "Measure what adapters cost.")
    parser.add_argument("--shape", choices=tuple(model_files.SHAPES), default="124m", help="(default %(default)s)")
    parser.add_argument("--width", choices=model_files.WIDTHS, default="fp16", help="(default %(default)s)")
    parser.add_argument("--sequences", metavar="N", nargs="+", type=int, default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--rank", metavar="N", type=int, default=16, help="(default %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=7, help="(default %(default)s)")
    parser.add_argument(
        "--threads", metavar="N", type=int, default=machine.usable_cores(), help="(default %(default)s)"
    )
    parser.add_argument("--cache", metavar="DIR", type=command_line.path, default=model_files.cache_folder())
    options = parser.parse_args(arguments)
    command_line.check_range(options, rank=(1, 256), rounds=(1, None), threads=(1, command_line.MAX_THREADS))
    for number in options.sequences:
        if not 1 <= number <= 256:
            raise command_line.UsageError(f"expected --sequences to be 1 to 256 but got {number}")
    return options


def decoder_of(checkpoint: Checkpoint, sequences: int, room: AdapterRoom | None) -> Decoder:
    """With pages for so many sequences."""
    pages = sequences * -(-(CONTEXT + STEPS) // PAGE_TOKENS)
    decoder = open_engine(checkpoint, "float16", 1, room=room).paged(PAGE_TOKENS, pages)
    assert decoder is not None
    return decoder


class Batch:
    """Sequences on a decoder, each of which has an adapter of its own or none."""

    def __init__(self, decoder: Decoder, slots: Sequence[int]) -> None:
        self._decoder, self._slots = decoder, slots
        self._pages = [decoder.pool.take(-(-(CONTEXT + STEPS) // decoder.page_tokens)) for _ in slots]
        tokens = np.arange(CONTEXT, dtype=np.int32)
        for pages, slot in zip(self._pages, slots, strict=True):
            decoder.step([Piece(tokens, 0, pages, slot=slot)])

    def rate(self) -> float:
        """Tokens/s of all, over a few steps."""
        begin = time.perf_counter()
        for step in range(STEPS):
            together = zip(self._pages, self._slots, strict=True)
            self._decoder.step([Piece([step], CONTEXT + step, p, generated=True, slot=s) for p, s in together])
        return STEPS * len(self._slots) / (time.perf_counter() - begin)

    def close(self) -> None:
        for pages in self._pages:
            self._decoder.pool.release(pages)


def carry_out(options: argparse.Namespace) -> int:
    """Measures and prints."""
    set_threads(options.threads)
    native_module()
    checkpoint = open_checkpoint(model_files.checkpoint_folder(options.shape, options.width, options.cache))
    room = AdapterRoom(ADAPTERS, ranks_for(checkpoint, options.rank))
    most = max(options.sequences)
    plain, roomy = decoder_of(checkpoint, most, None), decoder_of(checkpoint, 2 * most, room)
    random = np.random.default_rng(0)
    shapes = _shapes(checkpoint, room)
    waits = []
    for slot in range(1, ADAPTERS + 1):
        matrices = [0.02 * random.standard_normal(shape).astype(np.float32) for shape in shapes]
        begin = time.perf_counter()
        roomy.set_adapter(slot, matrices)
        waits.append(time.perf_counter() - begin)
    rows = []
    for count in options.sequences:
        batches = [
            Batch(plain, [0] * count),
            Batch(roomy, [0] * count),
            Batch(roomy, [1 + number % ADAPTERS for number in range(count)]),
        ]
        rates: list[list[float]] = [[] for _ in batches]
        for number in range(-1, options.rounds):
            for batch, found in zip(batches, rates, strict=True):
                rate = batch.rate()
                if number >= 0:  # the first round is for warming up
                    found.append(rate)
        for batch in batches:
            batch.close()
        ratios = [statistics.median(b / a for a, b in zip(rates[0], each, strict=True)) for each in rates[1:]]
        rows.append([str(count), *map(shown, rates), *(f"{each:.2f}" for each in ratios)])
    print(f"{machine.processor()}, {machine.instruction_set()}, {options.threads} threads")
    print(f"{options.shape}, {options.width}, {ADAPTERS} adapters of rank {options.rank}; tokens/s of all sequences\n")
    header = ["sequences", "no room", "room, none", "adapters", "none ÷ no room", "adapters ÷ no room"]
    print(table(header, rows, markdown=False, left=1))
    print(f"\nputting an adapter into its slot: {shown([1e3 * each for each in waits])} ms")
    return 0


def _shapes(checkpoint: Checkpoint, room: AdapterRoom) -> list[tuple[int, int, int]]:
    """Of an adapter's matrices, (layers, rank, width)."""
    config = replace(config_of(checkpoint, "float16"), adapters=room.count, adapter_ranks=room.ranks)
    return [shape[1:] for shape in config.adapter_shapes]


def main() -> int:
    """Exit code 0; 2 after one line for unusable input."""
    return command_line.main("lora_speed.py", lambda: carry_out(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
