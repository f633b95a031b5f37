"""Many clients against a server, with cancellations and bad requests: nothing lost or mixed up.

    python -m benchmarks.serve_load --out=serve_load.json

Starts `launch.serve` on a tiny random model that it makes itself (--model: another one), asks each
of a few dozen different requests alone, and then has 64 clients send 2,000 of them at once, whole
or streamed, some given up in the middle, some malformed. Every answer must be the one that the same
request got alone, the beginning of it where it was given up, and every bad request must get its
4xx. Afterwards the server must have nothing running, no page in use, and no more memory than
before. Exit status: 0 all of that holds, 1 it does not.

Rates are of this machine, clients and server together; they say nothing of an accelerator.
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
from typing import Any

import httpx
import jax
from absl import app, flags

from benchmarks import report
from qwen_jax import interop
from qwen_jax.model import ModelConfig, init_params
from qwen_jax.tokenizer import Tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KINDS = {"whole": 40, "stream": 24, "stream given up": 12, "whole given up": 8, "bad": 16}
_FLAT_MB = 32
"""Growth of the server's memory over the second half of the load that counts as none."""

_CONFIG = ModelConfig(
    family="qwen", vocab_size=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16,
    d_ff=128, max_length=1024, trained_length=1024, init_std=0.2,
)  # fmt: skip


def make_model(folder: pathlib.Path) -> pathlib.Path:
    """A random model over bytes, for chats."""
    tokenizer = Tokenizer(tuple(bytes([i]) for i in range(256)))
    params = jax.jit(functools.partial(init_params, _CONFIG))(jax.random.key(0))
    generation = {"chat_format": "chatml", "eos_token_id": tokenizer.eod_id, "do_sample": True}
    interop.save_hf(folder, params, _CONFIG, dtype="float32", generation_config=generation)
    tokenizer.save(folder / "qwen.tiktoken")
    return folder


# What is asked ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that can be served: where it goes, and its fields."""

    path: str
    fields: dict[str, Any]


def asks(model: str, number: int, seed: int) -> list[Ask]:
    """Different requests: chats and completions, short and long, greedy and drawn."""
    draw = random.Random(seed)
    made = []
    for i in range(number):
        words = "".join(
            f" {draw.choice('abcdefgh')}{draw.randrange(100)}" for _ in range(i % 40 + 1)
        )
        fields: dict[str, Any] = {"model": model, "max_tokens": draw.randrange(2, 40)}
        if i % 3 == 0:
            fields |= {"temperature": 0}
        else:
            fields |= {"seed": i, "temperature": draw.choice([0.7, 1.0]), "top_p": 0.9}
        if i % 5 == 0:
            fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
        if i % 7 == 0:
            fields |= {"n": 2}
        if i % 4 == 0:
            fields |= {"stop": ["e", "zz"]}
        if i % 2:
            made.append(Ask(TEXT, {**fields, "prompt": words}))
        else:
            messages = [{"role": "user", "content": words}]
            made.append(Ask(CHAT, {**fields, "messages": messages}))
    return made


def bad(model: str) -> list[tuple[str, bytes, int]]:
    """Requests that must be refused: path, body, status."""
    hi = [{"role": "user", "content": "hi"}]

    def chat(**fields: Any) -> bytes:
        return json.dumps({"model": model, "messages": hi, **fields}).encode()

    return [
        (CHAT, b'{"model": ', 400),
        (CHAT, b"\xff\xfe{}", 400),
        (CHAT, b"[1, 2]", 400),
        (CHAT, b"", 400),
        (CHAT, b"[" * 100_000, 400),
        (CHAT, chat(temperature="hot"), 400),
        (CHAT, chat(max_tokens=-1), 400),
        (CHAT, chat(temprature=1), 400),
        (CHAT, chat(messages=[]), 400),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 500_000}]), 400),
        (CHAT, chat(response_format={"type": "json_object"}), 400),
        (CHAT, chat(model="another"), 404),
        (CHAT, chat(user="x" * (5 << 20)), 413),
        (TEXT, json.dumps({"model": model, "prompt": [1, -5]}).encode(), 400),
        (TEXT, json.dumps({"model": model, "prompt": "x", "stop": ["a"] * 5}).encode(), 400),
        ("/v1/nothing", b"{}", 404),
    ]


# Clients ------------------------------------------------------------------------------------------

# An answer: of each choice (text, finish reason).
Told = dict[int, tuple[str, str | None]]


@dataclasses.dataclass
class Load:
    """What came of it.

    Attributes:
      counts: requests by kind. refused: 429s, which were sent again.
      wrong: what was not as it must be, a sentence each.
      seconds: of the load. tokens: new ones in answers that were read to their end.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


class Client:
    """Sends requests of all kinds and compares what comes back."""

    def __init__(self, http: httpx.AsyncClient, load: Load):
        self._http, self._load = http, load

    async def whole(self, ask: Ask) -> Told:
        """The answer in one piece; sent again after a 429."""
        while True:
            answer = await self._http.post(ask.path, json=ask.fields)
            if answer.status_code != 429:
                break
            await self._wait(answer)
        if answer.status_code != 200:
            raise Unexpected(f"{answer.status_code}: {answer.text[:200]}")
        body = answer.json()
        self._load.tokens += body["usage"]["completion_tokens"]
        return {c["index"]: (_text(c), c["finish_reason"]) for c in body["choices"]}

    async def stream(self, ask: Ask, most: int | None = None) -> Told:
        """The answer in pieces; given up after `most` of them."""
        fields = {**ask.fields, "stream": True, "stream_options": {"include_usage": True}}
        while True:
            async with self._http.stream("POST", ask.path, json=fields) as answer:
                if answer.status_code == 429:
                    await self._wait(answer)
                    continue
                if answer.status_code != 200:
                    raise Unexpected(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
                return await self._pieces(answer, most)

    async def _pieces(self, answer: httpx.Response, most: int | None) -> Told:
        told: Told = {}
        events = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return told
            if most is not None and events >= most:
                return told
            events += 1
            value = json.loads(line.removeprefix("data: "))
            if "error" in value:
                raise Unexpected(value["error"]["message"])
            if value.get("usage"):
                self._load.tokens += value["usage"]["completion_tokens"]
            for choice in value["choices"]:
                text, finish = told.get(choice["index"], ("", None))
                told[choice["index"]] = (text + _text(choice), choice["finish_reason"] or finish)
        raise Unexpected("the stream broke off")

    async def hang_up(self, ask: Ask, seconds: float) -> None:
        """Sends the request and goes away before the answer, or nearly so."""
        task = asyncio.ensure_future(self.whole(ask))
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def refused(self, path: str, body: bytes, status: int) -> None:
        """Sends what must be refused with `status`, in OpenAI's format."""
        headers = {"content-type": "application/json"}
        answer = await self._http.post(path, content=body, headers=headers)
        if answer.status_code != status or not answer.json()["error"]["message"]:
            raise Unexpected(f"{answer.status_code} instead of {status}: {answer.text[:200]}")

    async def _wait(self, answer: httpx.Response) -> None:
        self._load.refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))


class Unexpected(Exception):
    """An answer that must not be."""


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice of any of the four forms."""
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice["delta"]).get("content") or ""


async def alone(url: str, made: list[Ask]) -> list[Told]:
    """What each request gets when nothing else runs."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        client = Client(http, Load())
        return [await client.whole(ask) for ask in made]


async def run_load(
    url: str,
    made: list[Ask],
    expected: list[Told],
    *,
    requests: int,
    clients: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Load:
    """Sends `requests` from `clients`, each client one after the other; compares all answers."""
    load, draw = Load(), random.Random(seed)
    refusals = bad(made[0].fields["model"])
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=requests)
    todo = collections.deque(enumerate(kinds))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)

    async def work(http: httpx.AsyncClient) -> None:
        client = Client(http, load)
        while todo:
            number, kind = todo.popleft()
            which = draw.randrange(len(made))
            try:
                await one(client, kind, which)
            except (Unexpected, httpx.HTTPError, KeyError, ValueError) as error:
                load.wrong.append(f"{kind} {which}: {type(error).__name__}: {error}")
            load.counts[kind] += 1
            on_progress(number)

    async def one(client: Client, kind: str, which: int) -> None:
        ask, wanted = made[which], expected[which]
        if kind == "bad":
            await client.refused(*draw.choice(refusals))
        elif kind == "whole given up":
            await client.hang_up(ask, draw.random() * 0.1)
        elif kind == "stream given up":
            told = await client.stream(ask, draw.randrange(12))
            for index, (text, _) in told.items():
                if not wanted[index][0].startswith(text):
                    raise Unexpected(f"{text!r} does not begin {wanted[index][0]!r}")
        else:
            told = await (client.whole if kind == "whole" else client.stream)(ask)
            if told != wanted:
                raise Unexpected(f"{told} is not {wanted}")

    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        await asyncio.gather(*(work(http) for _ in range(clients)))
    load.seconds = time.monotonic() - started
    return load


# The server ---------------------------------------------------------------------------------------


def start_server(model: str, log: pathlib.Path) -> tuple[subprocess.Popen, str]:
    """Starts `launch.serve`; returns the process and its address."""
    flags_ = [f"--model={model}", "--port=0", "--cpu_devices=1", "--rows=8", "--max_length=512"]
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
    """Memory that a process holds (Linux: VmRSS), in MB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def numbers(url: str) -> dict[str, float]:
    """The server's metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def settled(url: str, seconds: float = 10.0) -> dict[str, float]:
    """The metrics when nothing runs any more, or after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found = numbers(url)
        busy = found["qwen_requests_running"] + found["qwen_requests_waiting"]
        if not busy or time.monotonic() > end:
            return found
        time.sleep(0.05)


def left_over(found: dict[str, float]) -> list[str]:
    """What a server that has nothing to do must not have, a sentence each."""
    wrong = []
    for name in ("qwen_requests_running", "qwen_requests_waiting"):
        if found[name]:
            wrong.append(f"{name} is {found[name]:g} after the load")
    if found["qwen_pages_free"] != found["qwen_pages_total"]:
        wrong.append(
            f"{found['qwen_pages_free']:g} of {found['qwen_pages_total']:g} pages are free"
        )
    ended = sum(value for name, value in found.items() if name.startswith("qwen_requests_ended_t"))
    if ended != found["qwen_requests_submitted_total"]:
        wrong.append(f"{found['qwen_requests_submitted_total']:g} submitted, {ended:g} ended")
    if found['qwen_requests_ended_total{finish="failed"}']:
        wrong.append("the engine failed")
    return wrong


def measure(model: str, folder: pathlib.Path) -> dict[str, Any]:
    """Everything, on a server of its own."""
    log = folder / "server.log"
    process, url = start_server(model, log)
    try:
        name = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
        made = asks(name, 48, flags.FLAGS.seed)
        expected = asyncio.run(alone(url, made))
        samples = [memory_mb(process.pid)]
        step = max(1, flags.FLAGS.requests // 20)

        def sample(number: int) -> None:
            if number % step == step - 1:
                samples.append(memory_mb(process.pid))

        load = asyncio.run(
            run_load(
                *(url, made, expected),
                requests=flags.FLAGS.requests,
                clients=flags.FLAGS.clients,
                seed=flags.FLAGS.seed,
                on_progress=sample,
            )
        )
        found = settled(url)
        samples.append(memory_mb(process.pid))
        wrong = [*load.wrong, *left_over(found)]
        if samples[-1] - samples[len(samples) // 2] > _FLAT_MB:
            wrong.append(f"memory grew by {samples[-1] - samples[len(samples) // 2]:.0f} MB")
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status:
            wrong.append(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()
    return {
        "requests": sum(load.counts.values()),
        "clients": flags.FLAGS.clients,
        "kinds": dict(load.counts),
        "sent_again_after_429": load.refused,
        "seconds": round(load.seconds, 1),
        "requests_per_second": round(sum(load.counts.values()) / load.seconds, 1),
        "tokens_per_second": round(load.tokens / load.seconds, 1),
        "cancelled_in_engine": found['qwen_requests_ended_total{finish="cancelled"}'],
        "prompt_tokens": found["qwen_prompt_tokens_total"],
        "cached_tokens": found["qwen_cached_tokens_total"],
        "preemptions": found["qwen_preemptions_total"],
        "memory_mb": [round(x, 1) for x in samples],
        "wrong": wrong,
    }


def _define_flags() -> None:  # not on import: tests import this beside other benchmarks
    flags.DEFINE_string("model", "", "Folder to serve; by default a tiny random model.")
    flags.DEFINE_integer("requests", 2000, "Requests to send.", 1)
    flags.DEFINE_integer("clients", 64, "Clients that send them.", 1)
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_string("out", "", "Write the report here.")


def main(argv: list[str]) -> None:
    """Runs the load and reports."""
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
