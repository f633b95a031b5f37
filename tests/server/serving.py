"""A real server on a free port, in a thread of the test's own process."""

import contextlib
import dataclasses
import threading
import time

import httpx
import openai

from qwen_jax.engine.request import SamplingParams
from qwen_jax.generate.service import Service
from qwen_jax.server.app import create_app
from qwen_jax.server.config import Limits, ServedModel
from qwen_jax.server.run import Server, bind
from qwen_jax.server.run import url as address
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.huggingface import AddedToken

BYTES = Tokenizer(tuple(bytes([byte]) for byte in range(256)))
"""The id of each byte is the byte."""

# As Qwen3's folders name them; here they stand where <|extra_0|> and its neighbours do.
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TAGGED = Tokenizer(
    BYTES.ranks, tuple(AddedToken(260 + i, tag, special=False) for i, tag in enumerate(TAGS))
)


def model(family="qwen", tokenizer=BYTES, **fields) -> ServedModel:
    """A model that ends a turn as Qwen's do."""
    ends = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
    defaults = dataclasses.replace(fields.pop("defaults", SamplingParams()), stop_ids=ends)
    given = {"max_length": 4096, "created": 1700000000, "defaults": defaults, **fields}
    return ServedModel("toy", tokenizer, family, **given)


def script(text, tokenizer=BYTES):
    """An engine's script: every request is answered with `text`, or with what it makes of it."""

    def answer(request):
        said = text(request) if callable(text) else text
        return tokenizer.encode(said, allowed_special="all")

    return answer


class Running:
    """A server that runs: its address, clients for it, and its insides."""

    def __init__(self, url, server, service, front):
        self.url, self.server, self.service, self.front = url, server, service, front
        self.http = httpx.Client(base_url=url, timeout=30)

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path, **options) -> httpx.Response:
        return self.http.post(path, **options)

    def get(self, path, **options) -> httpx.Response:
        return self.http.get(path, **options)

    def wait_until(self, condition, seconds=30.0) -> None:
        """Waits for something that another thread does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not so after {seconds} s"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(engine, served=None, limits=Limits(), *, max_waiting=1024):
    """Serves an engine until the end of the block."""
    served = served or model()
    with (
        Service(engine, served.tokenizer, max_waiting=max_waiting) as service,
        running(service, served, limits) as server,
    ):
        server.engine = engine
        yield server


@contextlib.contextmanager
def running(service, served, limits):
    """Serves a service until the end of the block."""
    app = create_app(service, served, limits)
    listener = bind("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    found = Running(address(listener), server, service, app.state.front)
    try:
        yield found
    finally:
        found.http.close()
        server.drain(0.0)
        thread.join(20)
        assert not thread.is_alive()
