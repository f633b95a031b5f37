"""ReAct format: parsing is independent of chunking and inverts formatting."""

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwen_jax.chat import react
from qwen_jax.chat.reply import TextPart, ToolCall, ToolDefinition, leading_json

NAMES = ("get_weather", "search")


def parse(pieces, reply_prefix="", names=NAMES):
    """Returns the text and the calls of a reply that is pushed in pieces."""
    parser = react.ReactReplyParser(names, reply_prefix)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    return text, [part for part in parts if isinstance(part, ToolCall)]


CALL = 'Thought: I need it.\nAction: get_weather\nAction Input: {"city": "Paris"}\n'


@dataclasses.dataclass
class ReplyCase:
    """A reply, the prefix that it continues, and what it is parsed into."""

    reply: str
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    prefix: str = ""


CASES = {
    "call": ReplyCase(CALL, "I need it.", (ToolCall("get_weather", '{"city": "Paris"}'),)),
    "answer": ReplyCase(
        "Thought: I now know the final answer.\nFinal Answer: It rains.\nTake a coat. ",
        "It rains.\nTake a coat.",
    ),
    "answer after an observation": ReplyCase(" I know.\nFinal Answer: 7", "7", prefix="Thought:"),
    "call after an observation": ReplyCase(
        " More.\nAction: search\nAction Input: {}",
        "More.",
        (ToolCall("search", "{}"),),
        prefix="Thought:",
    ),
    "no labels": ReplyCase("Hello!\nHow are you?", "Hello!\nHow are you?"),
    "unlabelled text, then a call": ReplyCase(
        "Let me see.\nAction: search\nAction Input: {}",
        "Let me see.",
        (ToolCall("search", "{}"),),
    ),
    "unlabelled text, then an answer": ReplyCase("Well.\nFinal Answer: 7", "Well.\n\n7"),
    "only a thought": ReplyCase("Thought: nothing to do", "nothing to do"),
    "unknown tool": ReplyCase("Action: rm\nAction Input: {}", "Action: rm\nAction Input: {}"),
    "unknown tool, then an answer": ReplyCase("Action: none\nFinal Answer: hi", "hi"),
    "action without input": ReplyCase("Action: search", "Action: search"),
    "tool name in another letter case": ReplyCase(
        "Action: Search\nAction Input: 1", calls=(ToolCall("search", "1"),)
    ),
    "forced call of any tool": ReplyCase(
        ' search\nAction Input: {"q": 1}',
        calls=(ToolCall("search", '{"q": 1}'),),
        prefix=react.tool_call_prefix(),
    ),
    "forced call of one tool": ReplyCase(
        ' {"q": 1}',
        calls=(ToolCall("search", '{"q": 1}'),),
        prefix=react.tool_call_prefix("search"),
    ),
    "forced call of an unknown tool": ReplyCase(
        " rm -rf", "rm -rf", prefix=react.tool_call_prefix()
    ),
    "input in a code fence": ReplyCase(
        'Action: search\nAction Input: ```json\n{"q": "a\\nb"}\n```',
        calls=(ToolCall("search", '{"q": "a\\nb"}'),),
    ),
    "input of several lines": ReplyCase(
        'Action: search\nAction Input: {\n  "q": "x"\n}\nThought: what else',
        calls=(ToolCall("search", '{\n  "q": "x"\n}'),),
    ),
    "input that is not JSON": ReplyCase(
        "Action: search\nAction Input: Paris today",
        calls=(ToolCall("search", "Paris today"),),
    ),
    "label inside a line": ReplyCase("The Action: is mine", "The Action: is mine"),
    "empty reply": ReplyCase(""),
}


@pytest.mark.parametrize("name", CASES)
def test_replies_are_parsed_whole_and_by_character(name):
    case = CASES[name]
    expected = (case.text, list(case.calls))
    assert parse([case.reply], case.prefix) == expected
    assert parse(list(case.reply), case.prefix) == expected


PIECE = st.sampled_from(
    [
        "Thought:",
        "Action:",
        "Action Input:",
        "Final Answer:",
        "\n",
        " ",
        "search",
        "{}",
        "x",
        "Thou",
        "ght:",
        "Act",
        "ion:",
        "\n\n",
        "Final",
        " Answer:",
        "get_weather",
        "天",
    ]
)


@given(
    st.lists(PIECE, max_size=14),
    st.sampled_from(["", "Thought:", react.tool_call_prefix()]),
    st.data(),
)
def test_parsing_does_not_depend_on_chunk_boundaries(pieces, prefix, data):
    whole = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parse(parts, prefix) == parse([whole], prefix) == parse(list(whole), prefix)


@given(st.text(max_size=40))
def test_a_reply_without_labels_is_returned_unchanged(text):
    if not any(label in text for label in ("Thought:", "Action:", "Final Answer:")):
        assert parse(list(text)) == (text, [])


line = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1).map(
    str.strip
)


@given(line.filter(bool), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
def test_formatted_calls_and_answers_are_parsed_back(thought, arguments):
    assume(not thought.startswith(("Action:", "Final Answer:")))  # read as a label
    call = ToolCall("search", json.dumps(arguments))
    text, calls = parse([react.format_tool_call(thought, call) + "\n"])
    assert calls == [call]
    assert text == thought
    answer, calls = parse([react.format_final_answer(thought)])
    assert (answer, calls) == (thought, [])


def test_final_answer_is_streamed_and_its_thought_is_not_returned():
    parser = react.ReactReplyParser(NAMES)
    returned = [
        parser.push(piece) for piece in ("Thought: hm", "\nFinal Ans", "wer: Yes", ", it", " is")
    ]
    assert returned == [[], [], [TextPart("Yes")], [TextPart(", it")], [TextPart(" is")]]


def test_question_has_the_published_labels_and_every_tool():
    tools = [
        ToolDefinition(
            "search", "Finds pages.", {"type": "object", "properties": {"q": {"title": "查询"}}}
        ),
        ToolDefinition("get_weather", "Tells the weather.", [{"name": "city"}], title="Weather"),
    ]
    prompt = react.format_question(tools, "Will it rain?")
    lines = prompt.splitlines()
    labels = ("Question:", "Thought:", "Action:", "Action Input:", "Observation:", "Thought:")
    order = [label for entry in lines for label in labels if entry.startswith(label)]
    assert [o for i, o in enumerate(order) if i == 0 or order[i - 1] != o] == [*labels, "Question:"]
    assert "one of [search, get_weather]" in prompt
    assert lines[-3:] == ["Begin!", "", "Question: Will it rain?"]
    # One line per tool, with its parameters as JSON without escapes.
    assert '"查询"' in next(entry for entry in lines if entry.startswith("search: "))
    assert "the Weather API" in next(entry for entry in lines if entry.startswith("get_weather: "))


@pytest.mark.parametrize(
    "text, value",
    [
        (' {"a": 1} and so on', '{"a": 1}'),
        ("```\n[1]\n```", "[1]"),
        ("not json", "not json"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_leading_json_value_of_a_text_is_extracted(text, value):
    assert leading_json(text) == value
