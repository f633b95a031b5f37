"""The hermes form: calls and thoughts out of replies, however cut; what is written is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.chat import hermes
from qwen_jax.chat.reply import Call, Reasoning, Text, Tool

NAMES = ("f", "g")


def collect(reader, pieces):
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    text = "".join(part.text for part in parts if isinstance(part, Text))
    thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return text, thoughts, [part for part in parts if isinstance(part, Call)]


def read(pieces, begun="", parallel=True):
    reader = hermes.ThinkReader(hermes.ReplyReader(NAMES, begun, parallel))
    return collect(reader, pieces)


F, G = Call("f", '{"x": 1}'), Call("g", "{}")
TWO = hermes.call_text(F) + "\n" + hermes.call_text(G)

CASES = {
    "text": ("Hello <there>", "Hello <there>", "", [], {}),
    "two calls": (f"Now:\n{TWO}", "Now:", "", [F, G], {}),
    "one call of two": (TWO, "", "", [F], {"parallel": False}),
    "a thought and an answer": ("<think>\nhm\n</think>\n\nYes.", "Yes.", "hm", [], {}),
    "a thought and a call": (f"<think>hm</think>{TWO}", "", "hm", [F, G], {}),
    "a thought without an end": ("<think>\nhm </thi", "", "hm </thi", [], {}),
    "an empty thought": ("<think>\n\n</think>\n\nYes.", "Yes.", "", [], {}),
    "no tool of ours": ('<tool_call>{"name": "h"}</tool_call>',) * 2 + ("", [], {}),
    "no JSON": ("<tool_call>f(1)</tool_call> x", "<tool_call>f(1)</tool_call> x", "", [], {}),
    "no end": ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", "", [F], {}),
    "cut short": (
        '<tool_call>{"name": "f", "arguments": {"x',
        *("", "", [Call("f", '{"x')], {}),
    ),
    "arguments in a string": (
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
        *("", "", [F], {}),
    ),
    "forced": ('{"x": 1}}\n</tool_call>', "", "", [F], {"begun": hermes.opening("f")}),
    "forced, any": (
        'f", "arguments": {"x": 1}}\n</tool_call>',
        *("", "", [F], {"begun": hermes.opening()}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_replies(case):
    reply, *expected, options = CASES[case]
    assert read([reply], **options) == tuple(expected)
    assert read(list(reply), **options) == tuple(expected)


PIECE = st.sampled_from(
    [
        *(hermes.OPEN, hermes.CLOSE, hermes.THINK_OPEN, hermes.THINK_CLOSE, "\n", " ", "<", "tool"),
        *('{"name": "f", "arguments": {}}', '{"name": "h"}', "x", "<tool_call", ">", "天"),
    ]
)


@given(st.lists(PIECE, max_size=12), st.booleans(), st.data())
def test_how_a_reply_is_cut_changes_nothing(pieces, parallel, data):
    whole = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    one = read([whole], parallel=parallel)
    assert read(parts, parallel=parallel) == one == read(list(whole), parallel=parallel)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_a_call_that_is_written_is_read_again(arguments):
    # As long as it does not spell the tag itself.
    call = Call("f", json.dumps(arguments, ensure_ascii=False))
    if hermes.CLOSE not in call.arguments:
        assert read([hermes.call_text(call)]) == ("", "", [call])


def test_the_system_turn_shows_each_tool_as_json_on_a_line():
    tool = Tool("f", "Does it.", {"type": "object"})
    text = hermes.system("Be brief.", [tool, Tool("g")])
    assert text.startswith("Be brief.\n\n# Tools\n")
    shown = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    told = [json.loads(line) for line in shown]
    assert told[0] == {
        "type": "function",
        "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}},
    }
    assert [entry["function"]["name"] for entry in told] == ["f", "g"]
