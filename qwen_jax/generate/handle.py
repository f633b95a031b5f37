"""Handle on a loaded model for notebooks and scripts: chat, stream, generate, submit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.generate.generation_config import GenerationDefaults
from qwen_jax.generate.service import Answer, Service
from qwen_jax.generate.session import Reply, Session, override_params
from qwen_jax.model import ModelConfig
from qwen_jax.tokenizer.tokenizer import Tokenizer


class Qwen:
    """A loaded model with its engine and one conversation; created by `qwen_jax.load`.

    The keyword options of all calls are the fields of `SamplingParams` (temperature=0.7,
    max_tokens=100, seed=1, …) and `stop`, a list of strings. Options that are left out come from
    the model's generation config.

    Attributes:
      config: configuration of the network.
      defaults: sampling parameters, chat format and system prompt of the model's folder.
      name: name of the model's folder, for display.
      service: runs the engine; its `submit` takes token ids from any thread.
      session: the conversation of `chat` and `stream`.
    """

    def __init__(
        self, service: Service, config: ModelConfig, defaults: GenerationDefaults, name: str
    ):
        """Creates the handle over a running service, which `close` ends."""
        self.service, self.config, self.defaults, self.name = service, config, defaults, name
        self.session = Session(service, defaults)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.service.tokenizer

    @property
    def history(self) -> list[tuple[str, str]]:
        """Pairs (user's message, answer) of the conversation, oldest first; may be edited."""
        return self.session.history

    @property
    def system(self) -> str | None:
        """System prompt of the conversation, or None; may be set."""
        return self.session.system

    @system.setter
    def system(self, text: str | None) -> None:
        """Sets the system prompt of the conversation."""
        self.session.system = text

    def chat(self, text: str, **options: Any) -> str:
        """Sends a message in the conversation and returns the answer, which joins the history.

        A base model returns a continuation of `text` instead, and keeps no history.

        Raises:
          UserError: the text is empty or too long, or an option is unknown or has a bad value.
        """
        return self.session.ask(text, stream=False, **options).text()

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Sends a message as `chat` does and yields the answer in pieces as it is generated.

        If the iteration is abandoned, the answer is cancelled and does not join the history.

        Raises:
          UserError: as `chat`.
        """
        reply = self.session.ask(text, stream=True, **options)
        return _stream_text(reply)

    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continues one text, or several at the same time, without chat format or history.

        Args:
          prompt: a text, or a list of texts. Control tokens in it are encoded as plain text.
          **options: see the class.

        Returns:
          The continuation, or a list of continuations for a list of prompts.

        Raises:
          UserError: as `chat`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        answers: list[Answer] = []
        try:
            answers.extend(self.submit(text, **options) for text in prompts)
            texts = [answer.result().text for answer in answers]
        finally:  # has no effect on finished answers
            for answer in answers:
                answer.cancel()
        return texts[0] if isinstance(prompt, str) else texts

    def submit(
        self, prompt: str | Sequence[int] | np.ndarray, *, stream: bool = False, **options: Any
    ) -> Answer:
        """Submits a text or token ids to continue; returns the answer before it is generated.

        Args:
          prompt: a text, or token ids.
          stream: whether text is delivered as soon as it is certain; otherwise in one chunk.
          **options: see the class; with `logprobs=K` the chunks have log-probabilities.

        Raises:
          UserError: as `chat`.
        """
        stop = options.pop("stop", self.defaults.stop)
        params = override_params(self.defaults.params, options)
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("The prompt is empty; give some text.")
            prompt = self.tokenizer.encode(prompt)
        return self.service.submit(prompt, params, stop=stop, stream=stream)

    def reset(self) -> None:
        """Clears the history of the conversation."""
        self.session.history.clear()

    def close(self) -> None:
        """Ends the engine and frees its memory; also done when the handle is garbage-collected."""
        self.service.close()

    def __enter__(self) -> Qwen:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Ends the engine, as `close`."""
        self.close()

    def __repr__(self) -> str:
        kind = "chat" if self.session.is_chat_model else "base"
        return (
            f"Qwen({self.name!r}, {kind} model of {self.config.n_layers} layers, up to "
            f"{self.service.max_length:,} tokens)"
        )


def _stream_text(reply: Reply) -> Iterator[str]:
    """Yields the pieces of a reply; cancels it if the iteration is abandoned."""
    try:
        yield from reply
    finally:
        reply.cancel()
