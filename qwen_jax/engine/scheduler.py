"""What the device does next: decisions on host state alone, nothing here touches a device.

A round is at most one prefill call and one decode call, so running answers never wait for more than
one chunk of somebody's prompt. Rows and pages go to requests in the order of arrival. When pages
run out, idle ones are forgotten, then new requests wait, then the youngest running request is put
aside (preempted) and comes back before anything younger begins.

Nobody starves: requests begin, and come back, strictly in order of arrival, and only younger ones
are ever put aside for an older one. So the oldest request always goes on; it fits, because `add`
refused what doesn't fit alone; when it ends another is the oldest.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.engine.page_pool import PagePool, page_key
from qwen_jax.engine.request import Request
from qwen_jax.engine.steps import Shapes


@dataclasses.dataclass(eq=False)
class Running:
    """A request for as long as the engine has it.

    Attributes:
      request: as it came.
      alpha: float32 [W], the factors of dynamic NTK of its prompt.
      root: the beginning of its pages' names.
      budget: most tokens it may draw.
      order: of arrival.
      answer: tokens drawn as far as the host knows, without the stop id.
      pages: in order; they cover what it has in the cache, and a little ahead.
      keys: names of its full pages, as far as they were needed.
      named: pages of its own that have been offered to others, or were found.
      row: of the device, while it has one.
      computed: tokens of the prompt whose keys and values are in the cache or on their way.
      cached: of these, tokens that another request had computed.
      drawn: tokens whose drawing was sent to the device; the host may know fewer.
      aside: its pages in the host's memory, between preemption and return.
      finish: None until it has ended: "stop", "length" or "cancelled".
      prompt_length: tokens of the prompt.
    """

    request: Request
    alpha: np.ndarray
    root: bytes
    budget: int
    order: int = -1
    answer: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    named: int = 0
    row: int | None = None
    computed: int = 0
    cached: int = 0
    drawn: int = 0
    aside: object = None
    finish: str | None = None
    prompt_length: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.prompt_length = len(self.request.prompt)

    @property
    def decoding(self) -> bool:
        """The prompt is computed, or on its way, and tokens are left to be drawn."""
        return self.row is not None and 0 < self.drawn < self.budget

    def slots(self, steps: int = 0) -> int:
        """Tokens in the cache after so many more steps; each is written when the next is drawn."""
        return self.prompt_length + max(min(self.drawn + steps, self.budget) - 1, 0)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens begin … end − 1 of prompt and answer."""
        answer = self.answer[max(begin - self.prompt_length, 0) : max(end - self.prompt_length, 0)]
        return [*self.request.prompt[begin:end], *answer]

    def known_slots(self) -> int:
        """Tokens in the cache as far as the host knows, once one is drawn: all but the newest."""
        return self.prompt_length + len(self.answer) - 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens start … start + count − 1 of a prompt, to be computed in one call.

    start is a border of pages, and so is start + count unless it ends the prompt.
    """

    running: Running
    start: int
    count: int

    @property
    def last(self) -> bool:
        """It ends the prompt, and the first token of the answer is drawn."""
        return self.start + self.count == self.running.prompt_length


@dataclasses.dataclass(frozen=True)
class Round:
    """What to send to the device, in this order.

    Attributes:
      stop: rows whose requests were cancelled or put aside.
      aside: requests whose pages are to be copied to the host, and those pages.
      back: requests that return to their rows, with pages to be filled.
      chunks: of one prefill call; none: no call.
      tokens: slots of the call, one of the buckets.
      decode: requests that decode; none: no call.
      rows: rows of the call, one of the buckets.
      steps: most tokens that each of them draws.
    """

    stop: tuple[int, ...] = ()
    aside: tuple[tuple[Running, tuple[int, ...]], ...] = ()
    back: tuple[Running, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    tokens: int = 0
    decode: tuple[Running, ...] = ()
    rows: int = 0
    steps: int = 0

    def __bool__(self) -> bool:
        return bool(self.stop or self.aside or self.back or self.chunks or self.decode)


def bucket(buckets: Sequence[int], value: int) -> int:
    """The smallest of ascending `buckets` that holds `value`."""
    return next(size for size in buckets if size >= value)


def prefill_slots(buckets: Sequence[int], wanted: int) -> int:
    """The bucket for `wanted` slots, at least half full if a smaller one can be filled instead."""
    for size, larger in itertools.pairwise(buckets):
        if wanted <= size or 2 * wanted < larger:
            return size
    return buckets[-1]


class Scheduler:
    """Requests that wait, requests that run, and the pages between them.

    Args:
      shapes: what the programs can take at once.
      reuse: look for, and keep, pages of prompts and answers for later requests.
      one_past: only the first chunk of a call may have anything in the cache (models with windows).
    """

    def __init__(self, shapes: Shapes, *, reuse: bool = True, one_past: bool = False):
        self.shapes = shapes
        self.pool = PagePool(shapes.pages)
        self.waiting: collections.deque[Running] = collections.deque()
        self.rows: list[Running | None] = [None] * shapes.rows
        self.preemptions = 0
        self._reuse, self._one_past = reuse, one_past
        self._orders = itertools.count()
        self._stop: list[int] = []

    # Coming and going

    def add(self, running: Running) -> None:
        """Puts a request at the end of the queue."""
        running.order = next(self._orders)
        self.waiting.append(running)

    def running(self) -> list[Running]:
        """Requests that have a row, oldest first."""
        return sorted((r for r in self.rows if r is not None), key=lambda r: r.order)

    def end(self, running: Running, finish: str) -> None:
        """A request ends: its row and pages are free, its full pages may be found by others.

        Calls that are on their way may still write to its pages; whoever gets them writes later.
        """
        running.finish = finish
        if running.row is None:
            self.waiting.remove(running)
        else:
            if finish == "cancelled":
                self._stop.append(running.row)
            self._leave(running)
        running.aside = None

    def _leave(self, running: Running) -> None:
        self.rows[running.row] = None
        running.row = None
        self.pool.release(running.pages)
        running.pages = []
        running.named = 0

    def learn(self, running: Running, tokens: Sequence[int]) -> str | None:
        """The host learns of drawn tokens; returns why the answer ended, None while it goes on."""
        running.answer.extend(tokens)
        if running.answer and running.answer[-1] in running.request.params.stop_ids:
            running.answer.pop()
            return "stop"
        # The last token is written when the next one is drawn.
        self._name_pages(running, running.known_slots())
        return "length" if len(running.answer) == running.budget else None

    def holders(self) -> Iterator[list[int]]:
        """The pages of every request; for `PagePool.check`."""
        return (r.pages for r in [*self.running(), *self.waiting])

    # A round

    def plan(self, settled: bool) -> Round | None:
        """Decides a round and books its rows and pages.

        Args:
          settled: the host has read every result. Only then can a request be put aside, because
            what it holds must be known.

        Returns:
          the round, empty when there is nothing to do; None: results must be read first, pages are
          needed and may come free.
        """
        aside = self._grow(settled)
        if aside is None:
            return None
        stop, self._stop = tuple(self._stop), []
        back = self._return()
        slots, chunks = self._prefill()
        decode = tuple(r for r in self.running() if r.decoding)
        steps = self._steps(decode)
        for running in decode:
            self._cover(running, steps)
            running.drawn = min(running.drawn + steps, running.budget)
        rows = bucket(self.shapes.decode_rows, max(r.row for r in decode) + 1) if decode else 0
        return Round(stop, tuple(aside), back, chunks, slots, decode, rows, steps)

    def _pages(self, slots: int) -> int:
        return -(-slots // self.shapes.page_size)

    def _lack(self, running: Running, steps: int) -> int:
        return max(self._pages(running.slots(steps)) - len(running.pages), 0)

    def _cover(self, running: Running, steps: int) -> None:
        running.pages += self.pool.take(self._lack(running, steps))

    def _grow(self, settled: bool) -> list[tuple[Running, tuple[int, ...]]] | None:
        """Room for one more step of every decoding request, oldest first; the youngest give way."""
        aside = []
        for running in self.running():
            while running.decoding and (lack := self._lack(running, 1)):
                if lack <= self.pool.available:
                    running.pages += self.pool.take(lack)
                    break
                if not settled:
                    return None
                youngest = self.running()[-1]
                if youngest.drawn:
                    known = self._pages(youngest.known_slots())
                    aside.append((youngest, tuple(youngest.pages[:known])))
                self._put_aside(youngest)
        return aside

    def _put_aside(self, running: Running) -> None:
        """Takes row and pages; a prompt that hasn't drawn yet simply begins again later."""
        if running.drawn:
            self._stop.append(running.row)
        else:
            running.computed = running.cached = 0
        self._leave(running)
        self.waiting.appendleft(running)
        self.preemptions += 1

    def _free_row(self) -> int | None:
        return next((row for row, r in enumerate(self.rows) if r is None), None)

    def _reserve(self) -> int:
        """Pages left for those who run to grow into, so that no newcomer is put aside at once."""
        return sum(r is not None for r in self.rows)

    def _return(self) -> tuple[Running, ...]:
        """Gives rows and pages back to requests that were put aside; they head the queue."""
        back = []
        while self.waiting and self.waiting[0].drawn:
            running, row = self.waiting[0], self._free_row()
            if row is None or self._lack(running, 1) + self._reserve() > self.pool.available:
                break
            self._seat(self.waiting.popleft(), row, [])
            self._cover(running, 1)
            back.append(running)
        return tuple(back)

    def _seat(self, running: Running, row: int, pages: list[int]) -> None:
        self.rows[row] = running
        running.row, running.pages, running.named = row, pages, len(pages)

    # Prompts

    def _prefill(self) -> tuple[int, tuple[Chunk, ...]]:
        """Slots and chunks of a prefill call: prompts already begun, then new ones, in order."""
        shapes, chunks = self.shapes, []
        begun = [r for r in self.running() if not r.drawn]
        slots = left = prefill_slots(shapes.prefill_tokens, self._wanted(begun))
        past = shapes.past_pages[-1]
        written: set[bytes] = set()  # names of pages that this very call writes
        while left and len(chunks) < shapes.prompts:
            if begun:
                running = begun[0]
            elif self.waiting and not self.waiting[0].drawn:
                if not self._admit(self.waiting[0], written):
                    break
                running = self.waiting.popleft()
                begun.append(running)
            else:
                break
            pages = running.computed // shapes.page_size
            if pages > past or (pages and chunks and self._one_past):
                break
            chunk = Chunk(
                running, running.computed, min(left, running.prompt_length - running.computed)
            )
            chunks.append(chunk)
            past -= pages
            left -= self._pages(chunk.count) * shapes.page_size
            running.computed += chunk.count
            written.update(self._name_pages(running, running.computed))
            begun.pop(0)
            if chunk.last:
                running.drawn = 1
        if not chunks:
            return 0, ()
        return bucket(shapes.prefill_tokens, slots - left), tuple(chunks)

    def _wanted(self, begun: list[Running]) -> int:
        """Slots that prompts could fill now, as far as known before looking for their pages."""
        new = itertools.islice(self.waiting, self.rows.count(None))
        wanted = 0
        for running in itertools.islice(itertools.chain(begun, new), self.shapes.prompts):
            if not running.drawn:
                left = running.prompt_length - running.computed
                wanted += self._pages(left) * self.shapes.page_size
        return wanted

    def _admit(self, running: Running, written: set[bytes]) -> bool:
        """Gives a new request a row and pages for its whole prompt, or leaves it in the queue.

        A request that could use a page which this call is only about to write waits for the next
        call. Many equal prompts that come together (OpenAI's `n`) are thus computed once.
        """
        row = self._free_row()
        if row is None:
            return False
        found = []
        if self._reuse:
            # The last token must be computed, since the answer begins with its logits.
            whole = (running.prompt_length - 1) // self.shapes.page_size
            keys = self._keys(running, whole)[:whole]
            found = self.pool.find(keys)
            if written.intersection(keys[: len(found)]):
                return False
        room = self.pool.available - self.pool.idle(found)
        lack = self._pages(running.slots(2)) - len(found)
        if lack + self._reserve() > room:
            return False
        self.pool.hold(found)
        self._seat(running, row, found)
        running.computed = running.cached = len(found) * self.shapes.page_size
        self._cover(running, 2)
        return True

    def _keys(self, running: Running, pages: int) -> list[bytes]:
        """Names of the first full pages, made as they are needed."""
        size = self.shapes.page_size
        for page in range(len(running.keys), pages):
            parent = running.keys[-1] if running.keys else running.root
            tokens = running.tokens(page * size, (page + 1) * size)
            running.keys.append(page_key(parent, tokens))
        return running.keys

    def _name_pages(self, running: Running, tokens: int) -> list[bytes]:
        """Offers pages that `tokens` tokens fill to others; returns their names."""
        if not self._reuse:
            return []
        full = tokens // self.shapes.page_size
        new = self._keys(running, full)[running.named : full] if full > running.named else []
        for page, key in zip(running.pages[running.named :], new, strict=False):
            self.pool.name(page, key)
        running.named = max(running.named, full)
        return new

    # Decoding

    def _steps(self, decode: Sequence[Running]) -> int:
        """1 while anybody reads along or waits, else what the burst, budgets and pages allow."""
        if not decode:
            return 0
        begun = any(not r.drawn for r in self.running())
        if begun or self.waiting or any(r.request.stream for r in decode):
            return 1
        steps = min(self.shapes.burst, max(r.budget - r.drawn for r in decode))
        while steps > 1 and sum(self._lack(r, steps) for r in decode) > self.pool.available:
            steps //= 2
        return steps
