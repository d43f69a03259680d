"""The fall-back executor: a plan, step by step, through the reference functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from nvtripy_portable.plan import Plan, Step

_NVTRIPYS_OWN = r"[/\\]nvtripy[/\\]"


class ExecutionError(Exception):
    """A step failed on the arrays that it got; the message says which, and where it came from."""


def run(plan: Plan, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a plan: writable, row-major, and sharing memory with neither inputs, constants nor each other."""
    slots: list[np.ndarray | None] = [None] * plan.num_slots
    slots[: plan.num_inputs] = inputs
    for index, value in plan.constants.items():
        slots[index] = value
    for step in plan.steps:
        operands = [None if slot is None else slots[slot] for slot in step.operands]
        try:
            results = step.function(*operands)
        except Exception as error:
            raise ExecutionError(_describe(step, operands, error)) from error
        if len(step.results) == 1:
            slots[step.results[0]] = results
        else:
            for slot, result in zip(step.results, results, strict=True):
                slots[slot] = result
        for slot in step.freed:
            slots[slot] = None
    taken = {id(_root(array)) for array in (*inputs, *plan.constants.values())}
    outputs = []
    for slot in plan.outputs:
        array = np.asarray(slots[slot])
        owned = np.ascontiguousarray(array).reshape(array.shape)
        if id(_root(owned)) in taken or not owned.flags.writeable:  # as NumPy makes broadcasts, even of one element
            owned = owned.copy()
        taken.add(id(_root(owned)))
        outputs.append(owned)
    return outputs


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _describe(step: Step, operands: Sequence[np.ndarray | None], error: Exception) -> str:
    shapes = ", ".join("none" if each is None else f"{each.dtype}{list(each.shape)}" for each in operands)
    return f"{step.kind}({shapes}): {error}{where(step.location)}"


def shortened(location: str) -> str:
    """What an error message says of a location: the lines of the user's program, innermost first; all of it where there
    are none. The location itself is nvtripy's whole stack, several kilobytes."""
    frames = re.findall(r"--> (.*?:\d+ in \S+\(\))", location)
    users = [frame for frame in frames if not re.search(_NVTRIPYS_OWN, frame)]
    return "\n".join(f"--> {frame}" for frame in users[:3]) or location


def where(location: str) -> str:
    """The shortened location as the end of a message."""
    indent = "\n    " if "-->" in location else "\n"
    return "".join(f"{indent}{line}" for line in shortened(location).split("\n"))
