"""A plug-in within a graph: what is known of its results before it runs, and how it runs on arrays.

As an operation it has the kind ``plugin`` and these attributes: ``name``, ``version`` and ``namespace``, by which its
meaning is looked up; ``fields``, those that the call gives; ``input_dtypes``, the element types that its function gets
(a pass may have taken casts in front of it away); ``output_info``, the ranks and element types of what it gives; and
``has_effects``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nvtripy_portable import reference
from nvtripy_portable.dims import Dim
from nvtripy_portable.graph import DTYPE_NAMES, DTYPES, GraphError, TensorType
from nvtripy_portable.plugins.native import NativeError, as_rows
from nvtripy_portable.plugins.registry import Plugin, PluginError, find


def of(attributes: Mapping[str, Any]) -> Plugin:
    """The meaning of an operation with these attributes.

    Raises:
        PluginError: it has none, or the fields are not those that it has.
    """
    plugin = find(attributes["name"], attributes["version"], attributes["namespace"])
    plugin.complete(attributes["fields"])
    return plugin


def check_counts(plugin: Plugin, inputs: int, outputs: int) -> None:
    """That a call has as many inputs and outputs as the plug-in.

    Raises:
        PluginError: it has not.
    """
    least, most = plugin.inputs if isinstance(plugin.inputs, tuple) else (plugin.inputs, plugin.inputs)
    if least is not None and most is not None and not least <= inputs <= most:
        wanted = least if least == most else f"{least} to {most}"
        raise PluginError(f"{plugin}: expected {wanted} inputs but got {inputs}")
    if outputs != plugin.outputs:
        raise PluginError(f"{plugin}: expected output_info of {plugin.outputs} outputs but got {outputs}")


def infer(operands: Sequence[TensorType], attributes: Mapping[str, Any]) -> list[TensorType]:
    """The types of the results, as far as they can be known.

    Raises:
        GraphError: the plug-in refuses the shapes, or gives others than promised.
    """
    plugin = find(attributes["name"], attributes["version"], attributes["namespace"])
    ranks, dtypes = zip(*attributes["output_info"], strict=True)
    shapes: list[tuple[Dim, ...]] = [(None,) * rank for rank in ranks]
    known = [operand.shape for operand in operands]
    is_static = all(isinstance(dim, int) for shape in known for dim in shape)
    try:
        found = _shapes(plugin, known, plugin.complete(attributes["fields"]))
        for number, (shape, rank) in enumerate(zip(found, ranks, strict=True)):
            if len(shape) != rank:
                raise PluginError(f"{plugin}: expected output {number} of rank {rank} but its shape is {shape}")
        shapes = found
    except PluginError as error:
        raise GraphError(str(error)) from None
    except Exception as error:
        # A function that was written for numbers may stumble over symbols; when it runs, it gets numbers.
        if is_static:
            raise GraphError(f"{plugin}: {error}") from error
    return [TensorType(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True)]


def _shapes(plugin: Plugin, shapes: Sequence[tuple[Dim, ...]], fields: Mapping[str, Any]) -> list[tuple[Dim, ...]]:
    """The outputs' shapes, from the inputs'."""
    if plugin.shapes is None:
        if not shapes:
            raise PluginError(f"{plugin}: expected shapes to be registered, as there is no input to be like")
        return [shapes[0]] * plugin.outputs
    given = plugin.shapes(*shapes, **fields)
    are_several = any(isinstance(each, (tuple, list)) for each in given)
    found = [tuple(each) for each in (given if are_several else [given])]
    if len(found) != plugin.outputs:
        raise PluginError(f"{plugin}: expected shapes to give {plugin.outputs} shapes but got {len(found)}")
    return found


def run(
    *arrays: np.ndarray,
    name: str,
    version: str,
    namespace: str,
    fields: Mapping[str, Any],
    input_dtypes: Sequence[str],
    output_info: Sequence[tuple[int, str]],
    has_effects: bool,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """Calls a plug-in on arrays: its NumPy function, or the native one where it has no other.

    Raises:
        PluginError: it has no meaning, or it failed, or gave something else than was promised.
    """
    plugin = find(name, version, namespace)
    complete = plugin.complete(fields)
    inputs = [
        array if DTYPE_NAMES[array.dtype] == dtype else reference.cast(array, dtype=DTYPES[dtype])
        for array, dtype in zip(arrays, input_dtypes, strict=True)
    ]
    try:
        shapes = _shapes(plugin, [each.shape for each in inputs], complete)
        expected = [TensorType(dtype, shape) for (_, dtype), shape in zip(output_info, shapes, strict=True)]
        if plugin.compute is None:
            results = _call_native(plugin, inputs, expected, complete)
        else:
            given = plugin.compute(*map(_read_only, inputs), **complete)
            results = [np.asarray(each) for each in (given if isinstance(given, (tuple, list)) else (given,))]
    except PluginError:
        raise
    except NativeError as error:
        raise PluginError(f"{plugin}: {error}") from None
    except Exception as error:
        raise PluginError(f"{plugin}: {type(error).__name__}: {error}") from error
    _check(plugin, results, expected)
    return tuple(results) if len(results) > 1 else results[0]


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view: what a function gets is others', too."""
    view = array.view()
    view.flags.writeable = False
    return view


def _check(plugin: Plugin, results: Sequence[np.ndarray], expected: Sequence[TensorType]) -> None:
    if len(results) != len(expected):
        raise PluginError(f"{plugin}: expected {len(expected)} results but got {len(results)}")
    for number, (result, type) in enumerate(zip(results, expected, strict=True)):
        if result.dtype != DTYPES[type.dtype] or result.shape != type.shape:
            raise PluginError(
                f"{plugin}: expected result {number} to be {DTYPES[type.dtype]}{list(type.shape)} "
                f"but got {result.dtype}{list(result.shape)}"
            )


def _call_native(
    plugin: Plugin, inputs: Sequence[np.ndarray], expected: Sequence[TensorType], fields: Mapping[str, Any]
) -> list[np.ndarray]:
    assert plugin.native is not None
    arrays = [np.ascontiguousarray(each).reshape(each.shape) for each in inputs]
    results = [np.empty(tuple(map(int, type.shape)), DTYPES[type.dtype]) for type in expected]  # type: ignore[arg-type]
    outputs = results
    if plugin.rows:
        arrays = [as_rows(each) if plugin.has_rows(number) else each for number, each in enumerate(arrays)]
        outputs = [as_rows(each) for each in results]
        counts = {len(each) for number, each in enumerate(arrays) if plugin.has_rows(number)}
        if counts != {len(each) for each in outputs} or len(counts) != 1:
            raise PluginError(f"{plugin}: expected as many rows of every input and output")
    plugin.native.call(arrays, outputs, plugin.described(fields))
    return results
