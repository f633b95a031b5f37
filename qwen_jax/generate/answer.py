"""The answer to one request: text chunks written by the engine thread and read by any other.

`AnswerState` is shared by the engine thread and the readers; `Answer` is the reader's handle on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.engine.request import Output, Request
from qwen_jax.generate.detokenizer import StreamDecoder
from qwen_jax.tokenizer.tokenizer import Tokenizer

# Fields of `Output` and `TextChunk` that are arrays with one row per token, or None.
_TOKEN_FIELDS = ("tokens", "logprobs", "raw_logprobs", "top_ids", "top_logprobs")


class Overloaded(RuntimeError):
    """Error of a request that was refused because the queue is full.

    Attributes:
      waiting: number of requests in the queue.
      retry_after: estimated seconds until they are finished, from the rate of recent requests.
    """

    def __init__(self, waiting: int, retry_after: float):
        """Creates the error; arguments as the attributes."""
        super().__init__(
            f"{waiting} requests are waiting already; try again in {retry_after:.0f} s."
        )
        self.waiting, self.retry_after = waiting, retry_after


class ServiceClosed(RuntimeError):
    """Error of a request that was submitted after `Service.close` was called."""


class EngineFailed(RuntimeError):
    """Error of all requests after the engine has raised; `__cause__` is the engine's exception."""

    def __init__(self, cause: BaseException):
        """Creates the error with the exception that the engine raised."""
        super().__init__(f"The engine has failed: {type(cause).__name__}: {cause}")
        self.__cause__ = cause


@dataclasses.dataclass(frozen=True)
class TextChunk:
    """A piece of an answer; the pieces joined are the full answer.

    Attributes:
      text: new text, made of complete characters; control tokens are left out.
      tokens: int32 [n], the tokens of this chunk. The tokens of all chunks together are the fewest
        that spell the text before the stop string, or all tokens if no stop string was found. A
        token belongs to the chunk in which the first character of its text is returned.
      finish: None while the answer continues; "stop" (a stop id or a stop string), "length" or
        "cancelled" in the last chunk.
      stop: the stop string that ended the answer, else None (also for a stop id).
      logprobs: as in `engine.request.Output`, for `tokens`; None unless requested.
      raw_logprobs: as in `Output`.
      top_ids: as in `Output`.
      top_logprobs: as in `Output`.
    """

    text: str
    tokens: np.ndarray
    finish: str | None = None
    stop: str | None = None
    logprobs: np.ndarray | None = None
    raw_logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def join_chunks(chunks: Sequence[TextChunk]) -> TextChunk:
    """Joins consecutive chunks of an answer into one; returns an empty chunk for no chunks."""
    columns = {
        name: _join_rows([getattr(chunk, name) for chunk in chunks]) for name in _TOKEN_FIELDS
    }
    finish = chunks[-1].finish if chunks else None
    stop = chunks[-1].stop if chunks else None
    return _make_chunk("".join(chunk.text for chunk in chunks), finish, stop, columns)


def _make_chunk(
    text: str, finish: str | None, stop: str | None, columns: dict[str, np.ndarray | None]
) -> TextChunk:
    """Returns a chunk with the arrays `columns`, by field name; `tokens` may be None for none."""
    tokens = columns["tokens"]
    return TextChunk(
        text=text,
        tokens=np.zeros(0, np.int32) if tokens is None else tokens,
        finish=finish,
        stop=stop,
        logprobs=columns["logprobs"],
        raw_logprobs=columns["raw_logprobs"],
        top_ids=columns["top_ids"],
        top_logprobs=columns["top_logprobs"],
    )


def _join_rows(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Concatenates the arrays among `parts` along their first axis; None if there are none."""
    arrays = [part for part in parts if part is not None]
    if not arrays:
        return None
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class AnswerState:
    """State of one request in the service: its text so far and the chunks not yet read.

    The engine thread calls `add_output`, `cancel` and `fail`; readers take chunks from `chunks`
    while they hold `condition`, which guards all of it.

    Attributes:
      request: the request as the engine receives it.
      ended: whether no more chunks will be added: finished, cancelled or failed.
      abandoned: whether the `Answer` was garbage-collected before the end.
      cached_tokens: prompt tokens that were found in the prefix cache.
      new_tokens: tokens received from the engine.
      submitted_at: `time.monotonic` of the submission.
      first_token_at: `time.monotonic` of the first output; None until then.
      ended_at: `time.monotonic` of the end; None until then.
      condition: lock, notified when a chunk is added or the answer ends.
      chunks: chunks that no reader has taken yet, in order.
      error: the exception that ended the answer, raised to every reader; None without one.
      waiters: event loops and futures of `async for` readers that wait for the next chunk.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, stop: tuple[str, ...]):
        """Creates the state of a request that is being submitted.

        Args:
          request: the request as the engine receives it.
          tokenizer: tokenizer of the model.
          stop: strings that end the answer and are not part of it.
        """
        self.request = request
        self.ended = self.abandoned = False
        self.cached_tokens = self.new_tokens = 0
        self.submitted_at = time.monotonic()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.condition = threading.Condition()
        self.chunks: list[TextChunk] = []
        self.error: BaseException | None = None
        self.waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._decoder = StreamDecoder(tokenizer, stop)
        # Rows of the tokens received but not yet part of a chunk, by field name.
        self._pending_rows: dict[str, np.ndarray | None] = {}
        self._num_chunk_tokens = 0  # tokens in all chunks so far
        self._unstreamed: list[TextChunk] = []  # joined at the end if the request does not stream

    def add_output(self, output: Output) -> str | None:
        """Decodes new tokens of the engine and makes their text available to the readers.

        Returns:
          How the answer ended ("stop" for a stop string too); None if it continues, or if it had
          ended before.
        """
        with self.condition:
            if self.ended:
                return None
            if self.first_token_at is None:
                self.first_token_at = time.monotonic()
                self.cached_tokens = output.cached_tokens
            self.new_tokens += len(output.tokens)
            text, finish = self._decoder.push(output.tokens), output.finish
            if finish is not None:
                text += self._decoder.finish()
            if self._decoder.stop_string is not None:
                finish = "stop"
            self._publish(self._next_chunk(text, finish, output))
            return finish

    def cancel(self) -> bool:
        """Ends the answer as "cancelled", with the text that was held back.

        Returns:
          False if the answer had ended before, else True.
        """
        with self.condition:
            if self.ended:
                return False
            self._publish(self._next_chunk(self._decoder.finish(), "cancelled", None))
            return True

    def fail(self, error: BaseException) -> None:
        """Ends the answer with `error`, which is raised to readers after the remaining chunks."""
        with self.condition:
            if not self.ended:
                self.error = error
                self._mark_ended()
                self._notify_readers()

    def _next_chunk(self, text: str, finish: str | None, output: Output | None) -> TextChunk:
        """Returns a chunk of `text` with the rows of its tokens; later tokens' rows stay pending.

        Args:
          text: text that has become certain.
          finish: how the answer ended; None if it continues.
          output: the engine output with the newest tokens; None if there are no new ones.
        """
        count = self._decoder.num_text_tokens - self._num_chunk_tokens
        self._num_chunk_tokens += count
        columns = {}
        for name in _TOKEN_FIELDS:
            new = None if output is None else getattr(output, name)
            rows = _join_rows([self._pending_rows.get(name), new])
            columns[name] = None if rows is None else rows[:count]
            self._pending_rows[name] = None if rows is None else rows[count:]
        return _make_chunk(text, finish, self._decoder.stop_string, columns)

    def _publish(self, chunk: TextChunk) -> None:
        """Makes a chunk available to the readers; without streaming, all chunks joined at the end.

        Chunks without text, tokens or end are dropped.
        """
        if chunk.finish is not None:
            self._mark_ended()
        if not self.request.stream:
            self._unstreamed.append(chunk)
            if chunk.finish is None:
                return
            chunk, self._unstreamed = join_chunks(self._unstreamed), []
        elif not (chunk.text or len(chunk.tokens) or chunk.finish):
            return
        self.chunks.append(chunk)
        self._notify_readers()

    def _mark_ended(self) -> None:
        """Records that and when the answer ended, and drops the rows that no chunk will have."""
        self.ended, self.ended_at = True, time.monotonic()
        self._pending_rows = {}

    def _notify_readers(self) -> None:
        """Wakes the threads and event loops that wait for a chunk or the end."""
        self.condition.notify_all()
        for loop, future in self.waiters:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits there
                loop.call_soon_threadsafe(_resolve, future)
        self.waiters.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    """Completes a future unless it was completed or cancelled before."""
    if not future.done():
        future.set_result(None)


class Canceller(Protocol):
    """The interface to the engine thread through which an answer cancels its request.

    Attributes:
      abandoned: ids of requests whose `Answer` was garbage-collected; the engine thread cancels
        them. Appending to the list needs no lock.
    """

    abandoned: list[str]

    def cancel(self, request_id: str) -> None:
        """Asks the engine thread to remove a request from the engine."""


class AnswerTimes(NamedTuple):
    """Times of an answer, in seconds of `time.monotonic`.

    Attributes:
      submitted: when the request was submitted.
      first_token: when its first tokens were received from the engine; None until then.
      ended: when the answer ended; None until then.
    """

    submitted: float
    first_token: float | None
    ended: float | None


class Answer:
    """Handle on one answer: an iterator over its chunks, for `for` or `async for`.

    Each chunk is returned once. If the handle is garbage-collected before the answer has ended, the
    request is cancelled. As a context manager it cancels an unfinished answer at the end of the
    block.
    """

    def __init__(self, state: AnswerState, canceller: Canceller, service: Any):
        """Creates the handle; called by `Service.submit`.

        Args:
          state: the state that the engine thread updates.
          canceller: removes the request from the engine.
          service: kept alive as long as this handle exists.
        """
        self._state, self._canceller, self._service = state, canceller, service

    @property
    def id(self) -> str:
        """Id of the request in the engine."""
        return self._state.request.id

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self._state.request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens found in the prefix cache; 0 until the first output."""
        return self._state.cached_tokens

    @property
    def new_tokens(self) -> int:
        """Number of tokens generated so far, including those after a stop string."""
        return self._state.new_tokens

    @property
    def times(self) -> AnswerTimes:
        """Times of submission, first token and end."""
        state = self._state
        return AnswerTimes(state.submitted_at, state.first_token_at, state.ended_at)

    def cancel(self) -> None:
        """Cancels the answer, from any thread; readers get the remaining text and "cancelled"."""
        if self._state.cancel():
            self._canceller.cancel(self.id)

    def result(self, timeout: float | None = None) -> TextChunk:
        """Waits for the end and returns all chunks that were not read yet, joined into one.

        Args:
          timeout: seconds to wait for each next chunk; None waits without limit.

        Raises:
          TimeoutError: no chunk was added within `timeout`.
          EngineFailed, UserError: as in iteration.
        """
        chunks = []
        while (chunk := self._next(timeout)) is not None:
            chunks.append(chunk)
        return join_chunks(chunks)

    async def aresult(self) -> TextChunk:
        """Returns the same as `result`, without blocking the event loop."""
        return join_chunks([chunk async for chunk in self])

    def __iter__(self) -> Answer:
        """Returns itself; each chunk is returned once."""
        return self

    def __next__(self) -> TextChunk:
        """Waits for the next chunk and returns it.

        Raises:
          EngineFailed: the engine failed.
          UserError: the engine refused the request.
        """
        chunk = self._next(None)
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Answer:
        """Returns itself; each chunk is returned once."""
        return self

    async def __anext__(self) -> TextChunk:
        """Returns the next chunk without blocking the event loop; raises as `__next__`."""
        state = self._state
        while True:
            with state.condition:
                if state.chunks:
                    return state.chunks.pop(0)
                if state.error is not None:
                    raise state.error
                if state.ended:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                waiter = (loop, loop.create_future())
                state.waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                with state.condition, contextlib.suppress(ValueError):
                    state.waiters.remove(waiter)

    def _next(self, timeout: float | None) -> TextChunk | None:
        """Waits up to `timeout` seconds for the next chunk; returns None at the end.

        Raises:
          TimeoutError: no chunk was added within `timeout`.
          EngineFailed, UserError: as `__next__`.
        """
        state = self._state
        with state.condition:
            if not state.condition.wait_for(lambda: state.chunks or state.ended, timeout):
                raise TimeoutError(f"The answer had no new text within {timeout} s.")
            if state.chunks:
                return state.chunks.pop(0)
            if state.error is not None:
                raise state.error
            return None

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Cancels the answer if it has not ended."""
        self.cancel()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Cancels the answer if it has not ended."""
        self.cancel()

    def __del__(self) -> None:
        """Has the engine thread cancel the request if it has not ended."""
        # The garbage collector may call this in any thread, under any lock, so it takes no lock.
        if not self._state.ended:
            self._state.abandoned = True
            self._canceller.abandoned.append(self.id)
