"""pip install ./portable on a machine without a C++ compiler: it succeeds, and the runtime says that it is slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAM = """
import nvtripy as tp
import model
gpt = model.GPT(model.GPTConfig(vocab_size=9, n_positions=4, n_layer=1, n_head=1, n_embd=32, dtype="float32"))
gpt.load_state_dict({name: tp.zeros(each.shape, dtype=each.dtype) for name, each in gpt.state_dict().items()})
compiled = tp.compile(gpt, args=[tp.InputInfo((1, 2), dtype=tp.int32)])
for _ in range(2):
    print(compiled(tp.zeros((1, 2), dtype=tp.int32).eval()).shape)
"""


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    sources = tmp_path / "portable"
    shutil.copytree(ROOT / "portable", sources, ignore=shutil.ignore_patterns("build", "*.so", "__pycache__"))
    environment = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path, sources]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    if "No matching distribution found for scikit-build-core" in done.stderr:
        pytest.skip("pip cannot fetch scikit-build-core: no network")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "nvtripy_portable/executable.py" in names and "nvtripy_portable.pth" in names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".cpp"))]

    # Without this environment's own nvtripy-portable, which its .pth file would put first.
    program = f"import sys; sys.path[:0] = {[str(installed), str(ROOT)]}; import nvtripy_portable\n{PROGRAM}"
    site = f"import sys; sys.path += {[path for path in sys.path if path.endswith('-packages')]}\n"
    run = subprocess.run([sys.executable, "-S", "-c", site + program], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "(1, 2, 9)\n" * 2), run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("nvtripy_portable: running on the slow path (NumPy), because")
