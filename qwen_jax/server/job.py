"""One HTTP request's answers: from submission to the end, whoever gives up first."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.engine.request import MAX_STOP_IDS, SamplingParams
from qwen_jax.generate.service import Answer, Chunk, Service
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import SERVER, ApiError
from qwen_jax.server.schema import ChatRequest, CompletionRequest

_DONE = object()


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt, how it is continued, and how often.

    Attributes:
      prompt: token ids. params, stop: as `Service.submit` wants them. n: answers wanted.
      stream: text is given out as it comes.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False


def sampling_params(
    request: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompt_tokens: int,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """How to continue: the request's fields over the model's defaults.

    Raises:
      ApiError: prompt and answer are together longer than the model takes, or too many stop ids.
    """
    room = model.max_length - prompt_tokens
    if room < 1 or (max_tokens or 0) > room:
        asked = f" and up to {max_tokens:,} new ones" if max_tokens else ""
        message = (
            f"The request has {prompt_tokens:,} tokens of prompt{asked}, but this model takes "
            f"{model.max_length:,} together; shorten the prompt or the answer."
        )
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    given = {
        name: getattr(request, name)
        for name in (
            *("temperature", "top_p", "top_k", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
        )
        if getattr(request, name) is not None
    }
    given["top_k"] = max(0, given.get("top_k", model.defaults.top_k))
    if "seed" in given:
        given["seed"] %= 2**63
    own = () if request.ignore_eos else model.defaults.stop_ids
    stops = tuple(dict.fromkeys([*(request.stop_token_ids or ()), *own]))
    if len(stops) > MAX_STOP_IDS:
        message = (
            f"stop_token_ids has {len(stops) - len(own)} ids beside the {len(own)} of the model; "
            f"give at most {MAX_STOP_IDS - len(own)}."
        )
        raise ApiError(400, message, param="stop_token_ids", code="invalid_value")
    return dataclasses.replace(
        model.defaults,
        **given,
        max_tokens=max_tokens or min(default_max_tokens, room),
        stop_ids=stops,
        logprobs=logprobs,
        logprobs_of=request.logprobs_of or "raw",
    )


def stop_strings(
    request: ChatRequest | CompletionRequest, model: ServedModel, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Strings that end the answer: the request's, the model's own, and `more`."""
    own = () if request.ignore_eos else model.stop
    return tuple(dict.fromkeys([*(request.stop or ()), *own, *more]))


class Job:
    """Running answers. Use as `async with`: what has not ended at its end is cancelled.

    Attributes:
      answers: of the service, `n` for each `Ask` in their order.
      prompt_tokens: of all prompts. new_tokens: in the chunks so far.
    """

    def __init__(self, service: Service, asks: Sequence[Ask]):
        """Submits everything, or nothing.

        Raises:
          UserError, Overloaded, Closed, EngineFailed: as `Service.submit`.
        """
        self.answers: list[Answer] = []
        self.new_tokens = 0
        self._first: list[int] = []
        self.prompt_tokens = sum(len(ask.prompt) for ask in asks)
        try:
            for ask in asks:
                self._first.append(len(self.answers))
                for i in range(ask.n):
                    params = ask.params
                    if params.seed is not None and i:
                        # Equal seeds would give equal answers.
                        params = dataclasses.replace(params, seed=(params.seed + i) % 2**63)
                    answer = service.submit(ask.prompt, params, stop=ask.stop, stream=ask.stream)
                    self.answers.append(answer)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends every answer that has not ended."""
        for answer in self.answers:
            answer.cancel()

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, *exc_info) -> None:
        self.cancel()

    async def chunks(
        self, timeout_s: float, keep_alive_s: float = math.inf
    ) -> AsyncIterator[tuple[int, Chunk] | None]:
        """Yields (number of the answer, chunk) as they come; None where nothing came for so long.

        Raises:
          EngineFailed, UserError: as an `Answer`.
          ApiError: an answer was cut by the server, or all of it took longer than `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        async def pump(number: int, answer: Answer) -> None:
            try:
                async for chunk in answer:
                    queue.put_nowait((number, chunk))
                queue.put_nowait((number, _DONE))
            except Exception as error:
                queue.put_nowait((number, error))

        pumps = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(self.answers)]
        try:
            running = len(pumps)
            while running:
                left = end - time.monotonic()
                try:
                    # Not `wait_for`: before Python 3.12 it can swallow a cancellation.
                    async with asyncio.timeout(max(0.0, min(left, keep_alive_s))):
                        number, item = await queue.get()
                except TimeoutError:
                    if left <= keep_alive_s:
                        raise timed_out(timeout_s) from None
                    yield None
                    continue
                if item is _DONE:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    self.new_tokens += len(item.tokens)
                    if item.finish == "cancelled":
                        raise cut()
                    yield number, item
        finally:
            for task in pumps:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*pumps, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`: a prompt counts once for all of its answers."""
        # Of several answers to a prompt, the first tells what was there before this request.
        cached = sum(self.answers[i].cached_tokens for i in self._first)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def cut() -> ApiError:
    """An answer was ended by the server, at the end of its drain."""
    return ApiError(
        503, "This server is shutting down and has cut the answer; ask another one.",
        type=SERVER, code="draining",
    )  # fmt: skip


def timed_out(seconds: float) -> ApiError:
    """An answer took longer than the server allows."""
    message = (
        f"The answer took longer than {seconds:g} s, which is this server's limit; ask for less."
    )
    return ApiError(504, message, type=SERVER, code="timeout")


def token_text(model: ServedModel, token: int) -> tuple[str, list[int]]:
    """A token as OpenAI's logprobs name it, and its bytes; half characters become U+FFFD."""
    data = model.tokenizer.token_bytes(token)
    return data.decode("utf-8", "replace"), list(data)


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it: what was ruled out is -9999, as OpenAI has it."""
    return max(float(logprob), -9999.0) if not np.isnan(logprob) else -9999.0


def chosen(chunk: Chunk, logprobs_of: str) -> np.ndarray:
    """Log-probabilities of the chunk's tokens, float32 [n], under the distribution asked for."""
    return chunk.logprobs if logprobs_of == "sampled" else chunk.raw_logprobs
