"""What beams cost: a search with so many beams beside a batch of as many sequences that are continued greedily.

    python benchmarks/beam_speed.py
    python benchmarks/beam_speed.py --shape 124m --width int8 --beams 2 4 8 --requests 4

Both run on the scheduler that serves, on one decoder, in turn: from prompts of 64 tokens, which all differ.
"""

from __future__ import annotations

import argparse
import statistics
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
from load import models
from native_runtime import native_module
from report import shown, table

import command_line
import machine
from serving.engine import ServingEngine
from serving.opening import open_model
from serving.settings import MAX_BEAMS, BeamSettings, SamplingSettings
from tokenizer import load_tokenizer
from weight_loader import open_checkpoint

PROMPT = 64  # tokens


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser("beam_speed.py", "Measure what beams cost.")
    parser.add_argument("--shape", choices=tuple(model_files.SHAPES), default="124m", help="(default %(default)s)")
    parser.add_argument("--width", choices=model_files.WIDTHS, default="fp16", help="(default %(default)s)")
    parser.add_argument("--beams", metavar="N", nargs="+", type=int, default=[4], help="(default: 4)")
    parser.add_argument("--requests", metavar="N", type=int, default=1, help="together (default %(default)s)")
    parser.add_argument("--new", metavar="N", type=int, default=64, help="tokens (default %(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=7, help="(default %(default)s)")
    parser.add_argument(
        "--threads", metavar="N", type=int, default=machine.usable_cores(), help="(default %(default)s)"
    )
    parser.add_argument("--cache", metavar="DIR", type=command_line.path, default=model_files.cache_folder())
    options = parser.parse_args(arguments)
    command_line.check_range(
        options, requests=(1, 64), new=(1, 512), rounds=(1, None), threads=(1, command_line.MAX_THREADS)
    )
    for number in options.beams:
        if not 2 <= number <= MAX_BEAMS:
            raise command_line.UsageError(f"expected --beams to be 2 to {MAX_BEAMS} but got {number}")
    return options


def seconds(engine: ServingEngine, prompts: Sequence[list[int]], settings: SamplingSettings) -> float:
    """From handing the prompts in to the last token of all."""
    begin = time.perf_counter()
    for prompt in prompts:
        engine.submit(prompt, settings)
    while engine.has_work:
        engine.turn()
    return time.perf_counter() - begin


def carry_out(options: argparse.Namespace) -> int:
    """Measures and prints."""
    set_threads(options.threads)
    native_module()
    checkpoint = open_checkpoint(models.folder(options.shape, options.width, options.cache))
    vocabulary = checkpoint.config.vocab_size
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, vocabulary)
    together = options.requests * max(options.beams)
    opened = open_model(checkpoint, "float16", together, None, None, lambda message: None)
    engine = ServingEngine(
        opened.decoder, tokenizer, frozenset(), lambda updates: None, max_sequences=together, sharing=False
    )
    random = np.random.default_rng(0)
    rows = []
    for beams in options.beams:
        many = random.integers(0, vocabulary, (options.requests * beams, PROMPT)).tolist()
        greedy = SamplingSettings(seed=0, temperature=0.0, max_tokens=options.new, ignore_eos=True)
        search = SamplingSettings(
            seed=0, temperature=0.0, max_tokens=options.new, ignore_eos=True, beams=BeamSettings(beams)
        )
        batch, searched = [], []
        for number in range(-1, options.rounds):
            found = seconds(engine, many, greedy), seconds(engine, many[: options.requests], search)
            if number >= 0:  # the first round is for warming up
                batch.append(found[0])
                searched.append(found[1])
        ratio = statistics.median(b / a for a, b in zip(batch, searched, strict=True))
        rows.append([str(options.requests), str(beams), shown(batch), shown(searched), f"{ratio:.2f}"])
    print(f"{machine.processor()}, {machine.instruction_set()}, {options.threads} threads")
    print(f"{options.shape}, {options.width}, {options.new} tokens behind {PROMPT}; seconds for all\n")
    print(table(["requests", "beams", "a batch of as many", "searched", "searched ÷ batch"], rows, False, left=2))
    return 0


def main() -> int:
    """Exit code 0; 2 after one line for unusable input."""
    return command_line.main("beam_speed.py", lambda: carry_out(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
