"""Pages: never lost, never handed out twice, found again exactly as far as two sequences agree."""

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
    """Sequences that come, share, and go, over 12 pages; a model remembers what each page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(12)
        self.sequences = []  # (tokens, pages)
        self.holds = {}  # page -> tokens from the beginning to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def begin(self, tokens):
        keys = keys_of(tokens)
        found = self.pool.find(keys)
        for i, page in enumerate(found):
            assert self.holds[page] == tokens[: (i + 1) * SIZE], "a page of somebody else's tokens"
        need = -(-len(tokens) // SIZE) - len(found)
        if need > self.pool.available - self.pool.idle(found):
            return
        self.pool.hold(found)
        pages = [*found, *self.pool.take(need)]
        held = [page for _, others in self.sequences for page in others]
        assert not set(pages[len(found) :]) & set(held), "a page was handed out twice"
        for i in range(len(found), len(pages)):
            self.holds[pages[i]] = tokens[: (i + 1) * SIZE]
        for page, key in zip(pages[len(found) :], keys[len(found) :], strict=False):
            self.pool.name(page, key)
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
        assert self.pool.available == 12 - len(held)


Pages.TestCase.settings = hypothesis.settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True
)
TestPages = Pages.TestCase


def test_names_depend_on_everything_before_and_on_the_factors():
    assert keys_of([1, 2, 3, 4]) == keys_of([1, 2, 3, 4, 5])
    assert keys_of([1, 2, 3, 4])[1] != keys_of([1, 1, 3, 4])[1]
    assert not set(keys_of([1, 2, 3, 4])) & set(keys_of([1, 2, 3, 4], alpha=3.0))
    assert root_key(np.array([1, 3])) != root_key(np.array([3, 1]))


def test_the_longest_unused_goes_first_and_ends_before_beginnings():
    pool = PagePool(4)
    old, new = keys_of([1, 1, 2, 2]), keys_of([3, 3, 4, 4])
    for keys in (old, new):
        pages = pool.take(2)
        for page, key in zip(pages, keys, strict=True):
            pool.name(page, key)
        pool.release(pages)
    pool.take(1)
    assert (len(pool.find(old)), len(pool.find(new))) == (1, 2)
    pool.hold(pool.find(old))
    pool.take(1)
    assert (len(pool.find(old)), len(pool.find(new))) == (1, 1)
    assert pool.available == 1 and pool.cached == 2


def test_more_than_there_is_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="3 pages asked for, 2 available"):
        PagePool(2).take(3)
