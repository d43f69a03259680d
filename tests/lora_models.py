"""Models of peft's with random adapters, and ours with the same ones: for tests that compare the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.lora import Lora, read_lora
from engine import AdapterRoom, open_engine
from nvtripy_portable.decoder import Decoder, Piece
from weight_loader import open_checkpoint


def adapted(base: Any, folder: Path, seed: int, **config: Any) -> Any:
    """A model of peft's with a random adapter, saved in a folder."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1 if "lora_B" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model.eval()


def room_of(loras: list[Lora]) -> AdapterRoom:
    return AdapterRoom(len(loras), tuple(max(ranks) for ranks in zip(*(each.ranks for each in loras), strict=True)))


def decoder_with(checkpoint: Any, dtype: str, loras: list[Lora], room: AdapterRoom | None = None) -> Decoder:
    room = room or room_of(loras)
    decoder = open_engine(checkpoint, dtype, 1, room=room).paged(8, 64)
    assert decoder is not None and decoder.slots == room.count
    for slot, lora in enumerate(loras, 1):
        decoder.set_adapter(slot, lora.tables(room.ranks))
    return decoder


def logits_with(decoder: Decoder, ids: list[int], slot: int) -> np.ndarray:
    """Of every position: a prompt, and the last quarter as generated tokens."""
    pages = decoder.pool.take(-(-len(ids) // decoder.page_tokens))
    prompt = len(ids) * 3 // 4
    found = [decoder.step([Piece(ids[:prompt], 0, pages, rows=list(range(prompt)), slot=slot)])]
    for position in range(prompt, len(ids)):
        found.append(decoder.step([Piece([ids[position]], position, pages, generated=True, slot=slot)]))
    decoder.pool.release(pages)
    return np.concatenate(found)


def logits_of_ours(base: Path, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    """A checkpoint's logits in float32 of every position (tokens, vocab), with an adapter or without."""
    checkpoint = open_checkpoint(base)
    if adapter is None:
        return logits_with(open_decoder(checkpoint), ids, 0)
    return logits_with(decoder_with(checkpoint, "float32", [read_lora(adapter, checkpoint)]), ids, 1)


def open_decoder(checkpoint: Any) -> Decoder:
    decoder = open_engine(checkpoint, "float32", 1).paged(8, 64)
    assert decoder is not None
    return decoder
