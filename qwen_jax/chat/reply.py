"""What tools a model is shown, and the parts that its reply is read into.

`react` and `hermes` write tools into prompts and read replies in the two formats of the Qwen
family; both speak in these records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
      name: what the model writes to call it (`name_for_model` of the release).
      description: what it is good for.
      parameters: its arguments, a JSON schema or the release's list of parameter records.
      title: its name for people; "" takes `name`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | list[Any] = dataclasses.field(default_factory=dict)
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of the answer, for the reader to see."""

    text: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers (`<think>` of Qwen3)."""

    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """The model asks for `name` with `arguments`, the text it wrote: JSON when it did well."""

    name: str
    arguments: str


Part = Text | Reasoning | Call


def dump_json(value: Any) -> str:
    """JSON as the release writes it into prompts: characters as they are, `", "` and `": "`."""
    return json.dumps(value, ensure_ascii=False)


def json_text(text: str) -> str:
    """The JSON value that `text` is or begins with; `text` itself, stripped, when there is none.

    A fence of back-ticks around it and anything after it are left out: models add both.
    """
    text = text.strip()
    body = text
    if body.startswith("```"):
        body = body[3:].removeprefix("json").removeprefix("JSON").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):
        return text
    return body[:end]


def held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning of a mark, but not all of it."""
    longest = max(map(len, marks)) - 1
    for size in range(min(len(text), longest), 0, -1):
        if any(len(mark) > size and mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
