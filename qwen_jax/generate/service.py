"""Service that runs the engine in a thread of its own and delivers answers as text.

    with Service(engine, tokenizer) as service:
        for chunk in service.submit(prompt_ids, params, stop=["\\n\\n"], stream=True):
            print(chunk.text, end="")

Any thread may submit, read and cancel. An answer is read with `for`, with `async for`, or complete
with `result()`. The engine thread never waits for a reader.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from qwen_jax.engine.request import Output, Request, SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.answer import (
    Answer,
    AnswerState,
    EngineFailed,
    Overloaded,
    ServiceClosed,
    TextChunk,
)
from qwen_jax.generate.detokenizer import check_stop_strings
from qwen_jax.generate.stats import ServiceCounters, ServiceStats
from qwen_jax.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "EngineFailed",
    "EngineLike",
    "Overloaded",
    "Service",
    "ServiceClosed",
    "ServiceStats",
    "TextChunk",
]

# An engine step that took less time and returned nothing had nothing to do. The thread then sleeps
# this long before the next one, so that an engine that holds requests back does not occupy a core.
_IDLE_STEP_S = 0.0005


class EngineLike(Protocol):
    """Engine interface that the service uses; implemented by `qwen_jax.engine.engine.Engine`."""

    max_length: int

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""

    def add(self, request: Request) -> None:
        """Submits a request; raises UserError if it can never fit."""

    def cancel(self, request_id: str) -> None:
        """Ends a request; `step` returns no more outputs for it."""

    def step(self) -> list[Output]:
        """Runs one scheduling step and returns new outputs."""

    def stats(self) -> Any:
        """Returns a dataclass of statistics, with `waiting` and `running` among its fields."""


class Service:
    """Thread-safe front of an engine, which runs in a thread of its own.

    The thread ends with `close`, at the end of a `with` block, when the service is
    garbage-collected, or with the process.

    Attributes:
      tokenizer: the tokenizer of the model.
      max_length: maximum number of tokens of a prompt and its answer together.
      max_waiting: maximum number of requests in the queue.
    """

    def __init__(self, engine: EngineLike, tokenizer: Tokenizer, *, max_waiting: int = 1024):
        """Starts the engine thread; no other thread may use `engine` from now on.

        Args:
          engine: the engine.
          tokenizer: the tokenizer of the model.
          max_waiting: maximum number of requests in the queue; further ones are refused.

        Raises:
          UserError: `max_waiting` is not positive.
        """
        if max_waiting < 1:
            raise UserError(f"max_waiting is {max_waiting}; it must be at least 1.")
        self.tokenizer = tokenizer
        self.max_length = engine.max_length
        self.max_waiting = max_waiting
        self._engine_thread = _EngineThread(engine)
        # The thread has no reference to the service, so an unused service can be collected.
        self._finalizer = weakref.finalize(self, self._engine_thread.close, False, None)

    def submit(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        params: SamplingParams = SamplingParams(),
        *,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> Answer:
        """Submits a prompt to continue and returns its answer at once, before it is generated.

        Args:
          prompt_ids: token ids, at least one.
          params: sampling parameters.
          stop: strings that end the answer and are not part of it; they may span tokens.
          stream: whether text is delivered as soon as it is certain; otherwise the answer is one
            chunk.

        Raises:
          UserError: bad input, or a prompt that can never fit. Errors that only the engine can
            detect are raised by the first read of the answer.
          Overloaded: `max_waiting` requests are in the queue.
          ServiceClosed: `close` was called.
          EngineFailed: the engine has failed.
        """
        check_stop_strings(stop)
        prompt = tuple(map(int, prompt_ids))
        if not prompt:
            raise UserError("The prompt has no tokens; give at least one.")
        if len(prompt) >= self.max_length:
            raise UserError(
                f"The prompt has {len(prompt):,} tokens, but prompt and answer together may have "
                f"{self.max_length:,}; shorten it."
            )
        request = Request(uuid.uuid4().hex, prompt, params, stream)
        state = AnswerState(request, self.tokenizer, tuple(stop))
        self._engine_thread.add(state, self.max_waiting)
        return Answer(state, self._engine_thread, service=self)

    def stats(self) -> ServiceStats:
        """Returns totals and histograms since the start, and the engine's statistics."""
        return self._engine_thread.stats()

    @property
    def failed(self) -> BaseException | None:
        """The exception that ended the engine; None while it works."""
        return self._engine_thread.failure

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Ends the engine thread; new requests are refused from now on.

        May be called more than once.

        Args:
          drain: whether to finish running and waiting requests; otherwise they are cancelled.
          timeout: seconds after which draining stops and unfinished requests are cancelled; None
            sets no limit.
        """
        self._finalizer.detach()
        self._engine_thread.close(drain, timeout)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Cancels all requests and ends the thread, as `close`."""
        self.close()


class _EngineThread:
    """The thread that owns the engine, and the queues through which other threads reach it.

    `_wake` guards everything that threads share. No thread holds two locks of this package at once:
    the lock of an `AnswerState` is taken after `_wake` is released, and a garbage-collected answer
    only appends to `abandoned`, which needs no lock.

    Attributes:
      failure: the exception that ended the engine; None while it works.
      abandoned: ids of requests whose `Answer` was garbage-collected, to be cancelled.
    """

    def __init__(self, engine: EngineLike):
        """Starts the thread, which takes over the engine."""
        self.failure: BaseException | None = None
        self.abandoned: list[str] = []
        self._engine = engine
        self._wake = threading.Condition()
        self._submitted: list[AnswerState] = []  # not yet received by the engine thread
        self._cancelled: list[str] = []
        self._accepting = True
        self._ending = False
        # Requests in the engine by id; used by the engine thread only.
        self._answers: dict[str, AnswerState] = {}
        self._counters = ServiceCounters()
        self._engine_stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, state: AnswerState, max_waiting: int) -> None:
        """Queues a request for the engine.

        Raises:
          EngineFailed: the engine has failed.
          ServiceClosed: `close` was called.
          Overloaded: `max_waiting` requests are waiting.
        """
        with self._wake:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            if not self._accepting:
                raise ServiceClosed("The service is closed; it accepts no more requests.")
            waiting = len(self._submitted) + self._engine_stats.waiting
            if waiting >= max_waiting:
                self._counters.refused += 1
                raise Overloaded(waiting, self._counters.estimate_wait(waiting))
            self._counters.submitted += 1
            self._submitted.append(state)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Asks the engine thread to remove a request from the engine; an ended one is ignored."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def stats(self) -> ServiceStats:
        """Returns the current statistics."""
        with self._wake:
            return self._counters.snapshot(len(self._submitted), self._engine_stats)

    def close(self, drain: bool, timeout: float | None) -> None:
        """Ends the thread; arguments as `Service.close`."""
        with self._wake:
            self._accepting = False
            self._ending |= not drain
            self._wake.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout if drain else None)
        if self._thread.is_alive():
            self.close(False, None)

    def _run(self) -> None:
        """Runs the engine until the end; if it raises, ends every request with `EngineFailed`."""
        try:
            while self._run_once():
                pass
        except BaseException as error:
            logging.exception("the engine has failed; every request ends with this error")
            with self._wake:
                self.failure = error
                unreceived, self._submitted = self._submitted, []
            for state in [*self._answers.values(), *unreceived]:
                state.fail(EngineFailed(error))
                self._count_finished(state, "failed")
        # Frees the weights and the cache, even if an answer is still referenced.
        self._answers.clear()
        del self._engine

    def _run_once(self) -> bool:
        """Waits for work, passes new requests and cancellations on, and runs one engine step.

        Returns:
          Whether to continue; False when the service was closed and nothing is left to do.

        Raises:
          RuntimeError: the engine is idle although requests have not finished.
        """
        with self._wake:
            while not (
                self._submitted or self._cancelled or self._engine.busy or not self._accepting
            ):
                self._wake.wait()
            new, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            ending, draining = self._ending, not self._accepting
            # They count as waiting in the engine until its statistics are refreshed.
            waiting = self._engine_stats.waiting + len(new)
            self._engine_stats = dataclasses.replace(self._engine_stats, waiting=waiting)
        # All are entered first, so that an engine failure at one of them reaches the others too.
        self._answers.update((state.request.id, state) for state in new)
        for state in new:
            self._start_request(state)
        while self.abandoned:
            cancelled.append(self.abandoned.pop())
        for request_id in list(self._answers) if ending else cancelled:
            self._cancel_request(request_id)
        if ending or (draining and not self._engine.busy):
            self._refresh_engine_stats()
            return False
        started = time.monotonic()
        outputs = self._engine.step() if self._engine.busy else []
        for output in outputs:
            self._deliver(output)
        if self._answers and not self._engine.busy:
            raise RuntimeError(f"The engine is idle with {len(self._answers)} requests unfinished.")
        self._refresh_engine_stats()
        if not outputs and time.monotonic() - started < _IDLE_STEP_S:
            self._pause_if_idle()
        return True

    def _pause_if_idle(self) -> None:
        """Sleeps for `_IDLE_STEP_S`, unless there are new requests or cancellations."""
        with self._wake:
            has_work = bool(self._submitted or self._cancelled)
            if self._engine.busy and self._accepting and not has_work:
                self._wake.wait(_IDLE_STEP_S)

    def _start_request(self, state: AnswerState) -> None:
        """Adds a request to the engine, unless it was cancelled or abandoned before."""
        if state.abandoned or state.ended:
            state.cancel()
            self._remove(state, "cancelled")
            return
        try:
            self._engine.add(state.request)
        except UserError as error:
            state.fail(error)
            self._remove(state, "refused")

    def _cancel_request(self, request_id: str) -> None:
        """Cancels a request in the engine; does nothing if it has ended."""
        if (state := self._answers.get(request_id)) is not None:
            state.cancel()
            self._remove(state, "cancelled")
            self._engine.cancel(request_id)

    def _deliver(self, output: Output) -> None:
        """Adds an output to its answer; cancels the request in the engine after a stop string."""
        state = self._answers.get(output.request_id)
        if state is None:
            return
        finish = state.add_output(output)
        if finish is not None:
            self._remove(state, finish)
            if output.finish is None:
                self._engine.cancel(output.request_id)
        elif output.finish is not None:  # cancelled by a reader; its message is still in the queue
            self._remove(state, "cancelled")

    def _remove(self, state: AnswerState, finish: str) -> None:
        """Removes an ended request and counts it under `finish`, a key of `finished`."""
        del self._answers[state.request.id]
        self._count_finished(state, finish)

    def _count_finished(self, state: AnswerState, finish: str) -> None:
        """Counts an ended request under `finish`, a key of `ServiceStats.finished`."""
        with self._wake:
            self._counters.count_finished(state, finish)

    def _refresh_engine_stats(self) -> None:
        """Stores the engine's current statistics for other threads."""
        stats = self._engine.stats()
        with self._wake:
            self._engine_stats = stats
