"""Which peers are there, and in which version: in this Python, or in the one that was given for a peer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from peers import PEERS, Peer

#: For another Python: the first of the modules that is missing, or the packages' versions.
_QUESTION = """
import json, sys
from importlib import metadata, util
modules, packages = json.load(sys.stdin)
lacking = next((module for module in modules if util.find_spec(module) is None), None)
versions = [] if lacking else [metadata.version(package) for package in packages]
print(json.dumps([lacking, versions]))
"""

#: Peer → the Python that it runs in, for those that need another one.
Pythons = Mapping[str, Path]


def missing(name: str, pythons: Pythons) -> str | None:
    """What a peer lacks, in words, or None."""
    peer = PEERS[name]
    if not peer.is_elsewhere:
        lacking = next((module for module in peer.modules if util.find_spec(module) is None), None)
        return lacking and f"{lacking} is not installed (pip install -r requirements/bench.txt)"
    if name not in pythons:
        return "it runs in a Python of its own, which was not given"
    try:
        lacking, _ = _asked(peer, pythons[name])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return lacking and f"{pythons[name]} has no {lacking}"


def version(name: str, pythons: Pythons) -> str:
    """The versions of the packages that a peer is made of."""
    peer = PEERS[name]
    versions = _asked(peer, pythons[name])[1] if peer.is_elsewhere else [metadata.version(p) for p in peer.packages]
    return ", ".join(f"{package} {number}" for package, number in zip(peer.packages, versions, strict=True))


def _asked(peer: Peer, python: Path) -> tuple[str | None, list[str]]:
    """What another Python says of a peer: the module that it lacks, or the versions.

    Raises:
        OSError: it cannot be started, or is no Python.
    """
    question = json.dumps([peer.modules, peer.packages])
    done = subprocess.run([python, "-c", _QUESTION], input=question, capture_output=True, text=True, timeout=60)
    try:
        lacking, versions = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise OSError(f"{python} does not answer as a Python does") from None
    return lacking, versions
