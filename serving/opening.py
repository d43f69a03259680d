"""From a checkpoint to an engine that serves it, with as many pages as its memory allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import UsageError
from engine_cache import EngineFolder
from serving.engine import BatchedDecoder
from serving.speculation import PromptLookup, Speculation
from tokenizer import Tokenizer, load_tokenizer
from weight_loader import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from engine import AdapterRoom, Engine
    from parallelism.mapping import Mapping

PAGE_TOKENS = 64
DEFAULT_CACHE = 1 << 30  # bytes of keys and values, where nothing is said
PROMPT_LOOKUP = "prompt-lookup"  # guesses that need no other model
DRAFTED = 4  # tokens of a guess by a smaller model: each takes a step of it


@dataclass
class OpenedModel:
    """A model that can be served.

    Attributes:
        can_share: Whether its sequences can have pages in common.
    """

    decoder: BatchedDecoder
    can_share: bool


def open_model(
    checkpoint: Checkpoint,
    dtype: str,
    max_sequences: int,
    cache_bytes: int | None,
    engines: EngineFolder | Path | None,
    report: Callable[[str], None],
    room: AdapterRoom | None = None,
    least_sequences: int = 1,
    mapping: Mapping | None = None,
) -> OpenedModel:
    """The checkpoint's model over pages or, where NVIDIA's runtime runs it, over ``max_sequences`` rows, or as many as
    the memory of those pages would hold.

    Args:
        least_sequences: As many whole contexts it has to hold at least.
        cache_bytes: For keys and values; at least a whole context's. None: 1 GiB, or what all sequences can fill.
        room: For adapters.
        mapping: Which rank this is, where several share the model.

    Raises:
        UsageError: ``cache_bytes`` is too small.
        EngineError, CheckpointError: as ``engine.open_engine``.
    """
    from engine import config_of, open_engine

    config = config_of(checkpoint, dtype, mapping)
    layers, two, _, heads, context, size = config.cache_shape(1)
    page_bytes = layers * two * heads * min(PAGE_TOKENS, context) * size * config.cache_dtype.itemsize
    whole = math.ceil(context / PAGE_TOKENS)
    wanted, least = max_sequences * whole, least_sequences * whole
    pages = min(wanted, max(DEFAULT_CACHE // page_bytes, least)) if cache_bytes is None else cache_bytes // page_bytes
    if pages < least:
        raise UsageError(
            f"expected --cache-memory to hold a whole context, {least * page_bytes / (1 << 20):.0f} MiB, but got "
            f"{(cache_bytes or 0) / (1 << 20):.0f} MiB"
        )
    engine: Engine = open_engine(checkpoint, dtype, 1, engines, report, room, mapping)
    decoder = engine.paged(PAGE_TOKENS, pages)
    if decoder is not None:
        return OpenedModel(decoder, True)
    from serving.slots import SlotDecoder

    static = open_engine(checkpoint, dtype, min(max_sequences, pages // whole), engines, report, room)
    return OpenedModel(SlotDecoder(static, config.vocab_size), False)


def open_draft(name: str | None, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Checkpoint | None:
    """The smaller model that guesses tokens for another one.

    Args:
        name: Its checkpoint; ``PROMPT_LOOKUP`` and None: there is none.
        checkpoint, tokenizer: Of the model for which it guesses.

    Raises:
        UsageError: its vocabulary is another.
        CheckpointError: it cannot be read.
    """
    if name is None or name == PROMPT_LOOKUP:
        return None
    draft = open_checkpoint(name)
    size, wanted = draft.config.vocab_size, checkpoint.config.vocab_size
    expected = f"expected the model of --speculate to have the vocabulary of {checkpoint.path}"
    if size != wanted:
        raise UsageError(f"{expected}, {wanted} tokens, but {draft.path} has {size}")
    own = load_tokenizer(draft.tokenizer_source, size)
    for id in range(size):
        theirs, ours = own.decode_bytes([id]), tokenizer.decode_bytes([id])
        if theirs != ours:
            raise UsageError(f"{expected}, where token {id} is {ours!r}, but in {draft.path} it is {theirs!r}")
    return draft


def open_speculation(
    name: str | None,
    draft: Checkpoint | None,
    dtype: str,
    engines: EngineFolder | Path | None,
    report: Callable[[str], None],
) -> Speculation | None:
    """What guesses tokens, if anything does.

    Args:
        name: As of :func:`open_draft`, which has given ``draft``.

    Raises:
        EngineError, CheckpointError: as ``engine.open_engine``.
    """
    if name is None:
        return None
    if draft is None:
        return Speculation(PromptLookup())
    from serving.draft_model import DraftModel

    opened = open_model(draft, dtype, Speculation.MAX_SEQUENCES, None, engines, report)
    return Speculation(DraftModel(opened.decoder), most=DRAFTED)


def chat_template_of(checkpoint: Checkpoint) -> tuple[str | None, dict[str, str]]:
    """The chat template beside a checkpoint's tokenizer, if there is one, and the texts of its special tokens."""
    from tokenizing.export import files_of

    files = files_of(checkpoint.tokenizer_source)
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = files.get("chat_template.jinja")
    source = template.decode("utf-8", "replace") if template else settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    return source if isinstance(source, str) else None, _special_tokens(settings)


def _special_tokens(settings: dict[str, object]) -> dict[str, str]:
    """The texts of special tokens in a tokenizer_config.json, by their names."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
