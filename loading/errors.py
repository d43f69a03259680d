"""What is raised when a checkpoint cannot be used, and how foreign texts and values are put into its one line."""

from __future__ import annotations

import json
from collections.abc import Sequence


class CheckpointError(Exception):
    """A checkpoint cannot be used. The text is one line, ready to be shown to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def reason(error: BaseException, limit: int = 200) -> str:
    """Another library's error as a short single-line clause: its messages can run over whole paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shown(value: object) -> str:
    """A value from a file for a message, as JSON has it."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # not of JSON, or an integer beyond Python's limit for printing
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first names of what can be hundreds."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
