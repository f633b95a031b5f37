"""Generation defaults of a model folder, from its generation_config.json and chat template."""

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
class GenerationDefaults:
    """Values that a model's folder sets for everything that a caller leaves out.

    Attributes:
      chat_format: "chatml" for a chat model, "raw" for a base model, which only continues text.
      params: sampling parameters, including stop ids.
      stop: stop strings, from stop words of several tokens.
      system: the system prompt; None for conversations that start with the user's turn (Qwen3).
      max_window: maximum number of tokens of system prompt and history in a prompt
        (`max_window_size`).
      template: source of the folder's chat template (Jinja; Qwen1.5 to Qwen3), or None.
    """

    chat_format: ChatFormat = "raw"
    params: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    system: str | None = DEFAULT_SYSTEM
    max_window: int = DEFAULT_MAX_WINDOW
    template: str | None = None

    @property
    def is_chat_model(self) -> bool:
        """Whether the model was trained on ChatML; otherwise it only continues text."""
        return self.chat_format == "chatml"


def read_defaults(
    folder: pathlib.Path | None, tokenizer: Tokenizer, *, chat_format: str | None = None
) -> GenerationDefaults:
    """Reads the generation defaults of a model folder.

    generation_config.json sets `chat_format`, `do_sample` (false: temperature 0), `temperature`,
    `top_k`, `top_p`, `min_p`, `repetition_penalty`, `max_new_tokens`, `max_window_size`,
    `eos_token_id` (an id or a list) and `stop_words_ids`. Qwen1.5 to Qwen3 have no `chat_format`;
    they are chat models if <|im_end|> is among the `eos_token_id`. Chat models also stop at
    <|im_end|> and <|im_start|> (the release's `get_stop_words_ids`), and every model at
    <|endoftext|>. The system prompt is the one that the chat template inserts by default.

    Args:
      folder: a Hugging Face folder; None, or a folder without that file, gives the defaults of a
        base model.
      tokenizer: tokenizer of the model.
      chat_format: "chatml" or "raw", in place of the folder's.

    Raises:
      UserError: the file is not valid JSON, a value has another type or is out of range, or the
        chat format is unknown.
    """
    file = None if folder is None else folder / "generation_config.json"
    found = read_json(file) if file is not None and file.is_file() else {}
    get = _TypedFields(found, file)
    ends = get("eos_token_id", (int, list), [])
    ends = [ends] if isinstance(ends, int) else get.check_ids("eos_token_id", ends)
    words = [get.check_ids("stop_words_ids", word) for word in get("stop_words_ids", list, [])]
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
    return GenerationDefaults(
        chat_format="chatml" if chat else "raw",
        params=params,
        stop=tuple(tokenizer.decode(word) for word in words if len(word) > 1),
        system=_default_system(template, folder) if chat else None,
        # Only Qwen v1 has a window; later chat models are limited by the engine alone.
        max_window=get("max_window_size", int, sys.maxsize if template else DEFAULT_MAX_WINDOW),
        template=template,
    )


class _TypedFields:
    """Type-checked access to the fields of a JSON object; null counts as absent.

    Called with a field's name, its type or types, and a default, returns the value or the default.
    """

    def __init__(self, found: Mapping[str, Any], file: pathlib.Path | None):
        """Wraps the object `found`, read from `file`, which error messages name."""
        self._found, self._file = found, file

    def __call__(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Returns the value of field `name`, or `default` if it is absent or null.

        Raises:
          UserError: the value is not of type `kind`.
        """
        value = self._found.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(
                f"{self._file}: {name} is {value!r}, which has the wrong type; correct it or "
                "download the file again."
            )
        return value

    def check_ids(self, name: str, value: Any) -> list[int]:
        """Returns `value`, found in field `name`, if it is a list of token ids.

        Raises:
          UserError: it is not.
        """
        if isinstance(value, list) and all(type(i) is int and i >= 0 for i in value):
            return value
        raise UserError(f"{self._file}: {name} has {value!r}; it must be a list of token ids.")


def _default_system(template: str | None, folder: pathlib.Path | None) -> str | None:
    """Returns the system prompt that a chat template inserts by default; None if it inserts none.

    Without a template, or with one that cannot be rendered, that of Qwen v1.
    """
    if template is None:
        return DEFAULT_SYSTEM
    try:
        text = ChatTemplate(template).render([{"role": "user", "content": "-"}])
    except UserError as error:
        logging.warning("%s: %s", folder, error)
        return DEFAULT_SYSTEM
    before, opened, rest = text.partition(f"{IM_START}system\n")
    if not opened or f"{IM_START}user" in before:
        return None
    return rest.partition(IM_END)[0]
