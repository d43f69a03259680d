"""What all tests share: a cache of their own. What the user's holds must not carry them, and they add nothing to it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# pip's cache holds no results, only packages.
_usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("PIP_CACHE_DIR", str(_usual / "pip"))
# Here and not in a fixture: some test modules copy the environment while they are imported.
_cache = tempfile.TemporaryDirectory(prefix="nanogpt-tripy-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
