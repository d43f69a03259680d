"""Tokenizers that the package `tokenizers` runs: what transformers itself encodes with, from the same description.

A tokenizer.json says how a text becomes ids in steps (normalizer, pre-tokenizer, model, post-processor), each of many
kinds. The package knows them all, and so the ids are transformers' by construction. Only the way back is done here, as
a program that prints tokens while they come needs the bytes of each: for the decoders of byte-level BPE and of
SentencePiece's kind. Any other decoder is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizing.added_tokens import AddedToken
from tokenizing.byte_pairs import token_bytes
from tokenizing.description import shown
from weight_loader import CheckpointError

if TYPE_CHECKING:
    import tokenizers

#: What SentencePiece writes for a space.
SPACE = "\u2581"

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Pipeline:
    """A tokenizer as a tokenizer.json describes it.

    Attributes:
        source: the file, for messages.
        content: of tokenizer.json, its added tokens aside.
        added: the tokens that are added to the vocabulary, in this order.
        eos_token: which one ends a text, if the files say so.
    """

    source: Path
    content: dict[str, Any] = field(repr=False)
    added: list[AddedToken] = field(default_factory=list)
    eos_token: str | None = None


def piece_decoder(has_leading_space: bool) -> dict[str, Any]:
    """The decoder, in tokenizer.json's words, of SentencePiece's pieces, the first of which may begin with a space."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_leading_space else []
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


class PipelineTokenizer:
    """A `Tokenizer` on the package `tokenizers`.

    Attributes:
        eos_id: the id that ends a text, or None if the vocabulary has none.
        prefix: the ids with which `encode` begins every text: a beginning-of-text token, or none.
    """

    def __init__(
        self,
        source: Path,
        backend: tokenizers.Tokenizer,
        decoder: _Decoder,
        around: tuple[tuple[int, ...], tuple[int, ...]],
        eos_token: str | None,
    ) -> None:
        """Put the parts together; `build_pipeline` is what calls this.

        Args:
            source: the file that it comes from, for messages.
            backend: encodes.
            decoder: how it decodes.
            around: the ids that stand before every text, and behind it.
            eos_token: the token that ends a text, if there is one.
        """
        self.eos_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        self.prefix, self._suffix = around
        self._source = source
        self._backend = backend
        self._decoder = decoder
        added = backend.get_added_tokens_decoder()
        self._contents = {token.content for token in added.values()}
        self._words = {id: token for token, id in backend.get_vocab(with_added_tokens=True).items()}
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for
        self._separator = _separator(added.values())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a lone surrogate, which no UTF-8 text can hold, is taken as U+FFFD."""
        return [id for part in self.encode_in_parts(text) for id in part]

    def encode_in_parts(self, text: str) -> Iterator[list[int]]:
        text = without_surrogates(text)
        yield list(self.prefix)
        begin = 0
        for match in self._separator.finditer(text) if self._separator is not None else ():
            if begin < match.start():
                yield self._ids(text[begin : match.start()])
            begin = match.start()
        yield self._ids(text[begin:])
        yield list(self._suffix)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._bytes_of, ids))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        ids = [id for id in ids if id in self._words]
        if not ids:
            return ""
        start = self._decoder.first_bytes(self._words[ids[0]], self._bytes_of(ids[0]))
        text = (start + self.decode_bytes(ids[1:])).decode("utf-8", errors)
        return text.removeprefix(" ") if self._decoder.strips_space else text

    def _bytes_of(self, id: int) -> bytes:
        found = self._bytes.get(id)
        if found is None:
            word = self._words.get(id, "")
            found = self._bytes[id] = self._decoder.bytes_of(word, is_added=word in self._contents)
        return found

    def _ids(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # a panic of the package is no Exception
            _raise(error, f"{self._source}: the package tokenizers cannot encode {text!r:.60}")


@dataclass(frozen=True)
class _Decoder:
    """What the steps of a tokenizer.json's decoder come to.

    Attributes:
        is_byte_level: tokens are written in GPT-2's byte alphabet.
        space: what stands for a space in a token; None: only a space.
        has_bytes: "<0x0A>" is a byte.
        strips_space: one space before a text is taken away.
        strips_token: all spaces of a text's first token are.
    """

    is_byte_level: bool = False
    space: str | None = None
    has_bytes: bool = False
    strips_space: bool = False
    strips_token: bool = False

    def bytes_of(self, token: str, is_added: bool) -> bytes:
        """The bytes of a token within a text. An added token of a byte-level vocabulary is its own text."""
        if self.is_byte_level:
            return token.encode("utf-8", "replace") if is_added else token_bytes(token)
        if self.has_bytes and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token if self.space is None else token.replace(self.space, " ")).encode("utf-8", "replace")

    def first_bytes(self, token: str, usual: bytes) -> bytes:
        """The bytes of a token with which a text begins; within a text they are `usual`."""
        if not self.strips_token or self.space is None or self.space not in token:
            return usual
        return token.replace(self.space, "").encode("utf-8", "replace")


def build_pipeline(pipeline: Pipeline, vocab_size: int) -> PipelineTokenizer:
    """The tokenizer of a description, for a model of `vocab_size` embeddings.

    Raises:
        CheckpointError: the vocabulary is larger, the package cannot read the description or is not there, or the
            tokenizer decodes in a way that is not known here.
    """
    package = _package(pipeline.source)
    source, content = pipeline.source, pipeline.content
    dropout = content["model"].get("dropout") if isinstance(content.get("model"), dict) else None
    if dropout not in (None, 0):
        raise CheckpointError(f"{source}: model.dropout={shown(dropout)} is not supported: a text has many encodings")
    decoder = _read_decoder(source, content.get("decoder"))
    around = _read_template(source, content.get("post_processor"))
    content = {**content, "added_tokens": [], "truncation": None, "padding": None}

    def backend_with(added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
        try:
            backend = package.Tokenizer.from_str(json.dumps(content))
            backend.add_tokens([_for_package(package, token) for token in added])
        except BaseException as error:  # a panic of the package is no Exception
            _raise(error, f"{source}: the package tokenizers cannot read this tokenizer")
        return backend

    backend = backend_with(pipeline.added)
    vocabulary = content["model"]["vocab"]  # by token, or a list
    largest = max(vocabulary.values(), default=0) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    if largest >= vocab_size:
        raise CheckpointError(f"{source} has ids up to {largest}, but the model's vocabulary has {vocab_size}")
    within = [token for token in pipeline.added if (backend.token_to_id(token.content) or 0) < vocab_size]
    if len(within) < len(pipeline.added):
        backend = backend_with(within)
    return PipelineTokenizer(source, backend, decoder, around, pipeline.eos_token)


def _read_decoder(source: Path, raw: object) -> _Decoder:
    """The decoder of a tokenizer.json.

    Raises:
        CheckpointError: it has steps that are not known here, or in another order.
    """
    listed = raw.get("decoders") if isinstance(raw, dict) and raw.get("type") == "Sequence" else None
    steps: list[Any] = listed if isinstance(listed, list) else [raw]
    decoder, done = _Decoder(), -1
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                return _Decoder(is_byte_level=True)
            case {"type": "Metaspace", "replacement": str(space)} if len(steps) == 1:
                always = step.get("prepend_scheme", "always") != "never"
                return _Decoder(space=space, strips_token=always)
            case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "} if done < 0 and space:
                decoder, done = replace(decoder, space=space), 0
            case {"type": "ByteFallback"} if done < 1:
                decoder, done = replace(decoder, has_bytes=True), 1
            case {"type": "Fuse"} if done < 2:
                done = 2
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if done == 2:
                decoder, done = replace(decoder, strips_space=True), 3
            case _:
                name = step.get("type") if isinstance(step, dict) else step
                raise CheckpointError(f"{source}: decoder.type={shown(name)} is not supported, nor is it in this order")
    if done < 0:
        raise CheckpointError(f"{source}: expected a decoder that says how tokens are joined, got {shown(raw)}")
    return decoder


def _read_template(source: Path, raw: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of a tokenizer.json puts before a text and behind it.

    Raises:
        CheckpointError: it does something else.
    """
    match raw:
        case None | {"type": "ByteLevel"}:
            return (), ()
        case {"type": "Sequence", "processors": list(steps)}:
            before: tuple[int, ...] = ()
            behind: tuple[int, ...] = ()
            for step in steps:
                left, right = _read_template(source, step)
                before, behind = left + before, behind + right
            return before, behind
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(tokens)}:
            text = {"Sequence": {"id": "A", "type_id": 0}}
            if pieces.count(text) == 1:
                place = pieces.index(text)
                return tuple(_ids_of(source, tokens, pieces[:place])), tuple(
                    _ids_of(source, tokens, pieces[place + 1 :])
                )
    raise CheckpointError(f"{source}: post_processor={shown(raw)} is not supported, only a template around the text")


def _ids_of(source: Path, tokens: dict[str, Any], pieces: list[Any]) -> Iterator[int]:
    for piece in pieces:
        match piece:
            case {"SpecialToken": {"id": str(name)}} if name in tokens:
                match tokens[name]:
                    case {"ids": list(ids)} if all(type(id) is int and id >= 0 for id in ids):
                        yield from ids
                        continue
        raise CheckpointError(f"{source}: expected a special token of the post_processor's, got {shown(piece)}")


def _separator(added: Iterable[tokenizers.AddedToken]) -> re.Pattern[str] | None:
    """Finds the added tokens before which a text can be cut, the parts still having the ids of the whole.

    That is where one begins that looks neither at what stands beside it nor can be part of another.
    """
    contents = [token.content for token in added if not token.normalized]
    inner = {letter for content in contents for letter in content[1:]}
    alone = [
        token.content
        for token in added
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and re.match(r"[^\w\s]", token.content)
        and token.content[0] not in inner
    ]
    return re.compile("|".join(map(re.escape, alone))) if alone else None


def _for_package(package: Any, token: AddedToken) -> tokenizers.AddedToken:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return package.AddedToken(token.content, **flags)


def _package(source: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise CheckpointError(
            f"{source} needs the package tokenizers ({error}): pip install -r requirements.txt"
        ) from error
    return tokenizers


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for what no UTF-8 text can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _raise(error: BaseException, message: str) -> NoReturn:
    """Tell what the package could not do: it raises plain exceptions, and panics, which are none."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise error
    raise CheckpointError(f"{message}: {(str(error) or type(error).__name__)[:200]}") from error
