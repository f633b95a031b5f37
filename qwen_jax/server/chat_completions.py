"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.chat.reply import ReasoningPart, ReplyPart, TextPart, ToolCall
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
from qwen_jax.server.prompts import ChatPrompt, chat_prompt


@endpoint
async def chat(request: Request, front: Front, leave: Callable[[], None]) -> Response:
    """Answers a conversation."""
    body = await read_body(request, front.limits.max_body_bytes)
    asked = await front.in_thread(schema.parse, schema.ChatRequest, body)
    front.check_model(asked.model)
    prompt, ask = await front.in_thread(_ask, asked, front.model)
    writer = ChatWriter(asked, prompt, front.model)
    return await front.answer(
        request, [ask], writer, leave,
        stream=bool(asked.stream), include_usage=asked.include_usage,
    )  # fmt: skip


def _ask(asked: schema.ChatRequest, model: ServedModel) -> tuple[ChatPrompt, Ask]:
    if asked.top_logprobs and not asked.logprobs:
        message = "top_logprobs is given without logprobs; set logprobs to true."
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")
    prompt = chat_prompt(asked, model)
    ids = prompt.ids(model.tokenizer)
    params = sampling_params(
        asked,
        model,
        len(ids),
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        default_max_tokens=model.defaults.max_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )
    stop = stop_strings(asked, model, prompt.stop)
    return prompt, Ask(ids, params, stop, asked.n or 1, bool(asked.stream))


class ChatWriter:
    """Writes chat completions; see `front.Writer`."""

    def __init__(self, asked: schema.ChatRequest, prompt: ChatPrompt, model: ServedModel):
        self._asked, self._model = asked, model
        of = asked.logprobs_of or "raw"
        self._choices = [_Choice(i, prompt, model, of) for i in range(asked.n or 1)]
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}

    def begin(self) -> list[dict[str, Any]]:
        """Says of each choice that the assistant speaks."""
        first = {"role": "assistant", "content": ""}
        return [self._event([choice.event(first)]) for choice in self._choices]

    def push(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The events of a chunk."""
        return [self._event([told]) for told in self._choices[number].push(chunk)]

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that tells the usage."""
        return {**self._event([]), "usage": usage}

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The response that is no stream."""
        choices = [choice.whole(bool(self._asked.logprobs)) for choice in self._choices]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        value = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return {**value, "usage": None} if self._asked.include_usage else value


class _Choice:
    """One answer: what has been read of it, and what is not told yet."""

    def __init__(self, number: int, prompt: ChatPrompt, model: ServedModel, logprobs_of: str):
        self._number, self._model, self._logprobs_of = number, model, logprobs_of
        self._reader = prompt.reader()
        self._parts: list[ReplyPart] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._told = 0
        self._finish: str | None = None

    def event(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """This choice in an event, with the log-probabilities that were not told yet."""
        untold = self._logprobs[self._told :]
        self._told = len(self._logprobs)
        logprobs = {"content": untold, "refusal": None} if untold else None
        index = {"index": self._number, "delta": delta}
        return {**index, "logprobs": logprobs, "finish_reason": finish}

    def push(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Reads a chunk; returns this choice in the events that tell of it."""
        self._logprobs += chat_logprobs(chunk, self._model, self._logprobs_of)
        parts = self._reader.push(chunk.text)
        if chunk.finish is not None:
            parts += self._reader.finish()
        events = [self.event(self._delta(part)) for part in parts]
        if chunk.finish is not None:
            self._finish = "tool_calls" if self._calls and chunk.finish == "stop" else chunk.finish
            events.append(self.event({}, self._finish))
        return events

    def _delta(self, part: ReplyPart) -> dict[str, Any]:
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
                self._calls.append(call)
                return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}

    def whole(self, logprobs: bool) -> dict[str, Any]:
        """This choice in a response that is no stream."""
        content = "".join(part.text for part in self._parts if isinstance(part, TextPart))
        thoughts = "".join(part.text for part in self._parts if isinstance(part, ReasoningPart))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if self._calls:
            message |= {"content": content or None, "tool_calls": self._calls}
        return {
            "index": self._number,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if logprobs else None,
            "finish_reason": self._finish,
        }


def chat_logprobs(chunk: Chunk, model: ServedModel, of: str) -> list[dict[str, Any]]:
    """A chunk's tokens with their log-probabilities as chats give them; [] unless asked for."""
    if chunk.top_ids is None:
        return []

    def told(token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(model, token)
        return {"token": text, "logprob": finite(logprob), "bytes": data}

    rows = zip(chunk.tokens, chosen(chunk, of), chunk.top_ids, chunk.top_logprobs, strict=True)
    return [
        {
            **told(int(token), logprob),
            "top_logprobs": [told(int(i), p) for i, p in zip(ids, logprobs, strict=True)],
        }
        for token, logprob, ids, logprobs in rows
    ]
