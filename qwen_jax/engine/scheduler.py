"""Continuous-batching scheduler: plans each engine step on the host.

A step contains at most one prefill call (one chunk of one or more prompts) and one decode call, so
decoding requests are delayed by at most one prefill chunk. Requests are admitted first come, first
served. When the page pool is exhausted the scheduler, in this order, (1) evicts unreferenced pages
from the prefix cache, (2) stops admitting requests, (3) preempts the most recently admitted request
and swaps its pages to host memory. A preempted request resumes before any later request is
admitted.

Starvation is impossible: the oldest request is never preempted for a younger one, and `Engine.add`
rejects a request that would not fit in an empty pool.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.engine.page_pool import PagePool, page_key
from qwen_jax.engine.request import Request
from qwen_jax.engine.steps import EngineShapes


@dataclasses.dataclass(eq=False)
class RequestState:
    """Scheduler state of one request, from `Engine.add` to its last output.

    Attributes:
      request: the request as submitted, with a seed.
      alpha: float32 [W], dynamic-NTK factors of its prompt, one per distinct window of the model.
      prefix_root: key that starts the chain of prefix-cache keys of its pages.
      token_budget: most output tokens it may sample.
      arrival: sequence number of its submission; lower is older.
      output_tokens: output tokens that the host has read, without the stop id.
      pages: its pages in sequence order; they cover all tokens in the cache and a few more.
      page_keys: prefix-cache keys of its first full pages, computed as they are needed.
      num_published_pages: leading pages that are in the prefix cache, or were taken from it.
      row: index of its row on the device while it is running, else None.
      num_computed_tokens: prompt tokens whose keys and values are in the cache, or are computed by
        a call already dispatched.
      num_cached_tokens: those of them that were found in the prefix cache.
      num_scheduled_tokens: output tokens whose sampling has been dispatched to the device; the host
        may not have read all of them yet (see `output_tokens`).
      swapped_out: host copies of its pages while it is preempted, else None.
      finish: None until it has ended: "stop", "length" or "cancelled".
      prompt_length: number of prompt tokens.
    """

    request: Request
    alpha: np.ndarray
    prefix_root: bytes
    token_budget: int
    arrival: int = -1
    output_tokens: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    num_published_pages: int = 0
    row: int | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0
    swapped_out: list[Any] | None = None
    finish: str | None = None
    prompt_length: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt)

    @property
    def assigned_row(self) -> int:
        """Its row on the device; only for requests that are running."""
        assert self.row is not None, f"request {self.request.id!r} is not running"
        return self.row

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed (or dispatched) and output tokens are left to sample."""
        return self.row is not None and 0 < self.num_scheduled_tokens < self.token_budget

    def num_slots(self, steps: int = 0) -> int:
        """Returns the cache slots it uses after `steps` more decode steps.

        The newest token takes a slot only when the token after it is sampled.
        """
        scheduled = min(self.num_scheduled_tokens + steps, self.token_budget)
        return self.prompt_length + max(scheduled - 1, 0)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Returns tokens [begin, end) of the prompt followed by the output read so far."""
        output = self.output_tokens
        output = output[max(begin - self.prompt_length, 0) : max(end - self.prompt_length, 0)]
        return [*self.request.prompt[begin:end], *output]

    def num_known_slots(self) -> int:
        """Returns the cache slots of tokens that the host has read: all but the newest.

        Only for requests with at least one output token.
        """
        return self.prompt_length + len(self.output_tokens) - 1


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Prompt tokens start … start + count − 1 of one request, computed in one prefill call.

    `start` is a multiple of the page size, and so is `start + count` unless it ends the prompt.
    """

    state: RequestState
    start: int
    count: int

    @property
    def ends_prompt(self) -> bool:
        """Whether the chunk ends the prompt, so that the call samples the first output token."""
        return self.start + self.count == self.state.prompt_length


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The work of one engine step, in the order in which it is dispatched to the device.

    Attributes:
      stop_rows: rows of requests that were cancelled or preempted.
      swap_out: preempted requests, each with the pages to copy to host memory.
      swap_in: resumed requests, whose rows and newly allocated pages are filled from host memory.
      prefill: chunks of the prefill call; empty means no call.
      prefill_tokens: token slots of the prefill call, one of the compiled sizes.
      decode: requests of the decode call; empty means no call.
      decode_rows: rows of the decode call, one of the compiled sizes.
      decode_steps: most tokens that each of its rows samples.
    """

    stop_rows: tuple[int, ...] = ()
    swap_out: tuple[tuple[RequestState, tuple[int, ...]], ...] = ()
    swap_in: tuple[RequestState, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    prefill_tokens: int = 0
    decode: tuple[RequestState, ...] = ()
    decode_rows: int = 0
    decode_steps: int = 0

    def __bool__(self) -> bool:
        return bool(self.stop_rows or self.swap_out or self.swap_in or self.prefill or self.decode)


def smallest_bucket(buckets: Sequence[int], value: int) -> int:
    """Returns the smallest of the ascending compiled sizes `buckets` that is at least `value`."""
    return next(size for size in buckets if size >= value)


def choose_prefill_size(buckets: Sequence[int], wanted: int) -> int:
    """Returns the compiled prefill size for `wanted` token slots.

    A size that would be less than half full is replaced by the next smaller one, which is then
    full; the remaining tokens are computed by the next call.
    """
    for size, larger in itertools.pairwise(buckets):
        if wanted <= size or 2 * wanted < larger:
            return size
    return buckets[-1]


class Scheduler:
    """Queue of waiting requests, rows of running ones, and the page pool they share.

    Attributes:
      shapes: sizes that the device programs are compiled for.
      pool: the page pool.
      waiting: new and preempted requests, in the order in which they will start.
      rows: the running request of each device row, or None.
      num_preemptions: how many times a request was preempted.
    """

    def __init__(
        self, shapes: EngineShapes, *, prefix_cache: bool = True, single_cached_prefix: bool = False
    ):
        """Starts without requests.

        Args:
          shapes: sizes that the device programs are compiled for.
          prefix_cache: whether to reuse pages of earlier prompts and outputs, and keep new ones.
          single_cached_prefix: whether only the first chunk of a prefill call may have tokens in
            the cache already, as models with sliding windows require.
        """
        self.shapes = shapes
        self.pool = PagePool(shapes.num_pages)
        self.waiting: collections.deque[RequestState] = collections.deque()
        self.rows: list[RequestState | None] = [None] * shapes.max_rows
        self.num_preemptions = 0
        self._prefix_cache = prefix_cache
        self._single_cached_prefix = single_cached_prefix
        self._arrivals = itertools.count()
        self._stop_rows: list[int] = []

    # Requests

    def add(self, state: RequestState) -> None:
        """Appends a request to the waiting queue and sets its arrival number."""
        state.arrival = next(self._arrivals)
        self.waiting.append(state)

    def running(self) -> list[RequestState]:
        """Returns the requests that have a row, oldest first."""
        return sorted((s for s in self.rows if s is not None), key=lambda s: s.arrival)

    def finish(self, state: RequestState, reason: str) -> None:
        """Ends a request: frees its row and pages; its full pages stay in the prefix cache.

        Calls in flight may still write to its pages; the next owner's writes are dispatched later
        and therefore happen after them.

        Args:
          state: a waiting or running request.
          reason: "stop", "length" or "cancelled".
        """
        state.finish = reason
        if state.row is None:
            self.waiting.remove(state)
        else:
            if reason == "cancelled":
                self._stop_rows.append(state.row)
            self._release_row(state)
        state.swapped_out = None

    def _assign_row(self, state: RequestState, row: int, pages: list[int]) -> None:
        """Makes a request running in `row`, with `pages` as its first pages."""
        self.rows[row] = state
        state.row, state.pages, state.num_published_pages = row, pages, len(pages)

    def _release_row(self, state: RequestState) -> None:
        """Frees the row and releases the pages of a running request."""
        self.rows[state.assigned_row] = None
        state.row = None
        self.pool.release(state.pages)
        state.pages = []
        state.num_published_pages = 0

    def commit_tokens(self, state: RequestState, tokens: Sequence[int]) -> str | None:
        """Appends sampled tokens that the host has read to a request's output.

        Returns:
          The reason why the request has ended ("stop" or "length"), or None if it continues.
        """
        state.output_tokens.extend(tokens)
        if state.output_tokens and state.output_tokens[-1] in state.request.params.stop_ids:
            state.output_tokens.pop()
            return "stop"
        # The newest token is not in the cache yet.
        self._publish_pages(state, state.num_known_slots())
        return "length" if len(state.output_tokens) == state.token_budget else None

    def page_lists(self) -> Iterator[list[int]]:
        """Yields the pages of every request; for `PagePool.check`."""
        return (state.pages for state in [*self.running(), *self.waiting])

    # Planning

    def plan(self, results_read: bool) -> Schedule | None:
        """Plans one step and reserves its rows and pages.

        Args:
          results_read: whether the host has read the results of every dispatched call. Only then
            can a request be preempted, because its output must be known.

        Returns:
          The schedule, empty if there is nothing to do; None if pages are needed that may become
          free once outstanding results are read.
        """
        swap_out = self._reserve_decode_pages(results_read)
        if swap_out is None:
            return None
        stop_rows, self._stop_rows = tuple(self._stop_rows), []
        swap_in = self._resume()
        prefill_tokens, prefill = self._plan_prefill()
        decode = tuple(state for state in self.running() if state.decoding)
        steps = self._choose_decode_steps(decode)
        for state in decode:
            self._allocate(state, steps)
            state.num_scheduled_tokens = min(state.num_scheduled_tokens + steps, state.token_budget)
        rows = 0
        if decode:
            used = max(state.assigned_row for state in decode) + 1
            rows = smallest_bucket(self.shapes.decode_rows, used)
        return Schedule(
            stop_rows=stop_rows,
            swap_out=tuple(swap_out),
            swap_in=swap_in,
            prefill=prefill,
            prefill_tokens=prefill_tokens,
            decode=decode,
            decode_rows=rows,
            decode_steps=steps,
        )

    def _num_pages(self, slots: int) -> int:
        """Returns the pages that `slots` tokens occupy."""
        return -(-slots // self.shapes.page_size)

    def _pages_needed(self, state: RequestState, steps: int) -> int:
        """Returns how many pages a request lacks for `steps` more decode steps."""
        return max(self._num_pages(state.num_slots(steps)) - len(state.pages), 0)

    def _allocate(self, state: RequestState, steps: int) -> None:
        """Allocates the pages that a request needs for `steps` more decode steps."""
        state.pages += self.pool.allocate(self._pages_needed(state, steps))

    def _reserve_decode_pages(
        self, results_read: bool
    ) -> list[tuple[RequestState, tuple[int, ...]]] | None:
        """Allocates pages for one more step of every decoding request, oldest first.

        When the pool is exhausted, preempts the youngest running request until it is not.

        Returns:
          The preempted requests that have output, each with the pages to copy to host memory; None
          if a request must be preempted but `results_read` is False.
        """
        swap_out = []
        for state in self.running():
            while state.decoding and (needed := self._pages_needed(state, 1)):
                if needed <= self.pool.num_available:
                    state.pages += self.pool.allocate(needed)
                    break
                if not results_read:
                    return None
                youngest = self.running()[-1]
                if youngest.num_scheduled_tokens:
                    known = self._num_pages(youngest.num_known_slots())
                    swap_out.append((youngest, tuple(youngest.pages[:known])))
                self._preempt(youngest)
        return swap_out

    def _preempt(self, state: RequestState) -> None:
        """Preempts a running request: frees its row and pages and puts it at the head of the queue.

        If it has output tokens, its pages have been swapped out to host memory before; otherwise
        nothing is kept, and its prompt is computed again.
        """
        if state.num_scheduled_tokens:
            self._stop_rows.append(state.assigned_row)
        else:
            state.num_computed_tokens = state.num_cached_tokens = 0
        self._release_row(state)
        self.waiting.appendleft(state)
        self.num_preemptions += 1

    def _free_row(self) -> int | None:
        """Returns the lowest device row without a request, or None."""
        return next((row for row, state in enumerate(self.rows) if state is None), None)

    def _reserved_pages(self) -> int:
        """Returns the pages kept free when admitting: one per running request.

        Without them a newly admitted request could be preempted in the next step.
        """
        return sum(state is not None for state in self.rows)

    def _resume(self) -> tuple[RequestState, ...]:
        """Gives rows and pages to the preempted requests at the head of the queue that fit."""
        resumed = []
        while self.waiting and self.waiting[0].num_scheduled_tokens:
            state, row = self.waiting[0], self._free_row()
            needed = self._pages_needed(state, 1) + self._reserved_pages()
            if row is None or needed > self.pool.num_available:
                break
            self._assign_row(self.waiting.popleft(), row, [])
            self._allocate(state, 1)
            resumed.append(state)
        return tuple(resumed)

    # Prefill

    def _plan_prefill(self) -> tuple[int, tuple[PrefillChunk, ...]]:
        """Plans a prefill call: prompts already started first, then new ones, in queue order.

        Returns:
          (token slots of the call, its chunks); (0, ()) if there is nothing to compute.
        """
        shapes = self.shapes
        chunks: list[PrefillChunk] = []
        started = [state for state in self.running() if not state.num_scheduled_tokens]
        slots = left = choose_prefill_size(
            shapes.prefill_tokens, self._prefill_slots_wanted(started)
        )
        cached_pages_left = shapes.cached_pages[-1]
        written: set[bytes] = set()  # prefix-cache keys of pages that this call writes
        while left and len(chunks) < shapes.max_prompts:
            if started:
                state = started[0]
            elif self.waiting and not self.waiting[0].num_scheduled_tokens:
                if not self._admit(self.waiting[0], written):
                    break
                state = self.waiting.popleft()
                started.append(state)
            else:
                break
            cached = state.num_computed_tokens // shapes.page_size
            if cached > cached_pages_left:
                break
            if cached and chunks and self._single_cached_prefix:
                break
            count = min(left, state.prompt_length - state.num_computed_tokens)
            chunk = PrefillChunk(state, state.num_computed_tokens, count)
            chunks.append(chunk)
            cached_pages_left -= cached
            left -= self._num_pages(count) * shapes.page_size
            state.num_computed_tokens += count
            written.update(self._publish_pages(state, state.num_computed_tokens))
            started.pop(0)
            if chunk.ends_prompt:
                state.num_scheduled_tokens = 1
        if not chunks:
            return 0, ()
        return smallest_bucket(shapes.prefill_tokens, slots - left), tuple(chunks)

    def _prefill_slots_wanted(self, started: list[RequestState]) -> int:
        """Returns the token slots that prompts could fill now, before prefix-cache lookups."""
        new = itertools.islice(self.waiting, self.rows.count(None))
        wanted = 0
        for state in itertools.islice(itertools.chain(started, new), self.shapes.max_prompts):
            if not state.num_scheduled_tokens:
                left = state.prompt_length - state.num_computed_tokens
                wanted += self._num_pages(left) * self.shapes.page_size
        return wanted

    def _admit(self, state: RequestState, written: set[bytes]) -> bool:
        """Gives a new request a row and pages for its whole prompt, if they are available.

        A request that could reuse a page which this call is about to write is not admitted until
        the next call. Equal prompts that arrive together (OpenAI's `n`) are therefore computed
        once.

        Args:
          state: the request at the head of the queue.
          written: prefix-cache keys of the pages that the planned prefill call writes.

        Returns:
          Whether the request was admitted; if not, nothing has changed.
        """
        row = self._free_row()
        if row is None:
            return False
        found: list[int] = []
        if self._prefix_cache:
            # The last prompt token must be computed: its logits give the first output token.
            reusable = (state.prompt_length - 1) // self.shapes.page_size
            keys = self._page_keys(state, reusable)[:reusable]
            found = self.pool.find_prefix(keys)
            if written.intersection(keys[: len(found)]):
                return False
        room = self.pool.num_available - self.pool.count_idle(found)
        needed = self._num_pages(state.num_slots(2)) - len(found)
        if needed + self._reserved_pages() > room:
            return False
        self.pool.add_references(found)
        self._assign_row(state, row, found)
        state.num_computed_tokens = state.num_cached_tokens = len(found) * self.shapes.page_size
        self._allocate(state, 2)
        return True

    def _page_keys(self, state: RequestState, count: int) -> list[bytes]:
        """Returns the keys of at least the first `count` full pages, computing missing ones."""
        size = self.shapes.page_size
        for page in range(len(state.page_keys), count):
            parent = state.page_keys[-1] if state.page_keys else state.prefix_root
            tokens = state.tokens(page * size, (page + 1) * size)
            state.page_keys.append(page_key(parent, tokens))
        return state.page_keys

    def _publish_pages(self, state: RequestState, num_tokens: int) -> list[bytes]:
        """Enters the pages that the first `num_tokens` tokens fill into the prefix cache.

        Returns:
          The keys of the newly entered pages.
        """
        if not self._prefix_cache:
            return []
        full, published = num_tokens // self.shapes.page_size, state.num_published_pages
        new = self._page_keys(state, full)[published:full] if full > published else []
        for page, key in zip(state.pages[published:], new, strict=False):
            self.pool.publish(page, key)
        state.num_published_pages = max(published, full)
        return new

    # Decoding

    def _choose_decode_steps(self, decode: Sequence[RequestState]) -> int:
        """Returns the number of steps of the decode call for these requests.

        1 if a request streams, waits or is in prefill; otherwise as many as the compiled limit, the
        token budgets and the available pages allow.
        """
        if not decode:
            return 0
        in_prefill = any(not state.num_scheduled_tokens for state in self.running())
        if in_prefill or self.waiting or any(state.request.stream for state in decode):
            return 1
        budgets = (state.token_budget - state.num_scheduled_tokens for state in decode)
        steps = min(self.shapes.max_decode_steps, max(budgets))
        while steps > 1:
            needed = sum(self._pages_needed(state, steps) for state in decode)
            if needed <= self.pool.num_available:
                break
            steps //= 2
        return steps
