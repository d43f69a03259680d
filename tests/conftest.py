"""What all tests share: a cache of their own, Ctrl-C as it usually is, and a browser where there is one. What the
user's cache holds must not carry them, and they add nothing to it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# pip's cache holds no results, only packages.
_usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("PIP_CACHE_DIR", str(_usual / "pip"))
# Here and not in a fixture: some test modules copy the environment while they are imported.
_cache = tempfile.TemporaryDirectory(prefix="nanogpt-tripy-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

# A shell without job control has what it starts in the background ignore Ctrl-C, and so do the programs that the tests
# start and press it at: unless it has a handler here, which no other program inherits.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
