"""Who holds which page of the cache, and which pages can be used again: plain Python on the host.

A full page is named by all that its keys and values depend on: the tokens from the beginning of the
sequence to its end, and the factors of dynamic NTK the keys were rotated by. Names are digests in a
chain, so two prompts share pages exactly as far as they agree. A named page that nobody holds stays
where it is until the room is needed; the one unused for longest goes first.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def root_key(alpha: np.ndarray) -> bytes:
    """Begins the chain of names of a sequence with these NTK factors, float32 [W]."""
    return hashlib.blake2b(np.asarray(alpha, np.float32).tobytes(), digest_size=16).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the page that holds `tokens` after everything `parent` names: 128-bit BLAKE2b."""
    data = np.asarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(data, digest_size=16, key=parent).digest()


class PagePool:
    """Hands out pages 0 … pages − 1, counts who holds them, finds named ones again.

    A page is in one of three states: held (by one or several), idle (nobody holds it, but it has a
    name and may be found again), or free.

    Args:
      pages: how many there are.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._held = [0] * pages
        self._name: list[bytes | None] = [None] * pages
        self._named: dict[bytes, int] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones, and idle ones that would be forgotten."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages with a name, held or idle."""
        return len(self._named)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest run of `keys`, from the first on, that are here; nobody holds more.

        Call `hold` before anything else is taken, or they may be forgotten.
        """
        found = []
        for key in keys:
            page = self._named.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these nobody holds: holding them takes so many from `available`."""
        return sum(not self._held[page] for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these, which are held or idle."""
        for page in pages:
            assert self._held[page] or page in self._idle, f"page {page} is free"
            self._held[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int]:
        """`count` pages that nobody else holds; the idle ones longest unused are forgotten."""
        assert count <= self.available, f"{count} pages asked for, {self.available} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._named[self._name[page]]
                self._name[page] = None
            self._held[page] = 1
            pages.append(page)
        return pages

    def name(self, page: int, key: bytes) -> None:
        """Names a held page whose keys and values are written, or will be before any later read.

        When another page has the name already, this one stays without.
        """
        assert self._held[page] and self._name[page] is None, f"page {page} can't be named"
        if key not in self._named:
            self._named[key] = page
            self._name[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page of a sequence, in its order.

        The end of a chain is no use without its beginning, so the last page is the first to go.
        """
        for page in reversed(pages):
            assert self._held[page] > 0, f"page {page} is not held"
            self._held[page] -= 1
            if self._held[page]:
                continue
            if self._name[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Asserts that the pool and its holders agree to the last page; for tests.

        Args:
          holders: the pages of each sequence there is.
        """
        held = collections.Counter(page for pages in holders for page in pages)
        assert [held[page] for page in range(self.pages)] == self._held
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle
        for page in range(self.pages):
            assert (page in free or page in idle) == (self._held[page] == 0)
            assert (self._name[page] is not None) >= (page in idle)
            assert not (page in free and self._name[page])
        assert self._named == {key: page for page, key in enumerate(self._name) if key is not None}
