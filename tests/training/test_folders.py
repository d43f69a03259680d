"""Files that are written together: all of them, or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from command_line import UsageError
from training.folders import written_together

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(folder: Path, failure: BaseException | None = None) -> None:
    with written_together(folder, last=".json") as partial:
        (partial / "a.json").write_text("new")
        if failure is not None:
            raise failure
        (partial / "b.bin").write_text("new")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), FULL])
def test_what_was_there_stays(failure: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(UsageError if failure is FULL else KeyboardInterrupt) as raised:
        write(tmp_path, failure)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]
    if failure is FULL:
        assert str(raised.value) == f"cannot write to {tmp_path}: No space left on device"


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(tmp_path / "new" / "newer", FULL)
    assert not list(tmp_path.iterdir())


def test_readers_find_the_last_when_the_others_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    (tmp_path / ".partial").mkdir()  # of a run that was killed
    (tmp_path / ".partial" / "c.bin").write_text("stale")
    write(tmp_path / "new")
    write(tmp_path)
    assert moved == ["b.bin", "a.json"] * 2
    for folder in (tmp_path, tmp_path / "new"):
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.glob("*.*")} == {
            "a.json": 0o644,
            "b.bin": 0o644,
        }
