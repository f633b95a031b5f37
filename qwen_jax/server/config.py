"""What a server serves, and within which limits: two frozen records."""

from __future__ import annotations

import dataclasses

from qwen_jax.chat.template import ChatTemplate
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.handle import Qwen
from qwen_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The model behind the server, as requests see it.

    Attributes:
      name: its id in `/v1/models`, the `model` of requests.
      tokenizer: text to ids.
      family: `ModelConfig.family`: "qwen" speaks ReAct where there are tools, the others hermes.
      max_length: most tokens of prompt and answer together.
      defaults: what a request that says nothing gets; its `max_tokens` is that of chats, cut to
        what fits. Of OpenAI's own defaults only `temperature` 1 stands, as in the releases.
        Its `stop_ids` end answers of both kinds.
      stop: strings that end answers of both kinds.
      chats: it knows ChatML; otherwise a chat is text without roles, which is continued.
      default_system: the system turn of a chat without one; None: no such turn.
      template: writes chats, as the model's folder has it; None, and always for Qwen v1: we do.
      created: when the server was started, seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    family: str
    max_length: int
    defaults: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    chats: bool = True
    default_system: str | None = None
    template: ChatTemplate | None = None
    created: int = 0

    @property
    def react(self) -> bool:
        """Whether tools are spoken of in ReAct's form; otherwise in hermes'."""
        return self.family == "qwen"


def served_model(qwen: Qwen, name: str | None, created: int) -> ServedModel:
    """A loaded model as it is served; `name` is by default that of its folder."""
    defaults = qwen.defaults
    return ServedModel(
        name=name or qwen.name,
        tokenizer=qwen.tokenizer,
        family=qwen.config.family,
        max_length=qwen.service.max_length,
        defaults=defaults.params,
        stop=defaults.stop,
        chats=defaults.chat_format == "chatml",
        default_system=defaults.system,
        template=ChatTemplate(defaults.template) if defaults.template else None,
        created=created,
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
      api_keys: one of them must come with each request to /v1; empty: nobody is asked.
      max_requests: HTTP requests for text that may be under way at once; more get a 429.
      max_body_bytes: longest body.
      request_timeout_s: a request that takes longer is cut and answered with an error.
      keep_alive_s: a stream without news sends a comment so often, for proxies that would close it.
      drain_s: how long running requests may go on after SIGTERM.
      cors_origins: origins whose pages may call the server; ("*",): all of them.
      allowed_hosts: names that the server may be called by; ("*",): any. A page elsewhere that
        resolves its own name to this host (DNS rebinding) is kept out by this.
    """

    api_keys: tuple[str, ...] = ()
    max_requests: int = 512
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    drain_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)

    def __post_init__(self):
        for name in ("max_requests", "max_body_bytes", "request_timeout_s", "keep_alive_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        if self.drain_s < 0:
            raise UserError(f"drain_s is {self.drain_s!r}; it must be 0 or more.")
        if not all(len(key) >= 8 and key.isascii() and key.isprintable() for key in self.api_keys):
            raise UserError("An API key is too short or odd; give 8 or more printable ASCII signs.")
