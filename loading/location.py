"""Where a checkpoint is: a local folder or file, or the HuggingFace hub."""

from __future__ import annotations

import os
from pathlib import Path

from loading.disk import look_at
from loading.errors import CheckpointError
from loading.hub import HUB_REPOSITORIES, download

#: Of the names of files that are checkpoints.
SUFFIXES = (".gguf", ".nemo", ".pt")


def locate(model_type: str | os.PathLike[str], revision: str | None, with_weights: bool) -> Path:
    """The folder or file that a name means, downloaded where it is neither.

    Args:
        with_weights: False: its tokenizer alone is wanted.

    Raises:
        CheckpointError: there is nothing of that name, or it cannot be downloaded.
    """
    name = os.fspath(model_type)
    folder = Path(os.path.expanduser(name))
    _, exists = look_at(folder) if name else (False, False)
    if exists:
        if revision is not None:
            raise CheckpointError(f"a revision ({revision!r}) was given, but {str(folder)!r} is here, not at the hub")
        return folder
    if isinstance(model_type, os.PathLike) or _looks_like_a_path(name):
        raise CheckpointError(f"expected a checkpoint folder or file at {name!r}, but nothing is there")
    if name not in HUB_REPOSITORIES and "/" not in name:
        known = ", ".join(HUB_REPOSITORIES)
        raise CheckpointError(
            f"no model {name!r}: expected a checkpoint folder, {known}, or an organization/name at the hub"
        )
    return download(HUB_REPOSITORIES.get(name, name), revision, with_weights)


def _looks_like_a_path(name: str) -> bool:
    """Whether `name` can only be meant as a folder: hub names are `name` or `organization/name`."""
    return (
        name == ""
        or name[0] in "./~"
        or name.startswith(os.sep)
        or name.count("/") > 1
        or name[-1] == "/"
        or "\\" in name
        or name.endswith(SUFFIXES)
    )
