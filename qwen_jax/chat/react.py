"""The ReAct format of Qwen v1: tools in a prompt, calls and answers in the text of a reply.

The published form (report §3.4; examples/react_prompt.md of the release): one user turn lists the
tools, explains the lines Question, Thought, Action, Action Input, Observation and Final Answer,
and ends with the question. The model writes a thought and an action and is stopped at
`Observation:`; whoever runs the tool appends its result and `Thought:` to the same assistant turn,
which goes on until a final answer. The labels are the published ones; the sentences are our own.

Pure functions of text, for the server and for agents alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_jax.chat.reply import Call, Part, Text, Tool, dump_json, json_text

STOP = "Observation:"
"""Where a reply that asks for a tool must be stopped: the next line is the tool's, not the model's.
"""

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


def question(tools: Sequence[Tool], query: str) -> str:
    """The user turn that asks `query` and offers `tools`."""
    names = ", ".join(tool.name for tool in tools)
    lines = "\n\n".join(_describe(tool) for tool in tools)
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


def _describe(tool: Tool) -> str:
    title = tool.title or tool.name
    return (
        f"{tool.name}: Use this tool to reach the {title} API. What is the {title} API for? "
        f"{tool.description} Parameters: {dump_json(tool.parameters)} "
        "Write the arguments as a JSON object."
    )


def call_text(thought: str, call: Call) -> str:
    """How the model wrote that it asks for a tool: what stands in its turn afterwards."""
    thought = thought.strip() or f"I should use {call.name}."
    return f"Thought: {thought}\nAction: {call.name}\nAction Input: {call.arguments.strip()}"


def observation_text(result: str) -> str:
    """The line of the assistant's turn that says what the tool has returned."""
    return f"Observation: {result}"


def answer_text(answer: str) -> str:
    """A finished answer, as it stands in an assistant turn of a conversation with tools."""
    return f"Thought: {FINAL_THOUGHT}\nFinal Answer: {answer}"


def opening(name: str | None = None) -> str:
    """The beginning of a turn that can only go on as a call, of tool `name` where it is given."""
    if name is None:
        return "Thought: I should use a tool.\nAction:"
    return f"Thought: I should use {name}.\nAction: {name}\nAction Input:"


class ReplyReader:
    """Reads a reply as it comes: the answer at once, thoughts held until it is known what they are.

    A reply that follows no format is an answer as it stands. The thought before a call is given
    as `Text`, the one before a final answer is dropped, both as in the release. However the text is
    cut into pushes, the texts joined and the call are the same.

    Args:
      names: the tools there are; a call of another one is no call but text.
      begun: what the turn began with in the prompt, such as "Thought:" after an observation, or
        `opening()`; the reply is read as its continuation.
    """

    def __init__(self, names: Sequence[str], begun: str = ""):
        self._names = tuple(names)
        self._text = begun
        # What was put into the model's mouth is not the model's to tell.
        self._forced = begun if "Action:" in begun else ""
        self._mode = "start"
        self._gap = ""  # between text that is already shown and what comes after labels

    def push(self, text: str) -> list[Part]:
        """Takes the next piece of the reply; returns what can be shown of it by now."""
        self._text += text
        shown = ""
        if self._mode == "start":
            self._start()
        if self._mode == "plain":
            shown += self._plain()
        if self._mode in ("thought", "answer-start"):
            self._decide()
        if self._mode == "answer":
            shown += self._answer()
        return [Text(shown)] if shown else []

    def finish(self) -> list[Part]:
        """Ends the reply; returns the rest of it, a call among it where there is one."""
        parts = self.push("")  # what the turn began with, where nothing came after it
        rest, self._text = self._text, ""
        if self._mode.startswith("answer"):
            return parts
        if self._mode == "call":
            return parts + self._called(rest)
        if self._mode == "thought":
            rest = rest.strip().removeprefix("Thought:").strip()
            rest = self._gap + rest if rest else ""
        return parts + ([Text(rest)] if rest else [])

    def _start(self) -> None:
        head = self._text.lstrip()
        if head.startswith(_LABELS):
            self._mode = "thought"
        elif not any(label.startswith(head) for label in _LABELS):
            self._mode = "plain"

    def _plain(self) -> str:
        """What is shown of text without a label; a line that begins like one waits for its end."""
        if label := _LABEL.search(self._text):
            end = len(self._text[: label.start()].rstrip())
            self._mode = "thought"
        else:
            last = self._text.rfind("\n")
            line = self._text[last + 1 :].lstrip()
            opens = last >= 0 and any(label.startswith(line) for label in _LABELS)
            end = len((self._text[:last] if opens else self._text).rstrip())
        shown, self._text = self._text[:end], self._text[end:]
        if shown:
            self._gap = "\n\n"
        return shown

    def _decide(self) -> None:
        if self._mode == "thought" and (found := _DECISION.search(self._text)):
            if found[1] == "Action:":
                self._mode = "call"
            else:
                self._text = self._text[found.end() :]
                self._mode = "answer-start"
        if self._mode == "answer-start" and self._text.lstrip():
            self._text = self._gap + self._text.lstrip()
            self._mode = "answer"

    def _answer(self) -> str:
        end = len(self._text.rstrip())
        shown, self._text = self._text[:end], self._text[end:]
        return shown

    def _called(self, rest: str) -> list[Part]:
        start = _DECISION.search(rest).start(1)
        found = _CALL.match(rest, start)
        name = self._known(found["name"]) if found else None
        if name is None:
            final = _FINAL.search(rest)
            rest = rest[final.end() :] if final else rest.removeprefix(self._forced)
            return [Text(self._gap + rest.strip())] if rest.strip() else []
        thought = rest[:start].strip().removeprefix("Thought:").strip()
        told = [Text(self._gap + thought)] if thought and not self._forced else []
        return [*told, Call(name, json_text(found["input"]))]

    def _known(self, name: str) -> str | None:
        name = name.strip().strip("`\"'[]").strip()
        if name in self._names:
            return name
        return next((known for known in self._names if known.lower() == name.lower()), None)
