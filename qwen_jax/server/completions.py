"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.generate.service import Chunk
from qwen_jax.server import schema
from qwen_jax.server.app_state import Front, endpoint, new_id
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.server.job import (
    Ask,
    chosen,
    finite,
    sampling_params,
    stop_strings,
    token_text,
)
from qwen_jax.server.limits import read_body
from qwen_jax.tokenizer.tokenizer import IncrementalDecoder

DEFAULT_MAX_TOKENS = 16
"""Of OpenAI's completions."""

MAX_PROMPTS = 64


@endpoint
async def completions(request: Request, front: Front, leave: Callable[[], None]) -> Response:
    """Continues one prompt or several."""
    body = await read_body(request, front.limits.max_body_bytes)
    asked = await front.in_thread(schema.parse, schema.CompletionRequest, body)
    front.check_model(asked.model)
    asks = await front.in_thread(_asks, asked, front.model)
    writer = CompletionWriter(asked, asks, front.model)
    return await front.answer(
        request, asks, writer, leave,
        stream=bool(asked.stream), include_usage=asked.include_usage,
    )  # fmt: skip


def _asks(asked: schema.CompletionRequest, model: ServedModel) -> list[Ask]:
    if asked.echo and asked.logprobs is not None:
        message = "echo is given with logprobs; the prompt's own log-probabilities are not served."
        raise ApiError(400, message, param="echo", code="unsupported_parameter")
    asks = []
    for prompt in _prompts(asked, model):
        params = sampling_params(
            asked,
            model,
            len(prompt),
            max_tokens=asked.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=asked.logprobs,
        )
        stop = stop_strings(asked, model)
        asks.append(Ask(prompt, params, stop, asked.n or 1, bool(asked.stream)))
    return asks


def _prompts(asked: schema.CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Token ids of each prompt; an empty one is the beginning of a document."""
    given = asked.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= MAX_PROMPTS:
        message = f"prompt has {len(given)} prompts; give 1 to {MAX_PROMPTS}."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    allowed = "all" if asked.allow_special_tokens else ()
    prompts = []
    for i, prompt in enumerate(given):
        ids = prompt
        if isinstance(prompt, str):
            ids = model.tokenizer.encode(prompt, allowed_special=allowed)
        outside = [token for token in ids if not 0 <= token < model.tokenizer.vocab_size]
        if outside:
            message = (
                f"prompt {i} has the token {outside[0]}; the vocabulary has the ids 0 to "
                f"{model.tokenizer.vocab_size - 1}."
            )
            raise ApiError(400, message, param="prompt", code="invalid_value")
        prompts.append(list(ids) or [model.tokenizer.eod_id])
    return prompts


class CompletionWriter:
    """Writes completions; see `front.Writer`."""

    def __init__(self, asked: schema.CompletionRequest, asks: Sequence[Ask], model: ServedModel):
        self._asked = asked
        prompts = [ask.prompt for ask in asks for _ in range(ask.n)]
        self._choices = [_Choice(i, ids, asked, model) for i, ids in enumerate(prompts)]
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    def begin(self) -> list[dict[str, Any]]:
        """The prompts, where they are to be echoed."""
        return [self._event([c.event(c.echo)]) for c in self._choices if c.echo]

    def push(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The event of a chunk."""
        return [self._event([self._choices[number].push(chunk)])]

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that tells the usage."""
        return {**self._event([]), "usage": usage}

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The response that is no stream."""
        choices = [choice.whole() for choice in self._choices]
        return {**self._head, "choices": choices, "usage": usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        value = {**self._head, "choices": choices}
        return {**value, "usage": None} if self._asked.include_usage else value


class _Choice:
    """One continuation."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        asked: schema.CompletionRequest,
        model: ServedModel,
    ):
        self._number, self._model = number, model
        self._of = asked.logprobs_of or "raw"
        self.echo = model.tokenizer.decode(prompt) if asked.echo else ""
        self._texts, self._logprobs = [], []
        self._offsets = IncrementalDecoder(model.tokenizer, skip_special_tokens=True)
        self._offset = 0
        self._finish: str | None = None

    def event(
        self, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """This choice in an event."""
        index = {"index": self._number, "text": text}
        return {**index, "logprobs": logprobs, "finish_reason": finish}

    def push(self, chunk: Chunk) -> dict[str, Any]:
        """Takes a chunk; returns this choice in the event that tells of it."""
        logprobs = self._tell(chunk) if chunk.top_ids is not None else None
        self._texts.append(chunk.text)
        self._logprobs.append(logprobs)
        self._finish = chunk.finish
        return self.event(chunk.text, logprobs, chunk.finish)

    def whole(self) -> dict[str, Any]:
        """This choice in a response that is no stream."""
        told = [logprobs for logprobs in self._logprobs if logprobs is not None]
        joined = (
            {name: [x for part in told for x in part[name]] for name in told[0]} if told else None
        )
        return self.event(self.echo + "".join(self._texts), joined, self._finish)

    def _tell(self, chunk: Chunk) -> dict[str, Any]:
        """The log-probabilities of a chunk: parallel lists over its tokens."""
        offsets = []
        for token in chunk.tokens:
            offsets.append(self._offset)
            self._offset += len(self._offsets.push(int(token)))
        tops = zip(chunk.top_ids, chunk.top_logprobs, strict=True)
        return {
            "tokens": [_name(self._model, int(token)) for token in chunk.tokens],
            "token_logprobs": [finite(p) for p in chosen(chunk, self._of)],
            "top_logprobs": [
                {_name(self._model, int(i)): finite(p) for i, p in zip(ids, ps, strict=True)}
                for ids, ps in tops
            ],
            "text_offset": offsets,
        }


def _name(model: ServedModel, token: int) -> str:
    """A token as a key: bytes that are no whole characters are spelt, so that keys differ."""
    text, data = token_text(model, token)
    if "\ufffd" in text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return text
