"""Runs a native program on arrays: one call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nvtripy_portable import reference
from nvtripy_portable.cpu import native
from nvtripy_portable.cpu.lowering import Lowered, is_fused, lower
from nvtripy_portable.cpu.versions import LOCK, Step, Version, raw
from nvtripy_portable.graph import Graph
from nvtripy_portable.interpreter import ExecutionError, where
from nvtripy_portable.plugins import PluginError


class Executor:
    """A graph's native program."""

    def __init__(self, lowered: Lowered, module: Any) -> None:
        self.lowered = lowered
        self._module = module

    @staticmethod
    def of(graph: Graph) -> Executor | None:
        """The executor of a graph, or None where it has to be interpreted.

        Raises:
            ExecutionError: the environment asks for an instruction set or a number of threads that cannot be.
        """
        if not is_fused(graph):
            return None
        try:
            module = native.load()
            lowered = None if module is None else lower(graph, module)
        except ValueError as error:
            raise ExecutionError(str(error)) from error
        return None if lowered is None else Executor(lowered, module)

    def run(self, inputs: Sequence[np.ndarray | Version]) -> list[np.ndarray | Version]:
        """The graph's outputs: arrays, and of caches their next versions.

        Raises:
            ExecutionError: a token id, a position or a row that is not in its table, or a plug-in that fails. The
                inputs are as before then.
        """
        lowered = self.lowered
        results: list[np.ndarray | Version] = []
        arrays = []
        for output in lowered.outputs:
            if output.cache is None:
                shape = (*inputs[output.source].shape[: output.leading], output.width)
                arrays.append(np.empty(shape, np.float32))
        integers = [_array(inputs[each]) for each in lowered.integers]
        tables = [raw(_array(inputs[each])) for each in lowered.tables]
        floats = [np.ascontiguousarray(_array(inputs[each]), np.float32) for each in lowered.floats]
        if not lowered.caches:
            self.call(integers, [], tables, floats, arrays)
            steps = []
        else:
            with LOCK:
                steps = self._steps(inputs)
                try:
                    self.call(integers, [raw(step.memory) for step in steps], tables, floats, arrays)
                except BaseException:
                    for step in steps:
                        step.take_back()
                    raise
        remaining = iter(arrays)
        for output in lowered.outputs:
            if output.cache is None:
                array = next(remaining)
                results.append(array if array.dtype == output.dtype else reference.cast(array, dtype=output.dtype))
            else:
                results.append(steps[output.cache].new)
        return results

    def _steps(self, inputs: Sequence[np.ndarray | Version]) -> list[Step]:
        lowered = self.lowered
        steps = []
        for cache, position, (source, dimension) in zip(
            lowered.caches, lowered.positions, lowered.lengths, strict=True
        ):
            length = inputs[source].shape[dimension]
            steps.append(Step(inputs[cache], _array(inputs[position]), length, self._module))
        return steps

    def call(
        self,
        integers: list[np.ndarray],
        caches: list[np.ndarray],
        tables: list[np.ndarray],
        floats: list[np.ndarray],
        outputs: list[np.ndarray],
    ) -> None:
        """Runs the program as it is: fills ``outputs``, float32, and writes into ``caches``.

        Raises:
            ExecutionError: as :meth:`run`.
        """
        try:
            self.lowered.program.run(integers, caches, tables, floats, outputs)
        except (IndexError, ValueError) as error:
            raise ExecutionError(f"{error}{where(self.lowered.location)}") from error
        except self._module.PluginError as error:
            raise ExecutionError(str(error)) from error

    def step(
        self,
        tokens: np.ndarray,
        segments: np.ndarray,
        tables: np.ndarray,
        rows: np.ndarray,
        memory: np.ndarray,
        page_tokens: int,
        adapters: list[np.ndarray],
        empty: np.ndarray,
        logits: np.ndarray,
    ) -> None:
        """One packed step, as ``decoder.Decoder.run`` describes it, of a program that is a decoder.

        Raises:
            ValueError: a token id, a position or a row that is not in its table, or pages that do not hold the tokens.
            PluginError: a plug-in failed.
        """
        try:
            self.lowered.program.step(tokens, segments, tables, rows, memory, page_tokens, adapters, empty, logits)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{error}{where(self.lowered.location)}") from error
        except self._module.PluginError as error:
            raise PluginError(str(error)) from error


def _array(value: np.ndarray | Version) -> np.ndarray:
    return value.copy() if isinstance(value, Version) else np.ascontiguousarray(value)
