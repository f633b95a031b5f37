"""A conversation with a model: history, prompt of the next answer, undo, import and export."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.chat.chatml import build_context
from qwen_jax.chat.template import ChatTemplate
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.generation_config import GenerationDefaults
from qwen_jax.generate.service import Answer, Service, TextChunk
from qwen_jax.tokenizer.tokenizer import Tokenizer


def override_params(params: SamplingParams, options: Mapping[str, Any]) -> SamplingParams:
    """Returns `params` with the fields in `options` replaced.

    Raises:
      UserError: an unknown name, with the nearest known one; a value of the wrong type or out of
        range.
    """
    fields = {field.name: field for field in dataclasses.fields(params)}
    for name, value in options.items():
        if name not in fields:
            raise UserError(
                f"{name!r} is not a sampling option{nearest(name, fields)}; the options are "
                f"{', '.join(fields)}."
            )
        default = fields[name].default
        numeric = isinstance(default, int | float) or name in ("seed", "logprobs")
        if numeric and (
            isinstance(value, bool)
            or not isinstance(value, int | float | None if default is None else int | float)
            or (not isinstance(default, float) and isinstance(value, float))
        ):
            kind = "a number" if isinstance(default, float) else "an integer"
            raise UserError(f"{name} is {value!r}; it must be {kind}.")
        if name == "stop_ids" and not all(isinstance(i, int) for i in value):
            raise UserError(f"stop_ids is {value!r}; it must be a list of token ids.")
    if "stop_ids" in options:
        options = {**options, "stop_ids": tuple(options["stop_ids"])}
    return dataclasses.replace(params, **options)


def build_chat_prompt(
    query: str,
    history: Sequence[tuple[str, str]],
    system: str | None,
    tokenizer: Tokenizer,
    max_window: int,
) -> np.ndarray:
    """Returns the ChatML prompt for the next answer, int32 [T] for its T tokens.

    As `chat.chatml.build_context` (the released `make_context`), but `system` may be None: the
    conversation then starts with the user's turn.

    Args:
      query: the user's new message.
      history: pairs (query, answer) of earlier turns, oldest first; the oldest are dropped if
        system prompt and history do not fit in `max_window`.
      system: the system prompt, or None.
      tokenizer: encodes roles and contents.
      max_window: limit of the tokens of system prompt and history.
    """
    if system is not None:
        return build_context(query, history, system, tokenizer, max_window)
    # Build with an empty system turn, then cut it off with the newline that follows it. The window
    # counts the turn without the newline.
    empty = len(build_context("", [], "", tokenizer)) - len(_query_turn("", tokenizer))
    return build_context(query, history, "", tokenizer, max_window + empty - 1)[empty:]


def _query_turn(query: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the user's turn with `query` and of the open assistant turn after it."""
    newline = tokenizer.encode("\n")
    user = [*tokenizer.encode("user"), *newline, *tokenizer.encode(query), tokenizer.im_end_id]
    answer = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return [tokenizer.im_start_id, *user, *newline, *answer]


class Session:
    """A conversation over a service; not thread-safe.

    Attributes:
      defaults: the model's generation defaults.
      system: the system prompt, or None.
      history: pairs (user's message, answer), oldest first.
      params: sampling parameters of the next answers.
      stop: stop strings of the next answers.
      thinking: value of `enable_thinking` for the chat template (Qwen3); None leaves it unset.
    """

    def __init__(self, service: Service, defaults: GenerationDefaults):
        """Creates an empty conversation with a model's generation defaults."""
        self.defaults = defaults
        self.system = defaults.system
        self.history: list[tuple[str, str]] = []
        self.params, self.stop = defaults.params, defaults.stop
        self.thinking: bool | None = None
        self._service = service
        self._template: ChatTemplate | None = None
        if defaults.template is not None:
            # `read_defaults` has logged a broken template; ChatML is used instead.
            with contextlib.suppress(UserError):
                self._template = ChatTemplate(defaults.template)

    @property
    def has_thinking_switch(self) -> bool:
        """Whether the chat template reads `enable_thinking`, so that `thinking` has an effect."""
        if self._template is None or self.defaults.template is None:
            return False
        return "enable_thinking" in self.defaults.template and self.is_chat_model

    @property
    def is_chat_model(self) -> bool:
        """Whether the model was trained on ChatML; otherwise it only continues text."""
        return self.defaults.is_chat_model

    def prompt(self, query: str, params: SamplingParams | None = None) -> np.ndarray:
        """Returns the prompt that would be sent for `query` now, int32 [T] for its T tokens.

        The model's chat template renders it (Qwen1.5 to Qwen3), without one the release's
        `make_context`. The oldest pairs are dropped so that the history fits in `max_window`, and
        the prompt leaves room in the engine for the answer: `max_tokens`, or half of the engine's
        `max_length` if that is less. For a base model the prompt is the text alone.

        Args:
          query: the user's new message.
          params: sampling parameters of the answer; those of the session by default.

        Raises:
          UserError: the text is empty.
        """
        params = params or self.params
        tokenizer = self._service.tokenizer
        if not query.strip():
            raise UserError("The message is empty; write something.")
        if not self.is_chat_model:
            return np.asarray(tokenizer.encode(query), np.int32)
        max_length = self._service.max_length
        room = max_length - min(params.max_tokens, max_length // 2)
        turn = len(_query_turn(query, tokenizer))
        window = min(self.defaults.max_window, room - turn)
        if self._template is None:
            return build_chat_prompt(query, self.history, self.system, tokenizer, window)

        def fits(dropped: int) -> bool:
            """Returns whether the prompt without the `dropped` oldest pairs fits the window."""
            return len(self._apply_template(query, dropped)) - turn < window

        # The smallest number of pairs to drop. A query that is too long by itself is refused by the
        # service.
        dropped = bisect.bisect_left(range(len(self.history)), True, key=fits)
        return self._apply_template(query, dropped)

    def _apply_template(self, query: str, dropped: int) -> np.ndarray:
        """Returns the prompt for `query` rendered by the chat template, int32 [T].

        The `dropped` oldest pairs of the history are left out.
        """
        assert self._template is not None
        messages = [*self.messages(dropped), {"role": "user", "content": query}]
        options: dict[str, Any] = (
            {} if self.thinking is None else {"enable_thinking": self.thinking}
        )
        ids = self._template.encode(self._service.tokenizer, messages, **options)
        return np.asarray(ids, np.int32)

    def ask(self, query: str, *, stream: bool = True, **options: Any) -> Reply:
        """Submits a message and returns the reply, which joins the history when it is complete.

        Args:
          query: the user's message.
          stream: whether text is delivered as it is generated; otherwise in one piece.
          **options: fields of `SamplingParams` for this answer, and `stop`, a list of strings.

        Raises:
          UserError: the text is empty, or an option is unknown or has a bad value; see also
            `Service.submit`.
        """
        stop = options.pop("stop", self.stop)
        params = override_params(self.params, options)
        prompt = self.prompt(query, params)
        answer = self._service.submit(prompt, params, stop=stop, stream=stream)
        return Reply(self, query, answer)

    def undo(self) -> tuple[str, str]:
        """Removes the newest pair from the history and returns it.

        Raises:
          UserError: the history is empty.
        """
        if not self.history:
            raise UserError("The conversation is empty; there is nothing to undo.")
        return self.history.pop()

    def messages(self, dropped: int = 0) -> list[dict[str, str]]:
        """Returns the conversation as OpenAI messages, dictionaries of `role` and `content`.

        Args:
          dropped: number of oldest pairs to leave out.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": content}
            for pair in self.history[dropped:]
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]

    def restore(self, messages: Any) -> None:
        """Replaces system prompt and history by those of a list of messages.

        Args:
          messages: as `messages` returns them.

        Raises:
          UserError: `messages` is not a list of messages that alternate between user and assistant,
            after at most one of the system; the session is unchanged then.
        """
        try:
            found = [(message["role"], message["content"]) for message in messages]
        except (TypeError, KeyError):
            raise UserError(
                "This is not a conversation; it must be a list of messages with role and content."
            ) from None
        system = found.pop(0)[1] if found and found[0][0] == "system" else None
        roles = [role for role, _ in found]
        texts = [content for _, content in found] + ([] if system is None else [system])
        if roles != ["user", "assistant"] * (len(found) // 2) or not all(
            isinstance(text, str) for text in texts
        ):
            raise UserError(
                "After the system prompt, messages of user and assistant must alternate, each with "
                f"one text; the roles are {', '.join(map(str, roles)) or 'none'}."
            )
        self.system = system
        contents = [content for _, content in found]
        self.history = list(zip(contents[::2], contents[1::2], strict=True))


class Reply:
    """Answer to a message of a session: an iterator over its text.

    When it has been read to its end and was not cancelled, it joins the session's history.

    Attributes:
      answer: the handle of the service.
      finish: how the answer ended, as in `TextChunk`; None until the end was read.
    """

    def __init__(self, session: Session, query: str, answer: Answer):
        """Creates the reply; called by `Session.ask`.

        Args:
          session: the session whose history the reply joins.
          query: the user's message.
          answer: the service's handle on the answer.
        """
        self.answer = answer
        self.finish: str | None = None
        self._session, self._query = session, query
        self._pieces: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text as they are generated."""
        for chunk in self.answer:
            self._add_chunk(chunk)
            if chunk.text:
                yield chunk.text

    def text(self) -> str:
        """Waits for the end and returns the full text, stripped of white space for a chat model."""
        with self.answer:  # an exception in the reader, such as Ctrl-C, cancels the answer
            self._add_chunk(self.answer.result())
        return self._full_text

    def cancel(self) -> None:
        """Cancels the answer, which then does not join the history."""
        self.answer.cancel()

    @property
    def _full_text(self) -> str:
        """The text read so far, stripped of white space for a chat model."""
        text = "".join(self._pieces)
        return text.strip() if self._session.is_chat_model else text

    def _add_chunk(self, chunk: TextChunk) -> None:
        """Adds a chunk to the text; at the end adds the message and the text to the history."""
        self._pieces.append(chunk.text)
        if self.finish is None and chunk.finish is not None:
            self.finish = chunk.finish
            if self.finish != "cancelled" and self._session.is_chat_model:
                self._session.history.append((self._query, self._full_text))
