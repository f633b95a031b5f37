"""Access control, admission limits, client disconnects, timeouts, and draining."""

import contextlib
import http.client
import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest

from qwen_jax.errors import UserError
from qwen_jax.server.config import ServerLimits
from qwen_jax.server.http_server import bind_socket
from tests.generate.fake_engine import FakeEngine, default_answer
from tests.server.serving import make_model, script, serve

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
BODY = {"model": "toy", "messages": HI}
FOREVER = {**BODY, "max_tokens": 4000, "ignore_eos": True}
KEY = "sesame-open-1234"


@contextlib.contextmanager
def open_request(server, body, path=CHAT):
    """Yields a connection with a sent request, which can be closed before the response ends."""
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", path, json.dumps(body).encode(), headers)
    try:
        yield connection
    finally:
        connection.close()


def disconnect(connection):
    """Closes the socket without notice, as when the client process is killed."""
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.fixture
def slow():
    """An engine with long answers at 2 ms per token."""

    def answer(request):
        for token in default_answer(request):
            time.sleep(0.002)
            yield token

    return FakeEngine(answer, max_length=100_000)


@pytest.mark.parametrize("keys", [(KEY,), ("another-key", KEY)])
def test_v1_requires_an_api_key(keys):
    with serve(FakeEngine(script("ok")), limits=ServerLimits(api_keys=keys)) as server:
        for headers in ({}, {"authorization": KEY}, {"authorization": "Basic " + KEY}):
            answer = server.post(CHAT, json=BODY, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "missing_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in (KEY[:-1], KEY + "x", "KEY", "é"):
            header = f"Bearer {wrong}".encode()
            answer = server.get("/v1/models", headers={b"authorization": header})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        assert server.client(api_key=KEY).models.list()
        # The page, health and metrics need no key.
        assert [server.get(path).status_code for path in ("/", "/health", "/metrics")] == [200] * 3
        # The key is checked before anything else.
        assert server.post(CHAT, content=b"{").status_code == 401
        assert server.get("/v1/nothing").status_code == 401
    assert server.engine.added == []


def test_access_log_contains_neither_keys_nor_text(caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        with serve(
            FakeEngine(script("the answer")), limits=ServerLimits(api_keys=(KEY,))
        ) as server:
            client = server.client(api_key=KEY)
            secret = [{"role": "user", "content": "the question"}]
            client.chat.completions.create(model="toy", messages=secret)
            list(client.chat.completions.create(model="toy", messages=secret, stream=True))
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="toy", messages=secret, temperature=9)
            server.get("/x?key=" + KEY)
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)
    lines = [r.getMessage() for r in caplog.records if r.name == "absl"]
    assert [entry for entry in lines if f"POST '{CHAT}' 200" in entry and "new=10" in entry] != []
    assert any(f"POST '{CHAT}' 400" in entry for entry in lines)
    assert any("GET '/x' 404" in entry for entry in lines)
    for entry in lines:
        assert KEY not in entry and "question" not in entry and "answer" not in entry


def test_requests_above_max_requests_get_429(slow):
    with serve(slow, limits=ServerLimits(max_requests=2)) as server:
        with open_request(server, FOREVER), open_request(server, FOREVER):
            server.wait_until(lambda: server.state.gate.active == 2)
            answer = server.post(CHAT, json=BODY)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "overloaded"
            assert server.get("/v1/models").status_code == 200
        server.wait_until(lambda: server.state.gate.active == 0)
        short = {**BODY, "max_tokens": 2}
        assert server.post(CHAT, json=short).status_code == 200


def test_answers_above_max_waiting_get_429_or_400():
    engine = FakeEngine(script("ok"), rows=1)
    engine.hold()
    with serve(engine, max_waiting=2) as server:
        with open_request(server, BODY), open_request(server, BODY):
            server.wait_until(lambda: server.service.stats().waiting == 2)
            # If one of two choices does not fit in the queue, none is submitted.
            answer = server.post(CHAT, json={**BODY, "n": 2})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            # More choices than the queue can ever hold are an invalid request.
            answer = server.post(CHAT, json={**BODY, "n": 3})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
            with pytest.raises(openai.RateLimitError):
                server.client().chat.completions.create(model="toy", messages=HI)
            engine.release()
            server.wait_until(lambda: server.state.gate.active == 0)
        # The official client retries after the time given in Retry-After.
        assert server.client(max_retries=2).chat.completions.create(model="toy", messages=HI)
    assert server.service.stats().refused >= 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_client_disconnect_cancels_its_requests_in_the_engine(slow, stream, n):
    with (
        serve(slow) as server,
        open_request(server, {**FOREVER, "stream": stream, "n": n}) as connection,
    ):
        server.wait_until(lambda: server.service.stats().running == n)
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        disconnect(connection)
        server.wait_until(lambda: server.service.stats().running == 0)
        assert len(slow.cancelled) == n
        server.wait_until(lambda: server.state.gate.active == 0)
        assert server.get("/health").json()["active"] == 0


def test_client_disconnect_before_the_first_token_cancels_the_request(slow):
    slow.hold()
    with serve(slow) as server, open_request(server, {**FOREVER, "stream": True}) as connection:
        server.wait_until(lambda: slow.added)  # otherwise the engine has nothing to cancel
        disconnect(connection)
        server.wait_until(lambda: len(slow.cancelled) == 1)


def test_client_disconnects_at_any_point_of_a_stream_cancel_the_request():
    """Including the moment when a token arrives."""

    def answer(request):
        for token in default_answer(request):
            time.sleep(0.0005)
            yield token

    engine = FakeEngine(answer, max_length=10**6)
    with serve(engine, make_model(max_length=10**6)) as server:
        for i in range(25):
            body = {**FOREVER, "stream": True, "max_tokens": 10**5}
            with open_request(server, body) as connection:
                response = connection.getresponse()
                for _ in range(2 + 3 * i):
                    response.readline()
                # A request that the engine does not have yet would not be cancelled there.
                server.wait_until(lambda n=i + 1: len(engine.added) == n)
                disconnect(connection)
            server.wait_until(lambda n=i + 1: len(engine.cancelled) == n)
        server.wait_until(lambda: server.service.stats().running == 0)
        server.wait_until(lambda: server.state.gate.active == 0)
        assert len(engine.cancelled) == 25


def test_closing_a_stream_of_the_official_client_cancels_the_request(slow):
    with serve(slow) as server:
        stream = server.client().chat.completions.create(
            model="toy", messages=HI, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        server.wait_until(lambda: len(slow.cancelled) == 1)


def test_idle_stream_sends_keep_alive_comments(slow):
    slow.hold()
    with serve(slow, limits=ServerLimits(keep_alive_s=0.05)) as server:
        with open_request(server, {**BODY, "stream": True, "max_tokens": 3}) as connection:
            response = connection.getresponse()
            lines = []
            while lines.count(b": still working\n") < 2:
                lines.append(response.readline())
            slow.release()
            rest = response.read()
            assert rest.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in rest
        # The official client ignores the comments.
        slow.hold()
        threading.Timer(0.2, slow.release).start()
        client = server.client()
        events = client.chat.completions.create(model="toy", messages=HI, max_tokens=3, stream=True)
        assert len(list(events)) >= 3


def test_request_timeout_cancels_the_answer_with_504(slow):
    slow.hold()
    with serve(slow, limits=ServerLimits(request_timeout_s=0.2, keep_alive_s=0.05)) as server:
        answer = server.post(CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert "0.2 s" in answer.json()["error"]["message"]
        stream = server.client().chat.completions.create(model="toy", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match=r"0\.2 s"):
            list(stream)
        server.wait_until(lambda: len(slow.cancelled) == 2)


def test_engine_failure_ends_running_and_new_requests_with_an_error(slow):
    with serve(slow) as server:
        stream = server.client().chat.completions.create(model="toy", messages=HI, stream=True)
        slow.hold()
        next(iter(stream))
        slow.fail(RuntimeError("secret detail"))
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(stream)
        answer = server.post(CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
        assert "secret" not in answer.text
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_draining_finishes_running_answers_and_rejects_new_requests():
    engine = FakeEngine(script("Hello"))
    engine.hold()
    with (
        serve(engine, limits=ServerLimits(drain_s=20)) as server,
        open_request(server, BODY) as connection,
    ):
        server.wait_until(lambda: server.service.stats().waiting == 1)
        server.server.handle_exit(15, None)
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        answer = server.post(CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        engine.release()
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["message"]["content"] == "Hello"
        server.wait_until(lambda: not is_up(server))


def test_answers_still_running_after_the_drain_time_are_cancelled(slow):
    with serve(slow, limits=ServerLimits(drain_s=0.3)) as server:
        whole, stream = {**FOREVER}, {**FOREVER, "stream": True}
        with open_request(server, whole) as first, open_request(server, stream) as second:
            server.wait_until(lambda: server.service.stats().running == 2)
            started = time.monotonic()
            server.server.handle_exit(15, None)
            answer = first.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "draining")
            last = second.getresponse().read().split(b"\n\n")[-2]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "draining"
            server.wait_until(lambda: not is_up(server))
            assert 0.2 < time.monotonic() - started < 20
    assert len(slow.cancelled) == 2


def test_second_signal_cancels_running_answers_at_once(slow):
    with (
        serve(slow, limits=ServerLimits(drain_s=60)) as server,
        open_request(server, FOREVER) as connection,
    ):
        server.wait_until(lambda: server.service.stats().running == 1)
        server.server.handle_exit(15, None)
        server.server.handle_exit(15, None)
        assert connection.getresponse().status == 503


def is_up(server):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(server.url + "/health", timeout=5).status_code > 0
    return False


def test_cors_headers_are_sent_to_allowed_origins_only():
    origin = "https://chat.example"
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    with serve(FakeEngine(script("ok"))) as server:
        answer = server.http.options(CHAT, headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
        answer = server.post(CHAT, json=BODY, headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers
    with serve(FakeEngine(script("ok")), limits=ServerLimits(cors_origins=(origin,))) as server:
        answer = server.http.options(CHAT, headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
        other = server.http.options(CHAT, headers={**preflight, "origin": "https://else.example"})
        assert "access-control-allow-origin" not in other.headers


def test_requests_to_other_host_names_get_403():
    hosts = ServerLimits(allowed_hosts=("127.0.0.1", "localhost", "::1"))
    with serve(FakeEngine(script("ok")), limits=hosts) as server:
        assert server.get("/health").status_code == 200
        port = server.url.rpartition(":")[2]
        for host in (f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
            assert server.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:80", "[::2]"):
            answer = server.get("/health", headers={"host": host})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


def test_page_policy_blocks_content_from_other_origins():
    with serve(FakeEngine(script("ok"))) as server:
        for path in ("/", "/page/chat.js", "/page/chat.css"):
            answer = server.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "http" not in policy
            assert "http://" not in answer.text and "https://" not in answer.text


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_requests": 0}, "max_requests is 0"),
        ({"drain_s": -1}, "drain_s is -1"),
        ({"api_keys": ("short",)}, "8 or more"),
        ({"api_keys": ("schlüssel-bund",)}, "ASCII"),
    ],
)
def test_invalid_limits_raise_user_errors(fields, words):
    with pytest.raises(UserError, match=words):
        ServerLimits(**fields)


def test_address_in_use_or_unknown_raises_user_error():
    with contextlib.closing(bind_socket("127.0.0.1", 0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind_socket("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen on"):
        bind_socket("no-such-host.invalid", 80)


def test_client_that_does_not_read_its_stream_does_not_block_others(slow):
    with serve(slow) as server, open_request(server, {**FOREVER, "stream": True}):
        server.wait_until(lambda: server.service.stats().running == 1)
        for _ in range(5):
            assert server.post(CHAT, json={**BODY, "max_tokens": 5}).status_code == 200


def test_models_reports_the_maximum_length(slow):
    with serve(slow, make_model(max_length=77)) as server:
        assert server.get("/v1/models").json()["data"][0]["max_model_len"] == 77
