"""Instructions per weight of the kernels' products, on ARM's instruction sets beside AVX2, counted under an emulator.

    python benchmarks/instructions.py [--build FOLDER]

portable/csrc/one_product.cpp, compiled for both processors, runs under qemu-user with one product and with two: the
difference is what a product takes, whatever surrounds it. Figures are for one weight and one token, where a weight
meets several. An emulator says nothing about time; instructions can be compared without the processor.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import command_line  # noqa: E402
from command_line import UsageError  # noqa: E402

#: Processor: its emulator, its compiler where it is another one than this machine's, and the instruction sets to count.
PROCESSORS = {
    "x86_64": ("qemu-x86_64", "x86_64-linux-gnu-g++", ("avx2",)),
    "aarch64": ("qemu-aarch64", "aarch64-linux-gnu-g++", ("portable", "neon", "dotprod", "i8mm")),
}
WEIGHTS = 48 * 768  # of one_product.cpp
TYPES = ("f16", "bf16", "f8", "i8", "i4")
#: Role and number of tokens.
CASES = (("generated", 1), ("generated", 4), ("generated", 16), ("prompt", 48))


def build(folder: Path, processor: str) -> Path:
    """one_product, compiled for a processor. Raises UsageError where a program is missing or fails."""
    emulator, compiler, _ = PROCESSORS[processor]
    native = platform.machine() == processor
    needed = ["cmake", emulator, "c++" if native else compiler]
    missing = [each for each in needed if not shutil.which(each)]
    if missing:
        raise UsageError(f"expected {', '.join(needed)} on the path, but {', '.join(missing)} is missing")
    target = [] if native else [f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    if target:
        target.append("-DCMAKE_SYSTEM_NAME=Linux")
    options = ["-DNVTRIPY_PORTABLE_PYTHON=OFF", "-DNVTRIPY_PORTABLE_CHECK=ON", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        ["cmake", "-S", str(ROOT / "portable"), "-B", str(folder), *options, *target],
        ["cmake", "--build", str(folder), "--target", "one_product", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return folder / "one_product"


def executed(program: Path, processor: str, arguments: list[str]) -> int:
    """How many instructions a run takes, from start to end: the emulator logs each of them on standard error."""
    emulator = [PROCESSORS[processor][0], "-cpu", "max", "-L", f"/usr/{processor}-linux-gnu"]
    if platform.machine() == processor:
        emulator = emulator[:3]
    command = [*emulator, "-singlestep", "-d", "exec,nochain", str(program), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        lines = sum(line.startswith(b"Trace") for line in process.stderr)
    if process.returncode:
        raise UsageError(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def settled(program: Path, processor: str, arguments: list[str]) -> int:
    """The same, counted until it comes out twice: once in a hundred runs the log was longer."""
    before, now = -1, executed(program, processor, arguments)
    while now != before:
        before, now = now, executed(program, processor, arguments)
    return now


def per_weight(program: Path, processor: str, isa: str, dtype: str, role: str, tokens: int) -> float:
    """Instructions of one product over its weights and tokens."""
    once, twice = (settled(program, processor, [isa, dtype, role, str(tokens), str(times)]) for times in (1, 2))
    return (twice - once) / (WEIGHTS * tokens)


def run() -> None:
    """What the command does."""
    parser = command_line.Parser("instructions.py", (__doc__ or "").splitlines()[0])
    folder = ROOT / "build" / "instructions"
    parser.add_argument("--build", type=command_line.path, default=folder, help="where to compile")
    options = parser.parse_args()
    programs = {processor: build(options.build / processor, processor) for processor in PROCESSORS}
    columns = [(processor, isa) for processor, (_, _, isas) in PROCESSORS.items() for isa in isas]
    print(f"| instructions for a weight and a token | {' | '.join(isa for _, isa in columns)} |")
    print(f"| :---{' | ---:' * len(columns)} |")
    with ThreadPoolExecutor(2) as pool:
        for role, tokens in CASES:
            for dtype in TYPES:
                counts = [
                    pool.submit(per_weight, programs[processor], processor, isa, dtype, role, tokens)
                    for processor, isa in columns
                ]
                what = f"{tokens} generated" if role == "generated" else f"prompt of {tokens}"
                print(f"| {what}, {dtype} | {' | '.join(f'{each.result():.3f}' for each in counts)} |", flush=True)


if __name__ == "__main__":
    sys.exit(command_line.main("instructions.py", run))
