"""Bare decoding and prefill of GPT-2 124M's shapes with random weights, against the machine's read bandwidth.

    python benchmarks/kernel_speed.py [--threads N] [--context 64] [--repeat 30] [--only f16,i8] [--prefill 64,512]

Decode: "of read" is (bytes of weights and of the filled cache) / time over the bandwidth of reading a buffer of 256 MB
with the same threads right before, turn by turn: the medians of all turns. So a memory that others on the machine use
now more, now less, changes the speeds but hardly the share. Prefill: GFLOP/s of the linear layers, over the whole time.
The load of the machine is printed first: other programs on the same cores make all of these figures worthless.

Decoding is measured with every policy by which weights may be prefetched (portable/nvtripy_portable/cpu/tuning.py), in
turns. The first figures of a width are those of the policy that the runtime chose here, then come the shares of all.
Where another one is 10 % or more ahead of it, three times in a row, the exit code is 1: the choice is wrong here.

The file is not called kernels.py: transformers looks for a package of that name, and would find it where this folder is
searched for modules.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import policies  # noqa: E402
from fused_graphs import Shape, empty_cache, model_graph  # noqa: E402
from native_runtime import native_module  # noqa: E402

import command_line  # noqa: E402
import machine  # noqa: E402
from command_line import UsageError  # noqa: E402
from nvtripy_portable.cpu import tuning  # noqa: E402
from nvtripy_portable.cpu.executor import Executor  # noqa: E402
from nvtripy_portable.cpu.native import isa  # noqa: E402
from nvtripy_portable.graph import Graph  # noqa: E402
from nvtripy_portable.interpreter import ExecutionError  # noqa: E402

GPT2 = Shape(layers=12, heads=12, head_size=64, context=1024, vocabulary=50257)
SMALL = Shape(layers=4, heads=4, head_size=64, context=256, vocabulary=2048)
VARIANTS = {
    "f32": {"weight_dtype": "f32"},
    "f16": {"weight_dtype": "f16"},
    "bf16": {"weight_dtype": "bf16"},
    "i8": {"weight_dtype": "i8", "scales": "rows"},
    "i4": {"weight_dtype": "i4", "scales": "128"},
    "fp8": {"weight_dtype": "f8e4m3fn", "scales": "scalar", "input_dtype": "f8e4m3fn"},
    "w8a8": {"weight_dtype": "i8", "scales": "rows", "input_dtype": "i8"},
}
BUFFER = 256 << 20  # bytes: eight times a large third-level cache


def weight_bytes(graph: Graph) -> int:
    """Of everything that a step reads of the linear operations."""
    arrays = {
        id(each.constant): each.constant
        for op in graph.operations
        if op.kind == "linear"
        for each in op.operands
        if each
    }
    return sum(array.nbytes for array in arrays.values() if array is not None)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def whole_numbers(text: str, option: str) -> list[int]:
    """Numbers from 1 to the context, with commas between them."""
    numbers = [each for each in text.split(",") if each]
    if not all(each.isdecimal() and 1 <= int(each[:20]) <= GPT2.context for each in numbers):
        raise UsageError(f"expected {option} to be numbers from 1 to {GPT2.context} but got {text!r}")
    return [int(each) for each in numbers]


def decode(executor: Executor, context: int) -> Callable[[], float]:
    """What measures one step at a context, in seconds."""
    token, last = np.ones((1, 1), np.int32), np.zeros(1, np.int32)
    prompt = np.arange(context, dtype=np.int32)[None]
    kept = [executor.run([prompt, last, empty_cache(GPT2, "f16"), last])[1]]
    position = np.array([context], np.int32)

    def step() -> None:
        kept[0] = executor.run([token, position, kept[0], last])[1]

    return partial(timed, step)


def run() -> int:
    """Carries out the command; 1 where a chosen policy is far behind the best."""
    parser = command_line.Parser("kernel_speed.py", (__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--prefill", default="64,512")
    options = parser.parse_args()
    command_line.check_range(
        options, threads=(1, command_line.MAX_THREADS), context=(1, GPT2.context - 1), repeat=(1, None)
    )
    lengths = whole_numbers(options.prefill, "--prefill")
    variants = options.only.split(",")
    if not set(variants) <= VARIANTS.keys():
        raise UsageError(f"expected --only to be of {', '.join(VARIANTS)} but got {options.only!r}")
    native = native_module()
    if options.threads:
        native.set_threads(options.threads)
    threads = native.threads()
    buffer = np.ones(BUFFER // 4, np.float32)
    native.read_all(isa(), buffer)
    print(f"{machine.processor()}, {machine.instruction_set()}")
    print(f"{native.kernels_for(isa())}, {threads} threads, load {os.getloadavg()[0]:.1f} before the first measurement")
    print(f"{'':6} {'GB/s read':>10} {'ms/token':>9} {'tokens/s':>9} {'of read':>8}", end="")
    print("".join(f" {f'prefill {each}':>12} {'GFLOP/s':>8}" for each in lengths))
    wrong = []
    for name in variants:
        # Activations are float16, as example.py has them by default: that allows int16 inputs for integer weights.
        graph = model_graph(GPT2, cache_dtype="f16", dtype="f16", **VARIANTS[name])
        executor = Executor.of(graph)
        assert executor is not None
        chosen = native.streaming()
        size = weight_bytes(graph) + 2 * 2 * GPT2.layers * GPT2.width * options.context
        again: policies.Measure = partial(
            policies.measure,
            choose=native.set_streaming,
            step=decode(executor, options.context),
            read=lambda: timed(lambda: native.read_all(isa(), buffer)) / BUFFER,
            rounds=options.repeat,
        )
        turns = again(list(dict.fromkeys([chosen, *tuning.CANDIDATES])))
        took = statistics.median(turns.steps[chosen])
        read = 1 / min(statistics.median(each) for each in turns.reads.values())
        print(f"{name:6} {read / 1e9:10.1f} {took * 1e3:9.2f} {1 / took:9.1f} {turns.share(chosen, size):8.0%}", end="")
        native.set_streaming(chosen)
        for length in lengths:
            prompt = np.arange(length, dtype=np.int32)[None]
            start, end, zero = empty_cache(GPT2, "f16"), np.array([length - 1], np.int32), np.zeros(1, np.int32)
            took = min(timed(partial(executor.run, [prompt, zero, start, end])) for _ in range(4))
            macs = GPT2.layers * 12 * GPT2.width**2 * length
            print(f" {took * 1e3:9.1f} ms {2e-9 * macs / took:8.0f}", end="", flush=True)
        best = turns.best(chosen)
        shares = ", ".join(f"{each} {turns.share(each, size):.0%}" for each in turns.steps)
        print(f"\n{'':6} {shares}; chosen {chosen}; best {best}, {turns.lead(best, chosen):.2f} x as fast", flush=True)
        if policies.is_wrong(turns, chosen, again):
            wrong.append(f"{name} ({best})")
        native.set_streaming(chosen)
    small = Executor.of(model_graph(SMALL, cache_dtype="f16", dtype="f16", weight_dtype="f16"))
    assert small is not None
    token, last = np.ones((1, 1), np.int32), np.zeros(1, np.int32)
    _, cache = small.run([np.ones((1, 64), np.int32), last, empty_cache(SMALL, "f16"), last])
    times = []
    for _ in range(2000):
        start_time = time.perf_counter()
        _, cache = small.run([token, np.array([64], np.int32), cache, last])
        times.append(time.perf_counter() - start_time)
    print(f"4 layers of width 256: {statistics.median(times) * 1e6:.0f} us a token, Python included")
    if wrong:
        print(f"the policy is wrong here: another one is 10 % or more ahead for {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    # The environment asks for an instruction set, a policy or a number of threads that cannot be.
    sys.exit(command_line.main("kernel_speed.py", run, ValueError, ExecutionError))
