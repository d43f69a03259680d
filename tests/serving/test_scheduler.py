"""Which tokens of which sequences a step computes: what can be said without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nvtripy_portable.pages import PagePool
from serving.adapters import AdapterSlots
from serving.pages import SharedPages
from serving.scheduler import Scheduler
from serving.sequence import Sequence
from serving.settings import SamplingSettings

PAGE = 8


def sequence(number: int, length: int) -> Sequence:
    nothing: Any = None
    return Sequence((0, number, 0), 0, [1] * length, SamplingSettings(), frozenset(), nothing, nothing)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("window", [None, 11, 20])
@pytest.mark.parametrize("budget", [3, 16, 512])
def test_prompts_longer_than_a_window_need_no_more_pages_than_there_are(window: int | None, budget: int) -> None:
    """A step ends, each brings some prompt further, and nobody is admitted only to be put aside at once."""
    no_slots = AdapterSlots(SimpleNamespace(slots=0))
    scheduler = Scheduler(SharedPages(PagePool(7), PAGE, False), 48, window, 8, budget, no_slots)
    waiting = [sequence(number, 40) for number in range(5)]
    for each in waiting:
        scheduler.add(each)
    for _ in range(400):
        work = scheduler.step()
        if not work:
            break
        for each in work:
            scheduler.computed(each, len(each.ids))
            if each.sequence.computed == 40:
                scheduler.remove(each.sequence)
    assert not scheduler.running and not scheduler.waiting and scheduler.pages.used == 0
    assert scheduler.preemptions <= 40
