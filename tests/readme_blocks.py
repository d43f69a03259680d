"""Finds the commands in a document that are to be run, and the output that is expected of them.

A block of commands is run when this marker stands right before it (blank lines between them do not matter)::

    <!-- Tripy: TEST: RUN -->
    ```bash
    make example
    ```

The output expected on stdout may follow right after the block. Either for readers to see, as it is, where an ellipsis
stands for any text at all, over several lines too::

    <!-- Tripy: STDOUT -->
    ```text
    The answer is 42. …
    ```

or hidden from the rendered page::

    <!-- Tripy: TEST: EXPECTED_STDOUT Start -->
    <!--
    ```
    The answer is \\d+\\.
    ```
    -->
    <!-- Tripy: TEST: EXPECTED_STDOUT End -->

The lines between those fences are one regular expression (Python's ``re``, no flags). The whole of stdout has to match,
both without the white space at their end. Plain text stands for itself except for the characters
``\\ . ^ $ * + ? { } [ ] | ( )``; ``(?s:.+)`` matches any text at all, over several lines too.

A block without the marker is not run. Anything half-written is an error: a marker without its block, an expectation
without a block that is run, a ``Start`` without its ``End``, a marker with a typing mistake. Text inside other fenced
blocks is not looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RUN = "<!-- Tripy: TEST: RUN -->"
SHOWN = "<!-- Tripy: STDOUT -->"
START = "<!-- Tripy: TEST: EXPECTED_STDOUT Start -->"
END = "<!-- Tripy: TEST: EXPECTED_STDOUT End -->"

_ANY_MARKER = re.compile(r"<!--\s*Tripy\b", re.IGNORECASE)
_ELLIPSIS = "…"
_ANYTHING = "(?s:.+)"
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


class ReadmeError(Exception):
    """The markers in a document do not fit together; the message starts with the line number."""


@dataclass(frozen=True)
class Block:
    """Commands to run, and what is expected of their stdout; ``line`` is where their marker stands."""

    line: int
    script: str
    expected: str | None = None
    is_shown: bool = False  # the expectation is text with ellipses; else a regular expression

    def check(self, stdout: str) -> None:
        """Raises an ``AssertionError`` that shows both texts unless ``stdout`` is what was expected."""
        if self.expected is None:
            return
        expected = self.expected.rstrip()
        pattern = _ANYTHING.join(map(re.escape, expected.split(_ELLIPSIS))) if self.is_shown else expected
        if re.fullmatch(pattern, stdout.rstrip()) is None:
            kind = f"{_ELLIPSIS} is any text" if self.is_shown else "a regular expression"
            raise AssertionError(
                f"line {self.line}: stdout does not match what the document expects.\n"
                f"--- expected ({kind})\n{expected}\n--- stdout\n{stdout}"
            )


def parse(document: str) -> list[Block]:
    """The blocks of a Markdown ``document`` that are marked to be run, in their order; raises :class:`ReadmeError`."""
    lines = [line.rstrip() for line in document.splitlines()]
    blocks: list[Block] = []
    at = 0  # index of the line being read; messages count from 1
    while at < len(lines):
        line = lines[at].strip()
        if line == RUN:
            block, at = _read_block(lines, at)
            blocks.append(block)
        elif line in (START, SHOWN):
            raise ReadmeError(f"{at + 1}: expected output that does not follow a block marked {RUN}")
        elif line == END:
            raise ReadmeError(f"{at + 1}: an End without its Start")
        elif _ANY_MARKER.match(line):
            raise ReadmeError(f"{at + 1}: unknown marker {line!r}; expected one of {RUN}, {SHOWN}, {START}, {END}")
        elif _FENCE.match(line):
            at = _closing_fence(lines, at) + 1
        else:
            at += 1
    return blocks


def _read_block(lines: list[str], marker: int) -> tuple[Block, int]:
    """The block of the RUN marker at line ``marker``, and the index of the line behind its last."""
    script, behind = _read_fenced(lines, marker, "```bash")
    start = _next_line(lines, behind)
    following = lines[start].strip() if start < len(lines) else ""
    if following == SHOWN:
        shown, behind = _read_fenced(lines, start, "```text")
        return Block(marker + 1, script + "\n", shown, is_shown=True), behind
    if following == START:
        expected, behind = _read_expected(lines, start)
        return Block(marker + 1, script + "\n", expected), behind
    return Block(marker + 1, script + "\n"), behind


def _read_fenced(lines: list[str], marker: int, opening: str) -> tuple[str, int]:
    """The text of the block that has to follow the marker at line ``marker``, and the index of the line behind it."""
    fence = _next_line(lines, marker + 1)
    if fence == len(lines) or lines[fence].strip() != opening:
        raise ReadmeError(f"{marker + 1}: the marker is not followed by a {opening} block")
    closing = _closing_fence(lines, fence)
    return "\n".join(lines[fence + 1 : closing]), closing + 1


def _read_expected(lines: list[str], start: int) -> tuple[str, int]:
    """The pattern behind the Start marker at line ``start``, and the index of the line behind its End."""
    if [line.strip() for line in lines[start + 1 : start + 3]] != ["<!--", "```"]:
        raise ReadmeError(f"{start + 1}: Start is not followed by a line '<!--' and a line '```'")
    closing = _closing_fence(lines, start + 2)
    if [line.strip() for line in lines[closing + 1 : closing + 3]] != ["-->", END]:
        raise ReadmeError(f"{start + 1}: a Start without its End: after the pattern come a line '-->' and {END}")
    expected = "\n".join(lines[start + 3 : closing])
    try:
        re.compile(expected)
    except re.error as error:
        raise ReadmeError(f"{start + 1}: the expected output is not a regular expression: {error}") from None
    return expected, closing + 3


def _next_line(lines: list[str], at: int) -> int:
    """The index of the first line from ``at`` on that is not blank; ``len(lines)`` where there is none."""
    while at < len(lines) and not lines[at].strip():
        at += 1
    return at


def _closing_fence(lines: list[str], opening: int) -> int:
    """The index of the line that closes the fenced block opened at line ``opening``."""
    match = _FENCE.match(lines[opening])
    assert match is not None, "called on a line that opens no block"
    fence = match.group(1)
    for at in range(opening + 1, len(lines)):
        text = lines[at].strip()
        if len(text) >= len(fence) and set(text) == {fence[0]}:
            return at
    raise ReadmeError(f"{opening + 1}: this block is never closed")
