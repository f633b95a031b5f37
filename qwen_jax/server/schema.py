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
    """Object `stream_options`: what a stream contains besides the answer.

    Attributes:
      include_usage: whether the stream ends with an event that reports token counts.
      include_obfuscation: accepted for compatibility; has no effect.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class FunctionDefinition(StrictModel):
    """Object `tools[].function`: a function that the model may call.

    Attributes:
      name: name of the function.
      description: what the function does.
      parameters: JSON schema of its arguments.
      strict: only passed to the chat template.
    """

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
    """Object `messages[].tool_calls[]`: an earlier call, as the API returned it.

    Attributes:
      id: id of the call, which the message with its result refers to.
      type: always "function".
      function: name and arguments of the call.
      index: position among the message's calls.
    """

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class TextContentPart(StrictModel):
    """Object `messages[].content[]`: a part of a message's content, always of type "text"."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """Object `messages[]`: one message of a conversation.

    Attributes:
      role: author of the message; "developer" is the same as "system".
      content: text, as a string or in parts; None only in assistant messages with tool calls.
      name: accepted for compatibility; has no effect.
      tool_calls: calls made by the assistant.
      tool_call_id: in tool messages, the id of the call that the message is the result of.
      reasoning_content: reasoning of the assistant before `content`.
      refusal: only null is accepted.
      audio: only null is accepted.
      function_call: only null is accepted.
      annotations: accepted for compatibility; has no effect.
    """

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
    """Object `chat_template_kwargs`: options of the model's chat template.

    Attributes:
      enable_thinking: False disables the reasoning of models with `<think>` blocks.
    """

    enable_thinking: bool | None = None


class CompletionFields(StrictModel):
    """Request fields common to chat and text completions; None means the model's default.

    Attributes:
      model: id of the model.
      max_tokens: maximum number of generated tokens.
      temperature: as in `SamplingParams`.
      top_p: as in `SamplingParams`.
      top_k: as in `SamplingParams`; -1 and 0 disable the limit.
      min_p: as in `SamplingParams`.
      repetition_penalty: as in `SamplingParams`.
      presence_penalty: as in `SamplingParams`.
      frequency_penalty: as in `SamplingParams`.
      n: number of answers per prompt.
      seed: random seed of the first answer; the i-th further one uses `seed` + i.
      stop: strings that end an answer and are not part of it.
      stop_token_ids: token ids that end an answer, in addition to the model's.
      ignore_eos: whether to continue past the model's own stop ids and strings.
      stream: whether to return server-sent events.
      stream_options: what a stream contains besides the answer.
      logprobs_of: distribution that log-probabilities refer to: "raw" (the default), the model's
        own, or "sampled", the one that tokens are sampled from.
    """

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
    """Body of `POST /v1/chat/completions`; adds these fields to those of `CompletionFields`.

    Attributes:
      messages: the conversation.
      max_completion_tokens: the same as `max_tokens`, over which it takes precedence.
      logprobs: whether to return the log-probability of each generated token.
      top_logprobs: number of most probable alternatives per token to return as well.
      tools: functions that the model may call.
      tool_choice: "auto" (the default), "none" to hide the tools, "required" to force a call, or
        the one tool to call.
      parallel_tool_calls: False ends the reply after the first call.
      chat_template_kwargs: options of the model's chat template.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=128)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(CompletionFields):
    """Body of `POST /v1/completions`; adds these fields to those of `CompletionFields`.

    Attributes:
      prompt: one or several prompts, each as text or as token ids.
      echo: whether to return each prompt before its completion.
      logprobs: number of most probable alternatives per token to return log-probabilities of; also
        returns those of the generated tokens.
      allow_special_tokens: whether control tokens spelled out in text are encoded as such.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    allow_special_tokens: bool | None = None
