"""The answers of one HTTP request: submission to the service, merged output and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from qwen_jax.engine.request import SamplingParams
from qwen_jax.generate.service import Answer, Service, TextChunk
from qwen_jax.server.errors import SERVER_ERROR, ApiError

_END = object()


@dataclasses.dataclass(frozen=True)
class PromptRequest:
    """A prompt with sampling parameters and the number of answers to generate for it.

    Attributes:
      prompt: token ids.
      params: sampling parameters, as for `Service.submit`.
      stop: stop strings, as for `Service.submit`.
      n: number of answers.
      stream: whether text is delivered while it is generated; otherwise in one chunk at the end.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False


class CompletionJob:
    """All answers that the service generates for one HTTP request.

    Attributes:
      answers: answers of the service, `n` consecutive ones for each `PromptRequest`, in order.
      prompt_tokens: total number of tokens of all prompts.
      new_tokens: total number of generated tokens in the chunks read so far.
    """

    def __init__(self, service: Service, requests: Sequence[PromptRequest]):
        """Submits all answers to `service`; if one is rejected, none is generated.

        Raises:
          UserError, Overloaded, ServiceClosed, EngineFailed: as `Service.submit`.
        """
        self.answers: list[Answer] = []
        self.new_tokens = 0
        self._first_answers: list[int] = []  # index of the first answer to each prompt
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        try:
            for request in requests:
                self._first_answers.append(len(self.answers))
                for i in range(request.n):
                    params = request.params
                    if params.seed is not None and i:
                        # Equal seeds would give equal answers.
                        params = dataclasses.replace(params, seed=(params.seed + i) % 2**63)
                    answer = service.submit(
                        request.prompt, params, stop=request.stop, stream=request.stream
                    )
                    self.answers.append(answer)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancels all answers that have not finished."""
        for answer in self.answers:
            answer.cancel()

    async def chunks(
        self, timeout_s: float, keep_alive_s: float = math.inf
    ) -> AsyncIterator[tuple[int, TextChunk] | None]:
        """Yields (index of the answer, chunk) for all answers, in order of arrival.

        Args:
          timeout_s: time limit of the whole iteration, in seconds.
          keep_alive_s: interval in seconds; None is yielded after each interval without output.

        Raises:
          ApiError: 504 after `timeout_s`; 503 if the server cancelled an answer to shut down.
          EngineFailed, UserError: as iterating an `Answer`.
        """
        end = time.monotonic() + timeout_s
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        async def forward(index: int, answer: Answer) -> None:
            try:
                async for chunk in answer:
                    queue.put_nowait((index, chunk))
                queue.put_nowait((index, _END))
            except Exception as error:
                queue.put_nowait((index, error))

        tasks = [asyncio.create_task(forward(i, answer)) for i, answer in enumerate(self.answers)]
        try:
            running = len(tasks)
            while running:
                left = end - time.monotonic()
                try:
                    # Not `wait_for`: before Python 3.12 it can swallow a cancellation.
                    async with asyncio.timeout(max(0.0, min(left, keep_alive_s))):
                        index, item = await queue.get()
                except TimeoutError:
                    if left <= keep_alive_s:
                        raise timeout_error(timeout_s) from None
                    yield None
                    continue
                if item is _END:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    self.new_tokens += len(item.tokens)
                    if item.finish == "cancelled":
                        raise shutdown_error()
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's `usage` object; a prompt counts once for all of its answers."""
        # Of several answers to a prompt, only the first reports what earlier requests had cached.
        cached = sum(self.answers[i].cached_tokens for i in self._first_answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def shutdown_error() -> ApiError:
    """Returns the HTTP 503 error for an answer that the server cancelled to shut down."""
    return ApiError(
        503,
        "This server is shutting down and has cancelled the answer; send it to another one.",
        type=SERVER_ERROR,
        code="draining",
    )


def timeout_error(seconds: float) -> ApiError:
    """Returns the HTTP 504 error for an answer that took longer than `seconds`, the limit."""
    message = (
        f"The answer took longer than {seconds:g} s, the limit of this server; request a shorter "
        "one."
    )
    return ApiError(504, message, type=SERVER_ERROR, code="timeout")
