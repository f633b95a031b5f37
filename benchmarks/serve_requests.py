"""Requests of the server's load test: valid ones of all kinds, and ones that must be refused."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """A valid request.

    Attributes:
      path: URL path of the endpoint.
      fields: JSON body.
    """

    path: str
    fields: dict[str, Any]


def make_requests(model: str, number: int, seed: int) -> list[LoadRequest]:
    """Returns different valid requests: chats and completions, short and long, greedy and sampled.

    Args:
      model: name of the served model.
      number: number of requests.
      seed: of the random choices.
    """
    rng = random.Random(seed)
    requests = []
    for i in range(number):
        words = "".join(f" {rng.choice('abcdefgh')}{rng.randrange(100)}" for _ in range(i % 40 + 1))
        fields: dict[str, Any] = {"model": model, "max_tokens": rng.randrange(2, 40)}
        if i % 3 == 0:
            fields |= {"temperature": 0}
        else:
            fields |= {"seed": i, "temperature": rng.choice([0.7, 1.0]), "top_p": 0.9}
        if i % 5 == 0:
            fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
        if i % 7 == 0:
            fields |= {"n": 2}
        if i % 4 == 0:
            fields |= {"stop": ["e", "zz"]}
        if i % 2:
            requests.append(LoadRequest(COMPLETIONS_PATH, {**fields, "prompt": words}))
        else:
            messages = [{"role": "user", "content": words}]
            requests.append(LoadRequest(CHAT_PATH, {**fields, "messages": messages}))
    return requests


def invalid_requests(model: str) -> list[tuple[str, bytes, int]]:
    """Returns requests that must be refused, as (path, body, expected status)."""
    hi = [{"role": "user", "content": "hi"}]

    def chat(**fields: Any) -> bytes:
        return json.dumps({"model": model, "messages": hi, **fields}).encode()

    def completion(**fields: Any) -> bytes:
        return json.dumps({"model": model, **fields}).encode()

    return [
        (CHAT_PATH, b'{"model": ', 400),
        (CHAT_PATH, b"\xff\xfe{}", 400),
        (CHAT_PATH, b"[1, 2]", 400),
        (CHAT_PATH, b"", 400),
        (CHAT_PATH, b"[" * 100_000, 400),
        (CHAT_PATH, chat(temperature="hot"), 400),
        (CHAT_PATH, chat(max_tokens=-1), 400),
        (CHAT_PATH, chat(temprature=1), 400),
        (CHAT_PATH, chat(messages=[]), 400),
        (CHAT_PATH, chat(messages=[{"role": "user", "content": "x" * 500_000}]), 400),
        (CHAT_PATH, chat(response_format={"type": "json_object"}), 400),
        (CHAT_PATH, chat(model="another"), 404),
        (CHAT_PATH, chat(user="x" * (5 << 20)), 413),
        (COMPLETIONS_PATH, completion(prompt=[1, -5]), 400),
        (COMPLETIONS_PATH, completion(prompt="x", stop=["a"] * 5), 400),
        ("/v1/nothing", b"{}", 404),
    ]
