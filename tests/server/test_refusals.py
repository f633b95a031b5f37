"""What can't be served is refused in OpenAI's format, with the field, the value and the remedy."""

import contextlib
import json

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.server.config import Limits
from tests.generate.fake_engine import FakeEngine
from tests.server.serving import model, script, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(script("ok"), max_length=100)
    with serve(engine, model(max_length=100), Limits(max_body_bytes=5000)) as running:
        yield running


def chat(**fields):
    return json.dumps({"model": "toy", "messages": HI, **fields}).encode()


def text(**fields):
    return json.dumps({"model": "toy", "prompt": "hi", **fields}).encode()


def said(*messages):
    return chat(messages=list(messages))


USER = {"role": "user", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}

# path, body, status, param, code, words of the message
REFUSED = {
    "not JSON": (CHAT, b"{", 400, None, "invalid_json", "line 1 column 2"),
    "not UTF-8": (CHAT, b'{"model": "\xff"}', 400, None, "invalid_utf8", "byte 11"),
    "NaN": (CHAT, b'{"temperature": NaN}', 400, None, "invalid_json", "NaN"),
    "nested": (CHAT, b"[" * 4000, 400, None, "invalid_json", ""),
    "a list": (CHAT, b"[]", 400, None, "invalid_type", "must be an object"),
    "empty": (CHAT, b"", 400, None, "invalid_json", ""),
    "no messages": (CHAT, b'{"model": "toy"}', 400, "messages", "missing_parameter", "missing"),
    "no model": (TEXT, b'{"prompt": "x"}', 400, "model", "missing_parameter", "missing"),
    "messages are text": (CHAT, chat(messages="hi"), 400, "messages", "invalid_type", "a list"),
    "no message": (CHAT, said(), 400, "messages", "invalid_value", "at least 1"),
    "a role": (
        *(CHAT, said({"role": "bot", "content": "x"}), 400, "messages[0].role", "invalid_value"),
        '"bot"',
    ),
    "content is a number": (
        *(CHAT, said(USER, {"role": "user", "content": 5}), 400, "messages[1].content"),
        *("invalid_type", "a string or a list"),
    ),
    "an image": (
        CHAT,
        said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        *(400, "messages[0].content[0].type", "unsupported_content", "text only"),
    ),
    "a field of a message": (
        *(CHAT, said({"role": "user", "contents": "x"}), 400, "messages[0].contents"),
        *("unknown_parameter", "'content'"),
    ),
    "no content": (
        *(CHAT, said({"role": "user"}), 400, "messages[0].content", "missing_parameter", "missing"),
    ),
    "the assistant is last": (
        *(CHAT, said(USER, {"role": "assistant", "content": "x"}), 400, "messages[1].role"),
        *("invalid_value", "last"),
    ),
    "a result without a call": (
        *(CHAT, said(USER, {"role": "tool", "tool_call_id": "c1", "content": "x"}), 400),
        *("messages[1].tool_call_id", "invalid_value", "no earlier call"),
    ),
    "a result without its id": (
        *(CHAT, said(USER, {"role": "tool", "content": "x"}), 400, "messages[1].tool_call_id"),
        *("missing_parameter", "which call"),
    ),
    "a call without a result": (
        *(CHAT, said(USER, {"role": "assistant", "tool_calls": [CALL]}, USER), 400),
        *("messages[1].tool_calls", "invalid_value", "no result"),
    ),
    "a call of the user's": (
        *(CHAT, said({**USER, "tool_calls": [CALL]}), 400, "messages[0].tool_calls"),
        *("invalid_value", "assistant"),
    ),
    "a misspelt field": (
        *(CHAT, chat(temprature=1), 400, "temprature", "unknown_parameter"),
        "did you mean 'temperature'?",
    ),
    "a field of the other kind": (
        *(TEXT, text(messages=HI), 400, "messages", "unknown_parameter", ""),
    ),
    "a number as text": (
        *(CHAT, chat(temperature="1"), 400, "temperature", "invalid_type", "a number"),
    ),
    "a flag as a number": (CHAT, chat(stream=1), 400, "stream", "invalid_type", "true or false"),
    "a count as a flag": (CHAT, chat(n=True), 400, "n", "invalid_type", "an integer"),
    "a fraction": (CHAT, chat(max_tokens=1.5), 400, "max_tokens", "invalid_type", "an integer"),
    "too hot": (CHAT, chat(temperature=2.1), 400, "temperature", "invalid_value", "at most 2"),
    "top_p of nothing": (CHAT, chat(top_p=0), 400, "top_p", "invalid_value", "above 0"),
    "no tokens": (CHAT, chat(max_tokens=0), 400, "max_tokens", "invalid_value", "1 or more"),
    "a huge number": (CHAT, chat(seed=2**80), 400, "seed", "invalid_value", ""),
    "an endless number": (CHAT, b'{"seed": ' + b"9" * 4400 + b"}", 400, None, "invalid_json", ""),
    "five stop strings": (
        CHAT,
        chat(stop=list("abcde")),
        400,
        "stop",
        "invalid_value",
        "at most 4",
    ),
    "an empty stop string": (CHAT, chat(stop=""), 400, "stop", "invalid_value", "without"),
    "a stop number": (CHAT, chat(stop=["a", 5]), 400, "stop[1]", "invalid_type", "a string"),
    "many choices": (CHAT, chat(n=99), 400, "n", "invalid_value", "at most 16"),
    "top_logprobs alone": (
        CHAT,
        chat(top_logprobs=2),
        400,
        "top_logprobs",
        "invalid_value",
        "true",
    ),
    "many logprobs": (
        *(CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value"),
        "at most 20",
    ),
    "a schema": (
        *(CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
        *("unsupported_parameter", "json_object"),
    ),
    "a bias": (
        *(CHAT, chat(logit_bias={"5": 1}), 400, "logit_bias", "unsupported_parameter", "leave"),
    ),
    "sound": (
        *(CHAT, chat(audio={"voice": "x"}), 400, "audio", "unsupported_parameter", "text only"),
    ),
    "functions": (CHAT, chat(functions=[]), 400, "functions", "unsupported_parameter", "tools"),
    "a tool's type": (
        *(CHAT, chat(tools=[{**TOOL, "type": "x"}]), 400, "tools[0].type", "invalid_value"),
        "'function'",
    ),
    "a tool's name": (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        *(400, "tools[0].function.name", "invalid_value", "letters"),
    ),
    "a tool without a function": (
        *(CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
        *("missing_parameter", "missing"),
    ),
    "a tool twice": (CHAT, chat(tools=[TOOL, TOOL]), 400, "tools", "invalid_value", "once"),
    "a choice without tools": (
        *(CHAT, chat(tool_choice="required"), 400, "tool_choice", "invalid_value", "no tools"),
    ),
    "a choice of no tool": (
        CHAT,
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        *(400, "tool_choice.function.name", "invalid_value", "'g'"),
    ),
    "a choice": (
        *(CHAT, chat(tools=[TOOL], tool_choice="always"), 400, "tool_choice", "invalid_value"),
        "'required'",
    ),
    "a long prompt": (
        *(CHAT, said({"role": "user", "content": "x" * 200}), 400, "messages"),
        *("context_length_exceeded", "takes 100 together"),
    ),
    "a long answer": (
        *(TEXT, text(max_tokens=99), 400, "prompt", "context_length_exceeded", "99 new"),
    ),
    "no prompts": (TEXT, text(prompt=[]), 400, "prompt", "invalid_value", "0 prompts"),
    "a prompt of both": (TEXT, text(prompt=["a", 5]), 400, "prompt[1]", "invalid_type", "a string"),
    "an id": (TEXT, text(prompt=[5, 999]), 400, "prompt", "invalid_value", "999"),
    "a negative id": (TEXT, text(prompt=[[-1]]), 400, "prompt", "invalid_value", "-1"),
    "a stop id": (TEXT, text(stop_token_ids=[1] * 9), 400, "stop_token_ids", "invalid_value", "8"),
    "stop ids": (
        *(CHAT, chat(stop_token_ids=[1, 2, 3, 4, 5, 6]), 400, "stop_token_ids", "invalid_value"),
        "at most 5",
    ),
    "echo with logprobs": (
        *(TEXT, text(echo=True, logprobs=1), 400, "echo", "unsupported_parameter", "logprobs"),
    ),
    "another model": (TEXT, text(model="toys"), 404, "model", "model_not_found", "'toy'"),
    "a long body": (CHAT, chat(user="x" * 5000), 413, None, "request_too_large", "5,000"),
    "a long name": (CHAT, chat(**{"x" * 300: 1}), 400, "x" * 100, "unknown_parameter", "..."),
    "half a character": (
        *(CHAT, b'{"\\ud800": 1, "model": "toy"}', 400, "?", "unknown_parameter", ""),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(server, case):
    path, body, status, param, code, words = REFUSED[case]
    answer = server.post(path, content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"] and error["message"].endswith(".")
    assert len(error["message"]) < 400


def test_routes_and_methods(server):
    for answer, status, code in (
        (server.get("/v2"), 404, "unknown_url"),
        (server.get(CHAT), 405, "method_not_allowed"),
        (server.post("/v1/models"), 405, "method_not_allowed"),
        (server.get("/v1/models/x"), 404, "model_not_found"),
        (server.get("/page/../app.py"), 404, "unknown_url"),
        (server.get("/page/none.js"), 404, "unknown_url"),
        (server.post(CHAT, content=chat()), 415, "unsupported_media_type"),
        (
            server.post(CHAT, content=chat(), headers={"content-type": "text/plain"}),
            *(415, "unsupported_media_type"),
        ),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("known", [True, False])
def test_a_body_that_is_too_long(server, known):
    """Its sender gets to see why, also when it is still sending; what has no end is cut off."""

    def pieces(size):
        return b"x" * size if known else (b"x" * 1000 for _ in range(size // 1000))

    answer = server.post(CHAT, content=pieces(39_000), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    with contextlib.suppress(httpx.TransportError):
        answer = server.post(CHAT, content=pieces(50_000_000), headers=JSON)
        assert answer.status_code == 413
    assert server.post(CHAT, content=chat(), headers=JSON).status_code == 200


def test_the_official_client_understands(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy", messages=HI, temperature=5)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=HI)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "x"]), inner
        )
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("messages", "prompt", "stop", "tools", "tool_choice", "n", "temperature", "logprobs"),
        *("stream_options", "max_tokens", "stop_token_ids", "logit_bias", "chat_template_kwargs"),
    ]
)


@given(st.sampled_from([CHAT, TEXT]), st.dictionaries(FIELDS, ANYTHING, max_size=3))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_comes_is_answered_or_refused(server, path, fields):
    base = {"model": "toy", "messages": HI} if path == CHAT else {"model": "toy", "prompt": "x"}
    answer = server.post(path, content=json.dumps({**base, **fields}).encode(), headers=JSON)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"] and error["param"].partition("[")[0].partition(".")[0] in fields
