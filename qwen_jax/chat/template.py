"""Chat templates: the Jinja program with which a model folder says how a conversation is written.

Qwen1.5 to Qwen3 carry one, with the very words that they were trained on, for tools too. It runs in
Jinja's sandbox. What people wrote cannot forge control tokens: their names are broken up before
the template runs and put together again as plain text afterwards.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from qwen_jax.errors import UserError
from qwen_jax.json_files import read_json
from qwen_jax.tokenizer.tokenizer import CONTROL_TOKENS, Tokenizer


def read_template(folder: pathlib.Path | None) -> str | None:
    """The chat template of a model folder; None where it has none.

    Raises:
      UserError: tokenizer_config.json is broken.
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
    """A compiled chat template."""

    def __init__(self, source: str):
        """Compiles `source`.

        Raises:
          UserError: it is no Jinja template.
        """
        # Whitespace, filters and functions as transformers gives them to templates.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"The chat template is broken ({error}); download it again.") from None

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The conversation as the template writes it, ending where the assistant is to speak.

        Args:
          messages: dicts with role and content, `tool_calls` among them as OpenAI has them, with
            arguments as objects. tools: OpenAI's tools.
          **options: further variables of the template, such as `enable_thinking`.

        Raises:
          UserError: the template refuses the conversation, or fails on it.
        """
        given = {"messages": messages, "tools": tools, "documents": None, **options}
        try:
            return self._template.render(**given, add_generation_prompt=True)
        except Exception as error:  # a template is somebody's program: anything may go wrong in it
            known = isinstance(error, jinja2.TemplateError)
            found = f"does not take it ({error!s:.200})" if known else f"fails ({error!r:.200})"
            raise UserError(
                f"The model's chat template {found}; write the conversation as the model knows it."
            ) from error

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """`text` as token ids; control tokens are those that the template itself wrote.

        Tags such as <think>, which a tokenizer has as ordinary text, are the template's to judge in
        the assistant's messages; everywhere else a tag that somebody wrote is text.
        """
        names = tokenizer.special_tokens
        plain = {token.text for token in tokenizer.added_tokens if not token.special}
        control = [name for name in {*CONTROL_TOKENS, *names} if name not in plain]
        mark = _unused(json.dumps([messages, tools], ensure_ascii=False))

        def broken(message: Mapping[str, Any]) -> Any:
            own = message.get("role") == "assistant"
            return _map(message, _breaker(control if own else [*names, *control], mark))

        everywhere = _breaker([*names, *control], mark)
        text = self.text(list(map(broken, messages)), _map(tools, everywhere), **options)
        pieces = re.split("(" + "|".join(map(re.escape, _longest_first(names))) + ")", text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [names[piece]] if i % 2 else tokenizer.encode(piece.replace(mark, ""))
        return ids


def _longest_first(names: Any) -> list[str]:
    return sorted(names, key=len, reverse=True)


def _breaker(names: Sequence[str], mark: str) -> Callable[[str], str]:
    """Puts `mark` behind the first sign of every name."""
    pattern = re.compile("|".join(map(re.escape, _longest_first(set(names)))))
    return lambda text: pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)


def _unused(text: str) -> str:
    """A character that does not occur: one of those that Unicode leaves to programs."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {_map(key, change): _map(inner, change) for key, inner in value.items()}
        case list() | tuple():
            return [_map(inner, change) for inner in value]
    return value


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter would escape signs of HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
