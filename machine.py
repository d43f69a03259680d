"""The machine that a program runs on: its processor, its user's cache, and the memory that the process has taken."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

_EXTENSIONS = "avx2 f16c avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16"
_ARM_EXTENSIONS = "asimd asimdhp asimddp i8mm bf16 sve sve2"


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """The architecture's name, and those of the processor's vector extensions that matter here."""
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    known = [flag for flag in f"{_EXTENSIONS} {_ARM_EXTENSIONS}".split() if flag in flags]
    return f"{platform.machine()}{' with ' if known else ''}{' '.join(known)}"


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor, by name; nothing elsewhere."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        for line in info:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def cache_folder() -> Path:
    """Where this user's programs keep what they could make again."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(base)) / "nanogpt-tripy"


def usable_cores() -> int:
    """How many cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident.

    Linux's ru_maxrss would begin with the size of the process that started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
