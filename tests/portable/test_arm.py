"""The kernels for 64-bit ARM, where there are a cross compiler and an emulator: with what any processor has, with
products of bytes (SDOT) and of small matrices of bytes (SMMLA), each chosen where the processor has it; and under the
sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PORTABLE = Path(__file__).resolve().parents[2] / "portable"
#: Programs, and what brings them on Debian.
NEEDED = {
    "cmake": "cmake",
    "aarch64-linux-gnu-g++": "apt-get install g++-aarch64-linux-gnu",
    "qemu-aarch64": "apt-get install qemu-user",
}
#: What arm.sh prints of each emulated processor: the instruction sets that the runtime found, the best first, and of
#: those that were checked that they passed, by both programs.
EXPECTED = {
    "cortex-a53": (["neon", "portable"], ["neon", "portable"]),
    "neoverse-n1": (["dotprod", "neon", "portable"], ["dotprod"]),
    "max": (["i8mm", "dotprod", "neon", "portable"], ["i8mm"]),
}
SANITIZED = ["i8mm", "dotprod", "neon"]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_kernels_on_emulated_arm_processors(tmp_path: Path) -> None:
    missing = [f"{program} ({source})" for program, source in NEEDED.items() if not shutil.which(program)]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)}")
    done = subprocess.run(
        [PORTABLE / "csrc" / "arm.sh", tmp_path / "build"], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = []
    for processor, (found, checked) in EXPECTED.items():
        expected += [f"{processor}:", f"this processor has {' '.join(found)}"]
        expected += [f"{name}: passed" for name in checked] * 2
    expected += ["address,undefined:", "max:", f"this processor has {' '.join(EXPECTED['max'][0])}"]
    expected += [f"{name}: passed" for name in SANITIZED] * 2
    assert done.stdout.splitlines() == expected
