"""How weights stream from memory: with which prefetch hint, and how far ahead of their use.

Processors differ by more than a factor of two in which policy is best, so nothing is built in. The environment may say
(``NVTRIPY_PORTABLE_PREFETCH``); else what was measured on a kind of processor before (``KNOWN``); else it is measured
on the spot, with the model's own weights, in some tens of milliseconds, and kept in the user's cache folder for the
next time. A policy is a text: ``t0:16384`` is x86's hint T0, 16 KB ahead; ``none`` asks for nothing. What comes out is
the same, bit for bit, under each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvtripy_portable import __version__

VARIABLE = "NVTRIPY_PORTABLE_PREFETCH"

#: Into every cache, as on nearly all processors the hardware's own prefetching does: never far behind the best, where
#: it was measured.
DEFAULT = "t0:16384"
#: What is measured where nothing is known. With equal times the first wins.
CANDIDATES = (DEFAULT, "t0:4096", "t1:16384", "nta:16384", "nta:4096", "none")
ROUNDS = 9
#: Times as fast as the default that another policy has to be: less may be chance.
CLEARLY = 1.05
#: Bytes of weights from which on the policy matters enough to be measured: those of less stay in a cache, or nearly.
WORTH_MEASURING = 64 << 20
_MOST_KEPT = 64  # processors, instruction sets and numbers of threads in the file
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Processor:
    """As CPUID tells; elsewhere only ``name`` says something."""

    vendor: str
    family: int
    model: int
    name: str


@dataclass(frozen=True)
class Known:
    """What was measured on one kind of processor, and why it may be so."""

    vendor: str
    family: int
    models: tuple[range, ...]
    policy: str

    def covers(self, processor: Processor) -> bool:
        return (processor.vendor, processor.family) == (self.vendor, self.family) and any(
            processor.model in each for each in self.models
        )


#: The figures are in benchmarks/RESULTS.md. Models as in Linux' arch/x86/kernel/cpu/amd.c and asm/intel-family.h.
KNOWN = (
    # Zen 5, an EPYC with AVX-512 (2026-11-21): NTA 16 KB ahead is 8 to 15 % faster than T0. What passes by the second
    # level and the third leaves them to inputs and keys.
    Known("AuthenticAMD", 26, (range(0x00, 0x30), range(0x40, 0x50), range(0x60, 0x80)), "nta:16384"),
    # Zen 3, an EPYC with AVX2 (2026-11-26): every hint at 4 or 16 KB is about as fast as any other (6 %); none at all
    # costs 10 to 20 % with int8, int4 and float8.
    Known("AuthenticAMD", 25, (range(0x00, 0x10), range(0x20, 0x60)), "t0:16384"),
    # Sapphire Rapids, a Xeon with AVX-512 (issue 13): NTA gives 33 % of the memory's bandwidth, T0 81 to 104 %. There
    # NTA fills the first level alone, neither the second nor the third: what is evicted before its use comes from
    # memory once more.
    Known("GenuineIntel", 6, (range(0x8F, 0x90),), "t0:16384"),
    # Emerald Rapids, a Xeon with AVX-512 and AMX (2026-11-26): T1 is as fast as T0 with float16, int4 and float8, and
    # 10 to 20 % faster with int8; NTA has a third to a half of T1's speed. The second level has 2 MB.
    Known("GenuineIntel", 6, (range(0xCF, 0xD0),), "t1:16384"),
)

#: What was measured in this process, by instruction set and number of threads.
_measured: dict[tuple[str, int], str] = {}


def apply(module: Any, isa: str, weights: Sequence[np.ndarray]) -> None:
    """Sets the policy for a model that is about to run.

    Args:
        module: ``nvtripy_portable._native``.
        isa: The instruction set that is asked for; empty for the best.
        weights: What a step streams, each in one piece of memory.

    Raises:
        ValueError: ``NVTRIPY_PORTABLE_PREFETCH`` is no policy, or ``isa`` no instruction set of this CPU.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced:
        module.set_streaming(forced, VARIABLE)
    else:
        module.set_streaming(choose(module, isa, weights))


def choose(module: Any, isa: str, weights: Sequence[np.ndarray]) -> str:
    """The policy for this processor: known, measured before, or measured now; the default for a few weights."""
    processor = this_processor(module)
    policy = known(processor)
    if policy is not None:
        return policy
    isa, threads = module.kernels_for(isa), module.threads()
    policy = _measured.get((isa, threads))
    if policy is None:
        key = f"{processor.name} ({processor.vendor} {processor.family}/{processor.model}), {isa}, {threads} threads"
        policy = read_kept(key)
        if policy is None:
            if sum(each.nbytes for each in weights) < WORTH_MEASURING:
                return DEFAULT
            policy = fastest(module.time_streaming(isa, list(CANDIDATES), ROUNDS, list(weights)))
            keep(key, policy)
        _measured[isa, threads] = policy
    return policy


def this_processor(module: Any) -> Processor:
    """The one that this process runs on."""
    vendor, family, model, name = module.processor()
    return Processor(vendor, family, model, name or _midr() or platform.processor() or platform.machine())


def _midr() -> str:
    """What tells one ARM processor from another on Linux: implementer, part and revision; empty elsewhere."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def known(processor: Processor) -> str | None:
    """The policy that was best on such a processor, or None where none was measured."""
    return next((each.policy for each in KNOWN if each.covers(processor)), None)


def fastest(seconds: Sequence[Sequence[float]]) -> str:
    """Of ``CANDIDATES`` with their times in each round: the fastest, or the first where none is clearly faster.

    >>> fastest([[2.0, 2.0, 9.0], [1.9, 2.0, 2.0], [1.0, 1.1, 1.0], [2, 2, 2], [2, 2, 2], [2, 2, 2]])
    't1:16384'
    """
    # In the median round, turn by turn, because a machine that is busy for a moment is so for neighbours alike; and
    # each at its best, because other programs only ever take time away.
    times = np.array(seconds)  # (policies, rounds)
    speeds = np.minimum(np.median(times[0] / times, axis=1), times[0].min() / times.min(axis=1))
    best = int(speeds.argmax())
    return CANDIDATES[best if speeds[best] >= CLEARLY else 0]


# -- The file of what was measured ------------------------------------------------------------------------------------


def kept_file() -> Path:
    """Where what was measured is kept: ``streaming.json`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(base)) / "nanogpt-tripy" / "streaming.json"


def read_kept(key: str) -> str | None:
    """What this version measured before, or None: the file is not there, damaged, or of another version."""
    policy = _kept().get(key)
    return policy if policy in CANDIDATES else None


def keep(key: str, policy: str) -> None:
    """Writes it down for the next time, beside the file and then in its place. If that fails it is measured again."""
    kept = {**_kept(), key: policy}
    policies = dict(list(kept.items())[-_MOST_KEPT:])
    path = kept_file()
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps({"version": __version__, "policies": policies}, indent=1) + "\n", "utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _kept() -> dict[str, Any]:
    """The file's policies by key; nothing where it cannot be used."""
    try:
        with open(kept_file(), "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
        if content["version"] == __version__ and isinstance(content["policies"], dict):
            return content["policies"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return {}
