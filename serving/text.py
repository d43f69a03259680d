"""An answer's tokens become its text: whole characters only, never past a text that ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from response import Response
from tokenizer import Tokenizer


@dataclass
class Certain:
    """A piece of text that nothing can take back, and the tokens that have come with it.

    Attributes:
        offsets: Where in the whole text each token begins, in characters.
    """

    text: str
    ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def __add__(self, other: Certain) -> Certain:
        """The two, one behind the other."""
        return Certain(self.text + other.text, self.ids + other.ids, self.offsets + other.offsets)


class AnswerText:
    """The text of one answer, piece by piece, and where in it each token begins.

    Args:
        stops: Texts that end it. Tokens that begin behind its end are not told.
        include_stop: Whether it has the one that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], include_stop: bool) -> None:
        self._response = Response(tokenizer, stops, (), include_stop)
        self._waiting: list[tuple[int, int]] = []
        self._length = 0  # of what is certain

    @property
    def stop(self) -> str | None:
        """The text that has ended it, if one has."""
        return self._response.stop

    def push(self, id: int, looks: bool = True) -> Certain:
        """Takes a token.

        Args:
            looks: False: texts that would end the answer are not looked for yet.
        """
        self._waiting.append((id, self._response.received))
        return self._certain(self._response.push(id, looks))

    def finish(self, ending: int | None = None) -> Certain:
        """The rest, at the end.

        Args:
            ending: The token that has ended the answer: it is told, and has no text.
        """
        if ending is not None:
            self._waiting.append((ending, self._response.received))
        return self._certain(self._response.finish())

    def whole(self, ids: list[int], is_ended: bool) -> Certain:
        """All of an answer at once, the last of whose tokens has ended it, or not."""
        certain = Certain("")
        for id in ids[: len(ids) - is_ended]:
            certain += self.push(id)
        return certain + self.finish(ids[-1] if is_ended else None)

    def _certain(self, text: str) -> Certain:
        self._length += len(text)
        told = self._waiting
        if self._response.holds or self.stop is not None:
            told = [each for each in self._waiting if each[1] < self._length]
        self._waiting = self._waiting[len(told) :]
        return Certain(text, [id for id, _ in told], [offset for _, offset in told])
