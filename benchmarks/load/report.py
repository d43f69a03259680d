"""The numbers of a run of serve_bench.py, as tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from model_files import title
from report import NOTHING, shown, table

import picture
from load.servers import OURS


@dataclass
class Row:
    """What one server did under one load, round by round.

    Attributes:
        load: "8 clients", "2 requests/s".
        rate: Tokens/s. first_token, between: seconds, of all rounds. http: seconds of processor time a token.
        memory: Bytes at the end.
        whole, changed: Answers that came to their end, and how many of them were other than the first time that the
            same was asked, alone or beside others.
    """

    shape: str
    width: str
    server: str
    load: str
    rate: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    http: list[float] = field(default_factory=list)
    memory: int = 0
    whole: int = 0
    changed: int = 0


@dataclass
class Answer:
    """The answer to one of the other questions."""

    shape: str
    width: str
    server: str
    question: str
    result: str
    values: dict[str, float]


@dataclass
class Run:
    """All of it."""

    machine: str
    isa: str
    threads: int
    runs: int
    seconds: float
    rows: list[Row] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _percentiles(values: Sequence[float]) -> str:
    """Median, 95th and 99th percentile, in ms."""
    if not values:
        return NOTHING
    return " / ".join(f"{each * 1e3:.0f}" for each in np.percentile(values, [50, 95, 99]))


def text(run: Run, markdown: bool) -> str:
    """The whole report."""
    parts = [
        f"{run.machine}, {run.isa}, {run.threads} threads; the clients run on the same processors.",
        f"Medians of {run.runs} rounds of {run.seconds:g} s (least-most).",
    ]
    header = ["width", "server", "load", "tokens/s", "first token, ms", "between tokens, ms"]
    header += ["HTTP, µs a token", "memory, MB", "answers that changed"]
    for shape in dict.fromkeys(row.shape for row in run.rows):
        lines = [
            [
                row.width,
                row.server,
                row.load,
                shown(row.rate),
                _percentiles(row.first_token),
                _percentiles(row.between),
                shown([each * 1e6 for each in row.http]),
                f"{row.memory / 1e6:.0f}",
                f"{row.changed} of {row.whole}",
            ]
            for row in run.rows
            if row.shape == shape
        ]
        parts += [f"### {title(shape)}" if markdown else title(shape), table(header, lines, markdown, left=3)]
    ratios = _ratios(run)
    if ratios:
        head = ["shape", "width", "load", "relative to", "tokens/s", "first token, p95"]
        parts += ["Ours relative to the others:", table(head, ratios, markdown, left=4)]
    if run.answers:
        lines = [[each.shape, each.width, each.server, each.question, each.result] for each in run.answers]
        parts.append(table(["shape", "width", "server", "question", "answer"], lines, markdown, left=5))
    parts += run.failures
    parts.append(
        "First token and between tokens: median / 95th / 99th percentile. HTTP: processor time of the side that speaks "
        "HTTP. Answers that changed: of those that came to their end, how many had another text than when the same was "
        "asked first, at temperature 0."
    )
    return "\n\n".join(parts)


def _ratios(run: Run) -> list[list[str]]:
    lines = []
    for ours in (row for row in run.rows if row.server == OURS and row.rate):
        for theirs in run.rows:
            same = theirs.shape == ours.shape and theirs.load == ours.load and theirs.server != OURS and theirs.rate
            # Who does not have a width stands there with float16 or bfloat16.
            has_width = any(row.server == theirs.server and row.width == ours.width for row in run.rows)
            if not same or theirs.width != (ours.width if has_width else "fp16"):
                continue
            rate = statistics.median(ours.rate) / max(statistics.median(theirs.rate), 1e-9)
            first = NOTHING
            if ours.first_token and theirs.first_token:
                first = f"{np.percentile(ours.first_token, 95) / np.percentile(theirs.first_token, 95):.2f}"
            name = theirs.server if has_width else f"{theirs.server} at {theirs.width}"
            lines.append([ours.shape, ours.width, ours.load, name, f"{rate:.2f}", first])
    return lines


def plot(run: Run, path: Path) -> None:
    """Tokens/s by the number of clients, a line for each server and width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "serve_bench"  # the same numbers give the same file
    rows = [row for row in run.rows if row.load.endswith(("client", "clients")) and row.rate]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(1.5 + 5 * len(shapes), 4.2), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for server, width in dict.fromkeys((row.server, row.width) for row in rows if row.shape == shape):
            mine = [row for row in rows if (row.shape, row.server, row.width) == (shape, server, width)]
            points = sorted((int(row.load.split()[0]), statistics.median(row.rate)) for row in mine)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{server}, {width}")
        axis.set_xscale("log", base=2)
        ticks = sorted({int(row.load.split()[0]) for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("clients")
        axis.set_ylabel("tokens/s of all")
        axis.set_title(title(shape))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture.write(figure, path)
    plt.close(figure)
