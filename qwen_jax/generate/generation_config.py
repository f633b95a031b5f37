"""How a model folder wants to be sampled: its generation_config.json and its chat template."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Literal

from absl import logging

from qwen_jax.chat.chatml import DEFAULT_MAX_WINDOW, DEFAULT_SYSTEM
from qwen_jax.chat.template import ChatTemplate, read_template
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError, nearest
from qwen_jax.json_files import read_json
from qwen_jax.tokenizer.tokenizer import IM_END, IM_START, Tokenizer

ChatFormat = Literal["chatml", "raw"]
CHAT_FORMATS = ("chatml", "raw")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What holds unless a caller says otherwise.

    Attributes:
      chat_format: "chatml" for a chat model, "raw" for a base model, which only continues text.
      params: sampling, stop ids included.
      stop: stop strings, from stop words of several tokens.
      system: the system prompt; None: conversations start with the user's turn (Qwen3).
      max_window: tokens of system prompt and history that a conversation keeps (`max_window_size`).
      template: the folder's chat template (Qwen1.5 to Qwen3), Jinja; None where it has none.
    """

    chat_format: ChatFormat = "raw"
    params: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    system: str | None = DEFAULT_SYSTEM
    max_window: int = DEFAULT_MAX_WINDOW
    template: str | None = None


def read_defaults(
    folder: pathlib.Path | None, tokenizer: Tokenizer, *, chat_format: str | None = None
) -> Defaults:
    """The defaults of a model folder.

    From generation_config.json come `chat_format`, `do_sample` (false: the most probable token),
    `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `max_new_tokens`,
    `max_window_size`, `eos_token_id` (an id or a list) and `stop_words_ids`. Qwen1.5 to Qwen3 name
    no chat_format: there the model is one for chat when <|im_end|> is among its ends. Chat models
    stop at <|im_end|> and <|im_start|> too (the release's `get_stop_words_ids`), every model at
    <|endoftext|>. The system prompt is the one that the chat template puts there by itself.

    Args:
      folder: a Hugging Face folder; None, or one without that file: a base model's defaults.
      tokenizer: of the model.
      chat_format: overrides the folder's.

    Raises:
      UserError: a broken file, a value of another type, an unknown chat format.
    """
    file = None if folder is None else folder / "generation_config.json"
    found = read_json(file) if file is not None and file.is_file() else {}
    get = _Reader(found, file)
    ends = get("eos_token_id", (int, list), [])
    ends = [ends] if isinstance(ends, int) else get.ids("eos_token_id", ends)
    words = [get.ids("stop_words_ids", word) for word in get("stop_words_ids", list, [])]
    declared = chat_format or get("chat_format", str, None)
    if declared not in (None, *CHAT_FORMATS):
        raise UserError(
            f"chat_format is {declared!r}{nearest(declared, CHAT_FORMATS)}; it must be chatml or "
            "raw."
        )
    chat = declared == "chatml" if declared else tokenizer.im_end_id in ends
    stops = [*ends, *(word[0] for word in words if len(word) == 1), tokenizer.eod_id]
    if chat:
        stops += [tokenizer.im_end_id, tokenizer.im_start_id]
    greedy = not get("do_sample", bool, not found)
    try:
        params = SamplingParams(
            max_tokens=get("max_new_tokens", int, 2048 if chat else 512),
            temperature=0.0 if greedy else float(get("temperature", (int, float), 1.0)),
            top_k=get("top_k", int, 0),
            top_p=float(get("top_p", (int, float), 1.0)),
            min_p=float(get("min_p", (int, float), 0.0)),
            repetition_penalty=float(get("repetition_penalty", (int, float), 1.0)),
            stop_ids=tuple(dict.fromkeys(stops)),
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    template = read_template(folder)
    return Defaults(
        chat_format="chatml" if chat else "raw",
        params=params,
        stop=tuple(tokenizer.decode(word) for word in words if len(word) > 1),
        system=_template_system(template, folder) if chat else None,
        # Only Qwen has windows; later chats keep what the engine has room for.
        max_window=get("max_window_size", int, sys.maxsize if template else DEFAULT_MAX_WINDOW),
        template=template,
    )


class _Reader:
    """Values of a JSON object; null and absent are the same, another type is refused."""

    def __init__(self, found: Mapping[str, Any], file: pathlib.Path | None):
        self._found, self._file = found, file

    def __call__(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._found.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self._file}: {name} is {value!r}; correct it or download the file.")
        return value

    def ids(self, name: str, value: Any) -> list[int]:
        """`value`, found under `name`, as a list of token ids."""
        if isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
            return value
        raise UserError(f"{self._file}: {name} has {value!r}; it must be ids of tokens.")


def _template_system(source: str | None, folder: pathlib.Path | None) -> str | None:
    """The system prompt that a chat template sets by itself; None when it sets none."""
    if source is None:
        return DEFAULT_SYSTEM
    try:
        text = ChatTemplate(source).render([{"role": "user", "content": "-"}])
    except UserError as error:
        logging.warning("%s: %s", folder, error)
        return DEFAULT_SYSTEM
    before, opened, rest = text.partition(f"{IM_START}system\n")
    if not opened or f"{IM_START}user" in before:
        return None
    return rest.partition(IM_END)[0]
