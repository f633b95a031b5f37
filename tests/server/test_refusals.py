"""Invalid requests get errors in OpenAI's format that name the field, its value and a remedy."""

import contextlib
import json
from typing import NamedTuple

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.server.config import ServerLimits
from tests.generate.fake_engine import FakeEngine
from tests.server.serving import make_model, script, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(script("ok"), max_length=100)
    with serve(engine, make_model(max_length=100), ServerLimits(max_body_bytes=5000)) as server:
        yield server


def chat(**fields):
    return json.dumps({"model": "toy", "messages": HI, **fields}).encode()


def text(**fields):
    return json.dumps({"model": "toy", "prompt": "hi", **fields}).encode()


USER = {"role": "user", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


class Refusal(NamedTuple):
    """An invalid request and the error that it must get.

    Attributes:
      path, body: the request.
      param, code: fields of the error object.
      words: a part of the error's message.
      status: HTTP status of the response.
    """

    path: str
    body: bytes
    param: str | None
    code: str
    words: str = ""
    status: int = 400


def chat_refusal(param, code, words="", **fields):
    """Returns the refusal of a chat request with the given fields."""
    return Refusal(CHAT, chat(**fields), param, code, words)


def completion_refusal(param, code, words="", **fields):
    """Returns the refusal of a completion request with the given fields."""
    return Refusal(TEXT, text(**fields), param, code, words)


def message_refusal(param, code, words, *messages):
    """Returns the refusal of a chat request with the given messages."""
    return Refusal(CHAT, chat(messages=list(messages)), param, code, words)


REFUSED = {
    # The body as a whole.
    "invalid JSON": Refusal(CHAT, b"{", None, "invalid_json", "line 1 column 2"),
    "invalid UTF-8": Refusal(CHAT, b'{"model": "\xff"}', None, "invalid_utf8", "byte 11"),
    "NaN": Refusal(CHAT, b'{"temperature": NaN}', None, "invalid_json", "NaN"),
    "deeply nested body": Refusal(CHAT, b"[" * 4000, None, "invalid_json"),
    "body is a list": Refusal(CHAT, b"[]", None, "invalid_type", "must be an object"),
    "empty body": Refusal(CHAT, b"", None, "invalid_json"),
    "integer with too many digits": Refusal(
        CHAT, b'{"seed": ' + b"9" * 4400 + b"}", None, "invalid_json"
    ),
    "body too large": Refusal(
        CHAT, chat(user="x" * 5000), None, "request_too_large", "5,000", status=413
    ),
    # The model and unknown or unsupported fields.
    "missing model": Refusal(TEXT, b'{"prompt": "x"}', "model", "missing_parameter", "missing"),
    "unknown model": Refusal(
        TEXT, text(model="toys"), "model", "model_not_found", "'toy'", status=404
    ),
    "misspelt field": chat_refusal(
        "temprature", "unknown_parameter", "did you mean 'temperature'?", temprature=1
    ),
    "field of the other endpoint": completion_refusal("messages", "unknown_parameter", messages=HI),
    "long unknown field": chat_refusal("x" * 100, "unknown_parameter", "...", **{"x" * 300: 1}),
    "unknown field with a lone surrogate": Refusal(
        CHAT, b'{"\\ud800": 1, "model": "toy"}', "?", "unknown_parameter"
    ),
    "response_format": chat_refusal(
        "response_format",
        "unsupported_parameter",
        "json_object",
        response_format={"type": "json_object"},
    ),
    "logit_bias": chat_refusal("logit_bias", "unsupported_parameter", "leave", logit_bias={"5": 1}),
    "audio": chat_refusal("audio", "unsupported_parameter", "text only", audio={"voice": "x"}),
    "functions": chat_refusal("functions", "unsupported_parameter", "tools", functions=[]),
    # Messages.
    "missing messages": Refusal(
        CHAT, b'{"model": "toy"}', "messages", "missing_parameter", "missing"
    ),
    "messages are a string": chat_refusal("messages", "invalid_type", "a list", messages="hi"),
    "no messages": message_refusal("messages", "invalid_value", "at least 1"),
    "unknown role": message_refusal(
        "messages[0].role", "invalid_value", '"bot"', {"role": "bot", "content": "x"}
    ),
    "content is a number": message_refusal(
        "messages[1].content",
        "invalid_type",
        "a string or a list",
        USER,
        {"role": "user", "content": 5},
    ),
    "image content": message_refusal(
        "messages[0].content[0].type",
        "unsupported_content",
        "text only",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    ),
    "misspelt field of a message": message_refusal(
        "messages[0].contents", "unknown_parameter", "'content'", {"role": "user", "contents": "x"}
    ),
    "missing content": message_refusal(
        "messages[0].content", "missing_parameter", "missing", {"role": "user"}
    ),
    "last message is the assistant's": message_refusal(
        "messages[1].role", "invalid_value", "last", USER, {"role": "assistant", "content": "x"}
    ),
    "tool result without a call": message_refusal(
        "messages[1].tool_call_id",
        "invalid_value",
        "no earlier call",
        USER,
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
    ),
    "tool result without an id": message_refusal(
        "messages[1].tool_call_id",
        "missing_parameter",
        "the id of the call",
        USER,
        {"role": "tool", "content": "x"},
    ),
    "tool call without a result": message_refusal(
        "messages[1].tool_calls",
        "invalid_value",
        "no result",
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        USER,
    ),
    "tool call by the user": message_refusal(
        "messages[0].tool_calls", "invalid_value", "assistant", {**USER, "tool_calls": [CALL]}
    ),
    # Types and ranges of sampling fields.
    "number as a string": chat_refusal("temperature", "invalid_type", "a number", temperature="1"),
    "boolean as a number": chat_refusal("stream", "invalid_type", "true or false", stream=1),
    "integer as a boolean": chat_refusal("n", "invalid_type", "an integer", n=True),
    "integer as a fraction": chat_refusal(
        "max_tokens", "invalid_type", "an integer", max_tokens=1.5
    ),
    "temperature too high": chat_refusal(
        "temperature", "invalid_value", "at most 2", temperature=2.1
    ),
    "top_p of 0": chat_refusal("top_p", "invalid_value", "above 0", top_p=0),
    "max_tokens of 0": chat_refusal("max_tokens", "invalid_value", "1 or more", max_tokens=0),
    "seed out of range": chat_refusal("seed", "invalid_value", seed=2**80),
    "too many stop strings": chat_refusal("stop", "invalid_value", "at most 4", stop=list("abcde")),
    "empty stop string": chat_refusal("stop", "invalid_value", "empty", stop=""),
    "stop is a number": chat_refusal("stop[1]", "invalid_type", "a string", stop=["a", 5]),
    "too many choices": chat_refusal("n", "invalid_value", "at most 16", n=99),
    "too many stop ids": completion_refusal(
        "stop_token_ids", "invalid_value", "8", stop_token_ids=[1] * 9
    ),
    "too many stop ids with those of the model": chat_refusal(
        "stop_token_ids", "invalid_value", "at most 5", stop_token_ids=[1, 2, 3, 4, 5, 6]
    ),
    "top_logprobs without logprobs": chat_refusal(
        "top_logprobs", "invalid_value", "true", top_logprobs=2
    ),
    "too many top_logprobs": chat_refusal(
        "top_logprobs", "invalid_value", "at most 20", logprobs=True, top_logprobs=21
    ),
    "echo with logprobs": completion_refusal(
        "echo", "unsupported_parameter", "logprobs", echo=True, logprobs=1
    ),
    # Tools.
    "type of a tool": chat_refusal(
        "tools[0].type", "invalid_value", "'function'", tools=[{**TOOL, "type": "x"}]
    ),
    "name of a tool": chat_refusal(
        "tools[0].function.name",
        "invalid_value",
        "letters",
        tools=[{"type": "function", "function": {"name": "a b"}}],
    ),
    "tool without a function": chat_refusal(
        "tools[0].function", "missing_parameter", "missing", tools=[{"type": "function"}]
    ),
    "duplicate tool": chat_refusal("tools", "invalid_value", "once", tools=[TOOL, TOOL]),
    "tool_choice without tools": chat_refusal(
        "tool_choice", "invalid_value", "no tools", tool_choice="required"
    ),
    "tool_choice of an unknown tool": chat_refusal(
        "tool_choice.function.name",
        "invalid_value",
        "'g'",
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "g"}},
    ),
    "unknown tool_choice": chat_refusal(
        "tool_choice", "invalid_value", "'required'", tools=[TOOL], tool_choice="always"
    ),
    # Prompts.
    "prompt too long": message_refusal(
        "messages",
        "context_length_exceeded",
        "supports 100 in total",
        {"role": "user", "content": "x" * 200},
    ),
    "prompt and answer too long": completion_refusal(
        "prompt", "context_length_exceeded", "99 new", max_tokens=99
    ),
    "no prompts": completion_refusal("prompt", "invalid_value", "0 prompts", prompt=[]),
    "prompts of text and ids": completion_refusal(
        "prompt[1]", "invalid_type", "a string", prompt=["a", 5]
    ),
    "token id out of range": completion_refusal("prompt", "invalid_value", "999", prompt=[5, 999]),
    "negative token id": completion_refusal("prompt", "invalid_value", "-1", prompt=[[-1]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_request_gets_an_error_about_the_offending_field(server, name):
    expected = REFUSED[name]
    answer = server.post(expected.path, content=expected.body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (expected.status, expected.param)
    assert error["code"] == expected.code
    assert error["type"] == "invalid_request_error"
    assert expected.words in error["message"] and error["message"].endswith(".")
    assert len(error["message"]) < 400


def test_unknown_urls_methods_and_media_types_get_json_errors(server):
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
            415,
            "unsupported_media_type",
        ),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("has_content_length", [True, False])
def test_client_that_sends_an_oversized_body_receives_the_413(server, has_content_length):
    """Even while it is still sending; far beyond the limit, the connection is closed instead."""

    def pieces(size):
        return b"x" * size if has_content_length else (b"x" * 1000 for _ in range(size // 1000))

    answer = server.post(CHAT, content=pieces(39_000), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    with contextlib.suppress(httpx.TransportError):
        answer = server.post(CHAT, content=pieces(50_000_000), headers=JSON)
        assert answer.status_code == 413
    assert server.post(CHAT, content=chat(), headers=JSON).status_code == 200


def test_the_official_client_raises_its_own_error_classes(server):
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
        "messages",
        "prompt",
        "stop",
        "tools",
        "tool_choice",
        "n",
        "temperature",
        "logprobs",
        "stream_options",
        "max_tokens",
        "stop_token_ids",
        "logit_bias",
        "chat_template_kwargs",
    ]
)


@given(st.sampled_from([CHAT, TEXT]), st.dictionaries(FIELDS, ANYTHING, max_size=3))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_arbitrary_field_values_get_200_or_a_400_about_one_of_them(server, path, fields):
    base = {"model": "toy", "messages": HI} if path == CHAT else {"model": "toy", "prompt": "x"}
    answer = server.post(path, content=json.dumps({**base, **fields}).encode(), headers=JSON)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"] and error["param"].partition("[")[0].partition(".")[0] in fields
