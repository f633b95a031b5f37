"""Endpoint `POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.chat.reply import ReasoningPart, ReplyPart, TextPart, ToolCall
from qwen_jax.generate.service import TextChunk
from qwen_jax.server.app_state import AppState, completion_endpoint, new_id
from qwen_jax.server.completion_job import PromptRequest
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.server.limits import read_body
from qwen_jax.server.logprobs import chat_logprobs
from qwen_jax.server.prompts import ChatPrompt, chat_prompt
from qwen_jax.server.sampling_fields import sampling_params, stop_strings
from qwen_jax.server.schema import ChatRequest
from qwen_jax.server.validation import parse_request


@completion_endpoint
async def chat_completions(
    request: Request, state: AppState, leave: Callable[[], None]
) -> Response:
    """Answers a conversation, whole or as a stream.

    Args:
      request: the HTTP request, whose body is a `ChatRequest`.
      state: the app's state.
      leave: marks the request as finished in the admission gate.
    """
    body = await read_body(request, state.limits.max_body_bytes)
    chat_request = await state.run_in_thread(parse_request, ChatRequest, body)
    state.check_model(chat_request.model)
    prompt, prompt_request = await state.run_in_thread(_prompt_request, chat_request, state.model)
    return await state.respond(
        request,
        [prompt_request],
        ChatWriter(chat_request, prompt, state.model),
        leave,
        stream=bool(chat_request.stream),
        include_usage=chat_request.include_usage,
    )


def _prompt_request(request: ChatRequest, model: ServedModel) -> tuple[ChatPrompt, PromptRequest]:
    """Renders the conversation of a request and encodes it with its sampling parameters.

    Raises:
      ApiError: 400 if the request is invalid or too long for the model.
    """
    if request.top_logprobs and not request.logprobs:
        message = "top_logprobs is given without logprobs; set logprobs to true."
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    prompt = chat_prompt(request, model)
    ids = prompt.encode(model.tokenizer)
    params = sampling_params(
        request,
        model,
        len(ids),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        default_max_tokens=model.default_params.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    stop = stop_strings(request, model, prompt.stop)
    return prompt, PromptRequest(ids, params, stop, request.n or 1, bool(request.stream))


class ChatWriter:
    """Formatter of chat completions (a `ResponseWriter`)."""

    def __init__(self, request: ChatRequest, prompt: ChatPrompt, model: ServedModel):
        """Prepares the choices of `request`, whose replies continue `prompt`."""
        self._request = request
        self._choices = [_ChatChoice(i, request, prompt, model) for i in range(request.n or 1)]
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}

    def first_events(self) -> list[dict[str, Any]]:
        """Returns one event per choice, with the role of the message."""
        delta = {"role": "assistant", "content": ""}
        return [self._event([choice.event(delta)]) for choice in self._choices]

    def push(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """Appends a chunk to choice `index` and returns the events for it."""
        return [self._event([choice]) for choice in self._choices[index].push(chunk)]

    def usage_event(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the event without choices that reports the token counts `usage`."""
        return {**self._event([]), "usage": usage}

    def response(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the object `chat.completion` with all choices and the token counts."""
        choices = [choice.response() for choice in self._choices]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns an object `chat.completion.chunk` with the given choices."""
        value = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return {**value, "usage": None} if self._request.include_usage else value


class _ChatChoice:
    """Formatter of one choice of a chat completion; parses tool calls and reasoning."""

    def __init__(self, index: int, request: ChatRequest, prompt: ChatPrompt, model: ServedModel):
        self._index, self._tokenizer = index, model.tokenizer
        self._include_logprobs = bool(request.logprobs)
        self._logprobs_of = request.logprobs_of or "raw"
        self._parser = prompt.parser()
        self._parts: list[ReplyPart] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._num_sent_logprobs = 0
        self._finish_reason: str | None = None

    def event(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Returns this choice as it appears in a stream event.

        Log-probabilities that no earlier event contained are included.
        """
        unsent = self._logprobs[self._num_sent_logprobs :]
        self._num_sent_logprobs = len(self._logprobs)
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": {"content": unsent, "refusal": None} if unsent else None,
            "finish_reason": finish_reason,
        }

    def push(self, chunk: TextChunk) -> list[dict[str, Any]]:
        """Parses a chunk and returns this choice as it appears in each stream event for the chunk.

        There may be no event, because the parser withholds text that may belong to a tool call.
        """
        self._logprobs += chat_logprobs(chunk, self._tokenizer, self._logprobs_of)
        parts = self._parser.push(chunk.text)
        if chunk.finish is not None:
            parts += self._parser.finish()
        events = [self.event(self._delta(part)) for part in parts]
        if chunk.finish is not None:
            has_calls = bool(self._tool_calls) and chunk.finish == "stop"
            self._finish_reason = "tool_calls" if has_calls else chunk.finish
            events.append(self.event({}, self._finish_reason))
        return events

    def _delta(self, part: ReplyPart) -> dict[str, Any]:
        """Records a part of the reply and returns the `delta` object that reports it."""
        self._parts.append(part)
        match part:
            case TextPart(text):
                return {"content": text}
            case ReasoningPart(text):
                return {"reasoning_content": text}
            case ToolCall(name, arguments):
                call = {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                self._tool_calls.append(call)
                return {"tool_calls": [{"index": len(self._tool_calls) - 1, **call}]}

    def response(self) -> dict[str, Any]:
        """Returns this choice with its complete message, for a response that is not streamed."""
        content = "".join(part.text for part in self._parts if isinstance(part, TextPart))
        reasoning = "".join(part.text for part in self._parts if isinstance(part, ReasoningPart))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self._tool_calls:
            message |= {"content": content or None, "tool_calls": self._tool_calls}
        logprobs = {"content": self._logprobs, "refusal": None} if self._include_logprobs else None
        return {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
        }
