"""Text ↔ token ids, equal to transformers' tokenizer of the same checkpoint.

    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    ids = tokenizer.encode("Hello world")      # [15496, 995]
    stream = StreamDecoder(tokenizer)
    for token in ids:
        print(stream.push(token), end="")      # never half a character
    print(stream.flush())

A checkpoint's own tokenizer comes first; without any, a vocabulary of GPT-2's size is taken for GPT-2's. Byte-level BPE
as GPT-2 has it runs on tiktoken, and an alphabet, where each character is a token, needs nothing. All else that Hugging
Face's files or a GGUF file describe runs on the package `tokenizers`, a SentencePiece model on `sentencepiece`; what
cannot be represented exactly is refused, by name, with `CheckpointError`.

A text gets the ids that transformers gives it by default: where its tokenizer puts a beginning-of-text token before
every text (Llama's kind), so does `encode`, and `Tokenizer.prefix` tells.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tokenizing import files
from tokenizing.byte_pairs import BytePairTokenizer, build_byte_pairs, byte_ids
from tokenizing.characters import UnknownCharacterError, build_alphabet
from tokenizing.description import Description, NotModelled, to_json
from tokenizing.gpt2 import GPT2_VOCAB_SIZE, describe_gpt2, gpt2_tokenizer
from tokenizing.pipelines import Pipeline, build_pipeline
from tokenizing.sources import BytePairFiles, GgufTokenizer, MetaPickle, SentencePieceModel, TokenizerSource
from weight_loader import CheckpointError

__all__ = [
    "GPT2_VOCAB_SIZE",
    "BytePairTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "UnknownCharacterError",
    "build",
    "byte_ids",
    "describe",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """Text ↔ ids of one vocabulary.

    Attributes:
        eos_id: the id that ends a text, or None if the vocabulary has none.
        prefix: the ids with which `encode` begins every text: a beginning-of-text token, or none.
    """

    eos_id: int | None
    prefix: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written in it become their ids, as with transformers."""

    def encode_in_parts(self, text: str) -> Iterator[list[int]]:
        """The same ids, part by part, so that a long text needs little memory: a document is a part."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, wherever in a text they stand; an id without a token (in a padded vocabulary) has none.

        Those of two lists, one after the other, are those of both lists joined.
        """

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text that consists of `ids`, special tokens included.

        A SentencePiece tokenizer puts a space before a text, which is taken away here, and not by `decode_bytes`.

        Args:
            errors: what becomes of bytes that are not UTF-8, as of `bytes.decode`: "replace" makes U+FFFD of them.
        """


class StreamDecoder:
    """Decode ids one at a time: the pieces of text, joined, are what `decode_bytes` gives for all of them.

    So they continue a text: `tokenizer.decode(before + ids)` is `tokenizer.decode(before)` and the pieces of `ids`. A
    character whose bytes are spread over tokens is held back until its last byte has come.
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


def load_tokenizer(source: TokenizerSource, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        source: a checkpoint folder, with `tokenizer.json`, else `vocab.json` and `merges.txt`, else `tokenizer.model`,
            and the files beside them that name special tokens; or another source (see tokenizing/sources.py).
        vocab_size: the model's number of embeddings. Added tokens beyond it are ignored, as the model has no embedding
            for them; a vocabulary beyond it is refused.

    Raises:
        CheckpointError: the files are absent or damaged, or of a tokenizer that cannot be represented exactly, or a
            package that it needs is not installed.
    """
    # Imported where they are needed: most programs start with a folder of Hugging Face's files.
    match source:
        case Path():
            return _from_folder(source, vocab_size)
        case BytePairFiles():
            return build(files.read_byte_pairs(source), vocab_size)
        case SentencePieceModel():
            from tokenizing.sentencepiece_model import load_model

            return load_model(source, vocab_size)
        case MetaPickle():
            from tokenizing.meta_pickle import load_meta

            return load_meta(source, vocab_size)
        case GgufTokenizer():
            from tokenizing.gguf import read_gguf

            found = read_gguf(source)
            return build(found, vocab_size) if isinstance(found, Description) else build_pipeline(found, vocab_size)


def _from_folder(folder: Path, vocab_size: int) -> Tokenizer:
    if files.has_files(folder):
        own = files.Files(folder)
        try:
            description = own.description()
        except NotModelled:
            return build_pipeline(own.pipeline(), vocab_size)
        return build(description, vocab_size)
    if (folder / "tokenizer.model").is_file():
        from tokenizing.sentencepiece_model import load_model_folder

        return load_model_folder(folder, vocab_size)
    _check_gpt2(folder, vocab_size)
    return gpt2_tokenizer(folder)


def _check_gpt2(folder: Path, vocab_size: int) -> None:
    """Refuse a folder without a tokenizer whose model is not of GPT-2's vocabulary."""
    # nanoGPT pads GPT-2's vocabulary to 50304, a multiple of 64.
    if not GPT2_VOCAB_SIZE <= vocab_size <= 50304:
        raise CheckpointError(
            f"{str(folder)!r} has neither tokenizer.json nor vocab.json with merges.txt nor tokenizer.model, "
            f"and its vocabulary of {vocab_size} is not GPT-2's"
        )


def describe(checkpoint_path: Path, vocab_size: int) -> Description:
    """What the tokenizer of a checkpoint folder is built from, for training to keep: byte-level BPE or an alphabet.

    Raises:
        CheckpointError: as of `load_tokenizer`; or it is of another kind.
    """
    if files.has_files(checkpoint_path):
        return files.read(checkpoint_path).within(vocab_size)
    _check_gpt2(checkpoint_path, vocab_size)
    return describe_gpt2(checkpoint_path)


def build(description: Description, vocab_size: int) -> Tokenizer:
    """The tokenizer of a description, for a model of `vocab_size` embeddings.

    Raises:
        CheckpointError: the vocabulary is larger, or it cannot be represented exactly.
    """
    description = description.within(vocab_size)
    if description.merges is None:
        return build_alphabet(description)
    try:
        return build_byte_pairs(description)
    except NotModelled:  # tiktoken would encode otherwise
        pipeline = Pipeline(description.source, to_json(description), description.added, description.eos_token)
        return build_pipeline(pipeline, vocab_size)
