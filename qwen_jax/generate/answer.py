"""One answer of the service: filled by the engine's thread, read by any other thread or loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from qwen_jax.engine.request import Output, Request
from qwen_jax.generate.detokenizer import TextStream
from qwen_jax.tokenizer.tokenizer import Tokenizer

# Arrays of an `Output` and a `Chunk` that have one row per token.
_PER_TOKEN = ("tokens", "logprobs", "raw_logprobs", "top_ids", "top_logprobs")


class Overloaded(RuntimeError):
    """Too many requests wait already.

    Attributes:
      waiting: how many.
      retry_after: seconds in which they should be done, judged by the latest ones.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(
            f"{waiting} requests are waiting already; try again in {retry_after:.0f} s."
        )
        self.waiting, self.retry_after = waiting, retry_after


class Closed(RuntimeError):
    """The service has ended or is ending."""


class EngineFailed(RuntimeError):
    """The engine has failed; `__cause__` is what it raised."""

    def __init__(self, cause: BaseException):
        super().__init__(f"The engine has failed: {type(cause).__name__}: {cause}")
        self.__cause__ = cause


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of an answer. Joined, the chunks are the whole answer.

    Attributes:
      text: new text, whole characters; control tokens are not shown.
      tokens: int32 [n], the tokens that belong to it: those of all chunks joined are the fewest
        that spell the text up to a stop string, or all tokens where none was found. A token stands
        in the chunk in which its text begins to be given out.
      finish: None while it goes on; "stop" (a stop id or a stop string), "length", "cancelled".
      stop: the stop string that ended it; None for a stop id.
      logprobs, raw_logprobs, top_ids, top_logprobs: of `tokens`, as in `Output`; None unless asked
        for.
    """

    text: str
    tokens: np.ndarray
    finish: str | None = None
    stop: str | None = None
    logprobs: np.ndarray | None = None
    raw_logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk out of consecutive ones; of none, an empty one."""
    columns = {name: _join([getattr(chunk, name) for chunk in chunks]) for name in _PER_TOKEN}
    if columns["tokens"] is None:
        columns["tokens"] = np.zeros(0, np.int32)
    last = chunks[-1] if chunks else None
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        finish=last and last.finish,
        stop=last and last.stop,
        **columns,
    )


def _join(parts: list[np.ndarray | None]) -> np.ndarray | None:
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Job:
    """What the service knows of a request. One lock guards its text and its chunks.

    Attributes:
      request: as the engine gets it.
      ended: nothing more will come: finished, cancelled or failed.
      abandoned: nobody can read the answer any more.
      cached, new: tokens of the prompt found in the cache; tokens that the engine has given.
      submitted_at, first_at, ended_at: seconds of `time.monotonic`; None until then.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.request = request
        self.ended = self.abandoned = False
        self.cached = self.new = 0
        self.submitted_at, self.first_at, self.ended_at = time.monotonic(), None, None
        self.ready = threading.Condition()
        self.chunks: list[Chunk] = []
        self.error: BaseException | None = None
        self.waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = []
        self._text = TextStream(tokenizer, stop)
        self._held: dict[str, np.ndarray | None] = {}  # rows of tokens not given out yet
        self._given = 0
        self._later: list[Chunk] = []  # of a request that is not streamed, until its end

    def take(self, output: Output) -> str | None:
        """Takes new tokens from the engine; returns how the answer ended, if it did."""
        with self.ready:
            if self.ended:
                return None
            if self.first_at is None:
                self.first_at, self.cached = time.monotonic(), output.cached_tokens
            self.new += len(output.tokens)
            text, finish = self._text.push(output.tokens), output.finish
            if finish is not None:
                text += self._text.finish()
            if self._text.stopped is not None:
                finish = "stop"
            self._post(self._chunk(text, finish, output))
            return finish

    def cancel(self) -> bool:
        """Ends the answer as "cancelled", with what was held back; False when it has ended."""
        with self.ready:
            if self.ended:
                return False
            self._post(self._chunk(self._text.finish(), "cancelled", None))
            return True

    def fail(self, error: BaseException) -> None:
        """Ends the answer with an error, which every read raises after what came before it."""
        with self.ready:
            if not self.ended:
                self.error = error
                self._end()
                self._wake()

    def _chunk(self, text: str, finish: str | None, output: Output | None) -> Chunk:
        """The chunk of `text`, with the rows of its tokens; keeps the rest."""
        count = self._text.kept - self._given
        self._given += count
        given = {}
        for name in _PER_TOKEN:
            parts = [self._held.get(name), None if output is None else getattr(output, name)]
            rows = _join(parts)
            given[name] = None if rows is None else rows[:count]
            self._held[name] = None if rows is None else rows[count:]
        if given["tokens"] is None:
            given["tokens"] = np.zeros(0, np.int32)
        return Chunk(text=text, finish=finish, stop=self._text.stopped, **given)

    def _post(self, chunk: Chunk) -> None:
        if chunk.finish is not None:
            self._end()
        if not self.request.stream:
            self._later.append(chunk)
            if chunk.finish is None:
                return
            chunk, self._later = join_chunks(self._later), []
        elif not (chunk.text or len(chunk.tokens) or chunk.finish):
            return
        self.chunks.append(chunk)
        self._wake()

    def _end(self) -> None:
        self.ended, self.ended_at = True, time.monotonic()
        self._held = {}

    def _wake(self) -> None:
        self.ready.notify_all()
        for loop, future in self.waiters:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits
                loop.call_soon_threadsafe(_resolve, future)
        self.waiters.clear()


def _resolve(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


class Canceller(Protocol):
    """The part of the service that an answer needs."""

    abandoned: list[str]

    def cancel(self, request_id: str) -> None:
        """Frees a request in the engine."""


class Answer:
    """A handle on one answer: iterate over it, once, by `for` or `async for`.

    When nobody holds it any more before its end, the request is cancelled. As a context manager it
    cancels at the end of the block what has not ended.
    """

    def __init__(self, job: Job, canceller: Canceller, keep: Any):
        """Made by `Service.submit`; `keep` is held as long as the answer is."""
        self._job, self._canceller, self._keep = job, canceller, keep

    @property
    def id(self) -> str:
        """The request's id in the engine."""
        return self._job.request.id

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._job.request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed again; known with the first chunk."""
        return self._job.cached

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, those after a stop string included."""
        return self._job.new

    @property
    def times(self) -> tuple[float, float | None, float | None]:
        """When it was submitted, had its first token, ended: seconds of `time.monotonic`."""
        return self._job.submitted_at, self._job.first_at, self._job.ended_at

    def cancel(self) -> None:
        """Ends the answer, from any thread: the reader gets what there is, then "cancelled"."""
        if self._job.cancel():
            self._canceller.cancel(self.id)

    def result(self, timeout: float | None = None) -> Chunk:
        """Waits for the end; returns everything not read yet as one chunk.

        Args:
          timeout: seconds to wait for the next chunk; None: as long as it takes.

        Raises:
          TimeoutError: nothing came in that time. EngineFailed, UserError: as in iteration.
        """
        chunks = []
        while (chunk := self._next(timeout)) is not None:
            chunks.append(chunk)
        return join_chunks(chunks)

    async def aresult(self) -> Chunk:
        """`result` for an event loop."""
        return join_chunks([chunk async for chunk in self])

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
          EngineFailed: the engine failed. UserError: it refused the request.
        """
        chunk = self._next(None)
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk, without blocking the event loop; raises as `__next__`."""
        job = self._job
        while True:
            with job.ready:
                if job.chunks:
                    return job.chunks.pop(0)
                if job.error is not None:
                    raise job.error
                if job.ended:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                waiter = (loop, loop.create_future())
                job.waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                with job.ready, contextlib.suppress(ValueError):
                    job.waiters.remove(waiter)

    def _next(self, timeout: float | None) -> Chunk | None:
        job = self._job
        with job.ready:
            if not job.ready.wait_for(lambda: job.chunks or job.ended, timeout):
                raise TimeoutError(f"no text came in {timeout} s")
            if job.chunks:
                return job.chunks.pop(0)
            if job.error is not None:
                raise job.error
            return None

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc_info) -> None:
        self.cancel()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exc_info) -> None:
        self.cancel()

    def __del__(self) -> None:
        # May run in any thread, at any moment, under any lock: so it takes none.
        if not self._job.ended:
            self._job.abandoned = True
            self._canceller.abandoned.append(self.id)
