"""The text around generation: a prompt becomes token ids, and drawn tokens become a response."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from command_line import UsageError
from tokenizer import StreamDecoder, Tokenizer


def encode_prompt(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        UsageError: it is empty, or longer than the context. One that fills it leaves room for one more token.
    """
    if not prompt:
        raise UsageError("expected a prompt but got an empty one")
    ids = tokenizer.encode(prompt)
    if len(ids) > context:
        raise UsageError(f"expected a prompt of at most {context} tokens, the model's context, but got {len(ids)}")
    return ids


class Response:
    """The text of one response: token ids come in, text goes out, whole characters only and never past a stop text.

    Args:
        stops: Texts that end it.
        eos_ids: Tokens that end it.
        keeps_stop: Whether it has the text that ended it.

    Attributes:
        is_done: Whether it has ended.
        stop: The text that ended it, if one did.
        received: How many characters have come in, those that are held back included.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], eos_ids: Collection[int], keeps_stop: bool = False
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._eos_ids, self._keeps_stop = stops, eos_ids, keeps_stop
        self._held = ""  # what may be the beginning of a stop text
        self.is_done = False
        self.stop: str | None = None
        self.received = 0

    @property
    def holds(self) -> bool:
        """Whether characters are held back: they may be the beginning of a stop text."""
        return bool(self._held)

    def push(self, token: int, looks: bool = True) -> str:
        """Takes a token and returns the text that is certain now.

        Args:
            looks: False: stop texts are not looked for in this token's text.
        """
        if token in self._eos_ids:
            return self.finish()
        return self._advance(self._decoder.push(token), is_last=False, stops=self._stops if looks else ())

    def finish(self) -> str:
        """Ends the response and returns the rest of its text."""
        if self.is_done:
            return ""
        rest = self._advance(self._decoder.flush(), is_last=True, stops=self._stops)
        self.is_done = True
        return rest

    def _advance(self, new: str, is_last: bool, stops: Sequence[str]) -> str:
        self.received += len(new)
        pending = self._held + new
        # The one that begins first; of those that begin together the longest is all of them.
        found = min(((pending.find(stop), -len(stop), stop) for stop in stops if stop in pending), default=None)
        if found is not None:
            end, _, self.stop = found
            certain, self._held, self.is_done = pending[: end + len(self.stop) * self._keeps_stop], "", True
        else:
            keep = 0 if is_last else _possible_stop(pending, stops)
            certain, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        return certain


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins one of ``stops``."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
