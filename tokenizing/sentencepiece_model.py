"""SentencePiece models (tokenizer.model), through the package `sentencepiece`: its ids, on any text.

    load_model(SentencePieceModel(path, content), vocab_size)     # of a .nemo archive: the model alone
    load_model_folder(folder, vocab_size)                         # of a folder without tokenizer.json

A folder's settings may name special tokens, which are then found in a text as transformers finds them, and may ask for
a token before every text or behind it. What stands between special tokens is encoded as a text of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizing.added_tokens import AddedToken, AddedTokens
from tokenizing.description import contents
from tokenizing.files import Files
from tokenizing.pipelines import SPACE, without_surrogates
from tokenizing.sources import SentencePieceModel
from weight_loader import CheckpointError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceTokenizer:
    """A `Tokenizer` on the package `sentencepiece`.

    Attributes:
        eos_id: the id that ends a text, or None if the vocabulary has none.
        prefix: the ids with which `encode` begins every text: a beginning-of-text token, or none.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        pieces: list[str],
        added: Iterable[AddedToken] = (),
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        eos_id: int | None = None,
    ) -> None:
        """Put the parts together; `load_model` is what calls this.

        Args:
            processor: does the work.
            pieces: its vocabulary, by id.
            added: tokens that are found in the text before the processor sees the rest.
            prefix: the ids that stand before every text.
            suffix: the ids that stand behind every text.
            eos_id: the id that ends a text.
        """
        self.eos_id = eos_id
        self.prefix = prefix
        self._suffix = suffix
        self._processor = processor
        added = list(added)
        self._added = AddedTokens(added)
        self._tokens: dict[int, bytes] = {}
        self._words: dict[int, str] = {}  # those that may begin with what stands for a space
        for id, piece in enumerate(pieces):
            if processor.is_byte(id):
                self._tokens[id] = bytes([int(piece[3:5], 16)])
            elif processor.is_control(id):
                self._tokens[id] = b""
            elif processor.is_unknown(id):
                self._tokens[id] = processor.decode([id]).encode()
            else:
                self._words[id] = piece
                self._tokens[id] = piece.replace(SPACE, " ").encode()
        for token in added:
            self._words.pop(token.id, None)
            self._tokens[token.id] = token.content.encode("utf-8", "replace")
        self._strips_all = SPACE * 2 not in processor.normalize("a  a")
        first = next((id for id, word in self._words.items() if word.startswith(SPACE)), None)
        self._strips = first is not None and not processor.decode([first]).startswith(" ")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a lone surrogate, which no UTF-8 text can hold, is taken as U+FFFD."""
        return [id for part in self.encode_in_parts(text) for id in part]

    def encode_in_parts(self, text: str) -> Iterator[list[int]]:
        yield list(self.prefix)
        for piece in self._added.split(without_surrogates(text)):
            yield [piece] if isinstance(piece, int) else self._processor.encode(piece)
        yield list(self._suffix)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._tokens.get(id, b"") for id in ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        start = b""
        ids = list(ids)
        while ids and not start and self._strips:
            word = self._words.get(ids[0])
            start, ids = self._tokens.get(ids[0], b""), ids[1:]
            if word is not None:
                rest = word.lstrip(SPACE) if self._strips_all else word.removeprefix(SPACE)
                start = rest.replace(SPACE, " ").encode()
                if not self._strips_all:
                    break
        return (start + self.decode_bytes(ids)).decode("utf-8", errors)


def load_model(source: SentencePieceModel, vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer that a SentencePiece model is by itself, for a model of `vocab_size` embeddings.

    Raises:
        CheckpointError: it is damaged, or has more pieces than there are embeddings; or the package is not there.
    """
    processor, pieces = _read(source, vocab_size)
    end = processor.eos_id()
    return SentencePieceTokenizer(processor, pieces, eos_id=end if end >= 0 else None)


def load_model_folder(folder: Path, vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer of a folder with tokenizer.model, and what tokenizer_config.json says of special tokens.

    Raises:
        CheckpointError: as of `load_model`; or the settings cannot be used.
    """
    path = folder / "tokenizer.model"
    try:
        source = SentencePieceModel(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    processor, pieces = _read(source, vocab_size)
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    control = [piece for piece, id in vocabulary.items() if processor.is_control(id)]
    beside = Files(folder, has_model=True).beside_model(vocabulary, control)
    added = [token for token in beside.added if token.id < vocab_size]
    ids = contents(added)
    before, behind = (
        tuple(ids[token] for token in tokens if token is not None and token in ids)
        for tokens in (beside.before, beside.behind)
    )
    return SentencePieceTokenizer(processor, pieces, added, before, behind, ids.get(beside.eos_token or ""))


def _read(source: SentencePieceModel, vocab_size: int) -> tuple[SentencePieceProcessor, list[str]]:
    try:
        import sentencepiece
    except ImportError as error:
        raise CheckpointError(
            f"{source.source} needs the package sentencepiece ({error}): pip install -r requirements.txt"
        ) from error
    if not source.content:  # the package takes it for no argument
        raise CheckpointError(f"{source.source} is not a SentencePiece model: it is empty")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=source.content)
        pieces = [processor.id_to_piece(id) for id in range(processor.get_piece_size())]
        sample = "".join(processor.encode("a a", out_type=str))
    except (RuntimeError, ValueError) as error:  # ValueError: pieces that are not UTF-8
        raise CheckpointError(f"{source.source} is not a SentencePiece model: {error}") from error
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"{source.source} has ids up to {len(pieces) - 1}, but the model's vocabulary has {vocab_size}"
        )
    if sample.endswith(SPACE):
        raise CheckpointError(f"{source.source}: treat_whitespace_as_suffix is not supported")
    return processor, pieces
