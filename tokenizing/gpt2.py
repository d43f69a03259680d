"""GPT-2's own vocabulary, which is tiktoken's encoding "gpt2", for checkpoints that come without a tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizing.added_tokens import AddedToken
from tokenizing.byte_pairs import BYTE_OF, BytePairTokenizer
from tokenizing.description import END_OF_TEXT, Description
from weight_loader import CheckpointError

if TYPE_CHECKING:
    import tiktoken

GPT2_VOCAB_SIZE = 50257


def gpt2_tokenizer(checkpoint_path: Path) -> BytePairTokenizer:
    """GPT-2's tokenizer, for the checkpoint folder of that name.

    Raises:
        CheckpointError: tiktoken has not got it, and cannot download it.
    """
    encoding = _encoding(checkpoint_path)
    tokens = {id: encoding.decode_single_token_bytes(id) for id in range(encoding.n_vocab)}
    added = [AddedToken(END_OF_TEXT, id=encoding.eot_token)]
    return BytePairTokenizer(encoding, list(range(encoding.n_vocab)), tokens, added, eos_id=encoding.eot_token)


def _encoding(checkpoint_path: Path) -> tiktoken.Encoding:
    """GPT-2's own vocabulary, which tiktoken downloads once."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network provokes
        raise CheckpointError(
            f"{str(checkpoint_path)!r} has no tokenizer files, and GPT-2's cannot be had from tiktoken "
            f"({type(error).__name__}): put tokenizer.json there, or a filled cache at TIKTOKEN_CACHE_DIR"
        ) from error


def describe_gpt2(checkpoint_path: Path) -> Description:
    """What `gpt2_tokenizer` gives, as a description.

    A token's merge joins the two tokens that its bytes become by the merges before it.
    """
    encoding = _encoding(checkpoint_path)
    letters = {byte: chr(code) for code, byte in BYTE_OF.items()}
    ranks = encoding._mergeable_ranks
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            place = found.index(min(found))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            left, right = ("".join(letters[byte] for byte in part) for part in parts)
            merges.append((left, right))
    added = [AddedToken(END_OF_TEXT, id=encoding.eot_token, special=True)]
    vocabulary[END_OF_TEXT] = encoding.eot_token
    return Description(checkpoint_path, vocabulary, merges, added, eos_token=END_OF_TEXT)
