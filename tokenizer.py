"""Text ↔ token ids, equal to transformers' tokenizer of the same checkpoint.

    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config.vocab_size)
    ids = tokenizer.encode("Hello world")      # [15496, 995]
    stream = StreamDecoder(tokenizer)
    for token in ids:
        print(stream.push(token), end="")      # never half a character
    print(stream.flush())

Two kinds are known: byte-level BPE, through tiktoken, and alphabets, where each character is a token. A checkpoint's
own tokenizer files come first; without any, a vocabulary of GPT-2's size is taken for GPT-2's, which is tiktoken's
encoding "gpt2". What cannot be represented exactly is refused, by name, with `CheckpointError`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from weight_loader import CheckpointError, read_json

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257

# Unicode's White_Space, which is what both tokenizers mean by \s; Python's own \s has four control characters more.
_WHITE_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
# A run of a million white-space characters overflows the stack of tiktoken's regex engine.
_LONG_WHITE_SPACE = re.compile(_WHITE_SPACE + "{50000,}")


class UnknownCharacterError(CheckpointError, ValueError):
    """A text has a character that the checkpoint's alphabet lacks; the message names it."""


class Tokenizer(Protocol):
    """Text ↔ ids of one vocabulary.

    Attributes:
        eos_id: the id that ends a text, or None if the vocabulary has none.
    """

    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written in it become their ids, as with transformers."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; an id without a token (in a padded vocabulary) has none."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""


class BytePairTokenizer:
    """A `Tokenizer` that splits a text into words, and merges the bytes of each. Any text encodes.

    Attributes:
        encoding: the `tiktoken.Encoding` that does the work; its ranks are merge priorities, not yet vocabulary ids.
        eos_id: the id that ends a text, or None if the vocabulary has none.
    """

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
        ids: list[int] = []
        for piece in self._added.split(text):
            if piece in self._added.ids:
                ids.append(self._added.ids[piece])
                continue
            if self._add_prefix_space and not piece.startswith(" "):
                piece = " " + piece
            for part in _short_of_stack_overflow(piece) if self._use_regex else [piece]:
                ids.extend(self._ids[rank] for rank in self.encoding.encode_ordinary(part))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._tokens.get(id, b"") for id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharacterTokenizer:
    """A `Tokenizer` with one token for each character of an alphabet; text with any other does not encode."""

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
        self._added = AddedTokens(added)
        self._tokens = {id: token for token, id in [*alphabet.items(), *self._added.ids.items()]}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            UnknownCharacterError: a character is not in the alphabet.
        """
        ids: list[int] = []
        for piece in self._added.split(text):
            if piece in self._added.ids:
                ids.append(self._added.ids[piece])
                continue
            try:
                ids.extend(map(self._alphabet.__getitem__, piece))
            except KeyError as error:
                character = error.args[0]
                raise UnknownCharacterError(
                    f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self._alphabet)} "
                    f"of {self._source}"
                ) from None
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8", "replace")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._tokens.get(id, "") for id in ids)


class StreamDecoder:
    """Decode ids one at a time: the pieces of text, joined, are what `Tokenizer.decode` gives for all of them.

    A character whose bytes are spread over tokens is held back until its last byte has come.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """At the end: U+FFFD for a character that was never completed. The decoder can then be used again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def load_tokenizer(checkpoint_path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        checkpoint_path: the folder; `tokenizer.json`, else `vocab.json` with `merges.txt`, and the files beside them
            that name special tokens.
        vocab_size: the model's number of embeddings. Added tokens beyond it are ignored, as the model has no embedding
            for them; a vocabulary beyond it is refused.

    Raises:
        CheckpointError: the files are absent, damaged, or of a tokenizer that is neither byte-level BPE nor an
            alphabet.
    """
    if (checkpoint_path / "tokenizer.json").is_file():
        description = _read_tokenizer_json(checkpoint_path)
        return (_build if description.merges is not None else _build_alphabet)(description, vocab_size)
    if (checkpoint_path / "vocab.json").is_file() and (checkpoint_path / "merges.txt").is_file():
        return _build(_read_vocab_and_merges(checkpoint_path), vocab_size)
    # nanoGPT pads GPT-2's vocabulary to 50304, a multiple of 64.
    if not GPT2_VOCAB_SIZE <= vocab_size <= 50304:
        raise CheckpointError(
            f"{str(checkpoint_path)!r} has neither tokenizer.json nor vocab.json with merges.txt, "
            f"and its vocabulary of {vocab_size} is not GPT-2's"
        )
    return _gpt2(checkpoint_path)


def _gpt2(checkpoint_path: Path) -> Tokenizer:
    """GPT-2's own vocabulary, which tiktoken downloads once."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network provokes
        raise CheckpointError(
            f"{str(checkpoint_path)!r} has no tokenizer files, and GPT-2's cannot be had from tiktoken "
            f"({type(error).__name__}): put tokenizer.json there, or a filled cache at TIKTOKEN_CACHE_DIR"
        ) from error
    tokens = {id: encoding.decode_single_token_bytes(id) for id in range(encoding.n_vocab)}
    added = [AddedToken(END_OF_TEXT, encoding.eot_token)]
    return BytePairTokenizer(encoding, list(range(encoding.n_vocab)), tokens, added, eos_id=encoding.eot_token)


# ---------------------------------------------------------------------------------------------------------------------
# Reading HuggingFace's files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before it is split into words. `normalized` ones are looked for last."""

    content: str
    id: int
    normalized: bool = False


class AddedTokens:
    """The added tokens of a vocabulary.

    Attributes:
        ids: id by content.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        tokens = list(tokens)
        self.ids = {token.content: token.id for token in tokens}
        self._patterns = []
        for normalized in (False, True):
            contents = sorted((t.content for t in tokens if t.normalized is normalized), key=len, reverse=True)
            if contents:
                self._patterns.append(re.compile("(" + "|".join(map(re.escape, contents)) + ")"))

    def split(self, text: str) -> list[str]:
        """`text` cut around the tokens in it: at the leftmost, and there the longest; pieces are never empty."""
        pieces = [text]
        for pattern in self._patterns:
            pieces = [part for piece in pieces for part in ([piece] if piece in self.ids else pattern.split(piece))]
        return [piece for piece in pieces if piece]


@dataclass
class _Description:
    """A tokenizer as its files describe it."""

    source: Path
    vocabulary: dict[str, int]  # in the byte alphabet; of an alphabet: its characters
    merges: list[tuple[str, str]] | None  # by priority; None: an alphabet
    added: list[AddedToken] = field(default_factory=list)
    use_regex: bool = True
    add_prefix_space: bool = False
    ignore_merges: bool = False
    eos_token: str | None = None


def _read_tokenizer_json(folder: Path) -> _Description:
    """tokenizer.json, of HuggingFace's `tokenizers`."""
    source = folder / "tokenizer.json"
    raw = read_json(source)

    def part(name: str) -> dict[str, Any]:
        value = raw.get(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: expected {name} to be of a byte-level BPE tokenizer, got {value!r:.60}")
        return value

    def require(name: str, found: object, *accepted: object) -> None:
        if found not in accepted:
            raise CheckpointError(f"{source}: {name}={found!r:.60} is not supported, only {accepted[0]!r}")

    model, pre_tokenizer = part("model"), part("pre_tokenizer")
    is_alphabet = model.get("type") == "WordLevel"
    if is_alphabet:
        # Each character a token, which the pattern cuts out, and the decoder joins without spaces between.
        require("pre_tokenizer", pre_tokenizer, EACH_CHARACTER)
        require("decoder.type", part("decoder").get("type"), "Fuse")
        if model.get("unk_token") in (model.get("vocab") or {}):
            raise CheckpointError(f"{source}: an alphabet with a token for what is not in it is not supported")
    else:
        require("model.type", model.get("type", "BPE"), "BPE")
        require("pre_tokenizer.type", pre_tokenizer.get("type"), "ByteLevel")
        require("decoder.type", part("decoder").get("type"), "ByteLevel")
    normalizer = raw.get("normalizer")
    require("normalizer", normalizer.get("type") if isinstance(normalizer, dict) else normalizer, None)
    if not _adds_nothing(raw.get("post_processor")):
        raise CheckpointError(f"{source}: a post_processor that adds tokens to the text's is not supported")
    require("model.dropout", model.get("dropout"), None, 0)
    require("model.byte_fallback", model.get("byte_fallback", False), False)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(f"model.{affix}", model.get(affix), None, "")

    description = _Description(
        source,
        _vocabulary(source, model.get("vocab")),
        None if is_alphabet else _merges(source, model.get("merges")),
        use_regex=pre_tokenizer.get("use_regex", True) is not False,
        add_prefix_space=pre_tokenizer.get("add_prefix_space", True) is not False,
        ignore_merges=model.get("ignore_merges", False) is True,
    )
    added = raw.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{source}: expected added_tokens to be a list, got {added!r:.60}")
    for token in added:
        _add(description, token, token.get("id") if isinstance(token, dict) else None)
    _read_special_tokens(description, folder)
    return description


#: The pre-tokenizer of an alphabet, as `tokenizers` writes it.
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def _adds_nothing(processor: object) -> bool:
    """Whether a post_processor leaves the ids as they are: transformers writes one even where it adds nothing."""
    if processor is None:
        return True
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return all(map(_adds_nothing, _values(processor.get("processors"))))
    template = [list(item) for item in _values(processor.get("single")) if isinstance(item, dict)]
    return processor.get("type") == "ByteLevel" or template == [["Sequence"]]


def _read_vocab_and_merges(folder: Path) -> _Description:
    """vocab.json and merges.txt, of GPT-2's original tokenizer."""
    source = folder / "merges.txt"
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {source} as UTF-8 text: {type(error).__name__}") from error
    lines = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
    merges = _merges(source, [line for line in lines if line])
    vocab = folder / "vocab.json"
    description = _Description(vocab, _vocabulary(vocab, read_json(vocab)), merges)
    _read_special_tokens(description, folder)
    return description


def _vocabulary(source: Path, vocab: object) -> dict[str, int]:
    """A vocabulary whose ids are distinct and not negative."""
    valid = isinstance(vocab, dict) and all(type(id) is int and 0 <= id < 2**31 for id in vocab.values())
    if not isinstance(vocab, dict) or not valid or len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{source}: expected the vocabulary to map tokens to distinct ids")
    return vocab


def _merges(source: Path, merges: object) -> list[tuple[str, str]]:
    """Merges as pairs: each is written as "a b" or, in newer files, as ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: expected a list of merges, got {merges!r:.60}")
    pairs = []
    for merge in merges:
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((left + "", right + ""))
        except (ValueError, TypeError):
            raise CheckpointError(f"{source}: expected a merge of two tokens, got {merge!r:.60}") from None
    return pairs


# The keys under which tokenizer_config.json and special_tokens_map.json name special tokens.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def _read_special_tokens(description: _Description, folder: Path) -> None:
    """What the files beside the vocabulary say: more added tokens, which one ends a text, and the leading space."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    for key in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if settings.get(key):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {key}=true is not supported, only false")
    # transformers' GPT-2 class builds the splitting into words anew, whatever tokenizer.json says.
    is_gpt2_class = str(settings.get("tokenizer_class", "")).startswith("GPT2Tokenizer")
    if is_gpt2_class or description.source.name == "vocab.json":
        description.use_regex = True
        description.add_prefix_space = settings.get("add_prefix_space", False) is True
        for key in ("bos_token", "eos_token", "unk_token"):
            settings.setdefault(key, END_OF_TEXT)

    decoder = settings.get("added_tokens_decoder", {})
    listed: dict[object, object] = {}
    if (folder / "added_tokens.json").is_file():
        listed |= {id: token for token, id in read_json(folder / "added_tokens.json").items() if type(id) is int}
    if isinstance(decoder, dict):
        listed |= {int(id): token for id, token in decoder.items() if id.isdecimal()}
    for id, token in listed.items():
        _add(description, token, id)
    more = [token for key in _MORE_SPECIAL for token in _values(settings.get(key))]
    for token in [*(settings[key] for key in _SPECIAL if key in settings), *more]:
        _add(description, token, None)
    if "eos_token" in settings:
        description.eos_token = _content(settings["eos_token"])
    elif any(token.content == END_OF_TEXT for token in description.added):
        description.eos_token = END_OF_TEXT


def _values(tokens: object) -> list[Any]:
    """The members of a list, or of a dict by name."""
    return list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []


def _content(token: object) -> str | None:
    """The text of a token that is written as a string or as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _add(description: _Description, token: object, id: object) -> None:
    """Add a token that one of the files lists; the first that lists it decides its flags."""
    content = _content(token)
    if content == "":
        return
    if content is None:
        raise CheckpointError(f"{description.source}: expected an added token with its content, got {token!r:.60}")
    if any(known.content == content for known in description.added):
        return
    flags: dict[str, Any] = token if isinstance(token, dict) else {}
    for flag in ("lstrip", "rstrip", "single_word"):
        if flags.get(flag):
            raise CheckpointError(f"{description.source}: {flag} of the added token {content!r} is not supported")
    if content in description.vocabulary:
        id = description.vocabulary[content]
    elif type(id) is not int:  # as tokenizers numbers new tokens
        id = max([len(description.vocabulary) - 1, *(known.id for known in description.added)]) + 1
    elif id < 0 or id in description.vocabulary.values() or any(known.id == id for known in description.added):
        raise CheckpointError(f"{description.source}: the id {id} of the added token {content!r} is not its own")
    description.added.append(AddedToken(content, id, flags.get("normalized", False) is True))


# ---------------------------------------------------------------------------------------------------------------------
# Building the encoding
# ---------------------------------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for the 256 bytes: code point of the stand-in → byte.

    Printable Latin-1 characters stand for themselves, the other bytes for the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
# For str.translate: a code point that stands for no byte becomes one that Latin-1 cannot encode.
_TO_LATIN1 = dict.fromkeys(range(256), 0xFFFF) | _ALPHABET


def _token_bytes(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for; one outside the alphabet stands for its own text."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


def _check_vocabulary(description: _Description, vocab_size: int) -> None:
    largest = max(description.vocabulary.values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{description.source} has ids up to {largest}, but the model's vocabulary has {vocab_size}"
        )


def _build_alphabet(description: _Description, vocab_size: int) -> Tokenizer:
    """The tokenizer of an alphabet: its tokens, but for the added ones, are single characters."""
    _check_vocabulary(description, vocab_size)
    added = [token for token in description.added if token.id < vocab_size]
    special = {token.content: token.id for token in added}
    alphabet = {token: id for token, id in description.vocabulary.items() if token not in special}
    if longer := [token for token in alphabet if len(token) != 1]:
        raise CheckpointError(f"{description.source}: expected each token to be one character, got {longer[0]!r:.60}")
    return CharacterTokenizer(description.source, alphabet, added, special.get(description.eos_token or ""))


def _build(description: _Description, vocab_size: int) -> Tokenizer:
    """The byte-level BPE of a description, after proving that tiktoken encodes as the description says.

    tiktoken merges, of all adjacent pairs whose concatenation is a token, the one of the lowest rank first; HuggingFace
    merges only the listed pairs, in the order of the list. Both come to the same for tokens that are reached through
    their listed pair (see `_reached`), with the merge's place in the list as rank; the other tokens are never
    produced by HuggingFace's BPE, so tiktoken is not told of them.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    _check_vocabulary(description, vocab_size)
    source, vocabulary, merges = description.source, description.vocabulary, description.merges or []
    letters = {chr(code): byte for code, byte in _ALPHABET.items()}
    absent = [byte for letter, byte in letters.items() if letter not in vocabulary]
    if absent:
        raise CheckpointError(f"{source}: expected a token for each of the 256 bytes, but {len(absent)} have none")

    numbers = dict(letters)  # token → number: its byte, or 256 + its place in the list of merges
    pairs = []
    for place, (left, right) in enumerate(merges):
        token = left + right
        if left not in numbers or right not in numbers or token in numbers:
            fault = "makes a token for the second time" if token in numbers else "comes before what makes its parts"
            raise CheckpointError(f"{source}: merge {place + 1}, of {left!r} and {right!r}, {fault}")
        pairs.append((numbers[left], numbers[right]))
        numbers[token] = 256 + place
    if nameless := numbers.keys() - vocabulary.keys():
        raise CheckpointError(
            f"{source}: merges make {len(nameless)} tokens that have no id, among them {min(nameless)!r}"
        )
    reached = _reached(np.array(pairs, np.int64).reshape(-1, 2))

    added = [token for token in description.added if token.id < vocab_size]
    if description.ignore_merges:
        whole = set(vocabulary) - numbers.keys() - {token.content for token in added}
        if whole or not reached.all():
            raise CheckpointError(f"{source}: ignore_merges with tokens that no merge makes is not supported")
    tokens = {id: _token_bytes(token) for token, id in vocabulary.items()}
    ids = [0] * len(numbers)
    ranks = {}
    for token, number in numbers.items():
        ids[number] = vocabulary[token]
        if number < 256 or reached[number - 256]:
            ranks[tokens[vocabulary[token]]] = number
    for added_token in added:
        tokens[added_token.id] = added_token.content.encode("utf-8", "replace")
    pattern = r50k_pat_str if description.use_regex else r"(?s:.+)"
    encoding = tiktoken.Encoding(str(source), pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    eos = {token.content: token.id for token in added}.get(description.eos_token or "")
    return BytePairTokenizer(encoding, ids, tokens, added, description.add_prefix_space, description.use_regex, eos)


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


# ---------------------------------------------------------------------------------------------------------------------
# Splitting the text
# ---------------------------------------------------------------------------------------------------------------------


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
