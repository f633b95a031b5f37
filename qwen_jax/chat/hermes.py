"""Hermes tool-call format of Qwen1.5 to Qwen3: JSON calls in `<tool_call>` tags, and `<think>`.

The system turn lists the tools as JSON between `<tools>` tags. The model requests one or several
calls with `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; the results follow in a user turn
between `<tool_response>` tags. The tags are the published ones (the models' chat templates); the
sentences around them are our own. Qwen3 first writes its reasoning between `<think>` tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from qwen_jax.chat.reply import (
    ReasoningPart,
    ReplyParser,
    ReplyPart,
    TextPart,
    ToolCall,
    ToolDefinition,
    dump_json,
    partial_mark_length,
)

TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<tool_call>", "</tool_call>"
TOOL_RESPONSE_OPEN, TOOL_RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ASSISTANT_TAGS = (TOOL_CALL_OPEN, TOOL_CALL_CLOSE, THINK_OPEN, THINK_CLOSE)
TOOL_RESPONSE_TAGS = (TOOL_RESPONSE_OPEN, TOOL_RESPONSE_CLOSE)
"""Tags of assistant turns, and of user turns with tool results. Which of them are single tokens
depends on the model's vocabulary.
"""

_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*')


def format_system_prompt(text: str, tools: Sequence[ToolDefinition]) -> str:
    """Returns the content of a system turn: the system prompt `text`, then a list of `tools`."""
    lines = "\n".join(
        dump_json(
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
        )
        for tool in tools
    )
    head = f"{text}\n\n" if text else ""
    return (
        f"{head}# Tools\n\nFunctions may be called to help with the user's request. Their "
        "signatures stand between <tools></tools> tags:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "To call one, write a JSON object with its name and arguments between "
        f"{TOOL_CALL_OPEN}{TOOL_CALL_CLOSE} tags:\n"
        f'{TOOL_CALL_OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n'
        f"{TOOL_CALL_CLOSE}"
    )


def format_tool_call(call: ToolCall) -> str:
    """Returns the text of an assistant turn that requests `call`, tags included."""
    try:
        arguments = dump_json(json.loads(call.arguments))
    except (ValueError, RecursionError):
        arguments = dump_json(call.arguments)
    name = dump_json(call.name)
    return f'{TOOL_CALL_OPEN}\n{{"name": {name}, "arguments": {arguments}}}\n{TOOL_CALL_CLOSE}'


def format_tool_response(result: str) -> str:
    """Returns the text of a user turn that contains a tool's result, tags included."""
    return f"{TOOL_RESPONSE_OPEN}\n{result}\n{TOOL_RESPONSE_CLOSE}"


def format_think_block(reasoning: str) -> str:
    """Returns a `<think>` block for the beginning of an assistant turn.

    Empty `reasoning` gives the empty block that disables thinking.
    """
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n"


def tool_call_prefix(name: str | None = None) -> str:
    """Returns the beginning of an assistant turn that forces the model to call a tool.

    Args:
      name: the tool to call; None lets the model choose one.
    """
    if name is None:
        return f'{TOOL_CALL_OPEN}\n{{"name": "'
    return f'{TOOL_CALL_OPEN}\n{{"name": {dump_json(name)}, "arguments": '


class HermesReplyParser:
    """Streaming parser of replies with `<tool_call>` tags (a `ReplyParser`).

    Text is returned as it is generated, a tool call when its closing tag is complete. Tags whose
    content is not a call of an available tool are returned as text, tags included.

    Args:
      names: names of the available tools.
      reply_prefix: beginning of the assistant turn that is part of the prompt, from
        `tool_call_prefix()`. The reply is parsed as its continuation.
      parallel: whether to return more than one call; if False, everything after the first call is
        dropped.
    """

    def __init__(self, names: Sequence[str], reply_prefix: str = "", parallel: bool = True):
        self._names = tuple(names)
        self._text = reply_prefix  # not yet returned
        self._parallel = parallel
        self._num_calls = 0

    def push(self, text: str) -> list[ReplyPart]:
        """Appends `text` and returns the new parts of the reply that later text cannot change."""
        self._text += text
        parts: list[ReplyPart] = []
        while (start := self._text.find(TOOL_CALL_OPEN)) >= 0:
            end = self._text.find(TOOL_CALL_CLOSE, start)
            self._append_text(parts, self._text[:start].rstrip())
            self._text = self._text[start:]
            if end < 0:
                return parts
            size = end - start + len(TOOL_CALL_CLOSE)
            self._append_call(parts, self._text[:size])
            self._text = self._text[size:]
        # Whitespace before a call is not returned, so it is withheld until other text follows.
        withheld = partial_mark_length(self._text, (TOOL_CALL_OPEN,))
        visible = self._text[: len(self._text) - withheld].rstrip()
        self._append_text(parts, visible)
        self._text = self._text[len(visible) :]
        return parts

    def finish(self) -> list[ReplyPart]:
        """Marks the end of the reply and returns what was withheld, an unclosed call included."""
        parts: list[ReplyPart] = []
        rest, self._text = self._text, ""
        if rest.startswith(TOOL_CALL_OPEN):
            self._append_call(parts, rest)
        else:
            self._append_text(parts, rest)
        return parts

    def _append_text(self, parts: list[ReplyPart], text: str) -> None:
        """Appends `text` to `parts` unless it is blank or follows the only call wanted."""
        if text.strip() and (self._parallel or not self._num_calls):
            parts.append(TextPart(text))

    def _append_call(self, parts: list[ReplyPart], raw: str) -> None:
        """Appends the call written in `raw` (tags included) to `parts`, or `raw` as text."""
        if self._num_calls and not self._parallel:
            return
        body = raw.removeprefix(TOOL_CALL_OPEN).removesuffix(TOOL_CALL_CLOSE).strip()
        call = parse_tool_call(body)
        if call is None or call.name not in self._names:
            self._append_text(parts, raw)
            return
        self._num_calls += 1
        parts.append(call)


def parse_tool_call(body: str) -> ToolCall | None:
    """Parses the text `{"name": …, "arguments": …}` between tags; None if it has another form.

    Arguments that are invalid JSON are kept as the model wrote them.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        found = _CALL_HEAD.match(body)
        if not found:
            return None
        return ToolCall(found["name"], body[found.end() :].strip().removesuffix("}").strip())
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return ToolCall(
        value["name"], arguments if isinstance(arguments, str) else dump_json(arguments)
    )


class ThinkParser:
    """Streaming parser that separates a leading `<think>` block from the reply (a `ReplyParser`).

    The content of the block is returned as `ReasoningPart`s, what follows is passed on to `inner`.

    Args:
      inner: parser of the text after the block; None returns it as `TextPart`s.
      thinking: whether the prompt ends inside an open `<think>` block.
    """

    def __init__(self, inner: ReplyParser | None = None, thinking: bool = False):
        self._inner = inner
        self._text = ""  # not yet returned or passed on
        self._mode = "gap" if thinking else "start"
        self._mode_after_gap = "thinking"  # "gap": skipping whitespace

    def push(self, text: str) -> list[ReplyPart]:
        """Appends `text` and returns the new parts of the reply that later text cannot change."""
        self._text += text
        parts: list[ReplyPart] = []
        if self._mode == "start":
            head = self._text.lstrip()
            if head.startswith(THINK_OPEN):
                self._mode, self._text = "gap", head.removeprefix(THINK_OPEN)
            elif not THINK_OPEN.startswith(head):
                self._mode = "answer"
        if self._mode == "gap" and (head := self._text.lstrip()):
            self._text, self._mode = head, self._mode_after_gap
        if self._mode == "thinking":
            self._append_reasoning(parts)
        if self._mode == "gap" and (head := self._text.lstrip()):
            self._text, self._mode = head, self._mode_after_gap
        if self._mode == "answer":
            rest, self._text = self._text, ""
            parts += self._push_answer(rest)
        return parts

    def finish(self) -> list[ReplyPart]:
        """Marks the end of the reply and returns the parts that were withheld until now."""
        rest, self._text = self._text, ""
        if self._mode == "thinking":
            return [ReasoningPart(rest)] if rest.strip() else []
        parts = self._push_answer(rest) if self._mode in ("start", "answer") else []
        return [*parts, *(self._inner.finish() if self._inner else [])]

    def _append_reasoning(self, parts: list[ReplyPart]) -> None:
        """Moves buffered reasoning to `parts`; at the closing tag, mode "thinking" ends."""
        end = self._text.find(THINK_CLOSE)
        if end < 0:
            keep = len(self._text) - partial_mark_length(self._text, (THINK_CLOSE,))
        else:
            keep = end
        visible = self._text[:keep].rstrip()
        if visible:
            parts.append(ReasoningPart(visible))
        if end < 0:
            self._text = self._text[len(visible) :]
        else:
            self._text = self._text[end + len(THINK_CLOSE) :]
            self._mode, self._mode_after_gap = "gap", "answer"

    def _push_answer(self, text: str) -> list[ReplyPart]:
        """Passes text after the block to the inner parser and returns the resulting parts."""
        if self._inner:
            return self._inner.push(text)
        return [TextPart(text)] if text else []
