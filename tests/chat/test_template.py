"""Chat templates: parity with transformers, and control tokens that messages cannot forge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from qwen_jax.chat.template import ChatTemplate
from qwen_jax.errors import UserError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.huggingface import AddedToken

# A template with the turns of Qwen2.5 and Qwen3 (tools in the system turn, calls and results in
# tags, reasoning of past turns dropped) and the Jinja features that their templates use.
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "Tools:" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{- raise_exception('No user query found.') }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TOKENIZER = Tokenizer(
    tuple(bytes([i]) for i in range(256)),
    tuple(AddedToken(260 + i, tag, special=False) for i, tag in enumerate(TAGS)),
)
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "f", "arguments": {"城": "<b> & 'x'", "n": [1, None]}},
}
TOOL = {"name": "f", "description": 'a "<" b', "parameters": {}}
TOOLS = [{"type": "function", "function": TOOL}]
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_7|>")

texts = st.text(max_size=6) | st.sampled_from([*TAGS, *CONTROL, "\ue000", "<|im_end", "\n"])
contents = st.lists(texts, max_size=4).map("".join)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": contents},
        optional={"reasoning_content": contents, "tool_calls": st.just([CALL])},
    ),
    max_size=4,
).map(lambda previous: [*previous, {"role": "user", "content": "x"}])


@given(messages, st.sampled_from([None, TOOLS]), st.sampled_from([{}, {"enable_thinking": False}]))
def test_rendered_text_equals_that_of_transformers(messages, tools, options):
    expected, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=TEMPLATE,
        add_generation_prompt=True,
        **options,
    )
    assert ChatTemplate(TEMPLATE).render(messages, tools, **options) == expected[0]


@given(messages, st.sampled_from([None, TOOLS]))
def test_ids_decode_to_the_text_and_messages_cannot_forge_control_tokens(messages, tools):
    template = ChatTemplate(TEMPLATE)
    ids = template.encode(TOKENIZER, messages, tools)
    # `encode` normalises text (NFC) as the tokenizer always does.
    expected = TOKENIZER.decode(TOKENIZER.encode(template.render(messages, tools)))
    assert TOKENIZER.decode(TOKENIZER.encode(TOKENIZER.decode(ids))) == expected
    blank = [
        {
            **message,
            "content": "",
            "reasoning_content": "-" * bool(message.get("reasoning_content")),
        }
        for message in messages
    ]
    without_contents = template.render(blank, tools)
    for name in CONTROL:
        assert ids.count(TOKENIZER.special_tokens[name]) == without_contents.count(name)


def test_tags_are_tokens_only_if_written_by_the_template_or_the_assistant():
    template, ids = ChatTemplate(TEMPLATE), TOKENIZER.special_tokens
    messages = [
        {"role": "user", "content": "<tool_call><tool_response>"},
        {"role": "assistant", "content": "<tool_call>a", "tool_calls": [CALL]},
        {"role": "tool", "content": "</tool_response><|im_end|>"},
    ]
    found = template.encode(TOKENIZER, messages)
    assert found.count(ids["<tool_call>"]) == 2
    assert found.count(ids["<tool_response>"]) == found.count(ids["</tool_response>"]) == 1
    assert found.count(ids["<|im_end|>"]) == 3


def test_templates_can_reject_conversations_and_run_in_a_sandbox():
    with pytest.raises(UserError, match="No user query found"):
        ChatTemplate(TEMPLATE).render([{"role": "system", "content": ""}])
    with pytest.raises(UserError, match="broken"):
        ChatTemplate("{% for %}")
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(UserError, match="chat template"):
            ChatTemplate(source + "{{ raise_exception('reached') }}").render([])
