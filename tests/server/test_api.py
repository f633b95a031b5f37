"""API behaviour through the official client: fields, streams, log-probabilities, metrics."""

import concurrent.futures
import dataclasses
import json

import openai
import pytest

from qwen_jax.chat.chatml import render
from qwen_jax.engine.request import SamplingParams
from qwen_jax.server.logprobs import json_logprob
from tests.generate.fake_engine import FakeEngine, default_answer, logprob_of
from tests.server.serving import BYTES, make_model, script, serve

HI = [{"role": "user", "content": "hi"}]
DEFAULTS = SamplingParams(max_tokens=40, top_p=0.8, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(script("Hello, 世界!"), max_length=400)
    with serve(engine, make_model(default_params=DEFAULTS, max_length=400)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_chat_completion_has_openais_fields_and_usage(client, server):
    answer = client.chat.completions.create(model="toy", messages=HI)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, 世界!")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    prompt = render(HI, BYTES, add_generation_prompt=True).ids.tolist()
    assert list(server.engine.added[-1].prompt) == prompt
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 14)
    assert usage.total_tokens == len(prompt) + 14
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_streamed_chat_joins_to_the_unstreamed_answer(client):
    events = list(
        client.chat.completions.create(
            model="toy", messages=HI, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    assert [e.choices[0].delta.role for e in events[:2]] == ["assistant"] * 2
    assert [e.choices[0].index for e in events[:2]] == [0, 1]
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 2 * 14
    assert all(e.usage is None for e in events[:-1])
    assert len({e.id for e in events}) == len({e.created for e in events}) == 1
    for index in range(2):
        mine = [e.choices[0] for e in events[:-1] if e.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == "Hello, 世界!"
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert len(mine) == 1 + len("Hello, 世界!") + 1


def test_stream_has_the_format_of_server_sent_events(server):
    """Each event is `data: JSON` and a blank line; the last one is [DONE]."""
    body = {"model": "toy", "messages": HI, "stream": True}
    answer = server.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    values = [json.loads(event.removeprefix("data: ")) for event in events]
    assert values[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert values[-1]["choices"][0]["delta"] == {}
    assert "usage" not in values[0]


def test_request_fields_override_the_models_defaults(client, server):
    client.chat.completions.create(model="toy", messages=HI)
    stop_ids = (BYTES.im_end_id, BYTES.im_start_id, BYTES.eod_id)
    expected = dataclasses.replace(DEFAULTS, stop_ids=stop_ids, logprobs_of="raw")
    assert server.engine.added[-1].params == expected
    client.chat.completions.create(
        model="toy",
        messages=HI,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        user="somebody",
        metadata={"a": "b"},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.3,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "logprobs_of": "sampled",
        },
    )
    assert server.engine.added[-1].params == SamplingParams(
        max_tokens=7,
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.3,
        presence_penalty=1,
        frequency_penalty=-1.5,
        seed=3,
        stop_ids=(7,),
        logprobs=2,
        logprobs_of="sampled",
    )


def test_null_means_the_default(client, server):
    nulls = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "stream", "max_tokens", "tools", "user")
    )
    body = {"model": "toy", "messages": HI, **nulls, "logit_bias": None, "functions": None}
    assert server.post("/v1/chat/completions", json=body).status_code == 200
    assert server.engine.added[-1].params.top_p == 0.8


def test_choices_have_consecutive_seeds(client, server):
    client.chat.completions.create(model="toy", messages=HI, n=3, seed=2**63 - 2)
    seeds = [request.params.seed for request in server.engine.added[-3:]]
    assert seeds == [2**63 - 2, 2**63 - 1, 0]
    client.chat.completions.create(model="toy", messages=HI, seed=-1)
    assert server.engine.added[-1].params.seed == 2**63 - 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_and_is_not_part_of_it(client, stream):
    answer = client.chat.completions.create(
        model="toy", messages=HI, stop=["界", "xyz"], stream=stream
    )
    if stream:
        events = [event.choices[0] for event in answer]
        text = "".join(event.delta.content or "" for event in events)
        assert events[-1].finish_reason == "stop"
    else:
        text = answer.choices[0].message.content
        # "世" is three tokens; those of the stop string are not counted.
        assert answer.usage.completion_tokens == len("Hello, 世".encode())
    assert text == "Hello, 世"


def test_max_tokens_ends_an_answer_and_its_default_is_cut_to_the_model_length(client, server):
    answer = client.chat.completions.create(model="toy", messages=HI, max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")
    # The model's default is reduced to what fits.
    long = [{"role": "user", "content": "x" * 350}]
    answer = client.chat.completions.create(model="toy", messages=long)
    assert server.engine.added[-1].params.max_tokens == 400 - answer.usage.prompt_tokens < 40


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_cover_every_token(client, stream):
    answer = client.chat.completions.create(
        model="toy", messages=HI, logprobs=True, top_logprobs=2, max_tokens=9, stream=stream
    )
    if stream:
        entries = [t for event in answer for t in (event.choices[0].logprobs or NoLogprobs).content]
    else:
        entries = answer.choices[0].logprobs.content
    tokens = "Hello, 世".encode()[:9]
    assert bytes(b for t in entries for b in t.bytes) == tokens
    assert [t.logprob for t in entries] == [logprob_of(t) - 1 for t in tokens]
    assert all([len(t.top_logprobs) == 2 for t in entries])
    assert [t.top_logprobs[1].logprob for t in entries] == [logprob_of(t) - 1 for t in tokens]
    assert entries[0].token == "H" and entries[-1].token == "\ufffd"


class NoLogprobs:
    content = ()


def test_content_parts_are_joined_and_developer_messages_become_system_turns(client, server):
    client.chat.completions.create(
        model="toy",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "<|im_end|>"},
        ],
    )
    text = BYTES.decode(server.engine.added[-1].prompt)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # A control token spelled out by a user is plain text.
    prompt = list(server.engine.added[-1].prompt)
    assert prompt.count(BYTES.im_end_id) == 4


def test_completion_encodes_control_tokens_only_if_allowed(client, server):
    answer = client.completions.create(model="toy", prompt="x<|im_end|>")
    assert answer.choices[0].text == "Hello, 世界!"
    assert answer.object == "text_completion"
    request = server.engine.added[-1]
    assert (request.params.max_tokens, request.params.top_p) == (16, 0.8)
    assert list(request.prompt) == list(b"x<|im_end|>")
    extra = {"allow_special_tokens": True}
    client.completions.create(model="toy", prompt="x<|im_end|>", extra_body=extra)
    assert list(server.engine.added[-1].prompt) == [*b"x", BYTES.im_end_id]


def test_completions_of_several_prompts_are_ordered_by_prompt(client):
    answer = client.completions.create(
        model="toy", prompt=["a", "bc"], n=2, max_tokens=2, echo=True
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == ["aHe", "aHe", "bcHe", "bcHe"]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 8)
    assert usage.prompt_tokens_details.cached_tokens == 1 + 2
    ids = client.completions.create(model="toy", prompt=[[97], [98, 99]], max_tokens=2)
    assert [c.text for c in ids.choices] == ["He", "He"]
    assert client.completions.create(model="toy", prompt=[97, 98]).usage.prompt_tokens == 2
    assert client.completions.create(model="toy", prompt="").usage.prompt_tokens == 1


def test_streamed_completion_joins_to_the_whole_text(client):
    events = list(client.completions.create(model="toy", prompt="a", stream=True, echo=True))
    assert "".join(e.choices[0].text for e in events) == "aHello, 世界!"
    assert [e.choices[0].finish_reason for e in events][-1] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_have_tokens_alternatives_and_offsets(client, stream):
    answer = client.completions.create(
        model="toy", prompt="a", logprobs=1, max_tokens=10, stream=stream
    )
    choices = [e.choices[0] for e in answer] if stream else answer.choices
    parts = [c.logprobs for c in choices if c.logprobs]
    tokens = "Hello, 世".encode()
    names = [*"Hello, ", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96"]
    assert [t for part in parts for t in part.tokens] == names
    logprobs = [logprob_of(t) for t in tokens]
    assert [p for part in parts for p in part.token_logprobs] == [p - 1 for p in logprobs]
    tops = [p for part in parts for p in part.top_logprobs]
    assert tops == [{name: p} for name, p in zip(names, logprobs, strict=True)]
    assert [o for part in parts for o in part.text_offset] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_models_lists_the_served_model_only(client, server):
    assert [m.id for m in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").created == 1700000000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_concurrent_requests_get_their_own_answers(server):
    engine = FakeEngine(default_answer, rows=5)
    with serve(engine) as other:
        client = other.client()

        def complete(i):
            text = f"prompt {i % 17}"
            answer = client.completions.create(
                model="toy", prompt=text, max_tokens=10, stream=i % 2 == 0
            )
            if i % 2 == 0:
                return text, "".join(event.choices[0].text for event in answer)
            return text, answer.choices[0].text

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(complete, range(100)))
    for text, answer in answers:
        ids = default_answer(type("R", (), {"prompt": tuple(text.encode())}))
        tokens = bytes(next(ids) for _ in range(10))
        assert answer == tokens.decode("utf-8", "replace")


def test_metrics_count_requests_tokens_and_latencies(client, server):
    def value(text, name):
        lines = [entry for entry in text.splitlines() if entry.startswith(name + " ")]
        assert len(lines) == 1, f"{name} occurs {len(lines)} times"
        return float(lines[0].split()[-1])

    before = server.get("/metrics").text
    client.chat.completions.create(model="toy", messages=HI, max_tokens=5)
    server.get("/nowhere/1")
    server.get("/nowhere/2")
    after = server.get("/metrics").text

    def increase(name):
        return value(after, name) - value(before, name)

    ended = 'qwen_requests_ended_total{finish="length"}'
    assert increase(ended) == increase("qwen_requests_submitted_total") == 1
    assert increase("qwen_new_tokens_total") == 5
    assert increase("qwen_time_to_first_token_seconds_count") == 1
    assert increase('qwen_request_seconds_bucket{le="+Inf"}') == 1
    chats = 'qwen_http_requests_total{path="/v1/chat/completions",status="200"}'
    assert increase(chats) == 1
    # Paths that do not exist have no series of their own.
    assert value(after, 'qwen_http_requests_total{path="other",status="404"}') >= 2
    assert "nowhere" not in after
    assert value(after, "qwen_pages_total") == 64


def test_base_model_continues_the_joined_text_of_a_chat():
    base = make_model(is_chat_model=False, stop=("界",))
    with serve(FakeEngine(script("Hello, 世界!")), base) as server:
        client = server.client()
        answer = client.chat.completions.create(
            model="toy",
            messages=[
                {"role": "user", "content": "Once "},
                {"role": "assistant", "content": "upon a "},
                {"role": "user", "content": "time"},
            ],
        )
        assert bytes(server.engine.added[-1].prompt) == b"Once upon a time"
        # The stop string of its generation config ends the answer.
        assert answer.choices[0].message.content == "Hello, 世"
        more = client.completions.create(
            model="toy", prompt="x", max_tokens=40, extra_body={"ignore_eos": True}
        )
        assert more.choices[0].text == "Hello, 世界!"
        tool = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(openai.BadRequestError, match="base model"):
            client.chat.completions.create(model="toy", messages=HI, tools=[tool])


def test_logprobs_that_json_cannot_represent_are_replaced():
    values = [json_logprob(x) for x in (float("-inf"), float("nan"), -1e30, -0.5)]
    assert values == [-9999.0, -9999.0, -9999.0, -0.5]
    assert json.loads(json.dumps(values, allow_nan=False)) == values
