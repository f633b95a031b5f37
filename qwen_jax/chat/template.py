"""Jinja chat templates: reads a model folder's template and encodes conversations with it.

Folders of Qwen1.5 to Qwen3 contain a template with the exact wording used in training, tools
included. Templates run in Jinja's sandbox. A control token spelled out in a message is encoded as
plain text: a marker character is inserted into its name before the template runs, and removed from
the rendered text once it is split at control tokens.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from qwen_jax.errors import UserError
from qwen_jax.json_files import read_json
from qwen_jax.tokenizer.tokenizer import CONTROL_TOKENS, Tokenizer


def read_template(folder: pathlib.Path | None) -> str | None:
    """Reads the source of a model folder's chat template; returns None if there is none.

    Raises:
      UserError: tokenizer_config.json is not valid JSON.
    """
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A compiled Jinja chat template, which renders conversations as text or token ids."""

    def __init__(self, source: str):
        """Compiles the template source.

        Raises:
          UserError: `source` is not a valid Jinja template.
        """
        # Whitespace control, filters and functions as transformers provides them to templates.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template is broken ({error}); download it again.") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Returns a conversation as the template's text, ending with an open assistant turn.

        Args:
          messages: dicts with role and content, and optionally OpenAI's `tool_calls` with their
            arguments as objects.
          tools: tool definitions in OpenAI's format; None for no tools.
          **options: further template variables, such as `enable_thinking`.

        Raises:
          UserError: the template rejects the conversation or fails on it.
        """
        variables = {"messages": messages, "tools": tools, "documents": None, **options}
        try:
            return self._template.render(**variables, add_generation_prompt=True)
        except Exception as error:  # templates are third-party programs: any exception can occur
            rejected = isinstance(error, jinja2.TemplateError)
            found = f"rejects it ({error!s:.200})" if rejected else f"fails on it ({error!r:.200})"
            raise UserError(
                f"The conversation cannot be formatted: the model's chat template {found}; change "
                "the conversation to a form that the template supports."
            ) from error

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Returns the token ids of `render(messages, tools, **options)`.

        A control token is encoded as such only where the template itself wrote it; spelled out in a
        message it is encoded as plain text. The exception are tags such as <think> that the
        tokenizer has as ordinary text (`AddedToken.special` is False): in assistant messages they
        are passed to the template unchanged and encoded as tokens.

        Args:
          tokenizer: tokenizer of the model.
          messages: as in `render`.
          tools: as in `render`.
          **options: as in `render`.

        Raises:
          UserError: the template rejects the conversation or fails on it.
        """
        names = tokenizer.special_tokens
        ordinary = {token.text for token in tokenizer.added_tokens if not token.special}
        control = [name for name in {*CONTROL_TOKENS, *names} if name not in ordinary]
        marker = _unused_character(json.dumps([messages, tools], ensure_ascii=False))
        escape_control = _name_escaper(control, marker)
        escape_all = _name_escaper([*names, *control], marker)

        def escaped(message: Mapping[str, Any]) -> Any:
            by_assistant = message.get("role") == "assistant"
            return _map_strings(message, escape_control if by_assistant else escape_all)

        text = self.render(
            [escaped(message) for message in messages], _map_strings(tools, escape_all), **options
        )
        pieces = re.split("(" + "|".join(map(re.escape, _longest_first(names))) + ")", text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            # With a capturing group, re.split returns separators at odd indices.
            ids += [names[piece]] if i % 2 else tokenizer.encode(piece.replace(marker, ""))
        return ids


def _longest_first(names: Iterable[str]) -> list[str]:
    """Returns `names` by descending length, so that a regex alternation prefers the longest."""
    return sorted(names, key=len, reverse=True)


def _name_escaper(names: Iterable[str], marker: str) -> Callable[[str], str]:
    """Returns a function that inserts `marker` into each occurrence of one of `names` in a text.

    The marker goes after the first character, so that the name is no longer found in the text.
    """
    pattern = re.compile("|".join(map(re.escape, _longest_first(set(names)))))
    return lambda text: pattern.sub(lambda found: found[0][0] + marker + found[0][1:], text)


def _unused_character(text: str) -> str:
    """Returns a character of Unicode's private use area that does not occur in `text`."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON-like `value` with `change` applied to every string in it, keys included."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {
                _map_strings(key, change): _map_strings(inner, change)
                for key, inner in value.items()
            }
        case list() | tuple():
            return [_map_strings(inner, change) for inner in value]
    return value


def _to_json(value: Any, **options: Any) -> str:
    """Serialises `value` for the Jinja filter `tojson`.

    Jinja's own filter would escape HTML characters.
    """
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    """Raises a TemplateError with `message`; templates call it as `raise_exception`."""
    raise jinja2.TemplateError(message)
