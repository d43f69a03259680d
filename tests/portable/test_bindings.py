"""What a user of nvtripy sees of the runtime: DLPack, copies, streams, errors, and who owns the memory of a result."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import nvtripy as tp
import pytest

import nvtripy_portable

torch = pytest.importorskip("torch", reason="memory is exchanged with torch")

# Imported after nvtripy, under the names that nvtripy knows them by: there is one MTRTException.
from mlir_tensorrt.runtime import api, dlpack  # noqa: E402

PORTABLE = Path(nvtripy_portable.__file__).resolve().parents[1]
HERE = Path(__file__).name

NUMPY_DTYPES = {
    np.float32: tp.float32,
    np.float16: tp.float16,
    np.int8: tp.int8,
    np.int32: tp.int32,
    np.int64: tp.int64,
    np.bool_: tp.bool,
}
TORCH_DTYPES = {
    torch.float32: tp.float32,
    torch.float16: tp.float16,
    torch.bfloat16: tp.bfloat16,
    torch.float8_e4m3fn: tp.float8,
    torch.int8: tp.int8,
    torch.int32: tp.int32,
    torch.int64: tp.int64,
    torch.bool: tp.bool,
}


def memory(tensor: tp.Tensor) -> np.ndarray:
    """The array behind an evaluated tensor, of any element type."""
    return tensor.trace_tensor.producer.data.array


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """An error's text without the colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error.value))


def on_device(values: Any) -> tp.Tensor:
    return tp.copy(tp.Tensor(np.ascontiguousarray(values)), tp.device("gpu"))


# --- DLPack in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=lambda dtype: dtype.__name__)
def test_a_numpy_array_is_viewed(dtype: type) -> None:
    array = np.array([[0, 1, 0], [1, 1, 0]], dtype)
    tensor = tp.Tensor(array)
    assert tensor.dtype == NUMPY_DTYPES[dtype]
    assert (tensor.device.kind, tuple(map(int, tensor.shape))) == ("cpu", (2, 3))
    assert memory(tensor).ctypes.data == array.ctypes.data
    array[0, 2] = 1
    assert tensor.tolist() == [[0, 1, 1], [1, 1, 0]]
    torch.from_dlpack(tensor)[1, 0] = 0
    assert array.tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_torch_tensor_is_viewed(dtype: Any) -> None:
    source = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]).to(dtype)
    tensor = tp.Tensor(source)
    assert tensor.dtype == TORCH_DTYPES[dtype]
    assert memory(tensor).ctypes.data == source.data_ptr()
    source[0, 2] = 1
    assert tensor.tolist() == [[0, 1, 1], [1, 1, 0]]
    back = torch.from_dlpack(tensor)
    assert (back.dtype, back.data_ptr()) == (dtype, source.data_ptr())
    back[1, 0] = 0
    assert source.float().tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_result_is_viewed(dtype: Any) -> None:
    values = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]).to(dtype)
    if dtype == torch.float8_e4m3fn:  # nvtripy lets few operations give one
        result = tp.quantize(tp.Tensor(values.float().T.contiguous()), 1.0, tp.float8).eval()
    else:
        result = tp.permute(tp.Tensor(values), (1, 0)).eval()
    assert result.device.kind == "gpu"
    view = torch.from_dlpack(result)
    assert (view.dtype, view.stride()) == (dtype, (2, 1))
    assert view.data_ptr() == memory(result).ctypes.data
    assert torch.equal(view.float(), values.float().T)
    view[0, 0] = 1
    assert result.tolist() == [[1, 1], [1, 1], [0, 0]]
    if dtype not in (torch.bfloat16, torch.float8_e4m3fn):  # which NumPy's from_dlpack does not know
        array = np.from_dlpack(result)
        assert array.ctypes.data == view.data_ptr()
        assert array.tolist() == [[1, 1], [1, 1], [0, 0]]


def test_a_part_of_an_array_is_viewed_where_it_is_contiguous() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensor = tp.Tensor(array[1:3])
    assert tensor.tolist() == array[1:3].tolist()
    assert memory(tensor).ctypes.data == array.ctypes.data + 6 * 4
    source = torch.arange(24.0)
    assert tp.Tensor(source[5:7]).tolist() == [5, 6]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_scalars_and_empty_arrays(shape: tuple[int, ...], library: str) -> None:
    source = np.full(shape, 7, np.int32) if library == "numpy" else torch.full(shape, 7, dtype=torch.int32)
    tensor = tp.Tensor(source)
    assert tensor.tolist() == source.tolist()
    result = (tensor + 1).eval()
    for view in (np.from_dlpack(result), torch.from_dlpack(result)):
        assert tuple(view.shape) == shape
        assert view.tolist() == (source + 1).tolist()


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 4, 1)], ids=str)
def test_the_strides_of_single_elements_do_not_count(shape: tuple[int, ...]) -> None:
    # NumPy and torch leave odd numbers in them.
    base = np.arange(8, dtype=np.float32).reshape(2, 4)
    odd = np.lib.stride_tricks.as_strided(base[1], shape, [4 if size == 4 else 4000 for size in shape])
    assert tp.Tensor(odd).tolist() == odd.tolist()
    assert tp.Tensor(
        torch.arange(8.0)[4:].as_strided(shape, [1 if size == 4 else 77 for size in shape], 4)
    ).tolist() == (odd.tolist())


ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    ("view", "strides", "advice"),
    [
        (ARRAY.T, "[1, 4]", "np.ascontiguousarray"),
        (ARRAY[:, ::2], "[4, 2]", "np.ascontiguousarray"),
        (ARRAY[:, 1:3], "[4, 1]", "np.ascontiguousarray"),
        (torch.tensor(ARRAY).T, "[1, 4]", "tensor.contiguous()"),
        (torch.tensor([1.0]).expand(3, 4), "[0, 0]", "tensor.contiguous()"),
    ],
    ids=["transposed", "every other", "columns", "torch", "expanded"],
)
def test_odd_strides_are_refused_in_nvtripys_words(view: Any, strides: str, advice: str) -> None:
    with pytest.raises(tp.TripyException) as error:
        tp.Tensor(view)
    text = message(error)
    assert "Non-canonical strides detected" in text
    assert f"Strides: {strides}" in text
    assert f"Shape: {list(view.shape)}" in text
    assert f"Expected canonical strides: [{view.shape[1]}, 1]" in text
    assert advice in text
    assert HERE in text


@pytest.mark.parametrize(
    ("view", "strides"),
    [(ARRAY[::-1], [-4, 1]), (ARRAY[:, ::-1], [4, -1]), (ARRAY[::-1, ::-1], [-4, -1]), (ARRAY[0, ::-2], [-2])],
    ids=["rows", "columns", "both", "every other"],
)
def test_negative_strides_are_refused(view: np.ndarray, strides: list[int]) -> None:
    # nvtripy's own explanation does not know of a minus sign, so this message has to be enough.
    with pytest.raises(api.MTRTException) as error:
        tp.Tensor(view)
    canonical = dlpack.canonical_strides(list(view.shape))
    assert str(error.value) == (
        f"Given strides {strides} do not match canonical strides {canonical} for shape {list(view.shape)}"
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (np.zeros(3), "float64"),
        (np.zeros(3, np.int16), "int16"),
        (np.zeros(3, np.uint8), "uint8"),
        (np.zeros(3, np.complex64), "complex64"),
        (np.zeros((0,)), "float64"),
        (torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(3, dtype=torch.complex128), "complex128"),
        (torch.zeros(3, dtype=torch.uint8), "uint8"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_element_type_that_nvtripy_lacks_is_refused(source: Any, name: str) -> None:
    with pytest.raises(api.MTRTException, match=rf"expected an element type out of .*float32.* but got {name}\b"):
        tp.Tensor(source)


class Capsule:
    """An array-like of a given capsule."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.capsule


def managed(capsule: Any) -> dlpack._DLManagedTensor:
    return dlpack._DLManagedTensor.from_address(dlpack._get_pointer(capsule, b"dltensor"))


def test_memory_of_another_device_is_refused() -> None:
    capsule = tp.Tensor(np.zeros(3, np.float32)).__dlpack__()
    managed(capsule).dl_tensor.device_type = 2  # CUDA's
    with pytest.raises(api.MTRTException, match="expected memory of the CPU but got DLPack device type 2"):
        tp.Tensor(Capsule(capsule))


def test_host_memory_of_cuda_is_taken() -> None:
    capsule = tp.Tensor(np.arange(3, dtype=np.float32)).__dlpack__()
    managed(capsule).dl_tensor.device_type = 3
    assert tp.Tensor(Capsule(capsule)).tolist() == [0, 1, 2]


def test_vectors_as_elements_are_refused() -> None:
    capsule = tp.Tensor(np.zeros(3, np.float32)).__dlpack__()
    managed(capsule).dl_tensor.dtype_lanes = 4
    with pytest.raises(api.MTRTException, match="expected an element type"):
        tp.Tensor(Capsule(capsule))


def test_a_byte_offset_and_absent_strides_are_understood() -> None:
    capsule = tp.Tensor(np.arange(6, dtype=np.float32)).__dlpack__()
    tensor = managed(capsule).dl_tensor
    tensor.byte_offset = 8
    tensor.shape[0] = 4
    tensor.strides = ctypes.POINTER(ctypes.c_int64)()
    assert tp.Tensor(Capsule(capsule)).tolist() == [2, 3, 4, 5]


def test_a_capsule_is_consumed_once() -> None:
    capsule = tp.Tensor(np.arange(3, dtype=np.float32)).__dlpack__()
    tensor = tp.Tensor(Capsule(capsule))
    for nothing in (capsule, None, 3):
        with pytest.raises(api.MTRTException, match="expected an unused DLPack capsule"):
            tp.Tensor(Capsule(nothing))
    assert tensor.tolist() == [0, 1, 2]


# --- lifetimes --------------------------------------------------------------------------------------------------------


class Owner(np.ndarray):
    """An array that can be watched (as any can) and is not confused with its views."""


def owner(size: int = 100_000, value: float = 7.0) -> Owner:
    return np.full(size, value, np.float32).view(Owner)


def test_memory_lives_as_long_as_anybody_looks_at_it() -> None:
    source = owner()
    alive = weakref.ref(source)
    tensor = tp.Tensor(source)
    del source
    gc.collect()
    assert alive() is not None
    view = torch.from_dlpack(tensor)
    del tensor
    gc.collect()
    assert alive() is not None
    assert view.sum() == 700_000
    again = tp.Tensor(view)
    del view
    gc.collect()
    array = np.from_dlpack(again)
    del again
    gc.collect()
    assert alive() is not None
    assert array[-1] == 7
    del array
    gc.collect()
    assert alive() is None


def test_the_memory_of_torch_is_given_back() -> None:
    source = torch.full((100_000,), 7.0)
    alive = weakref.ref(source.untyped_storage())
    pointer = source.data_ptr()
    tensor = tp.Tensor(source)
    del source
    gc.collect()
    assert memory(tensor).ctypes.data == pointer
    assert memory(tensor).sum() == 700_000
    del tensor
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_consumes_lets_go() -> None:
    source = owner()
    alive = weakref.ref(source)
    capsule = tp.Tensor(source).__dlpack__()
    del source
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "refused", [lambda: owner()[::2], lambda: owner().astype(np.float64)], ids=["strides", "element type"]
)
def test_a_refused_array_is_let_go(refused: Callable[[], np.ndarray]) -> None:
    source = refused()
    alive = weakref.ref(source)
    with pytest.raises((tp.TripyException, api.MTRTException)):
        tp.Tensor(source)
    del source
    sys.last_value = sys.last_traceback = None  # pytest's, which hold the frame
    gc.collect()
    assert alive() is None


def test_exporting_twice() -> None:
    source = owner()
    alive = weakref.ref(source)
    tensor = tp.Tensor(source)
    views = [torch.from_dlpack(tensor) for _ in range(3)]
    del source, tensor
    views[0][0] = 1
    del views[0]
    gc.collect()
    assert [view[0].item() for view in views] == [1, 1]
    assert alive() is not None
    views.clear()
    gc.collect()
    assert alive() is None


def test_a_view_may_die_in_any_thread() -> None:
    source = owner()
    alive = weakref.ref(source)
    views = [torch.from_dlpack(tp.Tensor(source)) for _ in range(20)]
    del source
    threads = [threading.Thread(target=views.pop) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert alive() is None


def test_exchanged_memory_at_the_interpreters_exit() -> None:
    # Destructors and exit handlers run late and in no particular order: none may crash, complain, or free too early.
    code = """
        import atexit
        def late():
            print(sum(kept.tolist()), sum(tensor.tolist()))
        atexit.register(late)
        import nvtripy_portable
        import numpy as np
        import nvtripy as tp
        class Last:
            def __del__(self, array=np.from_dlpack(tp.Tensor(np.full(1_000_000, 2.0, np.float32)))):
                print(array[0] + array[-1])
        tensor = tp.Tensor(np.full(1_000_000, 3.0, np.float32))  # large enough to have its own pages
        kept = np.from_dlpack(tp.Tensor(np.full(1_000_000, 4.0, np.float32)))
        unused = tensor.__dlpack__()
        last = Last()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PORTABLE)},
        timeout=300,
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "4000000.0 3000000.0\n4.0\n")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TORCH_DTYPES.values(), tp.int4], ids=str)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_tolist(dtype: Any, device: str) -> None:
    values = [[0, 1, 1, 0], [1, 0, 1, 1]]  # an even number, as TensorRT packs int4 two a byte
    tensor = tp.Tensor([[float(value) for value in row] for row in values])
    tensor = (
        tp.quantize(tensor, 1.0, dtype) if dtype in (tp.int4, tp.int8, tp.float8) else tp.cast(tensor, dtype)
    ).eval()
    assert (tensor.dtype, tensor.device.kind) == (dtype, "gpu")
    if device == "cpu":
        tensor = tp.copy(tensor, tp.device("cpu"))
    assert tensor.tolist() == values
    assert type(tensor.tolist()[0][0]) is (
        bool if dtype == tp.bool else int if dtype in (tp.int8, tp.int32, tp.int64) else float
    )


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "values",
    [1, -1.5, True, [], [[], []], [1, 2], [[1.5], [2.5]], [[True, False]], [2**40, -(2**63)], [[[0]]]],
    ids=str,
)
def test_python_values_go_in_and_out(values: Any, device: str) -> None:
    tensor = tp.Tensor(values, device=tp.device(device))
    assert tensor.device.kind == device
    assert tensor.tolist() == values


@pytest.mark.parametrize(
    "values", [[[1.5, 2.0], [3.0, 4.0]], [[1, 2], [3, 4]], [[True, False], [False, True]], 7, []], ids=str
)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_memref_is_a_buffer(values: Any, device: str) -> None:
    # nvtripy's tolist takes a memoryview, and before Python 3.12 only types written in C can offer one.
    memref = tp.Tensor(values, device=tp.device(device)).trace_tensor.producer.data
    view = memoryview(memref)
    assert view.c_contiguous
    assert view.shape == np.shape(values)
    assert view.tolist() == values


def test_copies_are_copies() -> None:
    source = np.arange(4, dtype=np.float32)
    host = tp.Tensor(source)
    device = tp.copy(host, tp.device("gpu"))
    back = tp.copy(device, tp.device("cpu"))
    assert (host.device.kind, device.device.kind, back.device.kind) == ("cpu", "gpu", "cpu")
    source[:] = -1
    torch.from_dlpack(device)[0] = 5
    assert host.tolist() == [-1, -1, -1, -1]
    assert device.tolist() == [5, 1, 2, 3]
    assert back.tolist() == [0, 1, 2, 3]
    with pytest.raises(tp.TripyException, match="Copying within the same device kind"):
        tp.copy(back, tp.device("cpu"))


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streams() -> None:
    first, second = tp.Stream(), tp.Stream()
    assert first != second
    assert first == first
    assert tp.default_stream() is tp.default_stream()
    assert len({first.ptr, second.ptr, tp.default_stream().ptr, 0}) == 4
    assert first.ptr == first.ptr
    assert isinstance(first.ptr, int)
    double = tp.compile(lambda x: x * 2.0, args=[tp.InputInfo((2,), tp.float32)])
    assert double.stream == tp.default_stream()
    double.stream = first
    result = double(on_device(np.float32([1, 2])))
    first.synchronize()
    assert result.tolist() == [2, 4]


def test_an_executable_runs_in_many_threads_at_once() -> None:
    compiled = tp.compile(
        lambda x: tp.sum(tp.stack([x, x * 2.0]) @ tp.ones((64, 64)), dim=1), args=[tp.InputInfo((8, 64), tp.float32)]
    )
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        for _ in range(5):
            results[number] = np.from_dlpack(compiled(on_device(np.full((8, 64), number, np.float32))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        np.testing.assert_array_equal(results[number], np.full((2, 64), 8 * 64 * number) * [[1], [2]])


# --- errors at a call -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled() -> tp.Executable:
    def scale(x: tp.Tensor, y: tp.Tensor) -> tp.Tensor:
        return x * y

    rows = tp.NamedDimension("rows", 1, 2, 4)
    return tp.compile(scale, args=[tp.InputInfo((rows, 3), tp.float32), tp.InputInfo((rows, (1, 3, 3)), tp.float32)])


def ones(*shape: int) -> tp.Tensor:
    return on_device(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            lambda: (ones(2, 3), on_device(np.ones((2, 3), np.float16))),
            ["data type", "parameter y", "float32", "got: float16"],
        ),
        (lambda: (ones(2, 3), ones(3)), ["tensor rank", "`y`", "expected a rank of: 2 but got: 1"]),
        (lambda: (ones(5, 3), ones(5, 3)), ["tensor shape", "`x`", "min=(1, 3), max=(4, 3)", "got: (5, 3)"]),
        (lambda: (ones(2, 4), ones(2, 3)), ["tensor shape", "`x`", "got: (2, 4)", "Dimension 1 has a shape of 4"]),
        (lambda: (ones(0, 3), ones(0, 3)), ["tensor shape", "`x`", "got: (0, 3)"]),
        (lambda: (ones(2, 3), ones(3, 3)), ["dimension 'rows' is 2 in arg0 but 3 in arg1"]),
        (lambda: (ones(2, 3), tp.Tensor(np.ones((2, 3), np.float32))), ["tensor device", "`y`", "gpu but got: cpu"]),
        (lambda: (ones(2, 3), tp.ones((2, 3))), ["`y` is not evaluated", "Try calling `.eval()`"]),
        (lambda: (ones(2, 3),), ["Missing argument: y", "['x', 'y']"]),
        (lambda: (), ["Missing argument: x", "['x', 'y']"]),
        (lambda: (ones(2, 3),) * 3, ["Incorrect number of arguments", "Expected 2 arguments but got 3"]),
    ],
    ids=["dtype", "rank", "bound", "static", "zero", "named", "device", "lazy", "missing", "none", "many"],
)
def test_a_wrong_argument_is_explained(
    scaled: tp.Executable, arguments: Callable[[], tuple], expected: list[str]
) -> None:
    with pytest.raises(tp.TripyException) as error:
        scaled(*arguments())
    text = message(error)
    for part in expected:
        assert part in text
    assert HERE in text


def test_a_wrong_keyword_is_explained(scaled: tp.Executable) -> None:
    assert scaled(y=ones(2, 1), x=ones(2, 3)).tolist() == [[1, 1, 1]] * 2
    with pytest.raises(tp.TripyException, match=r"Extra keyword arguments: \['z'\]"):
        scaled(ones(2, 3), ones(2, 3), z=ones(1))


def test_an_executable_still_works_after_an_error(scaled: tp.Executable) -> None:
    with pytest.raises(tp.TripyException):
        scaled(ones(5, 3), ones(5, 3))
    assert scaled(ones(4, 3), ones(4, 3)).tolist() == [[1, 1, 1]] * 4


@pytest.mark.parametrize("size_first", [False, True])
def test_dimension_inputs_are_bounded(size_first: bool) -> None:
    def split(x: tp.Tensor, width: tp.DimensionSize) -> tp.Tensor:
        return tp.reshape(x, (-1, width))

    def split_with_size_first(width: tp.DimensionSize, x: tp.Tensor) -> tp.Tensor:
        return split(x, width)

    infos = [tp.InputInfo(((1, 12, 24),), tp.float32), tp.DimensionInputInfo((2, 3, 6))]
    function = split_with_size_first if size_first else split
    compiled = tp.compile(function, args=infos[::-1] if size_first else infos)
    x = on_device(np.arange(12, dtype=np.float32))
    for width in (2, 3, 6):
        assert compiled(x=x, width=tp.DimensionSize(width)).tolist() == np.arange(12).reshape(-1, width).tolist()
    for width in (1, 7, -3):
        with pytest.raises(tp.TripyException, match=rf"expected a value within \[2, 6\] but got {width}"):
            compiled(x=x, width=tp.DimensionSize(width))
    with pytest.raises(tp.TripyException, match=r"reshape expects a shape of 12 elements .*got \(2, 5\)"):
        tp.compile(split, args=[infos[0], tp.DimensionInputInfo((2, 3, 6))])(x, tp.DimensionSize(5))
    # nvtripy's own explanation of a wrong shape stumbles over a dimension before it: then it must not be asked for one.
    with pytest.raises(tp.TripyException) as error:
        compiled(x=on_device(np.zeros(25, np.float32)), width=tp.DimensionSize(2))
    assert re.search(r"(max=\[24\] but got \[25\])|(max=\(24,\), but got: \(25,\))", message(error))
    with pytest.raises(tp.TripyException, match=r"expected a value within \[2, 6\] but got shape \[2\]"):
        compiled(x=x, width=tp.Tensor([3, 3]))
    with pytest.raises(tp.TripyException, match="expected to be on device: cpu but got: gpu"):
        compiled(x=x, width=ones(1))


def test_a_dimension_input_may_be_negative() -> None:
    def shifted(x: tp.Tensor, by: tp.DimensionSize) -> tp.Tensor:
        return tp.stack([tp.reshape(each, (1,)) for each in (tp.maximum(by, 0), tp.minimum(by, 0), by * 2)]) * x

    compiled = tp.compile(shifted, args=[tp.InputInfo((1,), tp.int32), tp.DimensionInputInfo((-4, 1, 4))])
    for by in (-4, -1, 0, 3):
        result = compiled(on_device(np.int32([1])), tp.DimensionSize(by))
        assert result.tolist() == [[max(by, 0)], [min(by, 0)], [by * 2]]


def test_dimension_inputs_in_every_place() -> None:
    """Alone, before and after a tensor, as a size and as a number, with bounds that are dimensions themselves."""
    bounds = tp.DimensionInputInfo((1, tp.ones((3, 2)).shape[1], tp.DimensionSize(3)))
    doubled = tp.compile(lambda size: size * 2, args=[bounds])
    assert doubled(tp.DimensionSize(3)).tolist() == 6
    of_ones = tp.compile(lambda size: tp.ones((size, 2)), args=[bounds])
    assert of_ones(tp.DimensionSize(3)).tolist() == [[1, 1]] * 3
    rows = tp.compile(
        lambda size, x: tp.reshape(x, (size, -1)),
        args=[tp.DimensionInputInfo((1, 2, 4)), tp.InputInfo((4, 2), tp.float32)],
    )
    assert rows(tp.DimensionSize(2), ones(4, 2)).tolist() == [[1] * 4] * 2


# --- what MLIR compares by value --------------------------------------------------------------------------------------


def test_mlir_types_are_equal_by_value() -> None:
    from nvtripy.backend.mlir.utils import get_mlir_dtype
    from nvtripy.common.datatype import DATA_TYPES

    from mlir_tensorrt.compiler import ir

    types = [get_mlir_dtype(dtype) for dtype in DATA_TYPES.values()]
    again = [get_mlir_dtype(dtype) for dtype in DATA_TYPES.values()]
    assert types == again and len({*types, *again}) == len(types)
    assert get_mlir_dtype(tp.float16) == ir.F16Type.get() != ir.BF16Type.get()
    assert ir.IntegerType.get_signless(8) != ir.IntegerType.get_signless(4)
    assert ir.F32Type.get() != "f32"
    assert str(ir.F32Type.get()) == "f32"

    tensors = [ir.RankedTensorType.get(shape, ir.F32Type.get()) for shape in ((2, 3), (2, 3), (3, 2))]
    assert tensors[0] == tensors[1] != tensors[2] and len(set(tensors)) == 2
    assert isinstance(tensors[0], ir.RankedTensorType) and not isinstance(ir.F32Type.get(), ir.RankedTensorType)
    functions = [ir.FunctionType.get(tensors[:1], [tensors[i]]) for i in range(3)]
    assert functions[0] == functions[1] != functions[2] and len(set(functions)) == 2


def test_mlir_locations_and_attributes_are_equal_by_value() -> None:
    from mlir_tensorrt.compiler import ir

    def locations() -> list[ir.Location]:
        return [ir.Location.unknown(), ir.Location.name("a"), ir.Location.fused([ir.Location.name("a")], "metadata")]

    assert locations() == locations() and len({*locations(), *locations()}) == 3
    assert ir.Location.name("a") != "a"
    profile = "#tensorrt.shape_profile<min=[1], opt=[2], max=[3]>"
    attributes = [
        lambda: ir.Attribute.parse(profile),
        lambda: ir.ArrayAttr.get([1, 2]),
        lambda: ir.DenseI64ArrayAttr.get([1, 2]),
        lambda: ir.StringAttr.get("a"),
    ]
    for attribute in attributes:
        assert attribute() == attribute() and hash(attribute()) == hash(attribute())


# --- errors of a program ----------------------------------------------------------------------------------------------


def line_of(function: Callable[..., Any]) -> str:
    """Where the body of a function of one statement stands, as nvtripy prints it."""
    return f"{HERE}:{function.__code__.co_firstlineno + 1} in "


def unequal_inner(x: tp.Tensor) -> tp.Tensor:
    return x @ tp.ones((5, 4))


def unequal_operands(x: tp.Tensor) -> tp.Tensor:
    return x + tp.ones((4, 2))


def other_volume(x: tp.Tensor) -> tp.Tensor:
    return tp.reshape(x, (5, 3))


def uneven_rows(x: tp.Tensor) -> tp.Tensor:
    return tp.concatenate([x, tp.ones((4, 4))], dim=0)


def too_many(x: tp.Tensor) -> tp.Tensor:
    return tp.topk(x, 4, dim=1)[0]


def too_wide(x: tp.Tensor) -> tp.Tensor:
    return tp.expand(x, (4, 5))


def too_few_rows(x: tp.Tensor) -> tp.Tensor:
    return tp.maxpool(tp.reshape(x, (1, 1, 4, 3)), kernel_dims=(5, 1))


def unequal_choice(x: tp.Tensor) -> tp.Tensor:
    return tp.where(x > 0.0, x, tp.ones((2, 3)))


CONTRADICTIONS = {
    unequal_inner: "matrix_multiply: .*equal inner dimensions, but got 3 and 5",
    unequal_operands: r"must be conformable: .* got 3 and 2 in shapes \(4, 3\) and \(4, 2\)",
    other_volume: r"reshape changes volume: expected 12 elements, those of \(4, 3\), but got \(5, 3\)",
    uneven_rows: r"the same dimensions .* axis \(0\), but got shapes \(4, 3\) and \(4, 4\)",
    too_many: r"k to be at most 3 for f32\[4, 3\] but got 4",
    too_wide: r"must be conformable, but got \(4, 3\) for \(4, 5\)",
    too_few_rows: "a window of 5 .* does not fit into 4",
    unequal_choice: r"must be conformable: .* in shapes .*\(4, 3\) and \(2, 3\)",
}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("function", CONTRADICTIONS, ids=lambda function: function.__name__)
def test_a_contradiction_points_at_the_line(function: Callable[[tp.Tensor], tp.Tensor], mode: str) -> None:
    with pytest.raises(tp.TripyException) as error:
        if mode == "eager":
            function(tp.Tensor(np.ones((4, 3), np.float32))).eval()
        else:
            tp.compile(function, args=[tp.InputInfo((4, 3), tp.float32)])
    text = message(error)
    assert re.search(CONTRADICTIONS[function], text)
    assert line_of(function) + function.__name__ in text


def test_constants_that_contradict_each_other_point_at_the_line() -> None:
    # Found while folding, not by a shape: the function itself fails.
    def outside() -> tp.Tensor:
        return tp.gather(tp.Tensor([1.0, 2.0]), 0, tp.Tensor([0, 7]))

    with pytest.raises(tp.TripyException, match="indices in") as error:
        outside().eval()
    assert line_of(outside) in message(error)


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        (lambda x, y: x + y, "element_wise(float32[2, 3], float32[4, 3])", "dimensions are equal or 1"),
        (lambda x, y: tp.reshape(x, (2, 2)) + y[:1, :1], "reshape(float32[2, 3]", "a shape of 6 elements"),
        (
            lambda x, y: tp.concatenate([x, y], dim=1),
            "concatenation(float32[2, 3], float32[4, 3])",
            "dimensions other than 1 are equal",
        ),
    ],
    ids=["broadcast", "reshape", "concatenate"],
)
def test_a_failure_at_run_time_says_what_failed_and_where(
    function: Callable[..., tp.Tensor], kind: str, reason: str
) -> None:
    infos = [tp.InputInfo(((1, 2, 4), 3), tp.float32)] * 2
    compiled = tp.compile(function, args=infos)
    with pytest.raises(tp.TripyException) as error:
        compiled(ones(2, 3), ones(4, 3))
    text = message(error)
    assert kind in text
    assert reason in text
    assert f"{HERE}:{function.__code__.co_firstlineno} in <lambda>" in text


# --- whose memory a result is -----------------------------------------------------------------------------------------

CONSTANT = tp.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))

VIEWS: dict[str, Callable[[tp.Tensor], Any]] = {
    "the input": lambda x: x,
    "the input twice": lambda x: (x, x),
    "a constant": lambda x: CONSTANT,
    "a constant twice": lambda x: (CONSTANT, CONSTANT, x),
    "the same result twice": lambda x: ((y := x + 1.0), y),
    "views of the input": lambda x: (tp.reshape(x, (3, 2)), tp.flatten(x), x[:1], x[1:], tp.unsqueeze(x, 0)),
    "views of a constant": lambda x: (
        tp.reshape(CONSTANT, (3, 2)),
        CONSTANT[1:],
        CONSTANT[0],
        tp.permute(CONSTANT, (1, 0)),
    ),
    "views of one result": lambda x: ((y := x * 2.0), tp.reshape(y, (6,)), y[:1], tp.permute(y, (1, 0)), tp.flip(y)),
    "a permutation that moves nothing": lambda x: tp.permute(x[:, :1], (1, 0)),
    "an expansion": lambda x: (tp.expand(x[:1], (2, 3)), tp.expand(x[:1], (1, 3))),
    "a cast to its own type": lambda x: (tp.cast(x, tp.float32), tp.cast(tp.cast(x, tp.float32), tp.float32)),
    "scalars": lambda x: ((y := tp.reshape(x[:1, :1], ())), y, tp.reshape(y, (1,)), tp.reshape(CONSTANT[0, 0], ())),
    "nothing": lambda x: (x[:0], x[:0]),
    "numbers": lambda x: (tp.ones((2,)), tp.ones((2,)), tp.full((2, 2), 3.0)),
}


def as_tuple(outputs: Any) -> Sequence[tp.Tensor]:
    return (outputs,) if isinstance(outputs, tp.Tensor) else tuple(outputs)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("rows", [2, (1, 2, 4)], ids=["static", "dynamic"])
def test_a_compiled_result_is_nobody_elses(name: str, rows: Any) -> None:
    compiled = tp.compile(VIEWS[name], args=[tp.InputInfo((rows, 3), tp.float32)])
    values = np.arange(10, 16, dtype=np.float32).reshape(2, 3)
    x = on_device(values)
    first = as_tuple(compiled(x))
    expected = [each.tolist() for each in first]
    arrays = [memory(x), memory(CONSTANT), *map(memory, first)]
    for index, array in enumerate(arrays):
        assert array.flags.c_contiguous
        assert not any(np.shares_memory(array, other) for other in arrays[:index])
    for each in first:
        torch.from_dlpack(each).fill_(-1)
    np.testing.assert_array_equal(memory(x), values)
    assert [each.tolist() for each in as_tuple(compiled(x))] == expected


@pytest.mark.parametrize("name", [name for name in VIEWS if name not in ("the input", "the input twice")])
def test_an_evaluated_result_is_nobody_elses(name: str) -> None:
    values = np.arange(10, 16, dtype=np.float32).reshape(2, 3)
    x = on_device(values)
    constant = memory(CONSTANT).copy()
    for each in as_tuple(VIEWS[name](x)):
        if each is not x and each is not CONSTANT:
            torch.from_dlpack(each.eval()).fill_(-1)
    np.testing.assert_array_equal(memory(x), values)
    np.testing.assert_array_equal(memory(CONSTANT), constant)


def test_a_result_that_was_broadcast_to_its_own_size_can_be_written_to() -> None:
    # NumPy's broadcasts are read-only, also those that repeat nothing.
    compiled = tp.compile(
        lambda x, n: tp.full((n,), tp.sum(x)), args=[tp.InputInfo((2,), tp.float32), tp.DimensionInputInfo((1, 2, 3))]
    )
    for size in (1, 2):
        view = torch.from_dlpack(compiled(on_device(np.float32([1, 2])), tp.DimensionSize(size)))
        view += 1
        assert view.tolist() == [4] * size


class Weights:
    """NumPy memory behind the constants of a program, in the ways in which constants are used."""

    def __init__(self) -> None:
        self.arrays = {
            "small": np.full((2, 3), 2.0, np.float32),
            "half": np.full((3, 3), 2.0, np.float16),
            "large": np.full((3, 400_000), 2.0, np.float32),  # more than a pass copies without need
            "shape": np.array([3, 2], np.int32),
            "scalar": np.array(2.0, np.float32),
            "flag": np.array([True, False, True]),
            "scale": np.array(0.5, np.float32),
        }
        self.tensors = {name: tp.Tensor(array) for name, array in self.arrays.items()}

    def overwrite(self) -> None:
        for array in self.arrays.values():
            array.fill(1)


USES: dict[str, Callable[[Any, tp.Tensor], tp.Tensor]] = {
    "added": lambda w, x: x + w["small"],
    "returned": lambda w, x: w["small"],
    "returned whole": lambda w, x: w["large"],
    "transposed": lambda w, x: x @ tp.transpose(w["small"], 0, 1),
    "transposed and large": lambda w, x: tp.transpose(w["large"], 0, 1)[:5] @ tp.transpose(x, 0, 1),
    "reshaped": lambda w, x: tp.reshape(w["small"], (3, 2)) @ x,
    "sliced": lambda w, x: x + w["large"][:2, 7:10],
    "reversed": lambda w, x: x + tp.flip(w["small"]),
    "expanded": lambda w, x: x + tp.expand(w["scalar"], (2, 3)),
    "expanded to a lot": lambda w, x: tp.expand(tp.reshape(w["scalar"], (1, 1)), (2, 300_000))[:, :3] + x,
    "multiplied in half precision": lambda w, x: tp.cast(x, tp.float16) @ w["half"],
    "gathered": lambda w, x: tp.gather(w["small"], 0, tp.Tensor([1, 0, 1])),
    "a condition": lambda w, x: tp.where(w["flag"], x, 0.0),
    "quantized": lambda w, x: tp.dequantize(tp.quantize(w["small"], w["scale"], tp.int8), w["scale"], tp.float32),
    "computed with": lambda w, x: x * (w["small"] * 3.0 + w["scalar"]),
}


@pytest.mark.parametrize("name", USES)
def test_an_executable_does_not_hear_of_later_changes_of_an_array(name: str) -> None:
    weights = Weights()
    x = on_device(np.arange(6, dtype=np.float32).reshape(2, 3))
    compiled = tp.compile(lambda x: USES[name](weights.tensors, x), args=[tp.InputInfo(((1, 2, 4), 3), tp.float32)])
    weights.overwrite()
    changed = memory(compiled(x))
    weights = Weights()
    fresh = tp.compile(lambda x: USES[name](weights.tensors, x), args=[tp.InputInfo(((1, 2, 4), 3), tp.float32)])
    expected = memory(fresh(x))
    np.testing.assert_array_equal(changed, expected)
    weights.overwrite()
    np.testing.assert_array_equal(memory(fresh(x)), expected)


def test_no_operation_writes_to_its_operands() -> None:
    def program(x: tp.Tensor) -> tuple[tp.Tensor, ...]:
        normalized = tp.LayerNorm(3)
        normalized.weight, normalized.bias = tp.Tensor([1.0, 2.0, 3.0]), tp.Tensor([0.0, 1.0, 2.0])
        return (
            normalized(x),
            tp.softmax(x, dim=1),
            tp.gelu(x),
            tp.sigmoid(x),
            tp.cumsum(x, dim=0),
            tp.dequantize(tp.quantize(x, 0.1, tp.int8), 0.1, tp.float32),
            tp.topk(x, 2, dim=1)[0],
            tp.avgpool(tp.reshape(x, (1, 1, 2, 3)), (2, 2)),
            tp.var(x, dim=1),
        )

    compiled = tp.compile(program, args=[tp.InputInfo((2, 3), tp.float32)])
    values = np.array([[1.5, -2.0, 0.25], [3.0, 0.5, -1.0]], np.float32)
    x = on_device(values)
    first = [memory(each).copy() for each in compiled(x)]
    np.testing.assert_array_equal(memory(x), values)
    for before, after in zip(first, compiled(x), strict=True):
        np.testing.assert_array_equal(before, memory(after))


def test_results_of_every_type_have_it() -> None:
    # ml_dtypes' types come through the whole way, by their own names.
    x = tp.Tensor(np.float32([1.0, 2.5]))
    for dtype, expected in (
        (tp.bfloat16, ml_dtypes.bfloat16),
        (tp.float8, ml_dtypes.float8_e4m3fn),
        (tp.int4, ml_dtypes.int4),
    ):
        result = (tp.cast(x, dtype) if dtype == tp.bfloat16 else tp.quantize(x, 1.0, dtype)).eval()
        assert memory(result).dtype == expected
        assert memory(result).astype(np.float32).tolist() == ([1.0, 2.0] if dtype == tp.int4 else [1.0, 2.5])


# --- errors in TensorRT's words ---------------------------------------------------------------------------------------


def layer_norm_of_another_size(x: tp.Tensor) -> tp.Tensor:
    norm = tp.LayerNorm((2, 2))
    norm.weight, norm.bias = tp.Tensor(np.ones((2, 2), np.float32)), tp.Tensor(np.zeros((2, 2), np.float32))
    return norm(x)


def linspace_of_halves(x: tp.Tensor) -> tp.Tensor:
    from nvtripy.frontend.ops.utils import create_op, tensor_from_shape_like
    from nvtripy.trace.ops.linspace import Linspace

    shape = tensor_from_shape_like(x.shape)
    return create_op(Linspace, [shape, tp.Tensor(0.0), tp.Tensor(np.ones(x.rank, np.float32))], dtype=tp.float16)


CONFORMABLE = "broadcast dimensions must be conformable"
#: nvtripy's own tests look for these texts: a program, the shape of its argument, the text.
IN_TENSORRTS_WORDS: dict[str, tuple[Callable[[tp.Tensor], tp.Tensor], tuple[int, ...], str]] = {
    "an index beyond": (lambda x: x[4], (3,), "out of bounds access"),
    "an index beyond, before the first": (lambda x: x[-4], (3,), "out of bounds access"),
    "a reshape": (lambda x: tp.reshape(x, (3, 3)), (2, 2), "reshape changes volume"),
    "a squeeze": (
        lambda x: tp.squeeze(x, 2),
        (1, 1, 4),
        "reshape changes volume to multiple of original non-zero volume",
    ),
    "a concatenation": (
        lambda x: tp.concatenate([x, tp.ones((2, 4, 4))], dim=0),
        (2, 3, 4),
        "all concat input tensors must have the same dimensions",
    ),
    "a stack": (lambda x: tp.stack([x, tp.ones((4,))]), (3,), "all concat input tensors must have the same dimensions"),
    "a sum": (lambda x: x + tp.ones((2, 3)), (2, 4), CONFORMABLE),
    "a choice": (lambda x: tp.where(x > 0, x, tp.ones((3,))), (2,), CONFORMABLE),
    "an expansion": (lambda x: tp.expand(x, (3,)), (2,), CONFORMABLE),
    "a layer norm": (layer_norm_of_another_size, (5, 5, 5), CONFORMABLE),
    "a type": (linspace_of_halves, (2, 2), "failed to run pass pipeline"),
}


@pytest.mark.parametrize("name", IN_TENSORRTS_WORDS)
def test_errors_below_nvtripy_are_in_tensorrts_words(name: str) -> None:
    function, shape, text = IN_TENSORRTS_WORDS[name]
    x = tp.Tensor(np.ones(shape, np.float32))
    with pytest.raises(tp.TripyException, match=text) as error:
        function(x).eval()
    assert HERE in message(error)
    with pytest.raises(tp.TripyException, match=text):
        tp.compile(function, args=[tp.InputInfo(shape, tp.float32)])


@pytest.mark.parametrize("name", ["an index beyond", "a reshape", "a sum", "a concatenation"])
def test_errors_of_dynamic_shapes_are_in_tensorrts_words(name: str) -> None:
    """What only the shapes at run time show."""
    function, shape, text = IN_TENSORRTS_WORDS[name]
    dynamic = tp.InputInfo([(1, size, 2 * size + 4) for size in shape], tp.float32)
    with pytest.raises(tp.TripyException, match=text):
        tp.compile(function, args=[dynamic])(ones(*shape))


@pytest.mark.parametrize(
    ("emit", "reason"),
    [
        (
            lambda op, x: op.transpose(x, (0, 2)),
            r"transpose: expected permutation to be of the 2 dimensions of f32\[2, 3\]",
        ),
        (
            lambda op, x: op.matrix_multiply(x, op.shape(x), "kNONE", "kNONE"),
            "input1 of type f16, bf16, f32 but got i32",
        ),
        (lambda op, x: op.concatenation([x, op.shape(x)], 0), r"concatenation: expected inputs\[1\] of type"),
        (lambda op, x: op.softmax(op.reduce(x, (5,), "kSUM", False), 7), "reduce kSUM: expected axes to be within"),
    ],
    ids=["transpose", "product", "concatenation", "beyond"],
)
def test_operations_whose_results_cannot_be_inferred_are_refused(emit: Callable[..., Any], reason: str) -> None:
    """By the verifier's rules, before there is a graph to verify; what can be inferred is refused with the graph."""
    from mlir_tensorrt.compiler import api as compiler_api
    from mlir_tensorrt.compiler import ir
    from mlir_tensorrt.compiler.dialects import func, tensorrt

    type = ir.RankedTensorType.get((2, 3), ir.F32Type.get())
    with ir.Context() as context, ir.Location.name("here"):
        module = ir.Module.create()
        with ir.InsertionPoint(module.body) as point:
            block = func.FuncOp("main", ir.FunctionType.get([type], [type]), ip=point).add_entry_block()
        with ir.InsertionPoint(block), pytest.raises((ir.MLIRError, api.MTRTException), match=reason) as error:
            func.ReturnOp([emit(tensorrt, block.arguments[0])])
            compiler_api.CompilerClient(context).get_compilation_task("", []).run(module)
    assert "here" in error.value.error_diagnostics[0].location
