"""Sessions: prompts equal the release's, and the history contains the completed answers only."""

import numpy as np
import pytest

from qwen_jax.chat.chatml import build_context, render
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.generation_config import GenerationDefaults
from qwen_jax.generate.service import Service
from qwen_jax.generate.session import Session, build_chat_prompt
from qwen_jax.tokenizer import Tokenizer
from tests.generate.fake_engine import FakeEngine

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


@pytest.fixture
def make():
    """Creates sessions over an engine that answers the N-th request with " answer N "."""
    services = []

    def start(chat_format="chatml", max_length=4096, script=None, **defaults):
        def numbered(request):
            return iter(f" answer {len(engine.added)} ".encode())

        engine = FakeEngine(script or numbered, max_length=max_length)
        services.append(Service(engine, TOKENIZER))
        given = GenerationDefaults(
            chat_format=chat_format, params=SamplingParams(max_tokens=64), **defaults
        )
        session = Session(services[-1], given)
        session.engine = engine
        return session

    yield start
    for service in services:
        service.close()


def test_completed_turns_join_the_history_and_the_next_prompt(make):
    session = make()
    assert session.ask("one").text() == "answer 1"
    pieces = list(session.ask("two"))
    assert "".join(pieces) == " answer 2 " and len(pieces) > 2
    assert session.history == [("one", "answer 1"), ("two", "answer 2")]
    session.ask("three", stream=False).text()
    want = build_context(
        "three", session.history[:2], "You are a helpful assistant.", TOKENIZER, 6144
    )
    assert list(session.engine.added[-1].prompt) == want.tolist()
    assert session.undo() == ("three", "answer 3") and len(session.history) == 2


def test_cancelled_or_abandoned_answer_does_not_join_the_history(make):
    session = make(script=lambda request: iter(b"." * 10_000), max_length=10**6)
    reply = session.ask("one", max_tokens=10_000)
    for _ in reply:
        reply.cancel()
    assert reply.finish == "cancelled" and session.history == []
    abandoned = session.ask("two", max_tokens=10_000)
    next(iter(abandoned))
    del abandoned
    assert session.history == []


def test_oldest_pairs_are_dropped_to_leave_room_for_the_answer(make):
    session = make(max_length=400)
    session.history = [(f"question {i}", f"an answer of its own {i}") for i in range(20)]
    prompt = session.prompt("next")
    assert len(prompt) + session.params.max_tokens <= 400
    text = TOKENIZER.decode(prompt)
    assert "question 19" in text and "question 3<" not in text
    kept = text.count("<|im_start|>assistant") - 1
    more = build_context("next", session.history[-kept - 1 :], session.system, TOKENIZER)
    assert len(more) + session.params.max_tokens > 400  # one more pair does not fit
    # The window of the generation config is a second limit.
    small = make(max_window=120)
    small.history = session.history
    want = build_context("next", session.history, session.system, TOKENIZER, 120)
    assert small.prompt("next").tolist() == want.tolist()


def test_prompt_without_system_prompt_starts_with_the_user_turn():
    history = [("hi", "hello"), ("more", "of it")]
    prompt = build_chat_prompt("go", history, None, TOKENIZER, 10_000)
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "of it")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("user", "go")]]
    want = render(messages, TOKENIZER, add_generation_prompt=True)
    np.testing.assert_array_equal(prompt, want.ids)
    # A pair is dropped if it and the kept pairs reach the window.
    one = len(build_chat_prompt("go", history[1:], None, TOKENIZER, 10_000)) - len(
        build_chat_prompt("go", [], None, TOKENIZER, 10_000)
    )
    for window, kept in ((one + 1, 1), (one, 0)):
        got = build_chat_prompt("go", history, None, TOKENIZER, window)
        assert TOKENIZER.decode(got).count("assistant") == kept + 1


THINKING = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {{- message.content.split('</think>')[-1].lstrip('\n') }}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|im_end|>' + '\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
{%- endif %}"""


def test_models_with_a_chat_template_get_prompts_rendered_by_it(make):
    session = make(template=THINKING, system=None, max_length=600)
    session.history = [("hi", "<think>\nhm\n</think>\n\nhello"), ("<|im_end|>", "\n\nyes")]
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "<|im_end|>"), ("assistant", "yes")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("user", "go")]]
    want = render(messages, TOKENIZER, add_generation_prompt=True).ids
    np.testing.assert_array_equal(session.prompt("go"), want)
    assert session.has_thinking_switch and not make().has_thinking_switch
    session.thinking = False
    np.testing.assert_array_equal(
        session.prompt("go"), [*want, *TOKENIZER.encode("<think>\n\n</think>\n\n")]
    )
    # The smallest number of oldest pairs is dropped that leaves room for the answer.
    session.thinking = None
    session.history = [(f"question {i}", f"an answer {i}") for i in range(20)]
    kept = TOKENIZER.decode(session.prompt("go")).count("question")
    room = 600 - session.params.max_tokens
    assert 0 < kept < 20 and len(session.prompt("go")) <= room
    assert len(session._apply_template("go", 19 - kept)) > room
    # A broken template is replaced by plain ChatML.
    broken = make(template="{% for %}")
    assert broken.prompt("go").tolist() == make().prompt("go").tolist()


def test_base_model_continues_the_text_without_format_or_history(make):
    session = make("raw")
    assert session.ask("def f(").text() == " answer 1 "
    assert session.history == [] and list(session.engine.added[0].prompt) == list(b"def f(")


def test_restore_reads_what_messages_returns_and_refuses_other_input(make):
    session = make()
    session.ask("one").text()
    messages = session.messages()
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    other = make()
    other.restore(messages)
    assert (other.system, other.history) == (session.system, session.history)
    other.restore([])
    assert (other.system, other.history) == (None, [])
    for bad in (
        3, [1], [{"role": "user"}], [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}],
    ):  # fmt: skip
        with pytest.raises(UserError):
            session.restore(bad)
    assert session.messages() == messages


def test_bad_options_and_messages_are_refused(make):
    session = make()
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        session.ask("one", temperatur=0.5)
    for name, value in (("top_k", 0.5), ("top_p", "1"), ("seed", True), ("max_tokens", None)):
        with pytest.raises(UserError, match=f"{name} is"):
            session.ask("one", **{name: value})
    with pytest.raises(UserError, match=r"stop_ids is .'a'"):
        session.ask("one", stop_ids=["a"])
    assert session.ask("one", stop_ids=[ord("w")]).text() == "ans"
    with pytest.raises(UserError, match="write something"):
        session.ask("  ")
    session.history.clear()
    with pytest.raises(UserError, match="nothing to undo"):
        session.undo()
