"""Byte-level BPE through tiktoken, proven to encode as a description says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tokenizing.added_tokens import WHITE_SPACE, AddedToken, AddedTokens
from tokenizing.description import Description, NotModelled, contents
from weight_loader import CheckpointError

if TYPE_CHECKING:
    import tiktoken

# A run of a million white-space characters overflows the stack of tiktoken's regex engine.
_LONG_WHITE_SPACE = re.compile(f"[{re.escape(WHITE_SPACE)}]{{50000,}}")


class BytePairTokenizer:
    """A `Tokenizer` that splits a text into words, and merges the bytes of each. Any text encodes.

    Attributes:
        encoding: the `tiktoken.Encoding` that does the work; its ranks are merge priorities, not yet vocabulary ids.
        eos_id: the id that ends a text, or None if the vocabulary has none.
        prefix: nothing is put before a text.
    """

    prefix: tuple[int, ...] = ()

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        ids: list[int],
        tokens: dict[int, bytes],
        added: Iterable[AddedToken] = (),
        add_prefix_space: bool = False,
        use_regex: bool = True,
        eos_id: int | None = None,
    ) -> None:
        """Put the parts together; `load_tokenizer` is what calls this.

        Args:
            encoding: takes words to ranks; it does not know the added tokens.
            ids: vocabulary id by rank.
            tokens: bytes by vocabulary id.
            added: tokens that are found in the text before it is split into words.
            add_prefix_space: whether every text, and what follows an added token, begins with a space.
            use_regex: whether `encoding` splits into words by GPT-2's pattern, or takes a text as one word.
            eos_id: the id that ends a text.
        """
        self.encoding = encoding
        self.eos_id = eos_id
        self._ids = ids
        self._tokens = tokens
        self._added = AddedTokens(added)
        self._add_prefix_space = add_prefix_space
        self._use_regex = use_regex

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a lone surrogate, which no UTF-8 text can hold, is taken as U+FFFD."""
        return [id for part in self.encode_in_parts(text) for id in part]

    def encode_in_parts(self, text: str) -> Iterator[list[int]]:
        for piece in self._pieces(text):
            if isinstance(piece, int):
                yield [piece]
                continue
            for part in _short_of_stack_overflow(piece) if self._use_regex else [piece]:
                yield [self._ids[rank] for rank in self.encoding.encode_ordinary(part)]

    def words(self, text: str) -> Iterator[bytes | int]:
        """The words whose bytes `encode` merges, and between them the ids of added tokens."""
        import regex

        pattern = regex.compile(self.encoding._pat_str)
        for piece in self._pieces(text):
            if isinstance(piece, int):
                yield piece
            else:
                yield from (match[0].encode("utf-8", "replace") for match in pattern.finditer(piece))

    def _pieces(self, text: str) -> Iterator[str | int]:
        for piece in self._added.split(text):
            if self._add_prefix_space and isinstance(piece, str) and not piece.startswith(" "):
                piece = " " + piece
            yield piece

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._tokens.get(id, b"") for id in ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        return self.decode_bytes(ids).decode("utf-8", errors)


def _short_of_stack_overflow(text: str) -> Iterator[str]:
    """`text` in parts that are encoded as they would be within it, without very long runs of white space before text.

    GPT-2's pattern takes of such a run all but the last character as one word, and so it may be cut there.
    """
    begin = 0
    for run in _LONG_WHITE_SPACE.finditer(text):
        end = run.end() - (run.end() < len(text))
        yield text[begin : run.start()]
        yield text[run.start() : end]
        begin = end
    yield text[begin:]


# ---- the byte alphabet ----


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for the 256 bytes: code point of the stand-in → byte.

    Printable Latin-1 characters stand for themselves, the other bytes for the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
# For str.translate: a code point that stands for no byte becomes one that Latin-1 cannot encode.
_TO_LATIN1 = dict.fromkeys(range(256), 0xFFFF) | BYTE_OF


def token_bytes(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for; one outside the alphabet stands for its own text."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


# ---- building ----


def byte_ids(description: Description) -> list[int]:
    """The ids of the 256 bytes, from which merging begins, of a BPE."""
    letters = {byte: chr(code) for code, byte in BYTE_OF.items()}
    return [description.vocabulary[letters[byte]] for byte in range(256)]


def build_byte_pairs(description: Description) -> BytePairTokenizer:
    """The byte-level BPE of a description, after proving that tiktoken encodes as the description says.

    tiktoken merges, of all adjacent pairs whose concatenation is a token, the one of the lowest rank first; HuggingFace
    merges only the listed pairs, in the order of the list. Both come to the same for tokens that are reached through
    their listed pair (see `_reached`), with the merge's place in the list as rank; the other tokens are never
    produced by HuggingFace's BPE, so tiktoken is not told of them.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    source, vocabulary, merges = description.source, description.vocabulary, description.merges or []
    letters = {chr(code): byte for code, byte in BYTE_OF.items()}
    absent = [byte for letter, byte in letters.items() if letter not in vocabulary]
    if absent:
        raise NotModelled(f"{source}: expected a token for each of the 256 bytes, but {len(absent)} have none")

    numbers = dict(letters)  # token → number: its byte, or 256 + its place in the list of merges
    pairs = []
    for place, (left, right) in enumerate(merges):
        token = left + right
        if left not in numbers or right not in numbers or token in numbers:
            fault = "makes a token for the second time" if token in numbers else "comes before what makes its parts"
            raise NotModelled(f"{source}: merge {place + 1}, of {left!r} and {right!r}, {fault}")
        pairs.append((numbers[left], numbers[right]))
        numbers[token] = 256 + place
    if nameless := numbers.keys() - vocabulary.keys():
        raise CheckpointError(
            f"{source}: merges make {len(nameless)} tokens that have no id, among them {min(nameless)!r}"
        )
    reached = _reached(np.array(pairs, np.int64).reshape(-1, 2))

    added = contents(description.added)
    if description.ignore_merges:
        whole = set(vocabulary) - numbers.keys() - added.keys()
        if whole or not reached.all():
            raise NotModelled(f"{source}: ignore_merges with tokens that no merge makes is not supported")
    tokens = {id: token_bytes(token) for token, id in vocabulary.items()}
    ids = [0] * len(numbers)
    ranks = {}
    for token, number in numbers.items():
        ids[number] = vocabulary[token]
        if number < 256 or reached[number - 256]:
            ranks[tokens[vocabulary[token]]] = number
    for content, id in added.items():
        tokens[id] = content.encode("utf-8", "replace")
    pattern = r50k_pat_str if description.use_regex else r"(?s:.+)"
    encoding = tiktoken.Encoding(str(source), pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return BytePairTokenizer(
        encoding,
        ids,
        tokens,
        description.added,
        description.add_prefix_space,
        description.use_regex,
        added.get(description.eos_token or ""),
    )


def _reached(pairs: np.ndarray) -> np.ndarray:
    """Which tokens BPE makes of their own bytes through their listed pair.

    Args:
        pairs: (merges, 2) int64: the numbers of the tokens that each merge joins. Bytes have the numbers 0 to 255, the
            token of merge m has 256 + m, and a merge joins only tokens of smaller numbers.

    Returns:
        (merges,) bool.

    Merging the bytes of `left + right` in the order of the numbers makes `left` and `right` side by side, unless an
    earlier merge joins bytes across their border first. What stands at the border at each moment is found by going back
    from (left, right): of the two the one made last is replaced by its half at the border. A listed pair of the two
    joins across the border if its number comes before those of the merges that make the two into their successors; of
    equal numbers the merge further left goes first. Conversely, in any text a pair (x, y) with x + y = left + right
    can only arise where these bytes alone would make it, and so if (left, right) is reached, no other pair arises.
    """
    count = len(pairs)
    reached = np.ones(count, bool)
    if count == 0:
        return reached
    keys = pairs[:, 0] * (256 + count) + pairs[:, 1]
    order = np.argsort(keys)
    keys = keys[order]

    merge = np.arange(count)
    left, right = pairs[:, 0], pairs[:, 1]
    left_until = right_until = merge + 256  # the numbers of the tokens that `left` and `right` next become part of
    while merge.size:
        more = (left >= 256) | (right >= 256)
        merge, left, right, left_until, right_until = (
            array[more] for array in (merge, left, right, left_until, right_until)
        )
        undo_right = right >= left
        part = np.where(undo_right, right, left) - 256
        left_until, right_until = np.where(undo_right, left_until, left), np.where(undo_right, right, right_until)
        left, right = np.where(undo_right, left, pairs[part, 1]), np.where(undo_right, pairs[part, 0], right)
        key = left * (256 + count) + right
        place = np.minimum(np.searchsorted(keys, key), count - 1)
        number = 256 + order[place]
        crossed = (keys[place] == key) & (number < left_until) & (number <= right_until)
        reached[merge[crossed]] = False
    if not reached.all():  # what is made of an unreached token is not reached either
        for m, parts in enumerate(pairs.tolist()):
            reached[m] &= all(number < 256 or reached[number - 256] for number in parts)
    return reached
