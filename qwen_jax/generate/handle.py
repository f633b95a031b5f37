"""A loaded model as a person holds it in a notebook: chat, stream, generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.generate.generation_config import Defaults
from qwen_jax.generate.service import Answer, Service
from qwen_jax.generate.session import Reply, Session, with_options
from qwen_jax.model import ModelConfig
from qwen_jax.tokenizer.tokenizer import Tokenizer


class Qwen:
    """A model that is ready to answer; `qwen_jax.load` makes one.

    Options of every call are the fields of `SamplingParams` (temperature=0.7, max_tokens=100,
    seed=1, …) and `stop`, a list of strings; what is not given comes from the model's own
    generation config.

    Attributes:
      config: the network. tokenizer: text to ids and back. defaults: how the model wants to be
        sampled.
      service: runs the engine; its `submit` takes token ids from any thread.
      session: the conversation of `chat` and `stream`.
    """

    def __init__(self, service: Service, config: ModelConfig, defaults: Defaults, name: str):
        """Over a running service; `name` is for people."""
        self.service, self.config, self.defaults, self.name = service, config, defaults, name
        self.session = Session(service, defaults)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self.service.tokenizer

    @property
    def history(self) -> list[tuple[str, str]]:
        """Pairs (what was said, the answer) of the conversation; may be edited."""
        return self.session.history

    @property
    def system(self) -> str | None:
        """The system prompt of the conversation; may be set, None for none."""
        return self.session.system

    @system.setter
    def system(self, text: str | None) -> None:
        self.session.system = text

    def chat(self, text: str, **options: Any) -> str:
        """Says `text` in the conversation and returns the answer, which joins the history.

        A base model continues the text instead, and keeps no history.

        Raises:
          UserError: empty text, an unknown option or a bad value, a text longer than fits.
        """
        return self.session.ask(text, stream=False, **options).text()

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """`chat`, in pieces as they come. Left early, the answer is stopped and does not count."""
        reply = self.session.ask(text, stream=True, **options)
        return _pieces(reply)

    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continues a text, or several side by side; no chat format, no history.

        Args:
          prompt: a text, or a list of texts. Control tokens in it are plain text.
          **options: see above.

        Returns:
          what follows the prompt, or a list of it for a list.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        answers: list[Answer] = []
        try:
            answers.extend(self.submit(text, **options) for text in prompts)
            texts = [answer.result().text for answer in answers]
        finally:  # what has ended stays as it is
            for answer in answers:
                answer.cancel()
        return texts[0] if isinstance(prompt, str) else texts

    def submit(
        self, prompt: str | Sequence[int] | np.ndarray, *, stream: bool = False, **options: Any
    ) -> Answer:
        """Begins to continue a text or token ids; returns a handle with tokens and logprobs too."""
        stop = options.pop("stop", self.defaults.stop)
        params = with_options(self.defaults.params, options)
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("The prompt is empty; write something.")
            prompt = self.tokenizer.encode(prompt)
        return self.service.submit(prompt, params, stop=stop, stream=stream)

    def reset(self) -> None:
        """Forgets the conversation."""
        self.session.history.clear()

    def close(self) -> None:
        """Stops everything and frees the memory; also done when nobody holds the model."""
        self.service.close()

    def __enter__(self) -> Qwen:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "chat" if self.session.chats else "base"
        return (
            f"Qwen({self.name!r}, {kind} model of {self.config.n_layers} layers, up to "
            f"{self.service.max_length:,} tokens)"
        )


def _pieces(reply: Reply) -> Iterator[str]:
    try:
        yield from reply
    finally:
        reply.cancel()
