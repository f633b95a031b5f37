"""Conversion of a request's sampling fields to `SamplingParams` and stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwen_jax.engine.request import MAX_STOP_IDS, SamplingParams
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.server.schema import ChatRequest, CompletionRequest

# Fields with the same name and meaning in requests and in `SamplingParams`.
_SHARED_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


def sampling_params(
    request: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompt_tokens: int,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    logprobs: int | None,
) -> SamplingParams:
    """Returns the sampling parameters of a request; its fields override the model's defaults.

    Args:
      request: the request, validated.
      model: its defaults apply to fields that are None.
      prompt_tokens: number of tokens of the prompt.
      max_tokens: maximum number of new tokens that the request asks for, or None.
      default_max_tokens: maximum for None; it is reduced to what the model's length leaves.
      logprobs: number of alternatives per token to return log-probabilities of; None for none.

    Raises:
      ApiError: 400 if prompt and answer exceed the model's length, or there are too many stop ids.
    """
    room = model.max_length - prompt_tokens
    if room < 1 or (max_tokens or 0) > room:
        requested = f" and up to {max_tokens:,} new ones" if max_tokens else ""
        message = (
            f"The request has {prompt_tokens:,} prompt tokens{requested}, but this model supports "
            f"{model.max_length:,} in total; shorten the prompt or the answer."
        )
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    given: dict[str, Any] = {
        name: getattr(request, name)
        for name in _SHARED_FIELDS
        if getattr(request, name) is not None
    }
    given["top_k"] = max(0, given.get("top_k", model.default_params.top_k))
    if "seed" in given:
        given["seed"] %= 2**63
    model_stop_ids = () if request.ignore_eos else model.default_params.stop_ids
    stop_ids = tuple(dict.fromkeys([*(request.stop_token_ids or ()), *model_stop_ids]))
    if len(stop_ids) > MAX_STOP_IDS:
        message = (
            f"stop_token_ids has {len(stop_ids) - len(model_stop_ids)} ids in addition to the "
            f"model's {len(model_stop_ids)}; give at most {MAX_STOP_IDS - len(model_stop_ids)}."
        )
        raise ApiError(400, message, param="stop_token_ids", code="invalid_value")
    return dataclasses.replace(
        model.default_params,
        **given,
        max_tokens=max_tokens or min(default_max_tokens, room),
        stop_ids=stop_ids,
        logprobs=logprobs,
        logprobs_of=request.logprobs_of or "raw",
    )


def stop_strings(
    request: ChatRequest | CompletionRequest, model: ServedModel, additional: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the distinct strings that end an answer: the request's, the model's and `additional`.

    The model's are left out if the request sets `ignore_eos`.
    """
    model_stop = () if request.ignore_eos else model.stop
    return tuple(dict.fromkeys([*(request.stop or ()), *model_stop, *additional]))
