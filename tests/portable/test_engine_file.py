"""Executables in files of their own: what is saved is what is opened, and its constants are the file's pages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import nvtripy as tp
import pytest

from nvtripy_portable import engine_file

WEIGHT = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)


def compiled() -> tp.Executable:
    weight = tp.Tensor(WEIGHT)
    return tp.compile(lambda x: x @ weight, args=[tp.InputInfo((3, 64), dtype=tp.float32)])


def result(executable: tp.Executable) -> np.ndarray:
    return np.from_dlpack(executable(tp.copy(tp.Tensor(X), tp.device("gpu"))))


def test_what_is_saved_is_what_is_opened(tmp_path: Path) -> None:
    executable = compiled()
    engine_file.save(executable, tmp_path / "engine")
    opened = engine_file.load(str(tmp_path / "engine"))
    assert opened.input_infos == executable.input_infos
    np.testing.assert_array_equal(result(opened), result(executable))
    assert WEIGHT.nbytes < (tmp_path / "engine").stat().st_size < WEIGHT.nbytes + 20_000
    # What was opened can be saved again, in either form.
    engine_file.save(opened, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "engine").read_bytes()
    opened.save(str(tmp_path / "json"))
    np.testing.assert_array_equal(result(tp.Executable.load(str(tmp_path / "json"))), result(executable))


def test_nvtripys_own_files_are_opened_too(tmp_path: Path) -> None:
    executable = compiled()
    executable.save(str(tmp_path / "json"))
    np.testing.assert_array_equal(result(engine_file.load(tmp_path / "json")), result(executable))


def test_constants_are_the_files_own_pages(tmp_path: Path) -> None:
    """Of an open file that changes, the constants change: nothing was copied."""
    engine_file.save(compiled(), tmp_path / "engine")
    opened = engine_file.load(tmp_path / "engine")
    content = (tmp_path / "engine").read_bytes()
    start = content.index(WEIGHT.T.tobytes() if WEIGHT.tobytes() not in content else WEIGHT.tobytes())
    with open(tmp_path / "engine", "r+b") as file:
        file.seek(start)
        file.write(bytes(WEIGHT.nbytes))
    np.testing.assert_array_equal(result(opened), np.zeros((3, 512), np.float32))


def test_an_executable_without_constants(tmp_path: Path) -> None:
    executable = tp.compile(lambda x: x + x, args=[tp.InputInfo((3, 64), dtype=tp.float32)])
    engine_file.save(executable, tmp_path / "engine")
    np.testing.assert_array_equal(result(engine_file.load(tmp_path / "engine")), X + X)


@pytest.mark.parametrize("size", [0, 7, 15, 16, 100, -1, -WEIGHT.nbytes, -WEIGHT.nbytes - 3000])
def test_files_that_are_cut_short(tmp_path: Path, size: int) -> None:
    engine_file.save(compiled(), tmp_path / "engine")
    whole = (tmp_path / "engine").stat().st_size
    os.truncate(tmp_path / "engine", size if size >= 0 else whole + size)
    with pytest.raises(Exception):  # noqa: B017 - nvtripy has no kind of its own for it
        engine_file.load(tmp_path / "engine")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        engine_file.save(compiled(), "/dev/full")
