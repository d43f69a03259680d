"""Results of an evaluation, made up: for the tests of how they are shown."""

from __future__ import annotations

from typing import Any

from evaluation.speed import Speed
from evaluation.table import Result, Settings
from evaluation.weights import WeightBytes

SETTINGS = Settings("a|b.txt", 700, 1500, True, 512, 256, 32, 128, 3, "AMD EPYC", 2, "0.1.7")


def result(variant: str, size: int = 1_000_000, perplexity: float = 20.0, **changes: Any) -> Result:
    weights = WeightBytes(size, size // 2, size // 4)
    values: dict[str, Any] = {
        "dtype": "float16",
        "ratio": 1.0,
        "bits_per_byte": 2.0,
        "speed": Speed(100.0, 0.01, 50_000_000),
        "disk": weights,
        "memory": weights,
    }
    return Result(variant=variant, perplexity=perplexity, **(values | changes))


RESULTS = [
    result("float16", 2_000_000),
    result("int4-weight-only+lm-head", 600_000, 21.5, ratio=1.075),
    result("over|flow", perplexity=float("inf"), ratio=float("inf"), memory=WeightBytes()),
]
