"""Files and folders, looked at: what may not be read is an error, and never taken for absent."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from loading.errors import CheckpointError, reason

#: Of paths that do not exist, or that cannot.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


def look_at(path: Path) -> tuple[bool, bool]:
    """Whether a path is a folder, and whether it is anything.

    Raises:
        CheckpointError: it may not be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a name that no file can have
        return False, False
    except OSError as error:
        if error.errno in _ABSENT:
            return False, False
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return stat.S_ISDIR(mode), True


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        CheckpointError: what is there cannot be one, or may not be looked at.
    """
    is_folder, exists = look_at(path)
    if is_folder:
        raise CheckpointError(f"cannot read {path}: {os.strerror(errno.EISDIR)}")
    return exists


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or holds anything else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object in {path}, got a {type(value).__name__}")
    return value
