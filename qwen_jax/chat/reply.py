"""Tool definitions shown to a model, and the typed parts that its replies are parsed into.

The tool-call formats of the Qwen family (`react` for Qwen v1, `hermes` for later models) write
`ToolDefinition`s into prompts and parse generated text into `ReplyPart`s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class ToolDefinition:
    """A function that the model may call, as described to it in the prompt.

    Attributes:
      name: name that the model writes to call the function (`name_for_model` of the release).
      description: what the function does.
      parameters: its arguments: a JSON schema, or the release's list of parameter records.
      title: human-readable name (`name_for_human` of the release); "" means `name`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | list[Any] = dataclasses.field(default_factory=dict)
    title: str = ""


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A piece of the user-visible text of a reply.

    Attributes:
      text: the characters of this piece.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class ReasoningPart:
    """A piece of the reasoning that precedes an answer (the `<think>` block of Qwen3).

    Attributes:
      text: the characters of this piece, without tags.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function call requested by the model.

    Attributes:
      name: name of the function.
      arguments: arguments as the model wrote them: JSON text if the model kept to the format.
    """

    name: str
    arguments: str


ReplyPart = TextPart | ReasoningPart | ToolCall


class ReplyParser(Protocol):
    """Streaming parser of one generated reply, in any format.

    The concatenated parts do not depend on how the reply is split into pushes.
    """

    def push(self, text: str) -> list[ReplyPart]:
        """Appends `text` and returns the new parts of the reply that later text cannot change."""

    def finish(self) -> list[ReplyPart]:
        """Marks the end of the reply and returns the parts that were withheld until now."""


class PlainReplyParser:
    """Reply parser for prompts without tools or reasoning: every character is visible text."""

    def push(self, text: str) -> list[ReplyPart]:
        """Returns `text` as one `TextPart`; nothing for an empty string."""
        return [TextPart(text)] if text else []

    def finish(self) -> list[ReplyPart]:
        """Returns an empty list: nothing is ever withheld."""
        return []


def dump_json(value: Any) -> str:
    """Serialises `value` as the release writes JSON into prompts.

    Non-ASCII characters are kept unescaped, and the separators are `", "` and `": "`.
    """
    return json.dumps(value, ensure_ascii=False)


def leading_json(text: str) -> str:
    """Returns the text of the JSON value at the beginning of `text`, without parsing it.

    Leading whitespace, a Markdown code fence and anything after the value are removed, because
    models add them. Returns `text` stripped of whitespace if it does not begin with JSON.
    """
    text = text.strip()
    body = text
    if body.startswith("```"):
        body = body[3:].removeprefix("json").removeprefix("JSON").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):
        return text
    return body[:end]


def partial_mark_length(text: str, marks: tuple[str, ...]) -> int:
    """Returns the length of the longest suffix of `text` that is an incomplete mark, or 0.

    An incomplete mark is a non-empty proper prefix of one of `marks`. Streaming parsers withhold
    these characters until later text shows whether the mark is completed.
    """
    longest = max(map(len, marks)) - 1
    for size in range(min(len(text), longest), 0, -1):
        if any(len(mark) > size and mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
