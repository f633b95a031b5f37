"""What is asked of the engine and what it answers, one frozen record each.

Ids go in, ids come out: text, stop strings and streams of characters are one floor up, in
`generate.text` and `generate.service`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qwen_jax.errors import UserError

MAX_STOP_IDS = 8
"""Most stop ids of a request: they stand in a fixed row of an array on the device."""

MAX_LOGPROBS = 20
"""Most alternatives a token may be reported with (the limit of OpenAI's `top_logprobs`)."""

LOGPROBS_OF = ("sampled", "raw")
"""The distribution the token was drawn from (after penalties, temperature and truncation), or the
model's own, the softmax of its logits."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request is continued. Every number acts on its own request only.

    In order: repetition, then presence and frequency penalties on the logits, division by the
    temperature, top-k, top-p, min-p, and one draw keyed by (seed, position).

    Attributes:
      max_tokens: most new tokens.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: draw among so many most probable tokens only (ties with the last one stay); 0: all.
      top_p: draw among the fewest tokens whose probabilities reach this sum (tokens equal to the
        last one stay); 1: all.
      min_p: draw among tokens at least this share as probable as the most probable; 0: all.
      repetition_penalty: logits of tokens that the prompt or the answer has are divided by this
        where positive, multiplied where negative (arXiv:1909.05858 §4.1); 1: none.
      presence_penalty: subtracted from logits of tokens that the answer has.
      frequency_penalty: subtracted once for each time that the answer has the token.
      seed: of the draws; None: the engine picks one. The same seed, prompt and parameters give the
        same answer whatever else is running.
      stop_ids: tokens that end the answer; they are not part of it.
      logprobs: report the log-probability of each token and of this many alternatives; None: don't.
      logprobs_of: one of `LOGPROBS_OF`, the distribution of the alternatives. Both numbers are
        given for the token itself.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    logprobs_of: str = "sampled"

    def __post_init__(self):
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {allowed}.")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} is {value!r}; it must be a finite number.")
        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("temperature", self.temperature >= 0, "0 (most probable token) or more")
        check("top_k", self.top_k >= 0, "0 (all tokens) or more")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        check("repetition_penalty", self.repetition_penalty > 0, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, -2 <= getattr(self, name) <= 2, "from -2 to 2")
        if self.seed is not None:
            check("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        check("stop_ids", len(self.stop_ids) <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
        if self.logprobs is not None:
            check("logprobs", 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")
        check("logprobs_of", self.logprobs_of in LOGPROBS_OF, f"one of {', '.join(LOGPROBS_OF)}")

    @property
    def penalised(self) -> bool:
        """Whether any penalty changes the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
      id: unique among the requests that the engine has.
      prompt: token ids, at least one.
      params: how.
      stream: somebody reads the tokens as they come: they are given out one by one, where otherwise
        the engine takes many steps between two looks at the result.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    stream: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens of a request, and whether they are the last.

    Attributes:
      request_id: whose.
      tokens: int32 [n], may be empty when the request ends; stop ids are left out.
      finish: None while it goes on; "stop" (a stop id was drawn), "length" (`max_tokens`, or the
        longest sequence the engine holds).
      logprobs, raw_logprobs: float32 [n], natural logarithms under the distribution drawn from and
        under the model's own; None unless asked for.
      top_ids, top_logprobs: int32 and float32 [n, params.logprobs], most probable first.
      cached_tokens: tokens of the prompt that were not computed again, in the first output.
    """

    request_id: str
    tokens: np.ndarray
    finish: str | None = None
    logprobs: np.ndarray | None = None
    raw_logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    cached_tokens: int = 0
