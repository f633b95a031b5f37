"""Page pool of the paged KV cache: allocation, reference counts and the prefix cache, on the host.

A full page is keyed by everything its keys and values depend on: all tokens from the beginning of
the sequence to its end, and the dynamic-NTK factors that rotated the keys. Keys are digests in a
chain, so two sequences share pages exactly as far as they agree. A keyed page without references
stays in the prefix cache until its memory is needed; the least recently used is evicted first.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def root_key(alpha: np.ndarray) -> bytes:
    """Returns the key that starts the chain of a sequence with these NTK factors.

    Args:
      alpha: float32 [W], one dynamic-NTK factor for each of the model's W distinct windows.
    """
    return hashlib.blake2b(np.asarray(alpha, np.float32).tobytes(), digest_size=16).digest()


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Returns the 128-bit BLAKE2b prefix-cache key of a full page.

    Args:
      parent: key of the page before it in the sequence, or `root_key`.
      tokens: token ids in this page.
    """
    data = np.asarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(data, digest_size=16, key=parent).digest()


class PagePool:
    """Reference-counted allocator of cache pages 0 … num_pages − 1, with a prefix cache.

    A page is in one of three states: referenced (by one or several sequences), idle (no references,
    but keyed and therefore reusable), or free.
    """

    def __init__(self, num_pages: int):
        """Starts with all pages free."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._key_of_page: list[bytes | None] = [None] * num_pages
        self._page_of_key: dict[bytes, int] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_available(self) -> int:
        """Number of pages that `allocate` can return: free ones, and idle ones it would evict."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Number of pages in the prefix cache, referenced or idle."""
        return len(self._page_of_key)

    def find_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the cached pages of the longest leading run of `keys`, without referencing them.

        Call `add_references` before the next `allocate`, which may otherwise evict them.
        """
        found = []
        for key in keys:
            page = self._page_of_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def count_idle(self, pages: Iterable[int]) -> int:
        """Returns how many of these pages are idle, and so count towards `num_available`."""
        return sum(not self._references[page] for page in pages)

    def add_references(self, pages: Iterable[int]) -> None:
        """Adds one reference to each of these pages, which must be referenced or idle."""
        for page in pages:
            assert self._references[page] or page in self._idle, f"page {page} is free"
            self._references[page] += 1
            self._idle.pop(page, None)

    def allocate(self, count: int) -> list[int]:
        """Returns `count` pages with one reference each, evicting least recently used idle pages.

        Raises:
          AssertionError: `count` is more than `num_available`; callers check first.
        """
        assert count <= self.num_available, f"{count} pages wanted, {self.num_available} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                key = self._key_of_page[page]
                assert key is not None, f"idle page {page} has no key"
                del self._page_of_key[key]
                self._key_of_page[page] = None
            self._references[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Enters a referenced page into the prefix cache under `key`.

        Its keys and values must be written, or be written before any later read. If another page
        has the key already, this one stays out of the prefix cache.
        """
        assert self._references[page], f"page {page} has no references"
        assert self._key_of_page[page] is None, f"page {page} is published already"
        if key not in self._page_of_key:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Removes one reference from each page of a sequence, given in sequence order.

        Pages become idle from the last to the first, so that the end of a sequence, which is
        useless without its beginning, is evicted first.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} has no references"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._key_of_page[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def check(self, sequences: Iterable[Sequence[int]]) -> None:
        """Asserts that reference counts, states and keys are consistent; for tests.

        Args:
          sequences: the pages of every sequence that holds references.
        """
        held = collections.Counter(page for pages in sequences for page in pages)
        assert [held[page] for page in range(self.num_pages)] == self._references
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle
        for page in range(self.num_pages):
            assert (page in free or page in idle) == (self._references[page] == 0)
            assert (self._key_of_page[page] is not None) >= (page in idle)
            assert not (page in free and self._key_of_page[page])
        keyed = {key: page for page, key in enumerate(self._key_of_page) if key is not None}
        assert self._page_of_key == keyed
