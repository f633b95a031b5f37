"""ReAct: what a reply is read as does not depend on how it was cut, and what is written is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.chat import react
from qwen_jax.chat.reply import Call, Text, Tool, json_text

NAMES = ("get_weather", "search")


def read(pieces, begun="", names=NAMES):
    reader = react.ReplyReader(names, begun)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return text, [part for part in parts if isinstance(part, Call)]


CALL = 'Thought: I need it.\nAction: get_weather\nAction Input: {"city": "Paris"}\n'

CASES = {
    "a call": (CALL, "", "I need it.", [Call("get_weather", '{"city": "Paris"}')]),
    "an answer": (
        "Thought: I now know the final answer.\nFinal Answer: It rains.\nTake a coat. ",
        *("", "It rains.\nTake a coat.", []),
    ),
    "after an observation": (" I know.\nFinal Answer: 7", "Thought:", "7", []),
    "a call after an observation": (
        " More.\nAction: search\nAction Input: {}",
        *("Thought:", "More.", [Call("search", "{}")]),
    ),
    "no format": ("Hello!\nHow are you?", "", "Hello!\nHow are you?", []),
    "no format, then a call": (
        "Let me see.\nAction: search\nAction Input: {}",
        *("", "Let me see.", [Call("search", "{}")]),
    ),
    "no format, then an answer": ("Well.\nFinal Answer: 7", "", "Well.\n\n7", []),
    "a thought alone": ("Thought: nothing to do", "", "nothing to do", []),
    "an unknown tool": (
        "Action: rm\nAction Input: {}",
        *("", "Action: rm\nAction Input: {}", []),
    ),
    "an unknown tool, then an answer": ("Action: none\nFinal Answer: hi", "", "hi", []),
    "no input": ("Action: search", "", "Action: search", []),
    "another case": ("Action: Search\nAction Input: 1", "", "", [Call("search", "1")]),
    "forced, any": (
        ' search\nAction Input: {"q": 1}',
        *(react.opening(), "", [Call("search", '{"q": 1}')]),
    ),
    "forced, one": (' {"q": 1}', react.opening("search"), "", [Call("search", '{"q": 1}')]),
    "forced, to no avail": (" rm -rf", react.opening(), "rm -rf", []),
    "a fence": (
        'Action: search\nAction Input: ```json\n{"q": "a\\nb"}\n```',
        *("", "", [Call("search", '{"q": "a\\nb"}')]),
    ),
    "input of several lines": (
        'Action: search\nAction Input: {\n  "q": "x"\n}\nThought: what else',
        *("", "", [Call("search", '{\n  "q": "x"\n}')]),
    ),
    "input that is no JSON": (
        "Action: search\nAction Input: Paris today",
        *("", "", [Call("search", "Paris today")]),
    ),
    "a label inside a line": ("The Action: is mine", "", "The Action: is mine", []),
    "nothing": ("", "", "", []),
}


@pytest.mark.parametrize("case", CASES)
def test_replies(case):
    reply, begun, text, calls = CASES[case]
    assert read([reply], begun) == (text, calls)
    assert read(list(reply), begun) == (text, calls)


PIECE = st.sampled_from(
    [
        *("Thought:", "Action:", "Action Input:", "Final Answer:", "\n", " ", "search", "{}", "x"),
        *("Thou", "ght:", "Act", "ion:", "\n\n", "Final", " Answer:", "get_weather", "天"),
    ]
)


@given(st.lists(PIECE, max_size=14), st.sampled_from(["", "Thought:", react.opening()]), st.data())
def test_how_a_reply_is_cut_changes_nothing(pieces, begun, data):
    whole = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(parts, begun) == read([whole], begun) == read(list(whole), begun)


@given(st.text(max_size=40))
def test_a_reply_without_labels_is_shown_as_it_is(text):
    if not any(label in text for label in ("Thought:", "Action:", "Final Answer:")):
        assert read(list(text)) == (text, [])


line = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1).map(
    str.strip
)


@given(line.filter(bool), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
def test_a_call_that_is_written_is_read_again(thought, arguments):
    call = Call("search", json.dumps(arguments))
    text, calls = read([react.call_text(thought, call) + "\n"])
    assert calls == [call]
    assert text == thought
    answer, calls = read([react.answer_text(thought)])
    assert (answer, calls) == (thought, [])


def test_the_answer_is_shown_as_it_comes_and_the_thought_never():
    reader = react.ReplyReader(NAMES)
    shown = [
        reader.push(piece) for piece in ("Thought: hm", "\nFinal Ans", "wer: Yes", ", it", " is")
    ]
    assert shown == [[], [], [Text("Yes")], [Text(", it")], [Text(" is")]]


def test_the_prompt_has_the_published_lines_and_every_tool():
    tools = [
        Tool("search", "Finds pages.", {"type": "object", "properties": {"q": {"title": "查询"}}}),
        Tool("get_weather", "Tells the weather.", [{"name": "city"}], title="Weather"),
    ]
    prompt = react.question(tools, "Will it rain?")
    lines = prompt.splitlines()
    labels = ("Question:", "Thought:", "Action:", "Action Input:", "Observation:", "Thought:")
    order = [label for entry in lines for label in labels if entry.startswith(label)]
    assert [o for i, o in enumerate(order) if i == 0 or order[i - 1] != o] == [*labels, "Question:"]
    assert "one of [search, get_weather]" in prompt
    assert lines[-3:] == ["Begin!", "", "Question: Will it rain?"]
    # One line for each tool, with its parameters as JSON in characters, not escapes.
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
def test_json_at_the_beginning_of_a_text(text, value):
    assert json_text(text) == value
