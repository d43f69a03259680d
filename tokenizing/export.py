"""A tokenizer as Hugging Face's files: for a checkpoint that is written as a folder, and came as something else."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizing.description import Description, to_json, write_json
from tokenizing.files import read_byte_pairs
from tokenizing.gguf import read_gguf
from tokenizing.meta_pickle import read_meta
from tokenizing.pipelines import Pipeline
from tokenizing.sources import BytePairFiles, GgufTokenizer, MetaPickle, SentencePieceModel, TokenizerSource
from weight_loader import TOKENIZER_FILES, CheckpointError


def files_of(source: TokenizerSource) -> dict[str, bytes]:
    """The files, by name, that make a folder's tokenizer that of `source`, for this program and for transformers.

    Of a folder they are its own. A SentencePiece model is written as it is, which transformers reads its own way (see
    docs/tokenizers.md).

    Raises:
        CheckpointError: it cannot be used, or not be read.
    """
    match source:
        case Path():
            return _own_files(source)
        case SentencePieceModel():
            return {"tokenizer.model": source.content, "tokenizer_config.json": _settings("LlamaTokenizer", {})}
        case BytePairFiles():
            return _written(read_byte_pairs(source))
        case MetaPickle():
            return _written(Description(source.path, read_meta(source), None))
        case GgufTokenizer():
            return _written(read_gguf(source))


def _own_files(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        try:
            if path.is_file():
                found[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return found


def _written(found: Description | Pipeline) -> dict[str, bytes]:
    if isinstance(found, Pipeline):
        # The added tokens and their flags are written in one way, whatever the rest.
        words = Description(found.source, {}, [], found.added)
        content = {**found.content, "added_tokens": to_json(words)["added_tokens"]}
    else:
        content = to_json(found)
    tokens = {} if found.eos_token is None else {"eos_token": found.eos_token}
    return {
        "tokenizer.json": write_json(content).encode(),
        "tokenizer_config.json": _settings("PreTrainedTokenizerFast", tokens),
    }


def _settings(name: str, tokens: dict[str, str]) -> bytes:
    return (json.dumps({"tokenizer_class": name, **tokens}, indent=2) + "\n").encode()
