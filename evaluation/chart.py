"""The results as a picture: perplexity against the size of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import picture
import quantization
from evaluation.table import Result, Settings

COLORS = dict(zip(quantization.MODES, ("#1b6ca8", "#c44e00", "#2a7f3f", "#8a3ab9"), strict=True))


def draw(settings: Settings, results: Sequence[Result], path: Path) -> None:
    """Writes a picture of perplexity against size, beside its place first, so that it is never half-written.

    Raises:
        UsageError: it cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    in_memory = all(result.memory.total is not None for result in results)
    points = [
        (size / 1e6, result.perplexity, result.variant)
        for result in results
        for size in [result.memory.total if in_memory else result.disk.total]
        if size is not None and math.isfinite(result.perplexity)
    ]
    with matplotlib.rc_context({"svg.hashsalt": "evaluate", "font.size": 11, "text.parse_math": False}):
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # which measures text, and needs no display
        axes = figure.add_subplot()
        axes.margins(0.14, 0.16)
        for x, y, name in points:
            axes.plot([x], [y], "o", markersize=9, color=_color(name))
        axes.set_xlabel(f"weights {'in memory' if in_memory else 'on disk'}, MB")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_title(
            f"{settings.text}, {settings.tokens} tokens, window {settings.context}, stride {settings.stride}"
        )
        axes.ticklabel_format(useOffset=False)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, points)
        picture.write(figure, path)


def _color(variant: str) -> str:
    """One for each quantization mode."""
    return next((COLORS[word] for word in variant.split("+") if word in COLORS), "#555555")


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names points, each as near to its point as no other name or point is in the way, with a line if it is far."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # which settles where everything is
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    centers = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - 6 * pixels, y - 6 * pixels, x + 6 * pixels, y + 6 * pixels) for x, y in centers]
    turns = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    sides = {1: "left", 0: "center", -1: "right"}
    line = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
    heights = {1: "bottom", 0: "center", -1: "top"}
    places = [(turn, distance) for distance in range(9, 300, 9) for turn in turns]
    for x, y, name in sorted(points):
        for (right, up), distance in [*places, (turns[0], 9)]:  # the last one, if there is no room at all
            is_near = distance == 9 and 0 in (right, up)
            corner = (0.5 - right / 2, 0.5 - up / 2)  # of the text, where a line to the point begins
            label = axes.annotate(
                name,
                (x, y),
                xytext=(right * distance, up * distance),
                textcoords="offset points",
                ha=sides[right],
                va=heights[up],
                color=_color(name),
                arrowprops=None if is_near else {**line, "color": _color(name), "relpos": corner},
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
