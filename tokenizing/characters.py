"""Alphabets: each character is a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizing.added_tokens import AddedToken, AddedTokens
from tokenizing.description import Description, contents
from weight_loader import CheckpointError


class UnknownCharacterError(CheckpointError, ValueError):
    """A text has a character that the checkpoint's alphabet lacks; the message names it."""


class CharacterTokenizer:
    """A `Tokenizer` with one token for each character of an alphabet; text with any other does not encode."""

    prefix: tuple[int, ...] = ()

    def __init__(
        self, source: Path, alphabet: dict[str, int], added: Iterable[AddedToken] = (), eos_id: int | None = None
    ) -> None:
        """Put the parts together; `load_tokenizer` is what calls this.

        Args:
            source: the file that the alphabet comes from, for messages.
            alphabet: id by character.
            added: tokens that are found in the text before it is split into characters.
            eos_id: the id that ends a text.
        """
        self.eos_id = eos_id
        self._source = source
        self._alphabet = alphabet
        added = list(added)
        self._added = AddedTokens(added)
        self._tokens = {id: token for token, id in alphabet.items()} | {token.id: token.content for token in added}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            UnknownCharacterError: a character is not in the alphabet.
        """
        return [id for part in self.encode_in_parts(text) for id in part]

    def encode_in_parts(self, text: str) -> Iterator[list[int]]:
        for piece in self._added.split(text):
            if isinstance(piece, int):
                yield [piece]
                continue
            try:
                yield list(map(self._alphabet.__getitem__, piece))
            except KeyError:
                raise UnknownCharacterError(self._complaint(text)) from None

    def _complaint(self, text: str) -> str:
        pieces = (piece for piece in self._added.split(text) if isinstance(piece, str))
        first, *others = sorted({letter for piece in pieces for letter in piece if letter not in self._alphabet})
        more = f", nor are {len(others)} others of the text" if others else ""
        known = f"the {len(self._alphabet)} of {self._source}"
        return f"the character {first!r} (U+{ord(first):04X}) is not among {known}{more}"

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8", "replace")

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        return "".join(self._tokens.get(id, "") for id in ids)


def build_alphabet(description: Description) -> CharacterTokenizer:
    """The tokenizer of an alphabet: its tokens, but for the added ones, are single characters."""
    special = contents(description.added)
    alphabet = {token: id for token, id in description.vocabulary.items() if token not in special}
    if longer := [token for token in alphabet if len(token) != 1]:
        raise CheckpointError(f"{description.source}: expected each token to be one character, got {longer[0]!r:.60}")
    return CharacterTokenizer(description.source, alphabet, description.added, special.get(description.eos_token or ""))
