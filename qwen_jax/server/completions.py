"""Endpoint `POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.generate.service import TextChunk
from qwen_jax.server.app_state import AppState, completion_endpoint, new_id
from qwen_jax.server.completion_job import PromptRequest
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.server.limits import read_body
from qwen_jax.server.logprobs import CompletionLogprobs
from qwen_jax.server.sampling_fields import sampling_params, stop_strings
from qwen_jax.server.schema import CompletionRequest
from qwen_jax.server.validation import parse_request

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""

MAX_PROMPTS = 64
"""Maximum number of prompts per request."""


@completion_endpoint
async def completions(request: Request, state: AppState, leave: Callable[[], None]) -> Response:
    """Continues one or several prompts, whole or as a stream.

    Args:
      request: the HTTP request, whose body is a `CompletionRequest`.
      state: the app's state.
      leave: marks the request as finished in the admission gate.
    """
    body = await read_body(request, state.limits.max_body_bytes)
    completion_request = await state.run_in_thread(parse_request, CompletionRequest, body)
    state.check_model(completion_request.model)
    prompt_requests = await state.run_in_thread(_prompt_requests, completion_request, state.model)
    return await state.respond(
        request,
        prompt_requests,
        CompletionWriter(completion_request, prompt_requests, state.model),
        leave,
        stream=bool(completion_request.stream),
        include_usage=completion_request.include_usage,
    )


def _prompt_requests(request: CompletionRequest, model: ServedModel) -> list[PromptRequest]:
    """Encodes the prompts of a request and combines each with its sampling parameters.

    Raises:
      ApiError: 400 if the request is invalid or too long for the model.
    """
    if request.echo and request.logprobs is not None:
        message = "echo is given with logprobs; log-probabilities of the prompt are not supported."
        raise ApiError(400, message, param="echo", code="unsupported_parameter")
    prompt_requests = []
    for prompt in _encode_prompts(request, model):
        params = sampling_params(
            request,
            model,
            len(prompt),
            max_tokens=request.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=request.logprobs,
        )
        stop = stop_strings(request, model)
        prompt_requests.append(
            PromptRequest(prompt, params, stop, request.n or 1, bool(request.stream))
        )
    return prompt_requests


def _encode_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Returns the token ids of each prompt; an empty prompt becomes <|endoftext|>.

    Raises:
      ApiError: 400 if the number of prompts or a token id is out of range.
    """
    given: Any = request.prompt  # one or several prompts, each of them text or token ids
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= MAX_PROMPTS:
        message = f"prompt has {len(given)} prompts; give 1 to {MAX_PROMPTS}."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    tokenizer = model.tokenizer
    prompts = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            allowed = "all" if request.allow_special_tokens else ()
            ids = tokenizer.encode(prompt, allowed_special=allowed)
        else:
            ids = list(prompt)
        invalid = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if invalid:
            message = (
                f"prompt {i} has the token id {invalid[0]}; valid ids are 0 to "
                f"{tokenizer.vocab_size - 1}."
            )
            raise ApiError(400, message, param="prompt", code="invalid_value")
        prompts.append(ids or [tokenizer.eod_id])
    return prompts


class CompletionWriter:
    """Formatter of text completions (a `ResponseWriter`)."""

    def __init__(
        self,
        request: CompletionRequest,
        prompt_requests: Sequence[PromptRequest],
        model: ServedModel,
    ):
        """Prepares the choices of `request`: `n` consecutive ones for each prompt, in order."""
        self._request = request
        prompts = [p.prompt for p in prompt_requests for _ in range(p.n)]
        self._choices = [_CompletionChoice(i, ids, request, model) for i, ids in enumerate(prompts)]
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def first_events(self) -> list[dict[str, Any]]:
        """Returns one event per choice with its prompt if `echo` is set, else none."""
        return [self._event([c.event(c.echo)]) for c in self._choices if c.echo]

    def push(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """Appends a chunk to choice `index` and returns the event for it."""
        return [self._event([self._choices[index].push(chunk)])]

    def usage_event(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the event without choices that reports the token counts `usage`."""
        return {**self._event([]), "usage": usage}

    def response(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the object `text_completion` with all choices and the token counts."""
        choices = [choice.response() for choice in self._choices]
        return {**self._head, "choices": choices, "usage": usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns an object `text_completion` with the given choices, for a stream event."""
        value = {**self._head, "choices": choices}
        return {**value, "usage": None} if self._request.include_usage else value


class _CompletionChoice:
    """Formatter of one choice of a text completion.

    Attributes:
      echo: text of the prompt if the request sets `echo`, else "".
    """

    def __init__(
        self, index: int, prompt: Sequence[int], request: CompletionRequest, model: ServedModel
    ):
        self._index = index
        self.echo = model.tokenizer.decode(prompt) if request.echo else ""
        self._formatter = CompletionLogprobs(model.tokenizer, request.logprobs_of or "raw")
        self._texts: list[str] = []
        self._logprobs: list[dict[str, list[Any]]] = []  # one per chunk that has them
        self._finish_reason: str | None = None

    def event(
        self,
        text: str,
        logprobs: dict[str, list[Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """Returns the choice object with the given text, log-probabilities and finish reason."""
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def push(self, chunk: TextChunk) -> dict[str, Any]:
        """Appends a chunk and returns this choice as it appears in the stream event for it."""
        logprobs = self._formatter.push(chunk)
        self._texts.append(chunk.text)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._finish_reason = chunk.finish
        return self.event(chunk.text, logprobs, chunk.finish)

    def response(self) -> dict[str, Any]:
        """Returns this choice with its complete text, for a response that is not streamed."""
        joined = None
        if self._logprobs:
            joined = {
                name: [value for part in self._logprobs for value in part[name]]
                for name in self._logprobs[0]
            }
        return self.event(self.echo + "".join(self._texts), joined, self._finish_reason)
