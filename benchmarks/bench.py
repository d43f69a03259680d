"""Measures this project and its peers side by side, in one run.

    python benchmarks/bench.py --shapes 124m --widths int8 --json speeds.json --plot speeds.svg
    python benchmarks/bench.py --quick --shapes embedded

Every engine lives in a process of its own and is idle while another one works; each round asks all of them in turn for
the same thing, so that whatever else the machine does hits all alike. Before anything is timed, each one's logits are
compared with those of transformers. The table goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the programs at the root

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import model_files
import numpy as np
import peers
import report
from bandwidth import Bandwidth, last_level_cache
from peers import OURS, PEERS, Task
from report import Record, Run
from tqdm import tqdm
from workers import Timed, Worker, WorkerError, fresh_start, write_model

import command_line
import machine
import picture
from command_line import UsageError
from weight_loader import open_checkpoint

DECODE_CONTEXTS = (16, 64, 256, 1000)
PREFILL_LENGTHS = (64, 256, 512, 1000)
STEPS = 24  # decoding steps at each context: from 1000 they end at GPT-2's 1024
QUICK_CONTEXTS, QUICK_LENGTHS, QUICK_STEPS = (16, 64), (64,), 8
START_PROMPT = 16  # tokens of a fresh process's prompt
CHECK_PROMPT = 48
STARTS = 3  # fresh processes of each engine, at most

#: How far logits may be from transformers' in float32, relative to their spread: a broken model is far beyond.
TOLERANCES = {"fp16": 0.03, "int8": 0.1, "int4": 0.6}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UsageError: an unknown option, or a value out of its range.
    """
    others = [name for name in PEERS if name != OURS]
    shapes = [name for name in model_files.SHAPES if name != "tiny"]
    parser = command_line.Parser("bench.py", "Measure this project and its peers.")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=shapes,
        choices=tuple(model_files.SHAPES),
        help="models: the sizes of gpt2 and gpt2-medium with random weights, the embedded one (default: all), tiny",
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
        picture.check(options.plot, "requirements-bench.txt")
    path = options.json
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK) and not path.is_dir()):
        raise UsageError(f"expected --json to be a file in a writable folder but got {path}")
    for name in ("shapes", "widths", "peers"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    # The widths in their own order: quantized ones are compared with a peer's fp16, where it has nothing else.
    options.widths.sort(key=model_files.WIDTHS.index)
    return options


def set_threads(threads: int) -> None:
    """Sets what libraries look at when they are loaded, for the processes that are started from here."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NVTRIPY_PORTABLE_THREADS"):
        os.environ[name] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


# ---- measuring -------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """A line on standard error, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


@dataclass(frozen=True)
class Turn:
    """What one engine is asked for."""

    length: int  # of the prompt, in tokens
    steps: int  # of decoding after it
    is_prefill_wanted: bool


def turns(quick: bool, context: int) -> list[Turn]:
    """What every engine is asked for in each round, for a model with a context of so many tokens."""
    prompts = {min(length, context) for length in (QUICK_LENGTHS if quick else PREFILL_LENGTHS)}
    steps = QUICK_STEPS if quick else STEPS
    contexts = {min(length, context - steps) for length in (QUICK_CONTEXTS if quick else DECODE_CONTEXTS)}
    return [Turn(n, steps if n in contexts else 0, n in prompts) for n in sorted(prompts | contexts)]


class Bench:
    """One run of the program.

    Args:
        options: What `parse_arguments` returned.
        engines: A folder for compiled engines.
    """

    def __init__(self, options: argparse.Namespace, engines: Path) -> None:
        self._options, self._engines = options, engines
        self._names = [OURS, *(name for name in PEERS if name in options.peers and self._is_installed(name))]
        self.broken: list[str] = []
        self._written: set[tuple[str, str, str, Path]] = set()
        self.run = Run(
            machine=machine.processor(),
            isa=machine.instruction_set(),
            threads=options.threads,
            versions={name: peers.version(name) for name in self._names},
            settings={"runs": options.runs, "quick": options.quick, "shapes": options.shapes, "widths": options.widths},
            weight_bytes={},
            bandwidth=[],
            cache_bytes=last_level_cache(),
            records=[],
        )

    def _save(self) -> None:
        """Writes the numbers so far: a run takes long, and may be interrupted."""
        if self._options.json is not None:
            shapes = dict.fromkeys(record.shape for record in self.run.records)
            ratios = {s: report.ratios([r for r in self.run.records if r.shape == s]) for s in shapes}
            _write(self._options.json, json.dumps({**asdict(self.run), "ratios": ratios}, indent=1) + "\n")

    def _is_installed(self, name: str) -> bool:
        module = peers.missing(name)
        if module is not None:
            say(f"{name} is left out: {module} is not installed (pip install -r requirements-bench.txt)")
        return module is None

    def measure(self) -> Run:
        """Measures everything. Who cannot be measured is reported, and left out."""
        reader = Worker(Bandwidth, self._options.threads)
        for shape in self._options.shapes:
            config = open_checkpoint(model_files.float_checkpoint(shape, self._options.cache)).config
            widths = self._options.widths
            self.run.weight_bytes[shape] = {width: model_files.bytes_per_token(config, width) for width in widths}
            random = np.random.Generator(np.random.Philox(model_files.SEED))
            tokens = random.integers(0, config.vocab_size, config.n_positions).tolist()
            wanted = turns(self._options.quick, config.n_positions)
            reference = self._reference(shape, tokens[:CHECK_PROMPT])
            for width in self._options.widths:
                self._measure_group(shape, width, tokens, wanted, reference, reader)
                self._save()
        reader.close()
        return self.run

    def _task(self, record: Record, engines: Path | None = None) -> Task:
        """What a process is told to load; the file is there when this returns.

        Raises:
            WorkerError: it cannot be made.
        """
        wanted = (record.peer, record.shape, record.width, self._options.cache)
        if wanted not in self._written:
            Worker(write_model, *wanted).close()
            self._written.add(wanted)
        return Task(model_files.model_file(*wanted), record.variant, self._options.threads, engines)

    def _reference(self, shape: str, prompt: list[int]) -> np.ndarray | None:
        """The logits that everybody's are compared with."""
        module = peers.missing("transformers")
        if module is not None:
            say(f"nobody's logits are checked: {module} is not installed")
            return None
        try:
            worker = Worker(Timed, "transformers", self._task(Record(shape, "fp16", "transformers", "float32")))
            logits: np.ndarray = worker.call("logits", prompt)
        except WorkerError as error:
            say(f"nobody's logits are checked: transformers cannot compute them ({error})")
            return None
        worker.close()
        return logits

    def _leave_out(self, record: Record, reason: object) -> None:
        name = f"{record.label} with {record.shape} at {record.width}"
        say(f"{name} is left out: {reason}")
        self.broken.append(name)

    def _measure_group(
        self,
        shape: str,
        width: str,
        tokens: list[int],
        wanted: list[Turn],
        reference: np.ndarray | None,
        reader: Worker,
    ) -> None:
        """All engines with one model."""
        workers: list[tuple[Record, Worker]] = []
        for name in self._names:
            for variant in PEERS[name].variants.get(width, ()):
                record = Record(shape, width, name, variant)
                worker = self._started(record, tokens, reference)
                if worker is not None:
                    workers.append((record, worker))
        # Before the first round that counts there is another one: some engines prepare for each length that they meet.
        rounds = range(0 if self._options.quick else -1, self._options.runs)
        total = len(rounds) * len(wanted) * len(workers)
        reference_context = report.reference_context([turn.length for turn in wanted if turn.steps])
        with tqdm(total=total, desc=f"{shape} {width}", unit="turn", file=sys.stderr, leave=False) as progress:
            for number in rounds:
                self.run.bandwidth.append(reader.call("measure"))
                for turn in wanted:
                    for record, worker in list(workers):
                        # Memory that others use too is fast in one second and slow in the next.
                        is_compared = number >= 0 and record.peer == OURS and turn.length == reference_context
                        before = reader.call("measure") if is_compared else 0.0
                        try:
                            responses = worker.call("turn", tokens[: turn.length], turn.steps + 1)
                        except WorkerError as error:
                            self._leave_out(record, error)
                            worker.close()
                            workers.remove((record, worker))
                        else:
                            if number >= 0:
                                _note(record, turn, responses)
                            if is_compared:
                                record.bandwidth.append((before + reader.call("measure")) / 2)
                        progress.update()
        for _, worker in workers:
            worker.close()
        self._measure_starts([record for record, _ in workers], tokens)

    def _started(self, record: Record, tokens: list[int], reference: np.ndarray | None) -> Worker | None:
        """A worker that has loaded its model, has been checked and is warm; or None."""
        try:
            worker = Worker(Timed, record.peer, self._task(record, self._engines))
        except WorkerError as error:
            self._leave_out(record, error)
            return None
        try:
            if reference is not None:
                record.deviation = deviation(worker.call("logits", tokens[:CHECK_PROMPT]), reference)
                tolerance = TOLERANCES[record.width]
                if not record.deviation <= tolerance:  # nor if it is not a number
                    raise WorkerError(
                        f"its logits deviate by {record.deviation:.3f} from those of transformers, expected {tolerance}"
                    )
            worker.call("turn", tokens[:START_PROMPT], QUICK_STEPS)
        except WorkerError as error:
            self._leave_out(record, error)
            worker.close()
            return None
        return worker

    def _measure_starts(self, records: list[Record], tokens: list[int]) -> None:
        """Fresh processes. Ours starts twice: compiling, and from the engine that its worker has saved."""
        prompt, new = tokens[:START_PROMPT], QUICK_STEPS if self._options.quick else STEPS
        for _ in range(min(self._options.runs, STARTS)):
            for record in list(records):
                try:
                    task = self._task(record)
                    if record.peer == OURS:
                        record.cold.append(fresh_start(OURS, task, prompt, 1)[0])
                        seconds, peak = fresh_start(OURS, self._task(record, self._engines), prompt, new)
                        record.warm.append(seconds)
                    else:
                        seconds, peak = fresh_start(record.peer, task, prompt, new)
                        record.cold.append(seconds)
                    record.peak.append(peak)
                except WorkerError as error:
                    self._leave_out(record, error)
                    records.remove(record)
        self.run.records += records


def _write(path: Path, text: str) -> None:
    """Beside its place first, so that it is never half-written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def _note(record: Record, turn: Turn, responses: list[list[float]]) -> None:
    """Adds one turn to a record: the median of its repetitions."""
    if turn.is_prefill_wanted:
        seconds = statistics.median(moments[0] for moments in responses)
        record.prefill.setdefault(turn.length, []).append(turn.length / seconds)
    if turn.steps:
        seconds = statistics.median(moments[-1] - moments[0] for moments in responses)
        record.decode.setdefault(turn.length, []).append(turn.steps / seconds)


def deviation(logits: np.ndarray, reference: np.ndarray) -> float:
    """The root mean square of the difference, relative to the reference's spread around its mean."""
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference - reference.mean()))


def carry_out(options: argparse.Namespace) -> int:
    """Measures, draws and prints; returns 1 if an engine had to be left out because it failed, else 0."""
    set_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as engines:
        bench = Bench(options, Path(engines))
        run = bench.measure()
    if not run.records:
        raise UsageError("nothing could be measured")
    if options.plot is not None:
        report.plot(run, options.plot)
    print(report.text(run, options.markdown), flush=True)
    return 1 if bench.broken else 0


def main() -> int:
    """Exit code 0; 1 if an engine had to be left out because it failed; 2 after one line for unusable input."""
    return command_line.main("bench.py", lambda: carry_out(parse_arguments()), WorkerError)


if __name__ == "__main__":
    sys.exit(main())
