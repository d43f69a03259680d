"""Tokens that are added to a vocabulary, and found in a text before it is split into words: as `tokenizers` does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

#: Unicode's White_Space, which is what all tokenizers mean by \s; Python's own \s has four control characters more.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text.

    Attributes:
        content: its text.
        single_word: it counts only where no letter or digit stands at either side.
        lstrip, rstrip: it takes the white space before it, or after it, with it.
        normalized: it is looked for last, in what the others leave.
        special: it says something about the text and is not part of it; this has no influence here.
        id: its number.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False
    id: int = -1


class Addition:
    """The tokens that are added to a vocabulary, one after the other, with the ids that `tokenizers` gives them."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary = vocabulary
        self._ids: dict[str, int] = {}
        self._latest: dict[str, AddedToken] = {}
        self._special: dict[str, AddedToken] = {}
        self._ordinary: list[AddedToken] = []
        #: What was added, in this order.
        self.history: list[AddedToken] = []

    def add(self, token: AddedToken) -> None:
        """Add a token, or change the flags of one that is there: the id that it comes with counts for nothing."""
        content = token.content
        if not content:
            return
        token = replace(token, id=self._number(content))
        self.history.append(token)
        if token.special:
            self._special.setdefault(content, token)
        if self._latest.get(content) == token:
            return
        self._ids[content] = token.id
        self._latest[content] = token
        if content not in self._special:
            self._ordinary.append(token)

    def _number(self, content: str) -> int:
        known = self._ids.get(content, self._vocabulary.get(content))
        return max([len(self._vocabulary) - 1, *self._ids.values()]) + 1 if known is None else known

    def __contains__(self, content: str) -> bool:
        return content in self._ids

    def tokens(self) -> list[AddedToken]:
        """The tokens by id. One that came with several flags is found by the first, and then treated by the last."""
        found = {
            (token.content, token.normalized): replace(self._latest[token.content], normalized=token.normalized)
            for token in (*self._special.values(), *self._ordinary)
        }
        return sorted(found.values(), key=lambda token: token.id)


class AddedTokens:
    """Finds added tokens in a text."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._passes: list[tuple[re.Pattern[str], dict[str, AddedToken]]] = []
        tokens = list(tokens)
        for normalized in (False, True):
            by_content = {token.content: token for token in tokens if token.normalized is normalized}
            if by_content:
                # Of the alternatives that match, `re` takes the first: the longest token.
                longest_first = sorted(by_content, key=len, reverse=True)
                self._passes.append((re.compile("|".join(map(re.escape, longest_first))), by_content))

    def split(self, text: str) -> list[str | int]:
        """`text` cut around the tokens in it, at the leftmost, and there the longest: pieces, not empty, and ids."""
        pieces: list[str | int] = [text]
        for pattern, by_content in self._passes:
            pieces = [
                part
                for piece in pieces
                for part in ([piece] if isinstance(piece, int) else _cut(piece, pattern, by_content))
            ]
        return [piece for piece in pieces if piece != ""]


def _cut(text: str, pattern: re.Pattern[str], by_content: Mapping[str, AddedToken]) -> list[str | int]:
    parts: list[str | int] = []
    begin = 0  # of what no token has taken yet
    for match in pattern.finditer(text):
        token = by_content[match[0]]
        start, stop = match.span()
        if token.single_word and not _stands_alone(text, start, stop):
            continue
        if token.lstrip:
            start = max(begin, len(text[begin:start].rstrip(WHITE_SPACE)) + begin)
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(WHITE_SPACE))
        if begin < start:
            parts.append(text[begin:start])
        if start < stop:  # else the token before it has taken all of its white space
            parts.append(token.id)
        begin = stop
    parts.append(text[begin:])
    return parts


def _stands_alone(text: str, start: int, stop: int) -> bool:
    is_word = _word_character()
    return not is_word(text[start - 1 : start]) and not is_word(text[stop : stop + 1])


@cache
def _word_character():  # type: ignore[no-untyped-def]
    r"""Matches what \w means to `tokenizers`."""
    import regex  # which knows Unicode's properties; tiktoken needs it, too

    return regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]").match
