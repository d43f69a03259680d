"""The picture of perplexity: written whole, the same each time, and with names that can be read."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results import RESULTS, SETTINGS, result

from evaluation import chart
from evaluation.chart import Point


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="pictures need requirements/evaluate.txt")


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
    points = [Point(4.0 + 0.01 * n, 20.0 + 0.01 * (n % 3), f"int8-smoothquant+kv-{n}", "black") for n in range(12)]
    points.append(Point(15.0, 25.0, "float32", "black"))
    for point in points:
        axes.plot([point.x], [point.y], "o")
    chart._label(axes, points)
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in axes.texts]
    assert sorted(label.get_text() for label in axes.texts) == sorted(point.name for point in points)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_a_name_that_has_no_room_is_written_all_the_same(matplotlib: Any, tmp_path: Path) -> None:
    chart.draw(SETTINGS, [result("/a/very/long/path" * 20)], tmp_path / "picture.svg")
    assert "/a/very/long/path" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize("against", chart.AXES)
def test_what_the_axes_show(matplotlib: Any, tmp_path: Path, against: str) -> None:
    picture = tmp_path / "picture.svg"
    several = [result("float16", 800), result("int4-weight-only", 200, 21.0), result("int3-weight-only", 150, 99.0)]
    chart.draw(SETTINGS, several, picture, against)
    text = picture.read_text()
    assert ("bits a weight" in text) == (against == "bits") and ("MB" in text) == (against == "size")
    assert "perplexity" in text
    chart.draw(replace(SETTINGS, is_one_tokenizer=False), several, picture, against)
    assert "bits per byte of text" in picture.read_text()


def test_a_family_has_a_color_and_a_line() -> None:
    names = ["float16", "int8-weight-only", "int4-weight-only", "int8-weight-only+kv-int8", "fp8", "float32"]
    plain, int8, int4, cache, fp8, other = chart._colors(names)
    assert plain == other == chart.PLAIN
    assert int8 == int4 and len({plain, int8, cache, fp8}) == 4
    points = [Point(x, 20.0, name, "black") for x, name in [(8.0, "out+int8"), (3.0, "out+int3"), (4.0, "fp8")]]
    assert [[p.x for p in family] for family in chart._families(points).values()] == [[3.0, 8.0], [4.0]]
    results = doctest.testmod(chart)
    assert results.attempted == 1 and results.failed == 0
