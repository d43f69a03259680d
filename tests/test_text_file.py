"""text_file.py: what is taken off a text, and what is no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import UsageError
from text_file import decode_text, read_text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        ("a\nb\u2028c\x0c".encode(), "a\nb\u2028c\x0c"),
        (b"\xef\xbb\xbfa\r\nb\r\n", "a\nb\n"),
        (b"a\rb\r\r\n", "a\rb\r\n"),  # a lone carriage return ends no line
        (b"\xef\xbb\xbf\xef\xbb\xbf", "\ufeff"),
    ],
)
def test_a_text_is_the_same_whichever_system_wrote_it(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "text").write_bytes(content)
    assert read_text(tmp_path / "text") == decode_text(content, "here") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", "expected UTF-8 text in here but byte 3 is not"),
        (b"\xef\xbb\xbfabc\xff", "expected UTF-8 text in here but byte 6 is not"),
        (b"\xed\xa0\x80", "expected UTF-8 text in here but byte 0 is not"),  # a lone surrogate
        ("a".encode("utf-16"), "expected UTF-8 text in here but it is UTF-16: save it as UTF-8"),
        (b"\xfe\xff\0a", "expected UTF-8 text in here but it is UTF-16: save it as UTF-8"),
        ("a".encode("utf-16-le"), "expected UTF-8 text in here but byte 1 is NUL: it is a binary file"),
        (b"PK\3\4\0", "expected UTF-8 text in here but byte 4 is NUL: it is a binary file"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UsageError) as error:
        decode_text(content, "here")
    assert str(error.value) == message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(UsageError) as error:
            read_text(path)
        assert str(error.value) == f"cannot read {path}: {reason}"
    with pytest.raises(UsageError, match=r"cannot read .*null"):
        read_text(Path("a\0b"))
