"""Many readers, one engine: a thread owns the engine, answers come out as text.

    with Service(engine, tokenizer) as service:
        for chunk in service.submit(prompt_ids, params, stop=["\\n\\n"], stream=True):
            print(chunk.text, end="")

Any thread may submit, read and cancel; an answer is read with `for`, with `async for`, or at once
with `result()`. The engine's thread never waits for a reader.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from absl import logging

from qwen_jax.engine.request import Output, Request, SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.answer import Answer, Chunk, Closed, EngineFailed, Job, Overloaded
from qwen_jax.generate.detokenizer import check_stop
from qwen_jax.generate.stats import Counters, ServiceStats
from qwen_jax.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "Chunk",
    "Closed",
    "EngineFailed",
    "EngineLike",
    "Overloaded",
    "Service",
    "ServiceStats",
]

# A round of the engine that took less and gave nothing had nothing to do: the thread then sleeps
# as long before the next, so that an engine which holds requests back does not keep a core busy.
_IDLE_ROUND_S = 0.0005


class EngineLike(Protocol):
    """What the service asks of an engine; see `qwen_jax.engine.engine.Engine`."""

    max_length: int

    @property
    def busy(self) -> bool:
        """Whether there is work, waiting or running."""

    def add(self, request: Request) -> None:
        """Takes a request; UserError when it can never fit."""

    def cancel(self, request_id: str) -> None:
        """Frees a request; no more outputs for it."""

    def step(self) -> list[Output]:
        """One round of scheduling."""

    def stats(self) -> Any:
        """Numbers, among them `waiting` and `running`."""


class Service:
    """Runs an engine in a thread of its own.

    Ends with `close`, at the end of a `with` block, when it is garbage-collected, or with the
    process.
    """

    def __init__(self, engine: EngineLike, tokenizer: Tokenizer, *, max_waiting: int = 1024):
        """Starts the thread; from now on nobody else may touch `engine`.

        Args:
          engine: the engine.
          tokenizer: of the model.
          max_waiting: requests that may wait for the engine to start on them; more are refused.

        Raises:
          UserError: `max_waiting` is not positive.
        """
        if max_waiting < 1:
            raise UserError(f"max_waiting is {max_waiting}; it must be at least 1.")
        self.tokenizer = tokenizer
        self.max_length = engine.max_length
        self.max_waiting = max_waiting
        self._runner = _Runner(engine)
        # The thread knows the runner only, so that a service nobody holds is collected, and ends.
        self._end = weakref.finalize(self, self._runner.close, False, None)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams = SamplingParams(),
        *,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> Answer:
        """Asks for a continuation; returns at once.

        Args:
          prompt_ids: token ids, at least one.
          params: how to continue.
          stop: strings that end the answer and are not part of it, also across tokens.
          stream: give out text as it becomes certain; otherwise one chunk holds everything.

        Raises:
          UserError: bad input, or a prompt that can never fit. What only the engine can tell is
            raised by the first read instead.
          Overloaded: `max_waiting` requests wait already.
          Closed: the service has ended, or is ending.
          EngineFailed: the engine has failed.
        """
        check_stop(stop)
        prompt = tuple(map(int, prompt_ids))
        if not prompt:
            raise UserError("The prompt has no tokens; give at least one.")
        if len(prompt) >= self.max_length:
            raise UserError(
                f"The prompt has {len(prompt):,} tokens, but prompt and answer together may have "
                f"{self.max_length:,}; shorten it."
            )
        request = Request(uuid.uuid4().hex, prompt, params, stream)
        job = Job(request, self.tokenizer, tuple(stop))
        self._runner.add(job, self.max_waiting)
        return Answer(job, self._runner, keep=self)

    def stats(self) -> ServiceStats:
        """Counters and distributions since the start, and the engine's own numbers."""
        return self._runner.stats()

    @property
    def failed(self) -> BaseException | None:
        """What ended the engine; None while it works."""
        return self._runner.failure

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Ends the thread; new requests are refused from now on. Calling it again is harmless.

        Args:
          drain: let running and waiting requests come to their end; otherwise they end as
            "cancelled".
          timeout: seconds to drain for; those that are not done then are cancelled. None: no limit.
        """
        self._end.detach()
        self._runner.close(drain, timeout)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class _Runner:
    """The thread and what it shares with others, all under one lock.

    No two locks of this package are ever held at once: that of a job (its chunks) is taken after
    this one is let go, and a collected answer only appends to `abandoned`, which needs none.
    """

    def __init__(self, engine: EngineLike):
        self.failure: BaseException | None = None
        self.abandoned: list[str] = []  # ids of answers that nobody can read any more
        self._engine = engine
        self._wake = threading.Condition()
        self._new: list[Job] = []
        self._cancelled: list[str] = []
        self._accepting = True
        self._ending = False
        self._jobs: dict[str, Job] = {}  # the thread's own
        self._counters = Counters()
        self._engine_stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, job: Job, max_waiting: int) -> None:
        with self._wake:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            if not self._accepting:
                raise Closed("The service is ending and takes no more requests.")
            waiting = len(self._new) + self._engine_stats.waiting
            if waiting >= max_waiting:
                self._counters.refused += 1
                raise Overloaded(waiting, self._counters.seconds_until_free(waiting))
            self._counters.submitted += 1
            self._new.append(job)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def stats(self) -> ServiceStats:
        with self._wake:
            return self._counters.snapshot(len(self._new), self._engine_stats)

    def close(self, drain: bool, timeout: float | None) -> None:
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
        try:
            while self._round():
                pass
        except BaseException as error:
            logging.exception("the engine has failed; every request ends with this error")
            with self._wake:
                self.failure = error
                unseen, self._new = self._new, []
            for job in [*self._jobs.values(), *unseen]:
                job.fail(EngineFailed(error))
                self._count(job, "failed")
        # What the engine holds (weights, cache) is let go, whoever still holds an answer.
        self._jobs.clear()
        del self._engine

    def _round(self) -> bool:
        """Takes what has come in, then one round of the engine; False when it is time to end."""
        with self._wake:
            while not (self._new or self._cancelled or self._engine.busy or not self._accepting):
                self._wake.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            ending, draining = self._ending, not self._accepting
            # Until the engine has been asked again, they count as waiting there.
            waiting = self._engine_stats.waiting + len(new)
            self._engine_stats = dataclasses.replace(self._engine_stats, waiting=waiting)
        # All at once, so that a failure with the first reaches the others too.
        self._jobs.update((job.request.id, job) for job in new)
        for job in new:
            self._start(job)
        while self.abandoned:
            cancelled.append(self.abandoned.pop())
        for request_id in list(self._jobs) if ending else cancelled:
            self._stop(request_id)
        if ending or (draining and not self._engine.busy):
            self._refresh()
            return False
        started = time.monotonic()
        outputs = self._engine.step() if self._engine.busy else []
        for output in outputs:
            self._deliver(output)
        if self._jobs and not self._engine.busy:
            raise RuntimeError(f"the engine has dropped {len(self._jobs)} requests unfinished")
        self._refresh()
        if not outputs and time.monotonic() - started < _IDLE_ROUND_S:
            with self._wake:
                if self._engine.busy and self._accepting and not (self._new or self._cancelled):
                    self._wake.wait(_IDLE_ROUND_S)
        return True

    def _start(self, job: Job) -> None:
        """Gives a request to the engine, unless it was cancelled on the way there."""
        if job.abandoned or job.ended:
            job.cancel()
            self._forget(job, "cancelled")
            return
        try:
            self._engine.add(job.request)
        except UserError as error:
            job.fail(error)
            self._forget(job, "refused")

    def _stop(self, request_id: str) -> None:
        """Frees a request in the engine; one that has ended meanwhile is none of its own."""
        if (job := self._jobs.get(request_id)) is not None:
            job.cancel()
            self._forget(job, "cancelled")
            self._engine.cancel(request_id)

    def _deliver(self, output: Output) -> None:
        """Passes new tokens on; what a stop string ends is freed in the engine."""
        job = self._jobs.get(output.request_id)
        if job is None:
            return
        finish = job.take(output)
        if finish is not None:
            self._forget(job, finish)
            if output.finish is None:
                self._engine.cancel(output.request_id)
        elif output.finish is not None:  # cancelled by a reader, whose word is on its way
            self._forget(job, "cancelled")

    def _forget(self, job: Job, finish: str) -> None:
        del self._jobs[job.request.id]
        self._count(job, finish)

    def _count(self, job: Job, finish: str) -> None:
        with self._wake:
            self._counters.finished(job, finish)

    def _refresh(self) -> None:
        stats = self._engine.stats()
        with self._wake:
            self._engine_stats = stats
