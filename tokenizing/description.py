"""What a tokenizer is, as a value; tokenizer.json ↔ that.

    description = from_json(path, content)     # as `tokenizers` reads the file
    description.vocab_size                     # the largest id + 1: there may be holes
    to_json(description)                       # a tokenizer.json that says all of it, for training to write

Truncation and padding, which tokenizer.json may ask for, are not part of a tokenizer here: no text is cut in silence.
What tiktoken could not do exactly is refused, by name; most of it is left to the package `tokenizers` (pipelines.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizing.added_tokens import AddedToken, Addition
from weight_loader import CheckpointError

END_OF_TEXT = "<|endoftext|>"


class NotModelled(CheckpointError):
    """A tokenizer for which there are no rules here; the package `tokenizers` may have them."""


#: The pre-tokenizer of an alphabet, as `tokenizers` writes it.
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Description:
    """A tokenizer as its files describe it: byte-level BPE, or an alphabet, where each character is a token.

    Attributes:
        source: the file with the vocabulary, for messages.
        vocabulary: id by token: in the byte alphabet, of an alphabet its characters.
        merges: by priority; None: an alphabet.
        added: tokens that are found in the text before it is split into words, by id.
        use_regex: whether a text is split into words by GPT-2's pattern, or taken as one word.
        add_prefix_space: whether every text, and what follows an added token, begins with a space.
        ignore_merges: whether a word that is a token is taken as it is.
        eos_token: which one ends a text, if the files say so.
    """

    source: Path = field(compare=False)
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]] | None
    added: list[AddedToken] = field(default_factory=list)
    use_regex: bool = True
    add_prefix_space: bool = False
    ignore_merges: bool = False
    eos_token: str | None = field(default=None, compare=False)

    @property
    def vocab_size(self) -> int:
        """So many embeddings hold all ids: the largest one plus 1."""
        return max([*self.vocabulary.values(), *(token.id for token in self.added)], default=-1) + 1

    def within(self, vocab_size: int) -> Description:
        """Without the added tokens that a model of `vocab_size` embeddings has none for.

        Raises:
            CheckpointError: the vocabulary itself is larger.
        """
        largest = max(self.vocabulary.values(), default=0)
        if largest >= vocab_size:
            raise CheckpointError(f"{self.source} has ids up to {largest}, but the model's vocabulary has {vocab_size}")
        return replace(self, added=[token for token in self.added if token.id < vocab_size])


def from_json(source: Path, raw: dict[str, Any]) -> Description:
    """What a tokenizer.json describes that is alone, as `tokenizers` reads it.

    Args:
        source: its name, for messages.
        raw: its content.
    """
    description = parse_rules(source, raw, has_rules=True)
    addition = Addition(description.vocabulary)
    for token in listed_tokens(source, raw):
        addition.add(token)
    eos = END_OF_TEXT if END_OF_TEXT in addition else None
    return replace(description, added=distinct(description, addition), eos_token=eos)


def to_json(description: Description) -> dict[str, Any]:
    """The content of the tokenizer.json that says all of it, as `tokenizers` writes it."""

    def byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool = True) -> dict[str, Any]:
        flags = {"add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": use_regex}
        return {"type": "ByteLevel", **flags}

    vocabulary = dict(sorted(description.vocabulary.items(), key=lambda item: item[1]))
    model: dict[str, Any] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    if description.merges is not None:
        nothing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        model = {
            **{"type": "BPE", **dict.fromkeys(nothing), "fuse_unk": False, "byte_fallback": False},
            **{"ignore_merges": description.ignore_merges, "vocab": vocabulary},
            "merges": [list(pair) for pair in description.merges],
        }
    is_alphabet = description.merges is None
    return {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [
            {"id": token.id, "content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
            for token in description.added
        ],
        "normalizer": None,
        "pre_tokenizer": EACH_CHARACTER
        if is_alphabet
        else byte_level(description.add_prefix_space, True, description.use_regex),
        "post_processor": None if is_alphabet else byte_level(True, False),
        "decoder": {"type": "Fuse"} if is_alphabet else byte_level(True, True),
        "model": model,
    }


def write_json(content: dict[str, Any], indent: int | None = None) -> str:
    """A tokenizer.json's text, to the byte as `tokenizers` writes it, pretty or without any space."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(content, indent=indent, ensure_ascii=False, separators=separators)


def contents(tokens: Iterable[AddedToken]) -> dict[str, int]:
    """Id by content."""
    return {token.content: token.id for token in tokens}


# ---- the parts of tokenizer.json -------------------------------------------------------------------------------------


def parse_rules(source: Path, raw: dict[str, Any], has_rules: bool) -> Description:
    """What a tokenizer.json says, but for its added tokens.

    Args:
        has_rules: whether it also says how a text is split; if not, the values in the description are not of use.
    """

    def part(name: str) -> dict[str, Any]:
        value = raw.get(name)
        if not isinstance(value, dict):
            raise NotModelled(f"{source}: expected {name} to be of a byte-level BPE tokenizer, got {shown(value)}")
        return value

    def require(name: str, found: object, *accepted: object) -> None:
        if not any(found is value or (type(found) is type(value) and found == value) for value in accepted):
            raise NotModelled(f"{source}: {name}={shown(found)} is not supported, only {accepted[0]!r}")

    model, pre_tokenizer = part("model"), part("pre_tokenizer")
    is_alphabet = model.get("type") == "WordLevel"
    if is_alphabet:
        # Each character a token, which the pattern cuts out, and the decoder joins without spaces between.
        require("pre_tokenizer", pre_tokenizer, EACH_CHARACTER)
        require("decoder.type", part("decoder").get("type"), "Fuse")
        unknown = model.get("unk_token")
        if not isinstance(unknown, str) or unknown in parse_vocabulary(source, model.get("vocab")):
            raise NotModelled(f"{source}: an alphabet with a token for what is not in it is not supported")
    else:
        require("model.type", model.get("type", "BPE"), "BPE")
        require("pre_tokenizer.type", pre_tokenizer.get("type"), "ByteLevel")
        require("decoder.type", part("decoder").get("type"), "ByteLevel")
    normalizer = raw.get("normalizer")
    require("normalizer", normalizer.get("type") if isinstance(normalizer, dict) else normalizer, None)
    if not _adds_nothing(raw.get("post_processor")):
        raise NotModelled(f"{source}: a post_processor that adds tokens to the text's is not supported")
    require("model.dropout", model.get("dropout"), None, 0, 0.0)
    require("model.byte_fallback", model.get("byte_fallback", False), False)
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(f"model.{affix}", model.get(affix), None, "")
    vocabulary = parse_vocabulary(source, model.get("vocab"))
    if is_alphabet:
        return Description(source, vocabulary, None)
    merges = parse_merges(source, model.get("merges"))
    if not has_rules:
        return Description(source, vocabulary, merges)
    return Description(
        source,
        vocabulary,
        merges,
        use_regex=boolean(source, pre_tokenizer, "use_regex", True),
        add_prefix_space=boolean(source, pre_tokenizer, "add_prefix_space", None),
        ignore_merges=boolean(source, model, "ignore_merges", False),
    )


def _adds_nothing(processor: object) -> bool:
    """Whether a post_processor leaves the ids as they are: transformers writes one even where it adds nothing."""
    if processor is None:
        return True
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        processors = processor.get("processors")
        return isinstance(processors, list) and all(map(_adds_nothing, processors))
    if processor.get("type") != "TemplateProcessing":
        return processor.get("type") == "ByteLevel"
    match processor.get("single"):
        case [{"Sequence": {"id": "A"}} as only]:
            return len(only) == 1
    return False


def parse_vocabulary(source: Path, vocab: object) -> dict[str, int]:
    """A vocabulary whose ids are distinct and not negative."""
    valid = isinstance(vocab, dict) and all(type(id) is int and 0 <= id < 2**31 for id in vocab.values())
    if not isinstance(vocab, dict) or not valid or len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{source}: expected the vocabulary to map tokens to distinct ids")
    _check_text(source, "".join(vocab))
    return vocab


def _check_text(source: Path, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write, and no text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{source}: expected text, got the lone surrogate {text[error.start]!r}") from None


def parse_merges(source: Path, merges: object) -> list[tuple[str, str]]:
    """Merges as pairs: each is written as "a b" or, in newer files, as ["a", "b"]."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{source}: expected a list of merges, got {shown(merges)}")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        match parts:
            case [str(left), str(right)]:
                pairs.append((left, right))
            case _:
                raise CheckpointError(f"{source}: expected a merge of two tokens, got {shown(merge)}")
    return pairs


def listed_tokens(source: Path, raw: dict[str, Any]) -> list[AddedToken]:
    """The added tokens of a tokenizer.json, in its order, which with the vocabulary decides their ids."""
    return [parse_token(source, token) for token in raw_tokens(source, raw)] if "added_tokens" in raw else []


def raw_tokens(source: Path, raw: dict[str, Any]) -> list[Any]:
    """The added tokens of a tokenizer.json as they are written there."""
    listed = raw.get("added_tokens")
    if not isinstance(listed, list):
        raise CheckpointError(f"{source}: expected added_tokens to be a list, got {shown(listed)}")
    return listed


def parse_token(source: Path, token: object) -> AddedToken:
    """A token that is written as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else None
    if not isinstance(token, dict) or not isinstance(content, str):
        raise CheckpointError(f"{source}: expected an added token with its content, got {shown(token)}")
    flags = {flag: boolean(source, token, flag, False) for flag in _FLAGS}
    if "normalized" not in token:
        flags["normalized"] = not flags["special"]
    return AddedToken(content, **flags)


def distinct(description: Description, addition: Addition) -> list[AddedToken]:
    """The added tokens, each with an id of its own."""
    owners = {id: token for token, id in description.vocabulary.items()}
    tokens = addition.tokens()
    for token in tokens:
        _check_text(description.source, token.content)
        owner = owners.setdefault(token.id, token.content)
        if owner != token.content:
            raise CheckpointError(
                f"{description.source}: the added token {token.content!r:.60} gets the id {token.id}, "
                f"which is that of {owner!r:.60}"
            )
    return tokens


# ---- values --------------------------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value for a message."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # an integer beyond Python's limit for printing
        return f"a {type(value).__name__}"


def boolean(source: Path, values: dict[str, Any], name: str, default: bool | None) -> bool:
    """A setting that is true or false; one without a default has to be there."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: expected {name} to be true or false, got {shown(value)}")
    return value
