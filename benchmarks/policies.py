"""How fast weights stream under each prefetch policy, in turns; and whether the one that was chosen is right."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOO_FAR = 1.10  # times as fast as the chosen policy: another one that is so shows that the choice is wrong
REPEATS = 2  # more measurements before that is said: a busy machine can make any policy look slow for a while
Measure = Callable[[Sequence[str]], "Turns"]


@dataclass
class Turns:
    """What was measured in each round, by policy: seconds of a step, and of reading a byte of a large buffer."""

    steps: dict[str, list[float]]
    reads: dict[str, list[float]]

    def share(self, policy: str, size: int) -> float:
        """A step's ``size`` bytes a second, of the bandwidth: in each round of the fastest read; the median."""
        best = [min(reads) for reads in zip(*self.reads.values(), strict=True)]
        return statistics.median(size / step * read for step, read in zip(self.steps[policy], best, strict=True))

    def lead(self, policy: str, chosen: str) -> float:
        """How many times as fast a policy is as the chosen one, in the median round."""
        pairs = zip(self.steps[chosen], self.steps[policy], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)

    def best(self, chosen: str) -> str:
        """The policy with the largest lead; the chosen one where none has any."""
        return max((chosen, *self.steps), key=lambda policy: self.lead(policy, chosen))


def measure(
    policies: Sequence[str],
    choose: Callable[[str], object],
    step: Callable[[], float],
    read: Callable[[], float],
    rounds: int,
) -> Turns:
    """Lets the policies take turns.

    Args:
        choose: Sets a policy.
        step: Seconds of one step.
        read: Seconds for a byte of a buffer.
    """
    turns = Turns({each: [] for each in policies}, {each: [] for each in policies})
    for number in range(rounds):
        for policy in policies if number % 2 else reversed(policies):
            choose(policy)
            turns.reads[policy].append(read())
            turns.steps[policy].append(min(step() for _ in range(3)))  # other programs only ever take time away
    return turns


def is_wrong(turns: Turns, chosen: str, again: Measure) -> bool:
    """Whether another policy is ``TOO_FAR`` ahead of the chosen one, and still so when only these two are measured."""
    best = turns.best(chosen)
    for _ in range(REPEATS):
        if turns.lead(best, chosen) < TOO_FAR:
            return False
        turns = again([chosen, best])
    return turns.lead(best, chosen) >= TOO_FAR
