"""Configuration of a server: the model it serves, and its access and resource limits."""

from __future__ import annotations

import dataclasses

from qwen_jax.chat.template import ChatTemplate
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.handle import Qwen
from qwen_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """Configuration of the served model: its API name, tokenizer, maximum length and defaults.

    Attributes:
      name: model id in `/v1/models` and in the field `model` of requests.
      tokenizer: tokenizer of the model.
      family: `ModelConfig.family`; "qwen" (Qwen v1) uses the ReAct tool format, all others hermes.
      max_length: maximum number of tokens of a prompt and its answer together.
      default_params: sampling parameters for the fields that a request leaves out. Its `max_tokens`
        applies to chats only, and is reduced to what fits into `max_length`; its `stop_ids` end
        chat and text completions. OpenAI's own defaults are not used, but temperature 1 is the
        default here too, as in the releases.
      stop: strings that end chat and text completions.
      is_chat_model: whether the model was trained on ChatML; if not, a chat is rendered as the
        concatenated texts of its messages, without roles.
      default_system: system prompt of a chat that has none; None adds no system turn.
      template: the chat template that renders chats, from the model's folder. None, as always for
        Qwen v1: chats are rendered by `server.prompts` as ChatML.
      created: time at which the server was started, in seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    family: str
    max_length: int
    default_params: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    is_chat_model: bool = True
    default_system: str | None = None
    template: ChatTemplate | None = None
    created: int = 0

    @property
    def uses_react(self) -> bool:
        """Whether tools use the ReAct format; otherwise they use the hermes format."""
        return self.family == "qwen"


def served_model(qwen: Qwen, name: str | None, created: int) -> ServedModel:
    """Returns the server configuration of a loaded model.

    Args:
      qwen: the loaded model.
      name: model id in the API; None uses the name of the model's folder.
      created: start time of the server, in seconds since 1970.
    """
    defaults = qwen.defaults
    return ServedModel(
        name=name or qwen.name,
        tokenizer=qwen.tokenizer,
        family=qwen.config.family,
        max_length=qwen.service.max_length,
        default_params=defaults.params,
        stop=defaults.stop,
        is_chat_model=defaults.is_chat_model,
        default_system=defaults.system,
        template=ChatTemplate(defaults.template) if defaults.template else None,
        created=created,
    )


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Access control and resource limits of a server.

    Attributes:
      api_keys: keys, one of which each request to /v1 must carry; empty disables the check.
      max_requests: maximum number of concurrent HTTP completion requests; further ones get a 429.
      max_body_bytes: maximum size of a request body.
      request_timeout_s: time after which an unfinished answer is cancelled with an error.
      keep_alive_s: interval without output after which a stream sends a comment, so that proxies
        do not close it.
      drain_s: time that running requests have to finish after SIGTERM.
      cors_origins: origins whose pages may call the server; ("*",) allows all.
      allowed_hosts: host names under which the server may be called; ("*",) allows all. This blocks
        pages of other sites that resolve their own name to this host (DNS rebinding).

    Raises:
      UserError: a value is out of range, or an API key is too short or not printable ASCII.
    """

    api_keys: tuple[str, ...] = ()
    max_requests: int = 512
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    drain_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_body_bytes", "request_timeout_s", "keep_alive_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        if self.drain_s < 0:
            raise UserError(f"drain_s is {self.drain_s!r}; it must be 0 or more.")
        if not all(len(key) >= 8 and key.isascii() and key.isprintable() for key in self.api_keys):
            raise UserError("An API key is not valid; use 8 or more printable ASCII characters.")
