"""The results as a picture: what a model says of the text, against what its weights take."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import picture
from evaluation.table import Result, Settings
from evaluation.weights import WeightBytes
from weight_loader import PARAMETER_DTYPES

AXES = ("bits", "size")
PLAIN = "#555555"  # of what is not quantized
COLORS = ("#1b6ca8", "#c44e00", "#2a7f3f", "#8a3ab9", "#a3195b", "#7a5c00", "#00797a", "#b22222")
BIT_TICKS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)


@dataclass(frozen=True)
class Point:
    """A variant's place in the picture."""

    x: float
    y: float
    name: str
    color: str


def draw(settings: Settings, results: Sequence[Result], path: Path, against: str = "bits") -> None:
    """Writes a picture of perplexity, or of bits per byte where tokenizers differ, against the bits of a weight or the
    size of all weights. Variants that differ by their width alone are joined by a line.

    Args:
        settings: What the results have in common.
        results: A point each, but for those without a number.
        path: Where to; its ending gives the format.
        against: One of ``AXES``. In memory where all can be told there, else on disk.

    Raises:
        UsageError: it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    in_memory = all(_measure(result.memory, against) is not None for result in results)
    points = [
        Point(x, y, result.variant, color)
        for result, color in zip(results, _colors([result.variant for result in results]), strict=True)
        for x in [_measure(result.memory if in_memory else result.disk, against)]
        for y in [result.perplexity if settings.is_one_tokenizer else result.bits_per_byte]
        if x is not None and math.isfinite(y)
    ]
    where = "in memory" if in_memory else "on disk"
    with matplotlib.rc_context({"svg.hashsalt": "evaluate", "font.size": 11, "text.parse_math": False}):
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # which measures text, and needs no display
        axes = figure.add_subplot()
        if against == "bits":
            _scale_bits(axes, [point.x for point in points])
            axes.set_xlabel(f"bits a weight of the linear layers {where}, scales included")
        else:
            axes.set_xlabel(f"weights {where}, MB")
        if any(point.y > 3 * other.y for point in points for other in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        axes.margins(0.14, 0.16)
        for members in _families(points).values():
            axes.plot(
                [p.x for p in members], [p.y for p in members], "-", linewidth=1.2, alpha=0.5, color=members[0].color
            )
        for point in points:
            axes.plot([point.x], [point.y], "o", markersize=9, color=point.color)
        axes.set_ylabel(f"{'perplexity' if settings.is_one_tokenizer else 'bits per byte of text'} (lower is better)")
        axes.set_title(
            f"{settings.text}, {settings.bytes:,} bytes, window {settings.context}, stride {settings.stride}"
        )
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, points)
        picture.write(figure, path)


def _measure(weights: WeightBytes, against: str) -> float | None:
    if against == "bits":
        return weights.bits
    return None if weights.total is None else weights.total / 1e6


def _scale_bits(axes: Any, bits: Sequence[float]) -> None:
    """Halving the bits is a step of the same length everywhere."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(BIT_TICKS, [str(tick) for tick in BIT_TICKS])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(bits, default=4) / 1.3, max(bits, default=16) * 1.5)


def _family(name: str) -> str:
    """The name without widths of weights: those who share it differ by their width alone.

    >>> _family("int4-weight-only+kv-int8") == _family("int8-weight-only+kv-int8") != _family("int8-weight-only")
    True
    """
    return re.sub(r"(?<!kv-)\bint\d+", "int", name)


def _families(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by family, from narrow to wide."""
    families: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.x):
        families.setdefault(_family(point.name), []).append(point)
    return families


def _colors(names: Sequence[str]) -> list[str]:
    """A color for each name: one for each family of quantized variants, grey for those that are not quantized."""
    left, chosen = itertools.cycle(COLORS), {}
    for name in names:
        family = _family(name)
        if family not in chosen:
            chosen[family] = PLAIN if all(word in PARAMETER_DTYPES for word in name.split("+")) else next(left)
    return [chosen[_family(name)] for name in names]


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Names points, each as near to its point as no other name or point is in the way, with a line if it is far."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # which settles where everything is
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    centers = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_extents(x - 6 * pixels, y - 6 * pixels, x + 6 * pixels, y + 6 * pixels) for x, y in centers]
    turns = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    sides = {1: "left", 0: "center", -1: "right"}
    line = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
    heights = {1: "bottom", 0: "center", -1: "top"}
    places = [(turn, distance) for distance in range(9, 300, 9) for turn in turns]
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        for (right, up), distance in [*places, (turns[0], 9)]:  # the last one, if there is no room at all
            is_near = distance == 9 and 0 in (right, up)
            corner = (0.5 - right / 2, 0.5 - up / 2)  # of the text, where a line to the point begins
            label = axes.annotate(
                point.name,
                (point.x, point.y),
                xytext=(right * distance, up * distance),
                textcoords="offset points",
                ha=sides[right],
                va=heights[up],
                color=point.color,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},  # a line may pass behind
                arrowprops=None if is_near else {**line, "color": point.color, "relpos": corner},
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # an annotation's own includes its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
        else:
            axes.add_artist(label)
