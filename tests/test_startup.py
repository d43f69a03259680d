"""What example.py imports: packages that make a start slow are for those who need them, and nobody else waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_checkpoints import random_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "checkpoints" / "shakespeare"

#: Runs example.py as a program, and writes the names of all modules that are loaded in the end to a file.
RUNNER = """
import json, runpy, sys
script, report = sys.argv[1:3]
sys.path.insert(0, script.rpartition("/")[0])
sys.argv = [script, *sys.argv[3:]]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    with open(report, "w") as file:
        json.dump(list(sys.modules), file)
"""


def run(tmp_path: Path, *arguments: object) -> tuple[int, str, set[str]]:
    """Exit code, standard error, and the packages that were imported."""
    report = tmp_path / "modules"
    command = [sys.executable, "-c", RUNNER, ROOT / "example.py", report, *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stderr, {module.split(".")[0] for module in json.loads(report.read_text())}


@pytest.fixture(params=["tiny", "embedded"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> list[object]:
    """The option that names a checkpoint; none for the embedded one."""
    if request.param == "tiny":
        return ["--model-type", random_checkpoint(tmp_path / "checkpoint")]
    if not (EMBEDDED / "model.safetensors").is_file():
        pytest.skip(f"{EMBEDDED} is not there")
    return []


def test_neither_a_cold_nor_a_warm_start_imports_heavy_packages(tmp_path: Path, model: list[object]) -> None:
    given = [*model, "--input-text=To be", "--max-new-tokens=3", "--seed=1", "--verbose"]
    given += ["--engine-dir", tmp_path / "engines"]
    for start in ("saved", "opened"):
        code, err, packages = run(tmp_path, *given)
        assert code == 0 and err.startswith(start), err
        assert "nvtripy" in packages, "the modules were not seen"
        assert not packages & {"torch", "transformers", "huggingface_hub", "tokenizers", "tensorrt", "requests"}


@pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
@pytest.mark.parametrize("options", [["--quant-mode=fp8"], ["--quant-mode=int8-smoothquant", "--kv-cache-dtype=int8"]])
@pytest.mark.slow
def test_what_is_quantized_already_starts_like_any_other(tmp_path: Path, options: list[str]) -> None:
    given = ["--model-type", random_checkpoint(tmp_path / "checkpoint"), *options, "--calib-length=16"]
    given += ["--input-text=To be", "--max-new-tokens=3", "--seed=1"]
    code, err, packages = run(tmp_path, *given)
    assert code == 0 and {"torch", "modelopt"} <= packages, err
    code, err, packages = run(tmp_path, *given)
    assert (code, err) == (0, "")
    assert not packages & {"torch", "modelopt", "transformers", "huggingface_hub", "tokenizers", "datasets"}


def test_refused_input_imports_no_nvtripy(tmp_path: Path) -> None:
    """A mistake is answered at once: before the model is imported, and an option's before the checkpoint is opened."""
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    _, err, packages = run(tmp_path, "--model-type", checkpoint, "--input-text", "x" * 1000)
    assert "at most 64 tokens" in err and not packages & {"nvtripy", "torch", "transformers", "huggingface_hub"}
    _, err, packages = run(tmp_path, "--model-type", checkpoint, "--input-text=x", "--seed=-1")
    assert "expected a seed" in err and not packages & {"nvtripy", "safetensors", "tiktoken"}
