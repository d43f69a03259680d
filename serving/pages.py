"""Pages that several sequences share, because their texts begin alike.

A page full of a prompt's tokens is known by a chained SHA-256: of the page before it, a salt, and its tokens. What a
later prompt shares with an earlier one is then there already. A page that no sequence uses any more stays until the
pool needs it; the one that was used least recently goes first.

Only a prompt's own tokens are shared. The same tokens, generated, are computed by other kernels, and may differ in
their last bits: whoever took those pages would get an answer that depends on who was there before.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from nvtripy_portable.pages import PagePool, PagesExhausted


class SharedPages:
    """The pool of a decoder, of whose pages those that are known by their content are kept and found again.

    Attributes:
        queried: Tokens of prompts that were looked for.
        hit: Those of them that were there.
    """

    def __init__(self, pool: PagePool, page_tokens: int, sharing: bool = True) -> None:
        self.page_tokens = page_tokens
        self.queried = self.hit = 0
        self._pool, self._sharing = pool, sharing
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._users: dict[int, int] = {}  # of pages with a key: sequences that hold it
        self._idle: OrderedDict[int, None] = OrderedDict()  # those with none, the least recently used first

    @property
    def count(self) -> int:
        """How many pages there are."""
        return self._pool.count

    @property
    def available(self) -> int:
        """How many pages can be taken: free ones, and those that are kept for whoever may want them."""
        return self._pool.free + len(self._idle)

    @property
    def used(self) -> int:
        """How many pages sequences hold."""
        return self._pool.count - self.available

    def keys(self, tokens: Sequence[int], salt: bytes) -> list[bytes]:
        """What the full pages of a prompt are known by."""
        if not self._sharing:
            return []
        ids = np.asarray(tokens, np.int32)
        keys, parent = [], hashlib.sha256(b"pages of nanogpt-tripy\0" + salt).digest()
        for start in range(0, len(ids) - self.page_tokens + 1, self.page_tokens):
            parent = hashlib.sha256(parent + ids[start : start + self.page_tokens].tobytes()).digest()
            keys.append(parent)
        return keys

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that are there of a prompt's first ones. The caller holds them from now on."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        self.hold(found)
        return found

    def count_query(self, tokens: int, hit: int) -> None:
        """For the metrics: a prompt of so many tokens was looked for, and so many were there."""
        self.queried += tokens
        self.hit += hit

    def know(self, page: int, key: bytes) -> None:
        """Says by what a page that the caller holds is known, once its keys and values are in it. Where another is
        known by that already, nothing changes."""
        if self._sharing and key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page], self._users[page] = page, key, 1
            self._pool.hold([page])

    def take(self, count: int) -> list[int]:
        """Free pages, which the caller holds from now on.

        Raises:
            PagesExhausted: there are not as many. None was taken.
        """
        if count > self.available:
            raise PagesExhausted(f"expected {count} pages but {self.available} of {self.count} are to be had")
        while self._pool.free < count:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            del self._users[page]
            self._pool.release([page])
        return self._pool.take(count)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which somebody holds or which are kept."""
        for page in pages:
            if page in self._users:
                self._users[page] += 1
                self._idle.pop(page, None)
            self._pool.hold([page])

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of a sequence's pages. The last of them is the first to go when pages are needed: a
        text's beginning is what others are likelier to share."""
        for page in reversed(pages):
            if page in self._users:
                self._users[page] -= 1
                if self._users[page] == 0:
                    self._idle[page] = None
            self._pool.release([page])
