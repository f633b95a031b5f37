"""The tool format of Qwen2.5 and Qwen3: JSON calls between `<tool_call>` tags, and `<think>`.

The system turn shows the tools as JSON between `<tools>` tags; the model asks for a call with
`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several of them if it likes, and gets the
results in a user turn between `<tool_response>` tags. The tags are the published ones
(the models' chat templates); the sentences are our own. Qwen3 thinks between `<think>` tags first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from qwen_jax.chat.reply import Call, Part, Reasoning, Text, Tool, dump_json, held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_TAGS = (OPEN, CLOSE, THINK_OPEN, THINK_CLOSE)
RESPONSE_TAGS = (RESPONSE_OPEN, RESPONSE_CLOSE)
"""Tags of an assistant's turn and of a tool's; the models have tokens for those of them they know.
"""

_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*')


def system(text: str, tools: Sequence[Tool]) -> str:
    """The system turn that says `text` and offers `tools`."""
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
        f"{OPEN}{CLOSE} tags:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
    )


def call_text(call: Call) -> str:
    """How the model wrote that it asks for a tool."""
    try:
        arguments = dump_json(json.loads(call.arguments))
    except (ValueError, RecursionError):
        arguments = dump_json(call.arguments)
    return f'{OPEN}\n{{"name": {dump_json(call.name)}, "arguments": {arguments}}}\n{CLOSE}'


def response_text(result: str) -> str:
    """How a tool's result stands in the user turn after the call."""
    return f"{RESPONSE_OPEN}\n{result}\n{RESPONSE_CLOSE}"


def thought_text(thought: str) -> str:
    """A `<think>` block, as a turn begins with it; an empty one ends thinking before it begins."""
    return f"{THINK_OPEN}\n{thought.strip()}\n{THINK_CLOSE}\n\n"


def opening(name: str | None = None) -> str:
    """The beginning of a turn that can only go on as a call, of tool `name` where it is given."""
    if name is None:
        return f'{OPEN}\n{{"name": "'
    return f'{OPEN}\n{{"name": {dump_json(name)}, "arguments": '


class ReplyReader:
    """Reads a reply as it comes: text at once, each call when its tag is closed.

    What stands between the tags and is no call of a known tool is text again, tags and all. However
    the text is cut into pushes, the parts joined are the same.

    Args:
      names: the tools there are.
      begun: what the turn began with in the prompt, `opening()`; read as the model's own.
      parallel: whether more than one call is wanted; what follows the first is else left out.
    """

    def __init__(self, names: Sequence[str], begun: str = "", parallel: bool = True):
        self._names = tuple(names)
        self._text = begun
        self._parallel = parallel
        self._calls = 0

    def push(self, text: str) -> list[Part]:
        """Takes the next piece of the reply; returns the parts that are certain by now."""
        self._text += text
        parts: list[Part] = []
        while (start := self._text.find(OPEN)) >= 0:
            end = self._text.find(CLOSE, start)
            self._say(parts, self._text[:start].rstrip())
            self._text = self._text[start:]
            if end < 0:
                return parts
            size = end - start + len(CLOSE)
            self._call(parts, self._text[:size])
            self._text = self._text[size:]
        # Whitespace before a call is not shown, so it waits for what follows.
        shown = self._text[: len(self._text) - held_back(self._text, (OPEN,))].rstrip()
        self._say(parts, shown)
        self._text = self._text[len(shown) :]
        return parts

    def finish(self) -> list[Part]:
        """Ends the reply; returns the rest of it."""
        parts: list[Part] = []
        rest, self._text = self._text, ""
        if rest.startswith(OPEN):
            self._call(parts, rest)
        else:
            self._say(parts, rest)
        return parts

    def _say(self, parts: list[Part], text: str) -> None:
        if text.strip() and (self._parallel or not self._calls):
            parts.append(Text(text))

    def _call(self, parts: list[Part], raw: str) -> None:
        if self._calls and not self._parallel:
            return
        body = raw.removeprefix(OPEN).removesuffix(CLOSE).strip()
        call = parse_call(body)
        if call is None or call.name not in self._names:
            self._say(parts, raw)
            return
        self._calls += 1
        parts.append(call)


def parse_call(body: str) -> Call | None:
    """Reads `{"name": …, "arguments": …}`; None when it is something else.

    Arguments keep the text that the model gave them, also where it is not valid JSON.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        found = _NAME.match(body)
        if not found:
            return None
        return Call(found["name"], body[found.end() :].strip().removesuffix("}").strip())
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return Call(value["name"], arguments if isinstance(arguments, str) else dump_json(arguments))


class ThinkReader:
    """Splits a reply into what stands between `<think>` tags at its beginning and what follows.

    Args:
      inner: reads what follows: an object with `push` and `finish`, or None to show it as it is.
      thinking: the prompt has opened the block already.
    """

    def __init__(self, inner: ReplyReader | None = None, thinking: bool = False):
        self._inner = inner
        self._text = ""
        self._mode = "gap" if thinking else "start"
        self._next = "thinking"  # after the gap of whitespace

    def push(self, text: str) -> list[Part]:
        """Takes the next piece of the reply; returns the parts that are certain by now."""
        self._text += text
        parts: list[Part] = []
        if self._mode == "start":
            head = self._text.lstrip()
            if head.startswith(THINK_OPEN):
                self._mode, self._text = "gap", head.removeprefix(THINK_OPEN)
            elif not THINK_OPEN.startswith(head):
                self._mode = "answer"
        if self._mode == "gap" and (head := self._text.lstrip()):
            self._text, self._mode = head, self._next
        if self._mode == "thinking":
            self._think(parts)
        if self._mode == "gap" and (head := self._text.lstrip()):
            self._text, self._mode = head, self._next
        if self._mode == "answer":
            rest, self._text = self._text, ""
            parts += self._show(rest)
        return parts

    def finish(self) -> list[Part]:
        """Ends the reply; returns the rest of it."""
        rest, self._text = self._text, ""
        if self._mode == "thinking":
            return [Reasoning(rest)] if rest.strip() else []
        parts = self._show(rest) if self._mode in ("start", "answer") else []
        return [*parts, *(self._inner.finish() if self._inner else [])]

    def _think(self, parts: list[Part]) -> None:
        end = self._text.find(THINK_CLOSE)
        keep = len(self._text) - held_back(self._text, (THINK_CLOSE,)) if end < 0 else end
        shown = self._text[:keep].rstrip()
        if shown:
            parts.append(Reasoning(shown))
        if end < 0:
            self._text = self._text[len(shown) :]
        else:
            self._text = self._text[end + len(THINK_CLOSE) :]
            self._mode, self._next = "gap", "answer"

    def _show(self, text: str) -> list[Part]:
        if self._inner:
            return self._inner.push(text)
        return [Text(text)] if text else []
