"""The page pool loses no page, allocates none twice, and shares exactly common prefixes."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qwen_jax.engine.page_pool import PagePool, page_key, root_key

SIZE = 2


def keys_of(tokens, alpha=1.0):
    keys = [root_key(np.array([alpha]))]
    for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
        keys.append(page_key(keys[-1], tokens[at : at + SIZE]))
    return keys[1:]


class Pages(RuleBasedStateMachine):
    """Sequences begin, share and end over 12 pages; a model records the contents of each page."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(12)
        self.sequences = []  # (tokens, pages)
        self.holds = {}  # page -> tokens from the beginning to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def begin(self, tokens):
        keys = keys_of(tokens)
        found = self.pool.find_prefix(keys)
        for i, page in enumerate(found):
            assert self.holds[page] == tokens[: (i + 1) * SIZE], (
                "a page with other tokens was found"
            )
        need = -(-len(tokens) // SIZE) - len(found)
        if need > self.pool.num_available - self.pool.count_idle(found):
            return
        self.pool.add_references(found)
        pages = [*found, *self.pool.allocate(need)]
        held = [page for _, others in self.sequences for page in others]
        assert not set(pages[len(found) :]) & set(held), "a page was allocated twice"
        for i in range(len(found), len(pages)):
            self.holds[pages[i]] = tokens[: (i + 1) * SIZE]
        for page, key in zip(pages[len(found) :], keys[len(found) :], strict=False):
            self.pool.publish(page, key)
        self.sequences.append((tokens, pages))

    @rule(which=st.integers(0, 20))
    def end(self, which):
        if self.sequences:
            _, pages = self.sequences.pop(which % len(self.sequences))
            self.pool.release(pages)

    @invariant()
    def agrees(self):
        self.pool.check(pages for _, pages in self.sequences)
        held = {page for _, pages in self.sequences for page in pages}
        assert self.pool.num_available == 12 - len(held)


Pages.TestCase.settings = hypothesis.settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)
TestPages = Pages.TestCase


def test_page_keys_depend_on_all_earlier_tokens_and_on_ntk_factors():
    assert keys_of([1, 2, 3, 4]) == keys_of([1, 2, 3, 4, 5])
    assert keys_of([1, 2, 3, 4])[1] != keys_of([1, 1, 3, 4])[1]
    assert not set(keys_of([1, 2, 3, 4])) & set(keys_of([1, 2, 3, 4], alpha=3.0))
    assert root_key(np.array([1, 3])) != root_key(np.array([3, 1]))


def test_least_recently_used_pages_are_evicted_first_and_ends_before_beginnings():
    pool = PagePool(4)
    old, new = keys_of([1, 1, 2, 2]), keys_of([3, 3, 4, 4])
    for keys in (old, new):
        pages = pool.allocate(2)
        for page, key in zip(pages, keys, strict=True):
            pool.publish(page, key)
        pool.release(pages)
    pool.allocate(1)
    assert (len(pool.find_prefix(old)), len(pool.find_prefix(new))) == (1, 2)
    pool.add_references(pool.find_prefix(old))
    pool.allocate(1)
    assert (len(pool.find_prefix(old)), len(pool.find_prefix(new))) == (1, 1)
    assert pool.num_available == 1 and pool.num_cached == 2


def test_allocating_more_than_available_raises_assertion_error():
    with pytest.raises(AssertionError, match="3 pages wanted, 2 available"):
        PagePool(2).allocate(3)
