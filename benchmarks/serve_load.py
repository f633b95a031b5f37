"""Load test of the server: many concurrent clients, cancellations and invalid requests.

    python -m benchmarks.serve_load --out=serve_load.json

Starts `launch.serve` on a tiny random model that it creates (--model: another one), sends each of a
few dozen different requests alone, and then has 64 clients send 2,000 of them concurrently, whole
or streamed, some cancelled midway, some invalid. Every response must equal the one that the same
request got alone, or be the beginning of it if it was cancelled, and every invalid request must get
its 4xx status. Afterwards the server must have no request running, no page in use and no more
memory than before. The exit status is 0 if all of that holds, else 1.

Rates are of this machine, which clients and server share, and say nothing about an accelerator.

Prints one JSON object as its last line, which --out saves.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import json
import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import httpx
import jax
from absl import app, flags

from benchmarks import report
from benchmarks.serve_requests import LoadRequest, invalid_requests, make_requests
from qwen_jax import interop
from qwen_jax.model import ModelConfig, init_params
from qwen_jax.tokenizer import Tokenizer

KINDS = {"whole": 40, "stream": 24, "stream cancelled": 12, "whole cancelled": 8, "invalid": 16}
"""Kinds of request, with their relative frequency."""
_MEMORY_TOLERANCE_MB = 32
"""Growth of the server's memory over the second half of the load that counts as none."""

_CONFIG = ModelConfig(
    family="qwen",
    vocab_size=512,
    d_model=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    d_ff=128,
    max_length=1024,
    trained_length=1024,
    init_std=0.2,
)


def make_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes a chat model over bytes with random weights to a folder, and returns the folder."""
    tokenizer = Tokenizer(tuple(bytes([i]) for i in range(256)))
    params = jax.jit(functools.partial(init_params, _CONFIG))(jax.random.key(0))
    generation = {"chat_format": "chatml", "eos_token_id": tokenizer.eod_id, "do_sample": True}
    interop.save_hf(folder, params, _CONFIG, dtype="float32", generation_config=generation)
    tokenizer.save(folder / "qwen.tiktoken")
    return folder


# Clients ------------------------------------------------------------------------------------------

Choices: TypeAlias = dict[int, tuple[str, str | None]]
"""A response: (text, finish reason) of each choice by its index."""


@dataclasses.dataclass
class LoadResult:
    """What a load test counted.

    Attributes:
      counts: requests by kind.
      retries: responses with status 429, after which the request was sent again.
      wrong: a sentence for each response that was not as expected.
      seconds: duration of the load.
      tokens: output tokens of responses that were read to their end.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    retries: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


class UnexpectedResponse(Exception):
    """A response that is not as expected."""


class LoadClient:
    """Sends requests of all kinds over HTTP, counts tokens and retries, and checks responses.

    Raises UnexpectedResponse from its methods.
    """

    def __init__(self, http: httpx.AsyncClient, result: LoadResult):
        self._http, self._result = http, result

    async def send(self, request: LoadRequest) -> Choices:
        """Returns the response to a request that is not streamed; retries after status 429."""
        while True:
            response = await self._http.post(request.path, json=request.fields)
            if response.status_code != 429:
                break
            await self._wait_for_retry(response)
        if response.status_code != 200:
            raise UnexpectedResponse(f"{response.status_code}: {response.text[:200]}")
        body = response.json()
        self._result.tokens += body["usage"]["completion_tokens"]
        return {c["index"]: (_text_of(c), c["finish_reason"]) for c in body["choices"]}

    async def stream(self, request: LoadRequest, max_events: int | None = None) -> Choices:
        """Returns the response to a streamed request, cancelled after `max_events` events."""
        fields = {**request.fields, "stream": True, "stream_options": {"include_usage": True}}
        while True:
            async with self._http.stream("POST", request.path, json=fields) as response:
                if response.status_code == 429:
                    await self._wait_for_retry(response)
                    continue
                if response.status_code != 200:
                    body = await response.aread()
                    raise UnexpectedResponse(f"{response.status_code}: {body[:200]!r}")
                return await self._read_events(response, max_events)

    async def _read_events(self, response: httpx.Response, max_events: int | None) -> Choices:
        """Returns the choices assembled from the events of a stream, up to `max_events`."""
        choices: Choices = {}
        events = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return choices
            if max_events is not None and events >= max_events:
                return choices
            events += 1
            value = json.loads(line.removeprefix("data: "))
            if "error" in value:
                raise UnexpectedResponse(value["error"]["message"])
            if value.get("usage"):
                self._result.tokens += value["usage"]["completion_tokens"]
            for choice in value["choices"]:
                text, finish = choices.get(choice["index"], ("", None))
                text += _text_of(choice)
                choices[choice["index"]] = (text, choice["finish_reason"] or finish)
        raise UnexpectedResponse("the stream ended before its last event")

    async def send_and_cancel(self, request: LoadRequest, seconds: float) -> None:
        """Sends a request and closes the connection after `seconds`, usually before a response."""
        task = asyncio.ensure_future(self.send(request))
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def expect_refusal(self, path: str, body: bytes, status: int) -> None:
        """Sends an invalid request; checks the status and that the error is in OpenAI's format."""
        headers = {"content-type": "application/json"}
        response = await self._http.post(path, content=body, headers=headers)
        if response.status_code != status or not response.json()["error"]["message"]:
            raise UnexpectedResponse(
                f"{response.status_code} instead of {status}: {response.text[:200]}"
            )

    async def _wait_for_retry(self, response: httpx.Response) -> None:
        """Counts a 429 response and sleeps for as long as its Retry-After header says."""
        self._result.retries += 1
        await asyncio.sleep(float(response.headers["retry-after"]))


def _text_of(choice: dict[str, Any]) -> str:
    """Returns the text of a choice, of a chat or a completion, whole or streamed."""
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice["delta"]).get("content") or ""


async def run_alone(url: str, requests: list[LoadRequest]) -> list[Choices]:
    """Returns the response to each request, sent one after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        client = LoadClient(http, LoadResult())
        return [await client.send(request) for request in requests]


async def _run_one(
    client: LoadClient,
    kind: str,
    request: LoadRequest,
    expected: Choices,
    invalid: list[tuple[str, bytes, int]],
    rng: random.Random,
) -> None:
    """Sends one request of a kind and raises UnexpectedResponse if the response is wrong.

    Args:
      client: sends it.
      kind: one of `KINDS`.
      request: the request, unless the kind is "invalid".
      expected: the response that it got alone.
      invalid: invalid requests to choose from.
      rng: chooses the invalid request, and when to cancel.
    """
    if kind == "invalid":
        path, body, status = rng.choice(invalid)
        await client.expect_refusal(path, body, status)
    elif kind == "whole cancelled":
        await client.send_and_cancel(request, rng.random() * 0.1)
    elif kind == "stream cancelled":
        choices = await client.stream(request, rng.randrange(12))
        for index, (text, _) in choices.items():
            if not expected[index][0].startswith(text):
                raise UnexpectedResponse(f"{text!r} does not begin {expected[index][0]!r}")
    else:
        choices = await (client.send if kind == "whole" else client.stream)(request)
        if choices != expected:
            raise UnexpectedResponse(f"{choices} is not {expected}")


async def run_load(
    url: str,
    requests: list[LoadRequest],
    expected: list[Choices],
    *,
    total: int,
    clients: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda number: None,
) -> LoadResult:
    """Sends requests from concurrent clients and compares all responses.

    Args:
      url: address of the server.
      requests: valid requests to choose from.
      expected: response to each when it is sent alone (`run_alone`).
      total: number of requests to send.
      clients: number of clients; each sends one request after the other.
      seed: of the random choices.
      on_progress: called with the number of each request that is done.
    """
    result, rng = LoadResult(), random.Random(seed)
    invalid = invalid_requests(requests[0].fields["model"])
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=total)
    todo = collections.deque(enumerate(kinds))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)

    async def run_client(http: httpx.AsyncClient) -> None:
        client = LoadClient(http, result)
        while todo:
            number, kind = todo.popleft()
            index = rng.randrange(len(requests))
            try:
                await _run_one(client, kind, requests[index], expected[index], invalid, rng)
            except (UnexpectedResponse, httpx.HTTPError, KeyError, ValueError) as error:
                result.wrong.append(f"{kind} {index}: {type(error).__name__}: {error}")
            result.counts[kind] += 1
            on_progress(number)

    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        await asyncio.gather(*(run_client(http) for _ in range(clients)))
    result.seconds = time.monotonic() - started
    return result


# The server ---------------------------------------------------------------------------------------


def start_server(model: str, log: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """Starts `launch.serve` on a model folder; returns (process, address).

    Args:
      model: folder of the model.
      log: file for the server's output.

    Raises:
      RuntimeError: the server did not start within ten minutes; has the end of its output.
    """
    flags_ = [
        f"--model={model}",
        "--port=0",
        "--cpu_devices=1",
        "--max_running_requests=8",
        "--max_length=512",
    ]
    flags_ += ["--page_size=16", "--prefill_tokens=128", "--max_waiting=48", "--memory=0.5"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", *flags_],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end:
        if found := re.search(r"^serving .* at (\S+)$", log.read_text(errors="replace"), re.M):
            return process, found[1]
        time.sleep(0.2)
    process.kill()
    raise RuntimeError("the server did not start:\n" + log.read_text(errors="replace")[-2000:])


def memory_mb(pid: int) -> float:
    """Returns the resident memory of a process in MB (Linux: VmRSS)."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, f"/proc/{pid}/status has no VmRSS"
    return int(found[1]) / 1024


def read_metrics(url: str) -> dict[str, float]:
    """Returns the server's metrics by name with labels."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def wait_until_idle(url: str, seconds: float = 10.0) -> dict[str, float]:
    """Returns the metrics once no request is running or waiting, or after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        metrics = read_metrics(url)
        busy = metrics["qwen_requests_running"] + metrics["qwen_requests_waiting"]
        if not busy or time.monotonic() > end:
            return metrics
        time.sleep(0.05)


def find_leaks(metrics: dict[str, float]) -> list[str]:
    """Returns a sentence for each metric that an idle server must not show."""
    wrong = []
    for name in ("qwen_requests_running", "qwen_requests_waiting"):
        if metrics[name]:
            wrong.append(f"{name} is {metrics[name]:g} after the load")
    free, total = metrics["qwen_pages_free"], metrics["qwen_pages_total"]
    if free != total:
        wrong.append(f"{free:g} of {total:g} pages are free")
    ended = sum(x for name, x in metrics.items() if name.startswith("qwen_requests_ended_t"))
    if ended != metrics["qwen_requests_submitted_total"]:
        wrong.append(f"{metrics['qwen_requests_submitted_total']:g} submitted, {ended:g} ended")
    if metrics['qwen_requests_ended_total{finish="failed"}']:
        wrong.append("the engine failed")
    return wrong


def measure(model: str, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the whole load test on a server of its own.

    Args:
      model: folder of the model.
      folder: for the server's log.

    Returns:
      counts, rates, metrics and memory, and "wrong", a sentence for each violated expectation.
    """
    log = folder / "server.log"
    process, url = start_server(model, log)
    try:
        name = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        requests = make_requests(name, 48, flags.FLAGS.seed)
        expected = asyncio.run(run_alone(url, requests))
        memory = [memory_mb(process.pid)]
        interval = max(1, flags.FLAGS.requests // 20)

        def sample_memory(number: int) -> None:
            if number % interval == interval - 1:
                memory.append(memory_mb(process.pid))

        result = asyncio.run(
            run_load(
                url,
                requests,
                expected,
                total=flags.FLAGS.requests,
                clients=flags.FLAGS.clients,
                seed=flags.FLAGS.seed,
                on_progress=sample_memory,
            )
        )
        metrics = wait_until_idle(url)
        memory.append(memory_mb(process.pid))
        wrong = [*result.wrong, *find_leaks(metrics)]
        growth = memory[-1] - memory[len(memory) // 2]
        if growth > _MEMORY_TOLERANCE_MB:
            wrong.append(f"memory grew by {growth:.0f} MB")
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status:
            wrong.append(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()
    sent = sum(result.counts.values())
    return {
        "requests": sent,
        "clients": flags.FLAGS.clients,
        "kinds": dict(result.counts),
        "sent_again_after_429": result.retries,
        "seconds": round(result.seconds, 1),
        "requests_per_second": round(sent / result.seconds, 1),
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        "cancelled_in_engine": metrics['qwen_requests_ended_total{finish="cancelled"}'],
        "prompt_tokens": metrics["qwen_prompt_tokens_total"],
        "cached_tokens": metrics["qwen_cached_tokens_total"],
        "preemptions": metrics["qwen_preemptions_total"],
        "memory_mb": [round(x, 1) for x in memory],
        "wrong": wrong,
    }


def _define_flags() -> None:
    """Defines the flags; not at import, because tests import several benchmarks together."""
    flags.DEFINE_string("model", "", "Model folder to serve; by default a tiny random model.")
    flags.DEFINE_integer("requests", 2000, "Number of requests to send.", 1)
    flags.DEFINE_integer("clients", 64, "Number of clients that send them.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the random choices.")
    flags.DEFINE_string("out", "", "Also write the JSON to this file.")


def main(argv: list[str]) -> None:
    """Runs the load test; exits with status 1 if an expectation is violated."""
    del argv
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = flags.FLAGS.model or str(make_model(folder / "tiny"))
        found = measure(model, folder)
    report.emit(found, flags.FLAGS.out)
    if found["wrong"] or found["requests"] != flags.FLAGS.requests:
        sys.exit(1)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
