"""One conversation with a model: what was said, the prompt of the next answer, undo and retry."""

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
from qwen_jax.generate.generation_config import Defaults
from qwen_jax.generate.service import Answer, Chunk, Service
from qwen_jax.tokenizer.tokenizer import Tokenizer


def with_options(params: SamplingParams, options: Mapping[str, Any]) -> SamplingParams:
    """`params` with some fields replaced.

    Raises:
      UserError: an unknown name, with the nearest; a value of another type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(params)}
    for name, value in options.items():
        if name not in fields:
            raise UserError(
                f"{name!r} is no sampling option{nearest(name, fields)}; there are "
                f"{', '.join(fields)}."
            )
        default = fields[name].default
        numeric = isinstance(default, int | float) or name in ("seed", "logprobs")
        if numeric and (
            isinstance(value, bool)
            or not isinstance(value, int | float | None if default is None else int | float)
            or (not isinstance(default, float) and isinstance(value, float))
        ):
            kind = "a number" if isinstance(default, float) else "a whole number"
            raise UserError(f"{name} is {value!r}; it must be {kind}.")
        if name == "stop_ids" and not all(isinstance(i, int) for i in value):
            raise UserError(f"stop_ids is {value!r}; it must be a list of token ids.")
    if "stop_ids" in options:
        options = {**options, "stop_ids": tuple(options["stop_ids"])}
    return dataclasses.replace(params, **options)


def chat_prompt(
    query: str,
    history: Sequence[tuple[str, str]],
    system: str | None,
    tokenizer: Tokenizer,
    max_window: int,
) -> np.ndarray:
    """Prompt of the next answer, int32 [T], as the released `make_context`.

    Past pairs that do not fit in `max_window` tokens are dropped whole, oldest first; see
    `tokenizer.chatml.build_context`. With no system prompt the conversation starts with the user's
    turn.
    """
    if system is not None:
        return build_context(query, history, system, tokenizer, max_window)
    # An empty system turn and the newline after it, cut off again.
    empty = len(build_context("", [], "", tokenizer)) - len(_user_turn("", tokenizer))
    return build_context(query, history, "", tokenizer, max_window + empty - 1)[empty:]


def _user_turn(query: str, tokenizer: Tokenizer) -> list[int]:
    """What of a prompt follows the newline after the system turn when there is no history."""
    newline = tokenizer.encode("\n")
    user = [*tokenizer.encode("user"), *newline, *tokenizer.encode(query), tokenizer.im_end_id]
    answer = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return [tokenizer.im_start_id, *user, *newline, *answer]


class Session:
    """A conversation over a service; not thread-safe.

    Attributes:
      system: the system prompt; None: none.
      history: pairs (what the user said, the answer), oldest first.
      params: sampling of the next answers.
      stop: stop strings of the next answers.
      thinking: whether the model is to think before it answers, where its chat template asks
        (Qwen3); None leaves it to the template.
    """

    def __init__(self, service: Service, defaults: Defaults):
        self.defaults = defaults
        self.system = defaults.system
        self.history: list[tuple[str, str]] = []
        self.params, self.stop = defaults.params, defaults.stop
        self.thinking: bool | None = None
        self._service = service
        self._template = None
        if defaults.template is not None:
            with contextlib.suppress(UserError):  # broken, which the log has said: plain ChatML
                self._template = ChatTemplate(defaults.template)

    @property
    def thinks(self) -> bool:
        """Whether the chat template asks if the model is to think."""
        asks = self._template is not None and "enable_thinking" in self.defaults.template
        return asks and self.chats

    @property
    def chats(self) -> bool:
        """Whether the model is one for chat; otherwise it only continues text."""
        return self.defaults.chat_format == "chatml"

    def prompt(self, query: str, params: SamplingParams | None = None) -> np.ndarray:
        """Token ids of the prompt that asks `query` now, int32 [T].

        The model's own chat template writes it (Qwen1.5 to Qwen3), else the release's
        `make_context`. Of a conversation as much is kept as `max_window` allows and as leaves room
        in the engine for the answer: `max_tokens`, or half of what it holds where that is less. A
        base model gets the text alone.

        Raises:
          UserError: the text is empty.
        """
        params = params or self.params
        tokenizer = self._service.tokenizer
        if not query.strip():
            raise UserError("There is nothing to answer; write something.")
        if not self.chats:
            return np.asarray(tokenizer.encode(query), np.int32)
        longest = self._service.max_length
        room = longest - min(params.max_tokens, longest // 2)
        turn = len(_user_turn(query, tokenizer))
        window = min(self.defaults.max_window, room - turn)
        if self._template is None:
            return chat_prompt(query, self.history, self.system, tokenizer, window)

        def fits(dropped: int) -> bool:
            return len(self._templated(query, dropped)) - turn < window

        # The fewest of the oldest pairs are dropped; a query that is too long alone is refused.
        dropped = bisect.bisect_left(range(len(self.history)), True, key=fits)
        return self._templated(query, dropped)

    def _templated(self, query: str, dropped: int) -> np.ndarray:
        """The prompt that the model's own chat template writes, without the oldest pairs."""
        messages = [*self.messages(dropped), {"role": "user", "content": query}]
        options = {} if self.thinking is None else {"enable_thinking": self.thinking}
        ids = self._template.encode(self._service.tokenizer, messages, **options)
        return np.asarray(ids, np.int32)

    def ask(self, query: str, *, stream: bool = True, **options: Any) -> Reply:
        """Asks for an answer; it joins the history when it has come to its end.

        Args:
          query: what the user says.
          stream: text is read as it comes.
          **options: fields of `SamplingParams` for this answer, and `stop`, a list of strings.

        Raises:
          UserError: bad input; see also `Service.submit`.
        """
        stop = options.pop("stop", self.stop)
        params = with_options(self.params, options)
        prompt = self.prompt(query, params)
        answer = self._service.submit(prompt, params, stop=stop, stream=stream)
        return Reply(self, query, answer)

    def undo(self) -> tuple[str, str]:
        """Takes the last pair back and returns it.

        Raises:
          UserError: nothing was said yet.
        """
        if not self.history:
            raise UserError("Nothing was said yet; there is nothing to take back.")
        return self.history.pop()

    def messages(self, dropped: int = 0) -> list[dict[str, str]]:
        """The conversation, but for the oldest pairs, as role and content, as OpenAI has it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": content}
            for pair in self.history[dropped:]
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]

    def restore(self, messages: Any) -> None:
        """Puts a conversation of `messages` in place of this one.

        Raises:
          UserError: it is no list of messages that alternate between user and assistant, after at
            most one of the system; nothing is changed then.
        """
        try:
            found = [(message["role"], message["content"]) for message in messages]
        except (TypeError, KeyError):
            raise UserError(
                "A conversation is a list of messages with role and content; this is none."
            ) from None
        system = found.pop(0)[1] if found and found[0][0] == "system" else None
        roles = [role for role, _ in found]
        texts = [content for _, content in found] + ([] if system is None else [system])
        if roles != ["user", "assistant"] * (len(found) // 2) or not all(
            isinstance(text, str) for text in texts
        ):
            raise UserError(
                "After the system prompt, user and assistant must take turns with one text each; "
                f"the roles are {', '.join(map(str, roles)) or 'none'}."
            )
        self.system = system
        contents = [content for _, content in found]
        self.history = list(zip(contents[::2], contents[1::2], strict=True))


class Reply:
    """An answer in a conversation: iterate over its text. Read to its end, it joins the history.

    Attributes:
      answer: the service's handle.
      finish: how it ended; None so far.
    """

    def __init__(self, session: Session, query: str, answer: Answer):
        self.answer = answer
        self.finish: str | None = None
        self._session, self._query, self._pieces = session, query, []

    def __iter__(self) -> Iterator[str]:
        for chunk in self.answer:
            self._take(chunk)
            if chunk.text:
                yield chunk.text

    def text(self) -> str:
        """Waits for the end and returns the whole answer, without white space around it."""
        with self.answer:  # an interrupted reader must not leave it running
            self._take(self.answer.result())
        return self._whole

    def cancel(self) -> None:
        """Ends it; a cancelled answer does not join the history."""
        self.answer.cancel()

    @property
    def _whole(self) -> str:
        whole = "".join(self._pieces)
        return whole.strip() if self._session.chats else whole

    def _take(self, chunk: Chunk) -> None:
        self._pieces.append(chunk.text)
        if self.finish is None and chunk.finish is not None:
            self.finish = chunk.finish
            if self.finish != "cancelled" and self._session.chats:
                self._session.history.append((self._query, self._whole))
