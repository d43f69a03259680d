"""What ranks compute together: sums and columns, in NumPy and in C, with functions that stand for MPI's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvtripy as tp
import pytest
from random_gpt import random_model

from engine import compile_model
from model import GPTConfig, gathered, looked_up, summed
from nvtripy_portable import collectives
from nvtripy_portable.cpu import executor as executor_module
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.plugins import PluginError, registry

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

RANKS = 3
CONFIG = GPTConfig(
    vocab_size=50,
    n_positions=12,
    n_layer=2,
    n_head=2,
    head_dim=8,
    n_embd=48,
    n_inner=32,
    tp_size=RANKS,
    dtype="float32",
)
X = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)


def everyones(array: np.ndarray) -> list[np.ndarray]:
    """What ranks have: this one the array, the others the same with other signs and sizes."""
    return [array, *(array * each for each in (-0.3, 1e-3))]


class StandIn:
    """MPI_Allgather and MPI_Error_string in this process, for handles of a size."""

    def __init__(self, handle_bytes: int) -> None:
        handle: Any = {4: ctypes.c_int, 8: ctypes.c_void_p}[handle_bytes]
        self.calls: list[tuple[int, int, int]] = []
        self.code = 0

        def all_gather(sent: int, count: int, type: int, received: int, _: int, __: int, communicator: int) -> int:
            self.calls.append((count, type, communicator))
            mine = np.frombuffer((ctypes.c_char * count).from_address(sent), np.float32)
            parts = np.stack(everyones(mine)).astype(np.float32)
            ctypes.memmove(received, parts.ctypes.data, parts.nbytes)
            return self.code

        def error_string(code: int, text: int, length: int) -> int:
            ctypes.memmove(text, f"the code is {code}".encode() + b"\0", 16)
            return 0

        pointer = ctypes.c_void_p
        gather_type = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, ctypes.c_int, handle, pointer, ctypes.c_int, handle, handle
        )
        text_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, pointer, pointer)
        self.held = [gather_type(all_gather), text_type(error_string), handle(7), handle(8)]
        addresses = [ctypes.cast(each, pointer).value or 0 for each in self.held[:2]]
        addresses += [ctypes.addressof(each) for each in self.held[2:]]
        self.functions = collectives.MpiFunctions(*addresses, handle_bytes)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


@pytest.fixture(params=[4, 8, None], ids=["int handles", "pointer handles", "NumPy"])
def mpi(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn | None:
    """Registers them; None: without MPI, and without native programs."""
    if request.param is None:
        monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
        collectives.register(RANKS, everyones)
        return None
    stand_in = StandIn(request.param)
    collectives.register(RANKS, everyones, stand_in.functions)
    return stand_in


def on_device(array: np.ndarray) -> tp.Tensor:
    return tp.copy(tp.Tensor(array), tp.device("gpu"))


def compiled(function: Any, *shape: Any) -> tp.Executable:
    return tp.compile(function, args=[tp.InputInfo(shape, dtype=tp.float32)])


def test_a_sum_is_in_the_order_of_the_ranks(mpi: StandIn | None) -> None:
    weight = tp.Tensor(np.eye(48, dtype=np.float32))
    executable = compiled(lambda x: x + summed(x @ weight, CONFIG), (1, 5, 9), 48)
    first, second, third = (each.astype(np.float32) for each in everyones(X))
    wanted = X + ((first + second) + third)
    assert np.array_equal(np.from_dlpack(executable(on_device(X))), wanted)
    if mpi is not None:
        assert mpi.calls == [(X.nbytes, 8, 7)]
        assert isinstance(executable._executable.portable.runner(), Executor)


@pytest.mark.parametrize("shape", [(5, 48), (2, 300, 48)])
def test_large_sums_are_taken_in_pieces(mpi: StandIn | None, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    executable = compiled(lambda x: summed(tp.relu(x) * 2.0, CONFIG), *shape)
    wanted = collectives.summed([each.astype(np.float32) for each in everyones(2 * np.maximum(x, 0))])
    assert np.array_equal(np.from_dlpack(executable(on_device(x))), wanted)


def test_columns_of_all_ranks_stand_side_by_side(mpi: StandIn | None) -> None:
    weight = tp.Tensor(np.eye(48, 17, dtype=np.float32))
    executable = compiled(lambda x: gathered(x @ weight, (5,), CONFIG), 5, 48)
    wanted = np.concatenate([each.astype(np.float32) for each in everyones(X[:, :17])], axis=1)
    assert np.array_equal(np.from_dlpack(executable(on_device(X))), wanted)
    if mpi is not None:
        assert isinstance(executable._executable.portable.runner(), Executor)


def test_what_mpi_says_is_said(mpi: StandIn | None) -> None:
    if mpi is None:
        pytest.skip("there is no MPI to say anything")
    mpi.code = 13
    weight = tp.Tensor(np.eye(48, dtype=np.float32))
    with pytest.raises(Exception, match=r"AllReduce(?s:.*)MPI: the code is 13"):
        compiled(lambda x: summed(x @ weight, CONFIG), 5, 48)(on_device(X))


def test_a_group_is_all_ranks() -> None:
    collectives.register(RANKS + 1, lambda x: [x] * 4)
    plugin = registry.find("AllReduce", "1", collectives.NAMESPACE)
    assert plugin.compute is not None
    with pytest.raises(PluginError, match=r"expected a group of all 4 ranks but got \(0, 1\)"):
        plugin.compute(X, group=(0, 1), type_id=0)


def test_handles_that_no_mpi_has() -> None:
    with pytest.raises(ValueError, match="expected MPI's handles to have 4 or 8 bytes but got 2"):
        collectives.register(2, everyones, collectives.MpiFunctions(0, 0, 0, 0, 2))


@pytest.mark.parametrize("dimension", [None, 0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("is_rotary", [False, True])
def test_a_ranks_model_is_one_native_program(dimension: int | None, dtype: str, is_rotary: bool) -> None:
    collectives.register(RANKS, everyones, StandIn(8).functions)
    changes = {"embedding_sharding_dim": dimension, "dtype": dtype, "tp_rank": 1}
    changes |= {"position_embedding": "rotary"} if is_rotary else {}
    config = GPTConfig(**{**CONFIG.__dict__, **changes})
    runner = compile_model(random_model(config), 1)._executable.portable.runner()
    assert isinstance(runner, Executor) and runner.lowered.takes_any_rows


@pytest.mark.parametrize("is_native", [True, False])
def test_rows_that_another_rank_has_are_zeros(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(executor_module.Executor, "of", staticmethod(lambda graph: None))
    table = np.random.default_rng(3).standard_normal((51, 8)).astype(np.float32)  # the last of 3 parts is padded
    table[50] = 0
    ids = np.array([[0, 16, 17, 33, 34, 49]], np.int32)
    found = []
    for rank in range(RANKS):
        config = GPTConfig(**{**CONFIG.__dict__, "embedding_sharding_dim": 0, "tp_rank": rank})
        part = tp.Tensor(np.ascontiguousarray(table[17 * rank : 17 * rank + 17]))
        rows = tp.compile(
            lambda idx, part=part, config=config: looked_up(lambda own: tp.gather(part, 0, own), idx, 50, config),
            args=[tp.InputInfo((1, (1, 6, 9)), dtype=tp.int32)],
        )
        found.append(np.from_dlpack(rows(on_device(ids))))
        assert isinstance(rows._executable.portable.runner(), Executor) == is_native
    assert np.array_equal(sum(found), table[ids])
    assert [np.count_nonzero(each.any(axis=-1)) for each in found] == [2, 2, 2]
