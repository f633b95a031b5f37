"""ReAct tool-call format of Qwen v1: builds prompts with tools and parses replies into tool calls.

The published form (report §3.4; examples/react_prompt.md of the release): one user turn lists the
tools, explains the labels Question, Thought, Action, Action Input, Observation and Final Answer,
and ends with the question. The model writes a thought and an action, and generation is stopped at
`Observation:`. The caller runs the tool and appends its result and `Thought:` to the same assistant
turn, which is then continued, until the model writes a final answer. The labels are the published
ones; the sentences around them are our own.

Pure functions of text, used by the server and usable by agents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_jax.chat.reply import (
    ReplyPart,
    TextPart,
    ToolCall,
    ToolDefinition,
    dump_json,
    leading_json,
)

STOP_STRING = "Observation:"
"""Stop string of replies to prompts with tools: a tool's result follows it, not generated text."""

FINAL_THOUGHT = "I now know the final answer."

_LABELS = ("Thought:", "Action:", "Final Answer:")
_LABEL = re.compile(r"\n\s*(?:Thought|Action|Final Answer):")
_DECISION = re.compile(r"(?:\A(?:\s*Thought:)?|\n)\s*(Action:|Final Answer:)")
_FINAL = re.compile(r"(?:\A|\n)\s*Final Answer:")
_CALL = re.compile(
    r"\s*Action:(?P<name>[^\n]*)\n\s*Action Input:(?P<input>.*?)"
    r"(?=\n\s*(?:Thought|Action|Observation|Final Answer):|\Z)",
    re.DOTALL,
)


def format_question(tools: Sequence[ToolDefinition], query: str) -> str:
    """Returns the text of a user turn that lists `tools`, explains the format and asks `query`."""
    names = ", ".join(tool.name for tool in tools)
    lines = "\n\n".join(_format_tool(tool) for tool in tools)
    return (
        "Answer the question below as well as you can. These tools are available:\n\n"
        f"{lines}\n\n"
        "Write in this format:\n\n"
        "Question: the question to answer\n"
        "Thought: think about what to do next\n"
        f"Action: the tool to use, one of [{names}]\n"
        "Action Input: what the tool is given\n"
        "Observation: what the tool returned\n"
        "... (Thought, Action, Action Input and Observation may come zero or more times)\n"
        f"Thought: {FINAL_THOUGHT.removesuffix('.')}\n"
        "Final Answer: the answer to the question\n\n"
        "Begin!\n\n"
        f"Question: {query}"
    )


def _format_tool(tool: ToolDefinition) -> str:
    """Returns the line of a prompt that describes one tool and its parameters."""
    title = tool.title or tool.name
    return (
        f"{tool.name}: Use this tool to reach the {title} API. What is the {title} API for? "
        f"{tool.description} Parameters: {dump_json(tool.parameters)} "
        "Write the arguments as a JSON object."
    )


def format_tool_call(thought: str, call: ToolCall) -> str:
    """Returns the lines Thought, Action and Action Input with which an assistant turn makes a call.

    An empty thought is replaced by a generic one.
    """
    thought = thought.strip() or f"I should use {call.name}."
    return f"Thought: {thought}\nAction: {call.name}\nAction Input: {call.arguments.strip()}"


def format_observation(result: str) -> str:
    """Returns the line Observation of an assistant turn, which contains a tool's result."""
    return f"Observation: {result}"


def format_final_answer(answer: str) -> str:
    """Returns the lines Thought and Final Answer with which an assistant turn ends."""
    return f"Thought: {FINAL_THOUGHT}\nFinal Answer: {answer}"


def tool_call_prefix(name: str | None = None) -> str:
    """Returns the beginning of an assistant turn that forces the model to call a tool.

    Args:
      name: the tool to call; None lets the model choose one.
    """
    if name is None:
        return "Thought: I should use a tool.\nAction:"
    return f"Thought: I should use {name}.\nAction: {name}\nAction Input:"


class ReactReplyParser:
    """Streaming parser of replies in the ReAct format (a `ReplyParser`).

    A final answer is returned as it is generated, and so is a reply without labels. Text after the
    label `Thought:` is withheld until the next label shows what follows it: before a tool call the
    thought is returned as a `TextPart`, before a final answer it is dropped, both as in the
    release. A tool call is returned by `finish`.

    Args:
      names: names of the available tools; a call of any other tool is returned as text.
      reply_prefix: beginning of the assistant turn that is part of the prompt, such as "Thought:"
        after an observation, or `tool_call_prefix()`. The reply is parsed as its continuation.
    """

    def __init__(self, names: Sequence[str], reply_prefix: str = ""):
        self._names = tuple(names)
        self._text = reply_prefix  # not yet returned
        # A forced call's prefix was not written by the model, so its thought is not returned.
        self._forced_prefix = reply_prefix if "Action:" in reply_prefix else ""
        self._mode = "start"
        self._separator = ""  # goes between text returned before the labels and text after them

    def push(self, text: str) -> list[ReplyPart]:
        """Appends `text` and returns the new visible text that later text cannot change."""
        self._text += text
        visible = ""
        if self._mode == "start":
            self._detect_format()
        if self._mode == "plain":
            visible += self._take_plain_text()
        if self._mode in ("thought", "answer-start"):
            self._detect_action_or_answer()
        if self._mode == "answer":
            visible += self._take_answer()
        return [TextPart(visible)] if visible else []

    def finish(self) -> list[ReplyPart]:
        """Marks the end of the reply and returns the withheld text and the tool call, if any."""
        parts = self.push("")  # parses the prefix if nothing was generated
        rest, self._text = self._text, ""
        if self._mode.startswith("answer"):
            return parts
        if self._mode == "call":
            return parts + self._parse_call(rest)
        if self._mode == "thought":
            rest = rest.strip().removeprefix("Thought:").strip()
            rest = self._separator + rest if rest else ""
        return parts + ([TextPart(rest)] if rest else [])

    def _detect_format(self) -> None:
        """Leaves mode "start" once the text begins with a label or can no longer do so."""
        head = self._text.lstrip()
        if head.startswith(_LABELS):
            self._mode = "thought"
        elif not any(label.startswith(head) for label in _LABELS):
            self._mode = "plain"

    def _take_plain_text(self) -> str:
        """Removes and returns buffered text up to the next label, at which mode "thought" begins.

        Trailing whitespace, and a last line that may become a label, stay in the buffer.
        """
        if label := _LABEL.search(self._text):
            end = len(self._text[: label.start()].rstrip())
            self._mode = "thought"
        else:
            last = self._text.rfind("\n")
            line = self._text[last + 1 :].lstrip()
            may_be_label = last >= 0 and any(label.startswith(line) for label in _LABELS)
            end = len((self._text[:last] if may_be_label else self._text).rstrip())
        visible, self._text = self._text[:end], self._text[end:]
        if visible:
            self._separator = "\n\n"
        return visible

    def _detect_action_or_answer(self) -> None:
        """Enters mode "call" at a label `Action:`, or "answer" at a non-empty final answer."""
        if self._mode == "thought" and (found := _DECISION.search(self._text)):
            if found[1] == "Action:":
                self._mode = "call"
            else:
                self._text = self._text[found.end() :]
                self._mode = "answer-start"
        if self._mode == "answer-start" and self._text.lstrip():
            self._text = self._separator + self._text.lstrip()
            self._mode = "answer"

    def _take_answer(self) -> str:
        """Removes and returns the buffered answer up to trailing whitespace."""
        end = len(self._text.rstrip())
        visible, self._text = self._text[:end], self._text[end:]
        return visible

    def _parse_call(self, rest: str) -> list[ReplyPart]:
        """Parses a complete text with the label `Action:` into a thought and a tool call.

        If it contains no valid call of an available tool, its final answer is returned as text, or
        without one the whole text.
        """
        decision = _DECISION.search(rest)
        assert decision is not None, "mode is 'call' without an action"
        start = decision.start(1)
        found = _CALL.match(rest, start)
        name = self._find_tool(found["name"]) if found else None
        if found is None or name is None:
            final = _FINAL.search(rest)
            rest = rest[final.end() :] if final else rest.removeprefix(self._forced_prefix)
            return [TextPart(self._separator + rest.strip())] if rest.strip() else []
        parts: list[ReplyPart] = []
        thought = rest[:start].strip().removeprefix("Thought:").strip()
        if thought and not self._forced_prefix:
            parts.append(TextPart(self._separator + thought))
        return [*parts, ToolCall(name, leading_json(found["input"]))]

    def _find_tool(self, name: str) -> str | None:
        """Returns the available tool that the model's spelling `name` refers to, or None.

        Surrounding quotes and brackets are ignored, and letter case if no name matches exactly.
        """
        name = name.strip().strip("`\"'[]").strip()
        if name in self._names:
            return name
        return next((known for known in self._names if known.lower() == name.lower()), None)
