"""Request schema of the API, as pydantic models: OpenAI's fields and our extensions.

Fields of OpenAI's schema that are absent here are handled by `validation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field

from qwen_jax.engine.request import MAX_LOGPROBS, MAX_STOP_IDS

MAX_CHOICES = 16
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1_000

Stop = str | list[str] | None


class StrictModel(pydantic.BaseModel):
    """Base of all schema models: no type coercion ("5" is not 5, true is not 1), no other fields.

    A client's mistake is reported instead of being interpreted.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """Object `stream_options`: what a stream contains besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class FunctionDefinition(StrictModel):
    """Object `tools[].function`: a function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(StrictModel):
    """Object `tools[]`: a tool, always of type "function"."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(StrictModel):
    """Object `tool_choice.function`: the name of a function."""

    name: str


class NamedToolChoice(StrictModel):
    """Object `tool_choice`: the one tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(StrictModel):
    """Object `messages[].tool_calls[].function`: name and JSON arguments of an earlier call."""

    name: str
    arguments: str


class MessageToolCall(StrictModel):
    """Object `messages[].tool_calls[]`: an earlier call, as the API returned it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class TextContentPart(StrictModel):
    """Object `messages[].content[]`: a part of a message's content, always of type "text"."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """Object `messages[]`: one message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextContentPart] | None, Field(union_mode="left_to_right")] = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """The content as one string; "" if there is none."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TemplateOptions(StrictModel):
    """Object `chat_template_kwargs`: options of the model's chat template."""

    enable_thinking: bool | None = None


class CompletionFields(StrictModel):
    """Request fields common to chat and text completions; None means the model's default."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[Stop, Field(union_mode="left_to_right")] = None
    stop_token_ids: Annotated[list[int] | None, Field(max_length=MAX_STOP_IDS)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs_of: Literal["raw", "sampled"] | None = None

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Stop) -> list[str]:
        """Returns the stop strings as a list, or raises ValueError for too many or a bad length."""
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"has {len(stops)} strings; give at most {MAX_STOP_STRINGS}")
        if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(
                f"has a string that is empty or has over {MAX_STOP_LENGTH:,} characters"
            )
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that reports token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(CompletionFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=128)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(CompletionFields):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    allow_special_tokens: bool | None = None
