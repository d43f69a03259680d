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
    """The text of one response: token ids come in, text goes out, whole characters only and never past a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], eos_ids: Collection[int]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._eos_ids = stops, eos_ids
        self._held = ""  # what may be the beginning of a stop text
        self.is_done = False

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is certain now."""
        if token in self._eos_ids:
            return self.finish()
        return self._advance(self._decoder.push(token), is_last=False)

    def finish(self) -> str:
        """Ends the response and returns the rest of its text."""
        if self.is_done:
            return ""
        rest = self._advance(self._decoder.flush(), is_last=True)
        self.is_done = True
        return rest

    def _advance(self, new: str, is_last: bool) -> str:
        pending = self._held + new
        ends = [pending.find(stop) for stop in self._stops if stop in pending]
        if ends:
            certain, self._held, self.is_done = pending[: min(ends)], "", True
        else:
            keep = 0 if is_last else _possible_stop(pending, self._stops)
            certain, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        return certain


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins one of ``stops``."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
