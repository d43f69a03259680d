"""The kernels under the address, undefined-behaviour and thread sanitizers, where there is a compiler with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PORTABLE = Path(__file__).resolve().parents[2] / "portable"


def has_sanitizers(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    flags = ("address,undefined", "thread")
    return all(
        subprocess.run(["c++", f"-fsanitize={each}", source, "-o", folder / "empty"], capture_output=True).returncode
        == 0
        for each in flags
    )


@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("cmake")), reason="needs a C++ compiler and CMake")
@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    if not has_sanitizers(tmp_path):
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run(
        [PORTABLE / "csrc" / "sanitize.sh", tmp_path / "build"], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") >= 2
