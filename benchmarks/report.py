"""What was measured, as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_files import WIDTHS, title
from peers import OURS, PEERS

import picture

NOTHING = "-"
Cells = Callable[["Record"], list[str]]  # of an engine's row, after width and name


@dataclass
class Record:
    """One engine with one model. Every list has a number for each round."""

    shape: str
    width: str
    peer: str
    variant: str
    deviation: float | None = None  # of its logits from transformers' in float32, relative
    decode: dict[int, list[float]] = field(default_factory=dict)  # context → tokens/s
    prefill: dict[int, list[float]] = field(default_factory=dict)  # prompt → tokens/s
    cold: list[float] = field(default_factory=list)  # seconds from the start of the process to the first token
    warm: list[float] = field(default_factory=list)  # the same, from a saved engine; only ours has one
    peak: list[int] = field(default_factory=list)  # bytes
    # Bytes/s that the machine read from memory right before and after decoding at the reference context: the mean.
    # Only ours has it.
    bandwidth: list[float] = field(default_factory=list)
    together: dict[int, list[float]] = field(default_factory=dict)  # sequences → tokens/s of all of them

    @property
    def label(self) -> str:
        """Its name in the tables: with the type where it is not the width itself."""
        return self.peer if self.variant == self.width else f"{self.peer} {self.variant}"

    @property
    def start(self) -> list[float]:
        """Seconds to the first token as a user has it the second time."""
        return self.warm or self.cold


@dataclass(frozen=True)
class Failure:
    """An engine that could not be measured with a model."""

    shape: str
    width: str
    label: str
    reason: str


@dataclass
class Run:
    """Everything that one run of the program measured."""

    machine: str
    isa: str
    threads: int
    versions: dict[str, str]  # by peer
    settings: dict[str, Any]
    weight_bytes: dict[str, dict[str, int]]  # shape → width → bytes that a decoding step of ours reads
    bandwidth: list[float]  # bytes/s
    cache_bytes: int  # of the last-level cache
    records: list[Record]
    failures: list[Failure] = field(default_factory=list)

    def bytes_read(self, shape: str, width: str) -> int | None:
        """What a decoding step of ours reads of the weights from memory; None where a cache holds them."""
        size = self.weight_bytes[shape][width]
        return size if size > self.cache_bytes else None

    def limit(self, shape: str, width: str) -> float | None:
        """Tokens/s at which reading our weights takes all the bandwidth; None where a cache holds them."""
        size = self.bytes_read(shape, width)
        return statistics.median(self.bandwidth) / size if self.bandwidth and size else None


def shown(values: Sequence[float], digits: int | None = None) -> str:
    """The median, and the range in brackets where there are several."""
    if not values:
        return NOTHING

    def number(value: float) -> str:
        decimals = digits if digits is not None else (0 if value >= 100 else 1 if value >= 10 else 2)
        return f"{value:.{decimals}f}"

    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}-{number(max(values))})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool, left: int = 2) -> str:
    """Columns of text, the first ``left`` to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = [":" + "-" * (w - 1) if column < left else "-" * (w - 1) + ":" for column, w in enumerate(widths)]
        return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])
    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def text(run: Run, markdown: bool) -> str:
    """The whole report."""
    versions = "; ".join(f"{name}: {version}" for name, version in run.versions.items())
    parts = [
        f"{run.machine}, {run.isa}, {run.threads} threads, reads {shown([b / 1e9 for b in run.bandwidth])} GB/s",
        versions,
        f"Medians of {run.settings['runs']} interleaved rounds (least-most), sampling included.",
    ]
    shapes = [*(record.shape for record in run.records), *(failure.shape for failure in run.failures)]
    for shape in dict.fromkeys(shapes):
        records = [record for record in run.records if record.shape == shape]
        failures = [failure for failure in run.failures if failure.shape == shape]
        parts.append(f"### {title(shape)}" if markdown else title(shape))
        if any(record.together for record in records):
            parts.append(_together(records, failures, markdown))
        if any(record.decode or record.prefill for record in records):
            parts += [_speeds(run, records, failures, markdown), _starts(records, failures, markdown)]
        parts += [f"{each.label}, {each.width}, could not be measured: {each.reason}" for each in failures]
        ratios = _ratios(records, markdown)
        if ratios:
            parts += ["Ours relative to the others (speed: times as fast; time and memory: share of theirs):", ratios]
    notes = {
        f"{record.label}, {record.width}: {PEERS[record.peer].weights[record.variant]}": None for record in run.records
    }
    parts.append("\n".join(["Weights:", *(f"- {note}" for note in notes)]))
    parts.append(
        "Together: so many sequences are decoded at once, each from 64 tokens on; tokens/s of all of them. "
        "Bandwidth: what a decoding step reads of our weights, times tokens/s, relative to what the machine read from "
        "memory right before and after; only where no cache holds the weights. "
        "Deviation: of the logits from those of transformers in float32, root mean square, relative; what is added to "
        "all alike does not count."
    )
    return "\n\n".join(parts)


def _columns(records: Sequence[Record], which: str) -> list[int]:
    return sorted({length for record in records for length in getattr(record, which)})


def _lines(records: Sequence[Record], failures: Sequence[Failure], header: list[str], cells: Cells) -> list[list[str]]:
    """A table's rows, width by width: of each engine its cells, or that it failed."""
    rows = [[record.width, record.label, *cells(record)] for record in records]
    rows += [[each.width, each.label, "failed", *[NOTHING] * (len(header) - 3)] for each in failures]
    return sorted(rows, key=lambda row: WIDTHS.index(row[0]))


def _together(records: Sequence[Record], failures: Sequence[Failure], markdown: bool) -> str:
    counts = _columns(records, "together")
    header = ["width", "engine", *(f"{count} together, tokens/s" for count in counts), "deviation"]

    def cells(record: Record) -> list[str]:
        return [*(shown(record.together.get(count, [])) for count in counts), _deviation(record)]

    return table(header, _lines(records, failures, header, cells), markdown)


def _deviation(record: Record) -> str:
    return NOTHING if record.deviation is None else f"{record.deviation:.4f}"


def _speeds(run: Run, records: Sequence[Record], failures: Sequence[Failure], markdown: bool) -> str:
    contexts = _columns(records, "decode")
    reference, first, last = reference_context(contexts), contexts[0], contexts[-1]
    header = [
        "width",
        "engine",
        *(f"decode @{c}, tokens/s" for c in contexts),
        *([f"@{last} of @{first}"] if last > first else []),
        f"bandwidth @{reference}",
        "deviation",
    ]

    def cells(record: Record) -> list[str]:
        share = NOTHING
        size = run.bytes_read(record.shape, record.width)
        if record.bandwidth and size:
            rounds = zip(record.decode[reference], record.bandwidth, strict=True)
            share = f"{statistics.median(rate * size / bandwidth for rate, bandwidth in rounds):.0%}"
        pairs = zip(record.decode[last], record.decode[first], strict=True)
        rest = [f"{statistics.median(long / short for long, short in pairs):.0%}"] if last > first else []
        speeds = [shown(record.decode.get(context, [])) for context in contexts]
        return [*speeds, *rest, share, _deviation(record)]

    return table(header, _lines(records, failures, header, cells), markdown)


def reference_context(contexts: Sequence[int]) -> int:
    """64 tokens, or what is nearest: the cache is small there, and weights are nearly all that is read."""
    return min(contexts, key=lambda context: abs(context - 64))


def _starts(records: Sequence[Record], failures: Sequence[Failure], markdown: bool) -> str:
    prompts = _columns(records, "prefill")
    header = [
        "width",
        "engine",
        *(f"prefill of {n}, tokens/s" for n in prompts),
        "first token, s",
        "saved engine, s",
        "peak memory, MB",
    ]

    def cells(record: Record) -> list[str]:
        return [
            *(shown(record.prefill.get(n, [])) for n in prompts),
            shown(record.cold, 2),
            shown(record.warm, 2),
            shown([peak / 1e6 for peak in record.peak], 0),
        ]

    return table(header, _lines(records, failures, header, cells), markdown)


def ratios(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Ours relative to each peer, width by width: of a peer with several variants, each time to the best of them.

    A peer that does not have a width (transformers has no quantized GPT-2) stands there with the next wider one.
    """
    found = []
    for ours in (record for record in records if record.peer == OURS):
        for name in dict.fromkeys(record.peer for record in records if record.peer != OURS):
            theirs = _comparable([record for record in records if record.peer == name], ours.width)
            if not theirs:
                continue
            width = theirs[0].width

            entry: dict[str, Any] = {"width": ours.width, "peer": name if width == ours.width else f"{name} at {width}"}
            for length, rates in ours.decode.items():
                entry[f"decode @{length}"] = _ratio(rates, [record.decode.get(length, []) for record in theirs], max)
            for length, rates in ours.prefill.items():
                entry[f"prefill @{length}"] = _ratio(rates, [record.prefill.get(length, []) for record in theirs], max)
            for count, rates in ours.together.items():
                theirs_together = [record.together.get(count, []) for record in theirs]
                entry[f"{count} together"] = _ratio(rates, theirs_together, max)
            entry["first token"] = _ratio(ours.start, [record.start for record in theirs], min)
            entry["peak memory"] = _ratio(ours.peak, [record.peak for record in theirs], min)
            found.append(entry)
    return found


def _ratio(
    ours: Sequence[float], theirs: Sequence[Sequence[float]], best: Callable[[Sequence[float]], float]
) -> float | None:
    """Our median relative to the best of their medians; None where there is nothing to compare."""
    medians = [statistics.median(values) for values in theirs if values]
    return statistics.median(ours) / best(medians) if ours and medians else None


def _comparable(records: Sequence[Record], width: str) -> list[Record]:
    """The records at a width, or at the next wider one that there is."""
    for candidate in reversed(WIDTHS[: WIDTHS.index(width) + 1]):
        found = [record for record in records if record.width == candidate]
        if found:
            return found
    return []


def _ratios(records: Sequence[Record], markdown: bool) -> str:
    entries = ratios(records)
    if not entries:
        return ""
    columns = [key for key in entries[0] if any(not isinstance(entry.get(key), str | None) for entry in entries)]
    rows = [
        [e["width"], e["peer"], *(NOTHING if e.get(c) is None else f"{e[c]:.2f}" for c in columns)] for e in entries
    ]
    return table(["width", "relative to", *columns], rows, markdown)


def plot(run: Run, path: Path) -> None:
    """Decoding speed by width for each shape, and the limit that reading our weights sets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bench"  # the same numbers give the same file
    shapes = list(dict.fromkeys(record.shape for record in run.records if record.decode))
    names = list(dict.fromkeys(record.peer for record in run.records))
    figure, axes = plt.subplots(1, len(shapes), figsize=(1.5 + 4.5 * len(shapes), 4.2), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        records = [record for record in run.records if record.shape == shape]
        widths = list(dict.fromkeys(record.width for record in records))
        context = reference_context(_columns(records, "decode"))
        bar = 0.8 / len(names)
        for place, name in enumerate(names):
            for group, width in enumerate(widths):
                same = [record for record in records if (record.peer, record.width) == (name, width)]
                rates = [record.decode[context] for record in same if context in record.decode]
                if rates:
                    best = max(rates, key=statistics.median)
                    middle = statistics.median(best)
                    axis.bar(
                        group + (place - (len(names) - 1) / 2) * bar,
                        middle,
                        bar,
                        color=f"C{place}",
                        yerr=[[middle - min(best)], [max(best) - middle]] if len(best) > 1 else None,
                        error_kw={"linewidth": 0.8},
                    )
        for group, width in enumerate(widths):
            limit = run.limit(shape, width)
            if limit is not None:
                axis.hlines(limit, group - 0.45, group + 0.45, color="black", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(widths)), widths)
        axis.set_title(f"{title(shape)}, context {context}")
        axis.set_ylabel("decoding, tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{place}") for place in range(len(names))]
    limit_line = plt.Line2D([], [], color="black", linestyle="--", linewidth=1)
    labels = [*names, "weights ÷ bandwidth"]
    columns = 3 if len(shapes) == 1 else len(labels)  # as many as the figure is wide
    figure.legend([*handles, limit_line], labels, loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0.08 if columns == len(labels) else 0.14, 1, 1))
    picture.write(figure, path)
    plt.close(figure)
