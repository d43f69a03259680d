"""The environment without its proxies, for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def no_proxies() -> Iterator[None]:
    """Within it nothing goes through a proxy. Gradio asks its own page whether it is there, on this machine."""
    names = ("no_proxy", "NO_PROXY")
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
