"""HTTP servers on free ports, run in a thread of the test process."""

import contextlib
import dataclasses
import threading
import time

import httpx
import openai

from qwen_jax.engine.request import SamplingParams
from qwen_jax.generate.service import Service
from qwen_jax.server.app import create_app
from qwen_jax.server.config import ServedModel, ServerLimits
from qwen_jax.server.http_server import DrainingServer, bind_socket, socket_url
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.huggingface import AddedToken

BYTES = Tokenizer(tuple(bytes([byte]) for byte in range(256)))
"""Tokenizer whose ids 0 to 255 are the bytes."""

# As in Qwen3's folders, in place of <|extra_0|> and the ids that follow it.
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TAGGED = Tokenizer(
    BYTES.ranks, tuple(AddedToken(260 + i, tag, special=False) for i, tag in enumerate(TAGS))
)


def make_model(family="qwen", tokenizer=BYTES, **fields) -> ServedModel:
    """Returns a model named "toy" with the stop ids of Qwen's chat models."""
    stop_ids = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
    params = fields.pop("default_params", SamplingParams())
    fields = {"max_length": 4096, "created": 1700000000, **fields}
    params = dataclasses.replace(params, stop_ids=stop_ids)
    return ServedModel("toy", tokenizer, family, default_params=params, **fields)


def script(text, tokenizer=BYTES):
    """Returns a script for `FakeEngine` that answers each request with the same text.

    `text` may be a function of the request instead.
    """

    def answer(request):
        reply = text(request) if callable(text) else text
        return tokenizer.encode(reply, allowed_special="all")

    return answer


class RunningServer:
    """A running server with HTTP clients for it and access to its internals."""

    def __init__(self, url, server, service, state):
        self.url, self.server, self.service, self.state = url, server, service, state
        self.http = httpx.Client(base_url=url, timeout=30)

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path, **options) -> httpx.Response:
        return self.http.post(path, **options)

    def get(self, path, **options) -> httpx.Response:
        return self.http.get(path, **options)

    def wait_until(self, condition, seconds=30.0) -> None:
        """Waits until `condition()` holds, which another thread brings about."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"the condition does not hold after {seconds} s"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(engine, model=None, limits=ServerLimits(), *, max_waiting=1024):
    """Yields a `RunningServer` for an engine; its attribute `engine` is the engine."""
    model = model or make_model()
    with (
        Service(engine, model.tokenizer, max_waiting=max_waiting) as service,
        serve_service(service, model, limits) as server,
    ):
        server.engine = engine
        yield server


@contextlib.contextmanager
def serve_service(service, model, limits):
    """Yields a `RunningServer` for an existing service."""
    app = create_app(service, model, limits)
    listener = bind_socket("127.0.0.1", 0)
    server = DrainingServer(app)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    running = RunningServer(socket_url(listener), server, service, app.state.app_state)
    try:
        yield running
    finally:
        running.http.close()
        server.drain(0.0)
        thread.join(20)
        assert not thread.is_alive()
