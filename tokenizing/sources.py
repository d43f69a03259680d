"""Where a tokenizer comes from, if not from a folder of Hugging Face's files.

`Checkpoint.tokenizer_source` is a `TokenizerSource`, and `tokenizer.load_tokenizer` takes one. A source is only what
was found, unread: what is in it is judged where it is read, and what is wrong with it is told there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        source: the file, for messages.
        metadata: of the keys that begin with "tokenizer.ggml.", as they are in the file, to their values: str, bool,
            int, float, and lists (or arrays) of these.
    """

    source: Path
    metadata: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model, such as `tokenizer.model` within a `.nemo` archive, which adds no token to a text.

    Attributes:
        source: the file, or the archive and its member, for messages.
        content: the file's bytes.
    """

    source: Path
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class BytePairFiles:
    """GPT-2's two files, such as those within a `.nemo` archive.

    Attributes:
        source: the archive, for messages.
        vocabulary: the bytes of vocab.json.
        merges: the bytes of merges.txt.
    """

    source: Path
    vocabulary: bytes = field(repr=False)
    merges: bytes = field(repr=False)


@dataclass(frozen=True)
class MetaPickle:
    """nanoGPT's meta.pkl: a pickled dictionary with `stoi` and `itos` of an alphabet.

    Attributes:
        path: the file.
    """

    path: Path


#: A folder of Hugging Face's files (or, for GPT-2's own vocabulary, without any), or one of the others.
TokenizerSource: TypeAlias = Path | GgufTokenizer | SentencePieceModel | BytePairFiles | MetaPickle
