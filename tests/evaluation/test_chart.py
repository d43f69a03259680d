"""The picture of perplexity: written whole, the same each time, and with names that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from results import RESULTS, SETTINGS, result

from evaluation import chart


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="pictures need requirements-chart.txt")


@pytest.mark.parametrize("name", ["picture.png", "picture.SVG"])
def test_picture(matplotlib: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("what was there before")
    finite = RESULTS[:2]
    chart.draw(SETTINGS, finite, path)
    once = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if path.suffix == ".png":
        from matplotlib import image

        pixels = image.imread(path)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600 and pixels.std() > 0.01
    else:
        text = once.decode()
        assert "<svg" in text and "float16" in text and "int4-weight-only+lm-head" in text
    chart.draw(SETTINGS, finite, path)
    assert path.read_bytes() == once


def test_names_in_a_picture_do_not_overlap(matplotlib: Any) -> None:
    """A dozen variants that are nearly equal, and one far off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(9, 5.5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(4.0 + 0.01 * n, 20.0 + 0.01 * (n % 3), f"int8-smoothquant+kv-{n}") for n in range(12)]
    points.append((15.0, 25.0, "float32"))
    for x, y, _ in points:
        axes.plot([x], [y], "o")
    chart._label(axes, points)
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in axes.texts]
    assert sorted(label.get_text() for label in axes.texts) == sorted(name for *_, name in points)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_a_name_that_has_no_room_is_written_all_the_same(matplotlib: Any, tmp_path: Path) -> None:
    chart.draw(SETTINGS, [result("/a/very/long/path" * 20)], tmp_path / "picture.svg")
    assert "/a/very/long/path" in (tmp_path / "picture.svg").read_text()
