"""Memory that never changes is kept, not copied; all other memory of the caller's is copied."""

from __future__ import annotations

import gc

import numpy as np
import nvtripy as tp
import pytest

from nvtripy_portable import unchanging
from nvtripy_portable.unchanging import is_unchanging, never_changes


def product(weight: tp.Tensor) -> tp.Executable:
    return tp.compile(lambda x: x @ weight, args=[tp.InputInfo((2, 64), dtype=tp.float32)])


def product_of_rows(rows: tp.Tensor) -> tp.Executable:
    return tp.compile(lambda x: x @ tp.transpose(rows, 0, 1), args=[tp.InputInfo((2, 64), dtype=tp.float32)])


def apply(executable: tp.Executable, x: np.ndarray) -> np.ndarray:
    return np.from_dlpack(executable(tp.copy(tp.Tensor(x), tp.device("gpu"))))


@pytest.mark.parametrize("is_given", [False, True])
def test_only_what_never_changes_is_kept(is_given: bool) -> None:
    random = np.random.default_rng(0)
    weight, x = (random.standard_normal(shape).astype(np.float32) for shape in ((64, 48), (2, 64)))
    array = weight.copy()
    executable = product(tp.Tensor(never_changes(array) if is_given else array))
    np.testing.assert_allclose(apply(executable, x), x @ weight, rtol=1e-4, atol=1e-4)
    if not is_given:
        array[:] = 0
        np.testing.assert_allclose(apply(executable, x), x @ weight, rtol=1e-4, atol=1e-4)


def test_the_memory_itself_is_in_the_executable() -> None:
    """Where it lies as it is used: a matrix of which the columns are the output features, transposed in the graph."""
    rows = never_changes(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32))
    executable = product_of_rows(tp.Tensor(rows))
    constants = [
        operation.attributes["value"]
        for operation in executable._executable.portable.graph.operations
        if operation.kind == "constant"
    ]
    assert any(np.shares_memory(rows, constant) for constant in constants)
    x = np.ones((2, 64), np.float32)
    expected = x @ rows.T
    del rows, constants
    gc.collect()
    np.testing.assert_allclose(apply(executable, x), expected, rtol=1e-4, atol=1e-4)


def test_it_is_forgotten_with_the_array() -> None:
    array = never_changes(np.zeros(1000))
    assert is_unchanging(array) and is_unchanging(array.reshape(10, 100)) and is_unchanging(array[:10])
    assert not is_unchanging(array[1:]) and not is_unchanging(np.zeros(1000))
    address = array.__array_interface__["data"][0]
    del array
    gc.collect()
    assert address not in unchanging._sizes


def test_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an array that owns its memory but got a view"):
        never_changes(np.zeros(10)[:5])
