"""Tools, in both forms: what the model is shown, what is made of its reply, streamed or not."""

import dataclasses
import json

import pytest

from qwen_jax.chat import hermes, react
from qwen_jax.chat.chatml import build_context, render
from qwen_jax.chat.template import ChatTemplate
from tests.chat.test_template import TEMPLATE
from tests.generate.fake_engine import FakeEngine
from tests.server.serving import BYTES, TAGGED, model, script, serve

USER = {"role": "user", "content": "\nWill it rain? "}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
ASKED = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "Yes."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "search")
]


class Model:
    """A server whose model says what the test tells it to."""

    def __init__(self, family, tokenizer):
        self.says = ""
        self.engine = FakeEngine(lambda request: self._script(request), max_length=4000)
        self.served = model(family, tokenizer, max_length=4000)
        self.tokenizer = tokenizer

    def _script(self, request):
        return script(self.says, self.tokenizer)(request)

    def ask(self, client, says, *messages, stream=False, **fields):
        """The assistant's message and how it ended, put together where it was streamed."""
        self.says = says
        answer = client.chat.completions.create(
            model="toy", messages=list(messages) or [USER], stream=stream, **fields
        )
        if not stream:
            message = answer.choices[0].message
            calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
            thought = (message.model_extra or {}).get("reasoning_content")
            return message.content or "", calls, thought or "", answer.choices[0].finish_reason
        choices = [event.choices[0] for event in answer]
        deltas = [choice.delta for choice in choices]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        assert [call.index for call in calls] == list(range(len(calls)))
        assert len({call.id for call in calls}) == len(calls)
        thoughts = [(delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas]
        return (
            "".join(delta.content or "" for delta in deltas),
            [(call.function.name, call.function.arguments) for call in calls],
            "".join(thoughts),
            choices[-1].finish_reason,
        )

    @property
    def prompt(self):
        return self.tokenizer.decode(self.engine.added[-1].prompt)


@pytest.fixture(scope="module")
def v1():
    made = Model("qwen", BYTES)
    with serve(made.engine, made.served) as server:
        made.client = server.client()
        yield made


@pytest.fixture(scope="module")
def v3():
    made = Model("qwen3", TAGGED)
    with serve(made.engine, made.served) as server:
        made.client = server.client()
        yield made


REACT_CALL = 'Thought: I look.\nAction: weather\nAction Input: {"city": "Köln"}\nObservation: no'


@pytest.mark.parametrize("stream", [False, True])
def test_react_replies(v1, stream):
    def ask(says, *messages, **fields):
        fields = {"tools": TOOLS, **fields}
        return v1.ask(v1.client, says, *messages, stream=stream, **fields)[:2]

    # The model is stopped before it makes up a result.
    assert ask(REACT_CALL) == ("I look.", [("weather", '{"city": "Köln"}')])
    final = "Thought: I now know the final answer.\nFinal Answer: It rains."
    assert ask(final) == ("It rains.", [])
    assert ask("Hello.") == ("Hello.", [])
    assert ask(" Enough.\nFinal Answer: Rain.", USER, ASKED, RESULT) == ("Rain.", [])
    assert ask(" search\nAction Input: {}", tool_choice="required") == ("", [("search", "{}")])
    one = {"type": "function", "function": {"name": "search"}}
    assert ask(' {"q": 1}', tool_choice=one) == ("", [("search", '{"q": 1}')])
    # Without tools, the same text is only text.
    assert ask("Action: x\nObservation: y", tools=[]) == ("Action: x\nObservation: y", [])
    assert ask("Action: x", tool_choice="none") == ("Action: x", [])


def test_the_end_of_a_reply_with_calls(v1):
    def finish(says, **fields):
        return {v1.ask(v1.client, says, tools=TOOLS, stream=s, **fields)[3] for s in (True, False)}

    assert finish(REACT_CALL) == {"tool_calls"}
    assert finish("Final Answer: no") == {"stop"}
    assert finish(REACT_CALL, max_tokens=50) == {"length"}


def test_what_a_react_model_is_shown(v1):
    v1.ask(v1.client, "x", tools=TOOLS)
    head = "<|im_start|>system\nS<|im_end|>\n"
    question = BYTES.decode(v1.engine.added[-1].prompt)
    assert question.endswith("Question: Will it rain?<|im_end|>\n<|im_start|>assistant\n")
    assert '"city"' in question and "one of [weather, search]" in question

    # A result is appended to the model's own turn, which stays open.
    system = {"role": "system", "content": "S"}
    v1.ask(v1.client, "x", system, USER, ASKED, RESULT, tools=TOOLS)
    turn = 'Thought: I look.\nAction: weather\nAction Input: {"a": 1}\nObservation: Yes.\nThought:'
    assert v1.prompt.startswith(head + "<|im_start|>user\nAnswer")
    assert v1.prompt.endswith("Will it rain?<|im_end|>\n<|im_start|>assistant\n" + turn)

    # A finished turn is one turn, with its answer; the tools stand at the last finished question.
    more = [{"role": "assistant", "content": "It rains."}, {"role": "user", "content": "Where?"}]
    v1.ask(v1.client, "x", system, USER, ASKED, RESULT, *more, tools=TOOLS)
    finished = turn + " I now know the final answer.\nFinal Answer: It rains.<|im_end|>\n"
    assert v1.prompt.endswith(
        "Question: Will it rain?<|im_end|>\n<|im_start|>assistant\n" + finished
        + "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert v1.prompt.count("Begin!") == 1

    # No tools any more: the history stays, and the answer is asked for.
    v1.ask(v1.client, "x", USER, ASKED, RESULT, tools=TOOLS, tool_choice="none")
    assert "Begin!" not in v1.prompt
    assert v1.prompt.endswith("Thought: I now know the final answer.\nFinal Answer:")
    v1.ask(v1.client, "x", tools=TOOLS, tool_choice="required")
    assert v1.prompt.endswith("assistant\nThought: I should use a tool.\nAction:")


def test_calls_of_one_message_stand_one_after_the_other(v1):
    second = {**CALL, "id": "c2", "function": {"name": "search", "arguments": "{}"}}
    asked = {"role": "assistant", "tool_calls": [CALL, second]}
    results = [{**RESULT, "tool_call_id": "c2", "content": "2"}, {**RESULT, "content": "1"}]
    v1.ask(v1.client, "x", USER, asked, *results, tools=TOOLS)
    assert v1.prompt.endswith(
        "Thought: I should use weather.\nAction: weather\nAction Input: {\"a\": 1}\n"
        "Observation: 1\nThought: I should use search.\nAction: search\nAction Input: {}\n"
        "Observation: 2\nThought:"
    )  # fmt: skip


def test_a_conversation_without_tools_is_chatml_as_trained(v1):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ]
    v1.ask(v1.client, "x", *messages)
    expected = render(messages, BYTES, add_generation_prompt=True).ids.tolist()
    assert list(v1.engine.added[-1].prompt) == expected
    assert expected == build_context("c", [(" a\n", "b ")], "S", BYTES).tolist()


HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SEARCH = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_hermes_replies(v3, stream):
    def ask(says, *messages, **fields):
        fields = {"tools": TOOLS, **fields}
        return v3.ask(v3.client, says, *messages, stream=stream, **fields)[:3]

    weather, search = ("weather", '{"city": "Köln"}'), ("search", "{}")
    both = f"<think>\nHm.\n</think>\n\nNow:\n{HERMES_CALL}\n{SEARCH}"
    assert ask(both) == ("Now:", [weather, search], "Hm.")
    assert ask(both, parallel_tool_calls=False) == ("Now:", [weather], "Hm.")
    assert ask("<think>a</think>Yes.") == ("Yes.", [], "a")
    assert ask("<think>a</think>Yes.", tools=[]) == ("Yes.", [], "a")
    assert ask("Yes <tool_call>.") == ("Yes<tool_call>.", [], "")
    one = {"type": "function", "function": {"name": "search"}}
    assert ask('{"q": 1}}\n</tool_call>', tool_choice=one) == ("", [("search", '{"q": 1}')], "")
    required = 'search", "arguments": {}}\n</tool_call>'
    assert ask(required, tool_choice="required") == ("", [search], "")


def test_what_a_hermes_model_is_shown(v3):
    ids = TAGGED.special_tokens
    thought = {**ASKED, "reasoning_content": "Hm."}
    v3.ask(v3.client, "x", USER, thought, RESULT, tools=TOOLS)
    assert v3.prompt.startswith("<|im_start|>system\n# Tools\n")
    assert v3.prompt.endswith(
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nYes.\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompt = list(v3.engine.added[-1].prompt)
    # The tags are the model's tokens where they are tags, and text where somebody only says so.
    assert prompt.count(ids["<tool_response>"]) == 1 and prompt.count(ids["<tool_call>"]) == 1
    v3.ask(v3.client, "x", {"role": "user", "content": "<tool_response>"})
    assert ids["<tool_response>"] not in v3.engine.added[-1].prompt

    # Thoughts of earlier turns are left out; no thinking, when it is not wanted.
    more = [{"role": "assistant", "content": "Rain."}, {"role": "user", "content": "Where?"}]
    v3.ask(v3.client, "x", USER, thought, RESULT, *more, tools=TOOLS)
    assert "Hm." not in v3.prompt
    silent = {"chat_template_kwargs": {"enable_thinking": False}}
    v3.ask(v3.client, "x", extra_body=silent)
    assert v3.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    v3.ask(v3.client, "x", tools=TOOLS, tool_choice="required")
    assert v3.prompt.endswith('<think>\n\n</think>\n\n<tool_call>\n{"name": "')


def test_results_of_several_calls_share_a_turn(v3):
    second = {**CALL, "id": "c2"}
    asked = {"role": "assistant", "tool_calls": [CALL, second]}
    v3.ask(v3.client, "x", USER, asked, RESULT, {**RESULT, "tool_call_id": "c2"}, tools=TOOLS)
    one = "<tool_response>\nYes.\n</tool_response>"
    assert f"<|im_start|>user\n{one}\n{one}<|im_end|>" in v3.prompt


@pytest.mark.parametrize("family", ["v1", "v3"])
def test_a_whole_round_with_the_clients_own_records(family, request):
    """What the client got goes back as it is, and the model sees what it wrote."""
    fake = request.getfixturevalue(family)
    fake.says = REACT_CALL if family == "v1" else HERMES_CALL
    create = fake.client.chat.completions.create
    first = create(model="toy", messages=[USER], tools=TOOLS).choices[0]
    assert first.finish_reason == "tool_calls"
    call = first.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Köln"} and call.id.startswith("call_")
    fake.says = "Final Answer: Rain." if family == "v1" else "Rain."
    messages = [
        USER,
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    second = create(model="toy", messages=messages, tools=TOOLS).choices[0]
    assert (second.message.content, second.finish_reason) == ("Rain.", "stop")
    if family == "v1":
        assert (
            react.format_tool_call("I look.", react.ToolCall("weather", '{"city": "Köln"}'))
            in fake.prompt
        )
    else:
        assert (
            hermes.format_tool_call(hermes.ToolCall("weather", '{"city": "Köln"}')) in fake.prompt
        )


def test_logprobs_cover_what_is_hidden(v1):
    """Every token that was drawn is told of, also those of thoughts and labels."""
    v1.says = "Thought: I now know.\nFinal Answer: Rain."
    answer = v1.client.chat.completions.create(
        model="toy", messages=[USER], tools=TOOLS, logprobs=True, stream=True
    )
    logprobs = [event.choices[0].logprobs for event in answer]
    told = [entry for part in logprobs if part for entry in part.content]
    assert "".join(t.token for t in told) == v1.says


def test_a_models_own_template_writes_its_prompts():
    """Also of one whose template opens the thought itself."""
    end = TEMPLATE.index("    {%- if enable_thinking")
    always = TEMPLATE[:end] + "    {{- '<think>\\n' }}\n{%- endif %}"
    for template, begins in ((TEMPLATE, ""), (always, "<think>\n")):
        fake = Model("qwen3", TAGGED)
        fake.served = dataclasses.replace(fake.served, template=ChatTemplate(template))
        with serve(fake.engine, fake.served) as server:
            said = [USER, ASKED, RESULT]
            thought = "Hm.\n</think>\n\n" if begins else "<think>\nHm.\n</think>\n\n"
            told = fake.ask(server.client(), thought + HERMES_CALL, *said, tools=TOOLS)
            assert told == ("", [("weather", '{"city": "Köln"}')], "Hm.", "tool_calls")
            parsed = {**CALL, "function": {"name": "weather", "arguments": {"a": 1}}}
            asked = {**ASKED, "tool_calls": [parsed]}
            text = ChatTemplate(template).render([USER, asked, RESULT], TOOLS)
            assert fake.prompt == text and text.endswith(begins)
            answer = fake.ask(server.client(), "{}}", tools=TOOLS[:1], tool_choice="required")
            assert answer[:3] == ("", [("weather", "{}")], "")
            assert fake.prompt.endswith("\n</think>\n\n" + hermes.tool_call_prefix("weather"))
            assert fake.prompt.count("<think>") == fake.prompt.count("</think>") == 1
