"""The one way to read a text that a user names: a corpus, a calibration or evaluation text, prompts.

It is UTF-8. A byte order mark at its start, which Windows' editors write, is no part of the text, and a line ends in
"\\n" whichever system wrote it: the same text gives the same tokens everywhere.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from command_line import UsageError


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: it cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return decode_text(content, str(path))


def decode_text(content: bytes, source: str) -> str:
    """The text that `content` encodes.

    Args:
        source: where it comes from, for messages.

    Raises:
        UsageError: it is not UTF-8, or holds a NUL, as a text never does.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"expected UTF-8 text in {source} but it is UTF-16: save it as UTF-8")
    begin = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"expected UTF-8 text in {source} but byte {begin + error.start} is not") from None
    if (place := content.find(b"\0")) >= 0:
        raise UsageError(f"expected UTF-8 text in {source} but byte {place} is NUL: it is a binary file")
    return text.replace("\r\n", "\n")
