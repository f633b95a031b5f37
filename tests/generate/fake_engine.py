"""Deterministic stand-in for `qwen_jax.engine.engine.Engine` that needs no model.

By default the answer of a request depends only on its prompt (`default_answer`), with one token per
step and `rows` requests running. It ends with "stop" at a stop id and with "length" after
`max_tokens`. `hold()` suspends all requests until `release()`; `fail(error)` makes the next step
raise.
"""

import dataclasses
import threading

import numpy as np

from qwen_jax.engine.request import Output, Request
from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EngineStats:
    waiting: int = 0
    running: int = 0
    pages_total: int = 64
    pages_free: int = 64
    cached_pages: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0


def default_answer(request: Request, vocab: int = 256):
    """Yields endless ids below `vocab` that depend only on the prompt of `request`."""
    rng = np.random.default_rng(list(request.prompt))
    while True:
        yield int(rng.integers(vocab))


def logprob_of(token: int) -> float:
    """Returns the reported log-probability of a token; alternative k has k less."""
    return -(token % 7) / 8 - 0.125


class FakeEngine:
    """Engine that answers each request with the ids of `script(request)`.

    Args:
      script: returns the ids of an answer, which ends with "stop" after the last id.
      rows: maximum number of running requests.
      per_step: tokens per step of a request that does not stream.
      max_length: maximum number of tokens of prompt and answer together.
    """

    def __init__(self, script=default_answer, *, rows=8, per_step=4, max_length=256):
        self.max_length = max_length
        self.added: list[Request] = []  # all requests so far
        self.cancelled: list[str] = []
        self.threads: set[int] = set()  # threads that called a method
        self._script, self._rows, self._per_step = script, rows, per_step
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, tuple[Request, object, list[int]]] = {}
        self._held = False
        self._error: BaseException | None = None
        self._counts = {"prompt_tokens": 0, "new_tokens": 0}

    # Control by tests, from any thread.

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False

    def fail(self, error: BaseException) -> None:
        self._error = error

    # The interface of an engine.

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        if max(request.prompt) >= 1_000_000:
            raise UserError(f"Id {max(request.prompt)} is not in the vocabulary.")
        assert request.id not in self._waiting | self._running.keys()
        self.added.append(request)
        self._waiting[request.id] = request

    def cancel(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(request_id)
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        if self._error is not None:
            raise self._error
        if self._held:
            return []
        while self._waiting and len(self._running) < self._rows:
            request = self._waiting.pop(next(iter(self._waiting)))
            self._running[request.id] = (request, iter(self._script(request)), [])
            self._counts["prompt_tokens"] += len(request.prompt)
        return [self._advance(*row) for row in list(self._running.values())]

    def stats(self) -> EngineStats:
        return EngineStats(len(self._waiting), len(self._running), **self._counts)

    def _advance(self, request: Request, ids, given: list[int]) -> Output:
        tokens, finish, params = [], None, request.params
        first = not given
        while finish is None and len(tokens) < (1 if request.stream else self._per_step):
            token = next(ids, None)
            if token is None or token in params.stop_ids:
                finish = "stop"
                break
            tokens.append(token)
            given.append(token)
            if len(given) >= params.max_tokens:
                finish = "length"
            if len(request.prompt) + len(given) >= self.max_length:
                finish = "length"
        if finish is not None:
            del self._running[request.id]
        self._counts["new_tokens"] += len(tokens)
        array = np.array(tokens, np.int32)
        extra = {}
        if params.logprobs is not None:
            own = np.array([logprob_of(t) for t in tokens], np.float32)
            ranks = np.arange(params.logprobs)
            extra = {
                "logprobs": own,
                "raw_logprobs": own - 1,
                "top_ids": (array[:, None] + ranks).astype(np.int32),
                "top_logprobs": (own[:, None] - ranks).astype(np.float32),
            }
        cached = min(2, len(request.prompt)) if first else 0
        return Output(request.id, array, finish, cached_tokens=cached, **extra)
