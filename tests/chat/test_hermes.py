"""Hermes format: parsing is independent of chunking and inverts formatting."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.chat import hermes
from qwen_jax.chat.reply import ReasoningPart, TextPart, ToolCall, ToolDefinition

NAMES = ("f", "g")


def collect(parser, pieces):
    """Returns the text, the reasoning and the calls of a reply that is pushed in pieces."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
    return text, reasoning, [part for part in parts if isinstance(part, ToolCall)]


def parse(pieces, reply_prefix="", parallel=True):
    parser = hermes.ThinkParser(hermes.HermesReplyParser(NAMES, reply_prefix, parallel))
    return collect(parser, pieces)


F, G = ToolCall("f", '{"x": 1}'), ToolCall("g", "{}")
TWO = hermes.format_tool_call(F) + "\n" + hermes.format_tool_call(G)


@dataclasses.dataclass
class ReplyCase:
    """A reply, what it is parsed into, and options of the parser."""

    reply: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    options: dict = dataclasses.field(default_factory=dict)


CASES = {
    "text": ReplyCase("Hello <there>", "Hello <there>"),
    "two calls": ReplyCase(f"Now:\n{TWO}", "Now:", calls=(F, G)),
    "only the first of two calls": ReplyCase(TWO, calls=(F,), options={"parallel": False}),
    "reasoning and answer": ReplyCase("<think>\nhm\n</think>\n\nYes.", "Yes.", "hm"),
    "reasoning and calls": ReplyCase(f"<think>hm</think>{TWO}", reasoning="hm", calls=(F, G)),
    "unclosed think block": ReplyCase("<think>\nhm </thi", reasoning="hm </thi"),
    "empty think block": ReplyCase("<think>\n\n</think>\n\nYes.", "Yes."),
    "unknown tool": ReplyCase(
        '<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>'
    ),
    "call that is not JSON": ReplyCase(
        "<tool_call>f(1)</tool_call> x", "<tool_call>f(1)</tool_call> x"
    ),
    "unclosed call": ReplyCase('<tool_call>{"name": "f", "arguments": {"x": 1}}', calls=(F,)),
    "truncated arguments": ReplyCase(
        '<tool_call>{"name": "f", "arguments": {"x', calls=(ToolCall("f", '{"x'),)
    ),
    "arguments as a string": ReplyCase(
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', calls=(F,)
    ),
    "forced call of one tool": ReplyCase(
        '{"x": 1}}\n</tool_call>',
        calls=(F,),
        options={"reply_prefix": hermes.tool_call_prefix("f")},
    ),
    "forced call of any tool": ReplyCase(
        'f", "arguments": {"x": 1}}\n</tool_call>',
        calls=(F,),
        options={"reply_prefix": hermes.tool_call_prefix()},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_replies_are_parsed_whole_and_by_character(name):
    case = CASES[name]
    expected = (case.text, case.reasoning, list(case.calls))
    assert parse([case.reply], **case.options) == expected
    assert parse(list(case.reply), **case.options) == expected


PIECE = st.sampled_from(
    [
        hermes.TOOL_CALL_OPEN,
        hermes.TOOL_CALL_CLOSE,
        hermes.THINK_OPEN,
        hermes.THINK_CLOSE,
        "\n",
        " ",
        "<",
        "tool",
        '{"name": "f", "arguments": {}}',
        '{"name": "h"}',
        "x",
        "<tool_call",
        ">",
        "天",
    ]
)


@given(st.lists(PIECE, max_size=12), st.booleans(), st.data())
def test_parsing_does_not_depend_on_chunk_boundaries(pieces, parallel, data):
    whole = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    one = parse([whole], parallel=parallel)
    assert parse(parts, parallel=parallel) == one == parse(list(whole), parallel=parallel)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_a_formatted_call_is_parsed_back(arguments):
    # Unless the arguments spell the closing tag.
    call = ToolCall("f", json.dumps(arguments, ensure_ascii=False))
    if hermes.TOOL_CALL_CLOSE not in call.arguments:
        assert parse([hermes.format_tool_call(call)]) == ("", "", [call])


def test_system_prompt_lists_each_tool_as_one_line_of_json():
    tool = ToolDefinition("f", "Does it.", {"type": "object"})
    text = hermes.format_system_prompt("Be brief.", [tool, ToolDefinition("g")])
    assert text.startswith("Be brief.\n\n# Tools\n")
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    listed = [json.loads(line) for line in lines]
    assert listed[0] == {
        "type": "function",
        "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}},
    }
    assert [entry["function"]["name"] for entry in listed] == ["f", "g"]
