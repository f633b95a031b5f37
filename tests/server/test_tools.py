"""Tool calls over the API in both formats: prompts, parsed replies, streaming, round trips."""

import dataclasses
import json

import pytest

from qwen_jax.chat import hermes, react
from qwen_jax.chat.chatml import build_context, render
from qwen_jax.chat.reply import ToolCall
from qwen_jax.chat.template import ChatTemplate
from tests.chat.test_template import TEMPLATE
from tests.generate.fake_engine import FakeEngine
from tests.server.serving import BYTES, TAGGED, make_model, script, serve

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


class ScriptedModel:
    """A fake engine and its model configuration, with replies chosen by the test.

    Attributes:
      reply: text with which every request is answered.
      client: official client of a server with this model, set by fixtures.
    """

    def __init__(self, family, tokenizer):
        self.reply = ""
        self.engine = FakeEngine(lambda request: self._script(request), max_length=4000)
        self.config = make_model(family, tokenizer, max_length=4000)
        self.tokenizer = tokenizer

    def _script(self, request):
        return script(self.reply, self.tokenizer)(request)

    def ask(self, reply, *messages, stream=False, **fields):
        """Answers a chat request with `reply`; streamed pieces are joined.

        Returns:
          Content, calls as (name, arguments), reasoning, and finish reason of the API's answer.
        """
        self.reply = reply
        answer = self.client.chat.completions.create(
            model="toy", messages=list(messages) or [USER], stream=stream, **fields
        )
        if not stream:
            message = answer.choices[0].message
            calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
            reasoning = (message.model_extra or {}).get("reasoning_content")
            return message.content or "", calls, reasoning or "", answer.choices[0].finish_reason
        choices = [event.choices[0] for event in answer]
        deltas = [choice.delta for choice in choices]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        assert [call.index for call in calls] == list(range(len(calls)))
        assert len({call.id for call in calls}) == len(calls)
        reasoning = [(delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas]
        return (
            "".join(delta.content or "" for delta in deltas),
            [(call.function.name, call.function.arguments) for call in calls],
            "".join(reasoning),
            choices[-1].finish_reason,
        )

    @property
    def prompt(self):
        return self.tokenizer.decode(self.engine.added[-1].prompt)


@pytest.fixture(scope="module")
def v1():
    model = ScriptedModel("qwen", BYTES)
    with serve(model.engine, model.config) as server:
        model.client = server.client()
        yield model


@pytest.fixture(scope="module")
def v3():
    model = ScriptedModel("qwen3", TAGGED)
    with serve(model.engine, model.config) as server:
        model.client = server.client()
        yield model


REACT_CALL = 'Thought: I look.\nAction: weather\nAction Input: {"city": "Köln"}\nObservation: no'


@pytest.mark.parametrize("stream", [False, True])
def test_react_replies_become_content_and_tool_calls(v1, stream):
    def ask(reply, *messages, **fields):
        fields = {"tools": TOOLS, **fields}
        return v1.ask(reply, *messages, stream=stream, **fields)[:2]

    # The stop string ends the reply before the model invents a result.
    assert ask(REACT_CALL) == ("I look.", [("weather", '{"city": "Köln"}')])
    final = "Thought: I now know the final answer.\nFinal Answer: It rains."
    assert ask(final) == ("It rains.", [])
    assert ask("Hello.") == ("Hello.", [])
    assert ask(" Enough.\nFinal Answer: Rain.", USER, ASKED, RESULT) == ("Rain.", [])
    assert ask(" search\nAction Input: {}", tool_choice="required") == ("", [("search", "{}")])
    one = {"type": "function", "function": {"name": "search"}}
    assert ask(' {"q": 1}', tool_choice=one) == ("", [("search", '{"q": 1}')])
    # Without tools, labels are plain text.
    assert ask("Action: x\nObservation: y", tools=[]) == ("Action: x\nObservation: y", [])
    assert ask("Action: x", tool_choice="none") == ("Action: x", [])


def test_finish_reason_is_tool_calls_unless_the_length_ends_the_reply(v1):
    def finish(reply, **fields):
        return {v1.ask(reply, tools=TOOLS, stream=s, **fields)[3] for s in (True, False)}

    assert finish(REACT_CALL) == {"tool_calls"}
    assert finish("Final Answer: no") == {"stop"}
    assert finish(REACT_CALL, max_tokens=50) == {"length"}


def test_react_prompts_list_tools_and_continue_the_assistant_turn(v1):
    v1.ask("x", tools=TOOLS)
    head = "<|im_start|>system\nS<|im_end|>\n"
    question = BYTES.decode(v1.engine.added[-1].prompt)
    assert question.endswith("Question: Will it rain?<|im_end|>\n<|im_start|>assistant\n")
    assert '"city"' in question and "one of [weather, search]" in question

    # A result is appended to the model's own turn, which stays open.
    system = {"role": "system", "content": "S"}
    v1.ask("x", system, USER, ASKED, RESULT, tools=TOOLS)
    turn = 'Thought: I look.\nAction: weather\nAction Input: {"a": 1}\nObservation: Yes.\nThought:'
    assert v1.prompt.startswith(head + "<|im_start|>user\nAnswer")
    assert v1.prompt.endswith("Will it rain?<|im_end|>\n<|im_start|>assistant\n" + turn)

    # A finished turn is closed after its answer; tools are listed at the last finished question.
    more = [{"role": "assistant", "content": "It rains."}, {"role": "user", "content": "Where?"}]
    v1.ask("x", system, USER, ASKED, RESULT, *more, tools=TOOLS)
    finished = turn + " I now know the final answer.\nFinal Answer: It rains.<|im_end|>\n"
    assert v1.prompt.endswith(
        f"Question: Will it rain?<|im_end|>\n<|im_start|>assistant\n{finished}"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert v1.prompt.count("Begin!") == 1

    # With tools disabled, the history stays and a final answer is forced.
    v1.ask("x", USER, ASKED, RESULT, tools=TOOLS, tool_choice="none")
    assert "Begin!" not in v1.prompt
    assert v1.prompt.endswith("Thought: I now know the final answer.\nFinal Answer:")
    v1.ask("x", tools=TOOLS, tool_choice="required")
    assert v1.prompt.endswith("assistant\nThought: I should use a tool.\nAction:")


def test_react_prompt_orders_parallel_calls_each_with_its_result(v1):
    second = {**CALL, "id": "c2", "function": {"name": "search", "arguments": "{}"}}
    asked = {"role": "assistant", "tool_calls": [CALL, second]}
    results = [{**RESULT, "tool_call_id": "c2", "content": "2"}, {**RESULT, "content": "1"}]
    v1.ask("x", USER, asked, *results, tools=TOOLS)
    assert v1.prompt.endswith(
        'Thought: I should use weather.\nAction: weather\nAction Input: {"a": 1}\n'
        "Observation: 1\nThought: I should use search.\nAction: search\nAction Input: {}\n"
        "Observation: 2\nThought:"
    )


def test_conversation_without_tools_is_plain_chatml(v1):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ]
    v1.ask("x", *messages)
    expected = render(messages, BYTES, add_generation_prompt=True).ids.tolist()
    assert list(v1.engine.added[-1].prompt) == expected
    assert expected == build_context("c", [(" a\n", "b ")], "S", BYTES).tolist()


HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SEARCH = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_hermes_replies_become_content_tool_calls_and_reasoning(v3, stream):
    def ask(reply, *messages, **fields):
        fields = {"tools": TOOLS, **fields}
        return v3.ask(reply, *messages, stream=stream, **fields)[:3]

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


def test_hermes_prompts_list_tools_and_drop_past_reasoning(v3):
    ids = TAGGED.special_tokens
    thought = {**ASKED, "reasoning_content": "Hm."}
    v3.ask("x", USER, thought, RESULT, tools=TOOLS)
    assert v3.prompt.startswith("<|im_start|>system\n# Tools\n")
    assert v3.prompt.endswith(
        "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nYes.\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompt = list(v3.engine.added[-1].prompt)
    # Tags written by the format are control tokens; tags typed by a user are plain text.
    assert prompt.count(ids["<tool_response>"]) == 1 and prompt.count(ids["<tool_call>"]) == 1
    v3.ask("x", {"role": "user", "content": "<tool_response>"})
    assert ids["<tool_response>"] not in v3.engine.added[-1].prompt

    # Reasoning of earlier turns is left out; thinking can be disabled.
    more = [{"role": "assistant", "content": "Rain."}, {"role": "user", "content": "Where?"}]
    v3.ask("x", USER, thought, RESULT, *more, tools=TOOLS)
    assert "Hm." not in v3.prompt
    no_thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    v3.ask("x", extra_body=no_thinking)
    assert v3.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    v3.ask("x", tools=TOOLS, tool_choice="required")
    assert v3.prompt.endswith('<think>\n\n</think>\n\n<tool_call>\n{"name": "')


def test_hermes_results_of_parallel_calls_share_a_user_turn(v3):
    second = {**CALL, "id": "c2"}
    asked = {"role": "assistant", "tool_calls": [CALL, second]}
    v3.ask("x", USER, asked, RESULT, {**RESULT, "tool_call_id": "c2"}, tools=TOOLS)
    one = "<tool_response>\nYes.\n</tool_response>"
    assert f"<|im_start|>user\n{one}\n{one}<|im_end|>" in v3.prompt


@pytest.mark.parametrize("family", ["v1", "v3"])
def test_returned_message_can_be_sent_back_with_the_tool_result(family, request):
    """The prompt then contains the call as the model wrote it."""
    fake = request.getfixturevalue(family)
    fake.reply = REACT_CALL if family == "v1" else HERMES_CALL
    create = fake.client.chat.completions.create
    first = create(model="toy", messages=[USER], tools=TOOLS).choices[0]
    assert first.finish_reason == "tool_calls"
    call = first.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Köln"} and call.id.startswith("call_")
    fake.reply = "Final Answer: Rain." if family == "v1" else "Rain."
    messages = [
        USER,
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    second = create(model="toy", messages=messages, tools=TOOLS).choices[0]
    assert (second.message.content, second.finish_reason) == ("Rain.", "stop")
    weather = ToolCall("weather", '{"city": "Köln"}')
    if family == "v1":
        assert react.format_tool_call("I look.", weather) in fake.prompt
    else:
        assert hermes.format_tool_call(weather) in fake.prompt


def test_streamed_logprobs_include_tokens_that_are_not_shown(v1):
    """Every generated token has an entry, also those of thoughts and labels."""
    v1.reply = "Thought: I now know.\nFinal Answer: Rain."
    answer = v1.client.chat.completions.create(
        model="toy", messages=[USER], tools=TOOLS, logprobs=True, stream=True
    )
    logprobs = [event.choices[0].logprobs for event in answer]
    entries = [entry for part in logprobs if part for entry in part.content]
    assert "".join(entry.token for entry in entries) == v1.reply


def test_prompts_are_rendered_by_the_models_chat_template():
    """Also if the template ends with an open think block."""
    end = TEMPLATE.index("    {%- if enable_thinking")
    always = TEMPLATE[:end] + "    {{- '<think>\\n' }}\n{%- endif %}"
    for template, opens in ((TEMPLATE, ""), (always, "<think>\n")):
        fake = ScriptedModel("qwen3", TAGGED)
        fake.config = dataclasses.replace(fake.config, template=ChatTemplate(template))
        with serve(fake.engine, fake.config) as server:
            fake.client = server.client()
            thought = "Hm.\n</think>\n\n" if opens else "<think>\nHm.\n</think>\n\n"
            answer = fake.ask(thought + HERMES_CALL, USER, ASKED, RESULT, tools=TOOLS)
            assert answer == ("", [("weather", '{"city": "Köln"}')], "Hm.", "tool_calls")
            parsed = {**CALL, "function": {"name": "weather", "arguments": {"a": 1}}}
            asked = {**ASKED, "tool_calls": [parsed]}
            text = ChatTemplate(template).render([USER, asked, RESULT], TOOLS)
            assert fake.prompt == text and text.endswith(opens)
            answer = fake.ask("{}}", tools=TOOLS[:1], tool_choice="required")
            assert answer[:3] == ("", [("weather", "{}")], "")
            assert fake.prompt.endswith("\n</think>\n\n" + hermes.tool_call_prefix("weather"))
            assert fake.prompt.count("<think>") == fake.prompt.count("</think>") == 1
