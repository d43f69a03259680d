"""Adapters at the HuggingFace hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from adapters.errors import AdapterError
from loading.errors import reason

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def download_adapter(name: str, files: Sequence[str]) -> Path:
    """The cache's folder of a repository, with those of its files that an adapter is made of.

    Raises:
        AdapterError: the name is none that the hub can have, or the files cannot be had.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(f"expected an adapter's folder at {name!r}, but nothing is there")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of the network, of the hub, of the name: whatever it is, there is no adapter
        raise AdapterError(
            f"there is no folder {name!r}, and no adapter of that name can be had from the hub: {reason(error)}"
        ) from None
