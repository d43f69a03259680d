"""A compiled model that continues sequences, called without nvtripy in between.

``nvtripy.Executable.__call__`` checks its arguments and makes tensors of its results. That takes 20 microseconds while
its code and data are in the processor's caches, and 300 after a step that read a model's weights through them: a sixth
of a token of GPT-2 in int4. And as it cannot know who else holds a cache that it is given, it has to keep what a step
overwrites (``cpu/versions.py``). Here the cache has one owner.

Example::

    decoder = Decoder.of(executable)  # a function of (idx, position, cache, last) that gives (logits, cache)
    logits = decoder.step(idx, position, last)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.cpu.lowering import Output
from nvtripy_portable.cpu.versions import raw
from nvtripy_portable.executable import Executable
from nvtripy_portable.graph import DTYPES, Graph
from nvtripy_portable.interpreter import ExecutionError

if TYPE_CHECKING:
    import nvtripy as tp


class Decoder:
    """A model and the cache of the sequences that it continues, all zero at first. Made by :meth:`of`."""

    def __init__(self, executor: Executor, graph: Graph, output: Output) -> None:
        (cache,) = executor.lowered.caches
        given = [index for index in range(len(graph.inputs)) if index != cache]
        self._executor = executor
        self._integers = [given.index(index) for index in executor.lowered.integers]
        self._source, self._leading, self._width = given.index(output.source), output.leading, output.width
        type = graph.inputs[cache].value.type
        shape = [int(size) for size in type.shape]  # type: ignore[arg-type]  # static, in what was lowered
        self._caches = [raw(np.zeros(shape, DTYPES[type.dtype]))]

    @staticmethod
    def of(executable: tp.Executable) -> Decoder | None:
        """The decoder of a compiled function, or None where there can be none: NVIDIA's runtime runs it, or it is
        interpreted, or it is anything else than integers and one cache to float32 numbers and the cache's next version.

        Raises:
            ValueError: the environment asks for an instruction set or a number of threads that cannot be.
        """
        # nvtripy has no public name for what its runtime gave it.
        compiled = getattr(getattr(executable, "_executable", None), "portable", None)
        if not isinstance(compiled, Executable):
            return None
        try:
            runner = compiled.runner()
        except ExecutionError as error:
            raise ValueError(str(error)) from None
        if not isinstance(runner, Executor):
            return None
        lowered = runner.lowered
        arrays = [output for output in lowered.outputs if output.cache is None]
        is_decoder = len(lowered.caches) == len(arrays) == 1 and not lowered.floats and arrays[0].dtype == np.float32
        return Decoder(runner, compiled.graph, arrays[0]) if is_decoder else None

    def step(self, *inputs: np.ndarray) -> np.ndarray:
        """The numbers for the function's inputs without the cache, which is the next version from then on.

        Raises:
            ValueError: a shape that does not fit, or a token id, a position or a row that is not in its table. The
                cache is as before then.
        """
        integers = [np.ascontiguousarray(inputs[index], np.int32) for index in self._integers]
        numbers = np.empty((*inputs[self._source].shape[: self._leading], self._width), np.float32)
        try:
            self._executor.call(integers, self._caches, [], [numbers])
        except ExecutionError as error:
            raise ValueError(str(error)) from None
        return numbers
