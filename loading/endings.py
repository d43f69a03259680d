"""The tokens that end a text, as the files of a checkpoint say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loading.errors import CheckpointError, shown
from tokenizing.sources import BytePairFiles, SentencePieceModel, TokenizerSource


def ending_ids(path: Path, raw: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The eos_token_id of a JSON object: an integer, a list of them, or null. Sorted, and those of the vocabulary."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise CheckpointError(
            f"{path}: expected eos_token_id to be an integer, a list of integers or null, got {shown(value)}"
        )
    return tuple(sorted({each for each in ids if 0 <= each < vocab_size}))


def ending_ids_of(tokenizer: TokenizerSource, vocab_size: int) -> tuple[int, ...]:
    """The token that ends a text in a tokenizer's own files, where they are GPT-2's two or a SentencePiece model.

    Files that cannot be read say nothing here: the tokenizer itself refuses them.
    """
    found: object = None
    if isinstance(tokenizer, BytePairFiles):
        try:
            vocabulary = json.loads(tokenizer.vocabulary)
        except (ValueError, RecursionError):
            return ()
        found = vocabulary.get("<|endoftext|>") if isinstance(vocabulary, dict) else None
    elif isinstance(tokenizer, SentencePieceModel):
        try:
            from sentencepiece import SentencePieceProcessor

            found = SentencePieceProcessor(model_proto=tokenizer.content).eos_id()
        except Exception:  # of many kinds, for a damaged model
            return ()
    return (found,) if isinstance(found, int) and 0 <= found < vocab_size else ()
