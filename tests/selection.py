"""Which of many cases `make test` runs; `make test-all` runs them all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def partly_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: the cases, of which those that are not among `quick` are marked slow."""
    return [
        case if case in quick else pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.slow)
        for case in cases
    ]
