"""Adapters of a model, and the slots of the decoder that those have which are in use."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from adapters.lora import digest_of


class AdapterDecoder(Protocol):
    """What slots need of a decoder."""

    slots: int

    def set_adapter(self, slot: int, matrices: Sequence[np.ndarray | None] | None) -> None:
        """Puts an adapter into a slot, from 1 on."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that sequences may have.

    Attributes:
        name: How requests call it.
        tables: Its matrices, as the decoder takes them.
        key: What tells it from others: prompts share pages with those of the same adapter only.
    """

    name: str
    tables: Sequence[np.ndarray | None]

    @functools.cached_property
    def key(self) -> bytes:
        return digest_of(self.tables)

    def salted(self, salt: bytes) -> bytes:
        """A salt for prompts that are computed with this adapter, out of their own."""
        return hashlib.sha256(b"adapter" + self.key + salt).digest()


class AdapterSlots:
    """Who is in which slot of a decoder. An adapter that nobody runs with makes room for another one, the one that was
    not used for the longest time first.
    """

    def __init__(self, decoder: AdapterDecoder) -> None:
        self._decoder = decoder
        self._free = list(range(decoder.slots, 0, -1))
        self._slots: dict[Adapter, int] = {}  # who was used last comes last
        self._users: dict[Adapter, int] = {}

    def hold(self, adapter: Adapter | None) -> int | None:
        """The slot of an adapter, which stays there until it is released; 0 for none, and None where there is no room
        now."""
        if adapter is None:
            return 0
        slot = self._slots.pop(adapter, None)
        if slot is None:
            if not self._free:
                idle = next((each for each in self._slots if not self._users[each]), None)
                if idle is None:
                    return None
                self._free.append(self._slots.pop(idle))
                del self._users[idle]
            slot = self._free.pop()
            self._decoder.set_adapter(slot, adapter.tables)
        self._slots[adapter] = slot
        self._users[adapter] = self._users.get(adapter, 0) + 1
        return slot

    def release(self, adapter: Adapter | None) -> None:
        """A sequence has ended, or is put aside."""
        if adapter is not None:
            self._users[adapter] -= 1
