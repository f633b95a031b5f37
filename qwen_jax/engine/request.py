"""Requests to the engine, their sampling parameters, and its outputs, as frozen dataclasses.

The engine takes and returns token ids; text, stop strings and character streams are handled by
`generate.detokenizer` and `generate.service`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qwen_jax.errors import UserError

MAX_STOP_IDS = 8
"""Most stop ids of a request: they occupy a fixed-size row of a device array."""

MAX_LOGPROBS = 20
"""Most alternatives a token may be reported with (the limit of OpenAI's `top_logprobs`)."""

LOGPROBS_OF = ("sampled", "raw")
"""Distributions of reported alternatives: "sampled" is the one the token was sampled from (after
penalties, temperature and truncation), "raw" the softmax of the model's logits."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Applied in this order: repetition, then presence and frequency penalties on the logits, division
    by the temperature, top-k, top-p, min-p, and one sample keyed by (seed, position).

    Attributes:
      max_tokens: most output tokens.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: number of most probable tokens to sample from (ties with the last one are kept); 0
        disables it.
      top_p: sample from the fewest tokens whose probabilities reach this sum (ties with the last
        one are kept); 1 disables it.
      min_p: sample from tokens whose probability is at least this fraction of the highest; 0
        disables it.
      repetition_penalty: logits of tokens that occur in the prompt or output are divided by this
        where positive, multiplied where negative (arXiv:1909.05858 §4.1); 1 disables it.
      presence_penalty: subtracted from logits of tokens that occur in the output.
      frequency_penalty: subtracted from a token's logit once per occurrence in the output.
      seed: seed of the samples; None: the engine chooses one. The same seed, prompt and parameters
        give the same output whatever else is running.
      stop_ids: token ids that end the output; they are not part of it.
      logprobs: number of alternatives per token to report log-probabilities of, beside the token's
        own; None reports none at all.
      logprobs_of: one of `LOGPROBS_OF`, the distribution of the alternatives. The token's own
        log-probability is reported under both.
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
    """One prompt to continue.

    Attributes:
      id: unique among the engine's unfinished requests.
      prompt: token ids, at least one.
      params: sampling parameters.
      stream: whether each token is wanted as soon as it is sampled. Otherwise the engine may run
        several decode steps before it returns their tokens together.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    stream: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens of one request, and whether it has ended.

    Attributes:
      request_id: id of the request.
      tokens: int32 [n], the new tokens without stop ids; may be empty when the request ends.
      finish: None while the request continues; "stop" (a stop id was sampled) or "length"
        (`max_tokens`, or the engine's `max_length`, was reached).
      logprobs: float32 [n], natural log-probability of each token under the distribution it was
        sampled from; None unless requested.
      raw_logprobs: float32 [n], the same under the softmax of the model's logits.
      top_ids: int32 [n, params.logprobs], the most probable tokens at each position, best first.
      top_logprobs: float32 [n, params.logprobs], their natural log-probabilities.
      cached_tokens: prompt tokens found in the prefix cache, in the first output of a request only.
    """

    request_id: str
    tokens: np.ndarray
    finish: str | None = None
    logprobs: np.ndarray | None = None
    raw_logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    cached_tokens: int = 0
