"""Pages: blocks of tokens whose keys and values lie together, handed out from one pool.

A sequence has a table of the pages that its tokens lie in, in their order. So memory grows with the tokens that are
held, and a sequence that ends gives its pages to whoever comes next (Kwon et al. 2023, "Efficient memory management for
large language model serving with PagedAttention").
"""

from __future__ import annotations

from collections.abc import Iterable


class PagesExhausted(Exception):
    """The pool has not as many pages as are asked for. None was taken."""


class PagePool:
    """Which of ``count`` pages are free. A page may have several holders; it is free when the last one has released it.

    The page that was released last is the next one taken: memory that was never used stays unused.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = [*range(count - 1, -1, -1)]
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def is_free(self, page: int) -> bool:
        """Whether nobody holds a page."""
        return self._holders[page] == 0

    def take(self, count: int) -> list[int]:
        """Numbers of ``count`` free pages, which the caller holds from now on.

        Raises:
            PagesExhausted: there are not as many.
        """
        if count > len(self._free):
            raise PagesExhausted(f"expected {count} free pages but there are {len(self._free)} of {self.count}")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which somebody holds already."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is free")
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each of these pages."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is free")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
