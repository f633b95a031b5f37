"""Log-probabilities of generated tokens in OpenAI's response formats.

n is the number of tokens of a chunk, K the number of alternatives requested for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen_jax.generate.service import TextChunk
from qwen_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

MIN_LOGPROB = -9999.0
"""OpenAI's value for tokens of probability 0, whose -inf JSON cannot represent."""


def json_logprob(logprob: float) -> float:
    """Returns `logprob` limited to at least -9999, because JSON has no -inf; -9999 for NaN."""
    return max(float(logprob), MIN_LOGPROB) if not np.isnan(logprob) else MIN_LOGPROB


def chat_logprobs(chunk: TextChunk, tokenizer: Tokenizer, logprobs_of: str) -> list[dict[str, Any]]:
    """Returns a chunk's entries of `logprobs.content` in a chat completion, one per token.

    Args:
      chunk: the chunk; the list is empty if it was generated without log-probabilities.
      tokenizer: gives the text and the bytes of each token.
      logprobs_of: distribution that a token's own log-probability refers to: "raw" or "sampled".
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = _token_text(tokenizer, token)
        return {"token": text, "logprob": json_logprob(logprob), "bytes": data}

    return [
        {
            **entry(token, logprob),
            "top_logprobs": [entry(int(i), p) for i, p in zip(top_ids, top_logprobs, strict=True)],
        }
        for token, logprob, top_ids, top_logprobs in _rows(chunk, logprobs_of)
    ]


class CompletionLogprobs:
    """Formatter of the log-probabilities of one text completion; tracks offsets in its text."""

    def __init__(self, tokenizer: Tokenizer, logprobs_of: str):
        """Starts at the beginning of the completion.

        Args:
          tokenizer: gives the text and the bytes of each token.
          logprobs_of: distribution that a token's own log-probability refers to: "raw" or
            "sampled".
        """
        self._tokenizer, self._logprobs_of = tokenizer, logprobs_of
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        self._offset = 0  # characters before the next token

    def push(self, chunk: TextChunk) -> dict[str, list[Any]] | None:
        """Returns OpenAI's `logprobs` object of the next chunk: parallel lists over its tokens.

        None if the chunk was generated without log-probabilities.
        """
        if chunk.top_ids is None:
            return None
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, logprob, top_ids, top_logprobs in _rows(chunk, self._logprobs_of):
            found["tokens"].append(self._token_name(token))
            found["token_logprobs"].append(json_logprob(logprob))
            found["top_logprobs"].append(
                {
                    self._token_name(int(i)): json_logprob(p)
                    for i, p in zip(top_ids, top_logprobs, strict=True)
                }
            )
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token))
        return found

    def _token_name(self, token: int) -> str:
        r"""Returns a token's text, or "bytes:\xe4\xb8" (its bytes) if it has partial characters.

        The names are keys in `top_logprobs`, where U+FFFD would be ambiguous.
        """
        text, data = _token_text(self._tokenizer, token)
        if "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text


def _rows(
    chunk: TextChunk, logprobs_of: str
) -> Iterator[tuple[int, float, np.ndarray, np.ndarray]]:
    """Yields (token, its log-probability, top ids [K], their log-probabilities [K]) for n tokens.

    Yields nothing if the chunk was generated without log-probabilities.
    """
    if chunk.top_ids is None:
        return
    own = chunk.logprobs if logprobs_of == "sampled" else chunk.raw_logprobs
    assert own is not None and chunk.top_logprobs is not None, "set together with top_ids"
    for token, logprob, top_ids, top_logprobs in zip(
        chunk.tokens, own, chunk.top_ids, chunk.top_logprobs, strict=True
    ):
        yield int(token), logprob, top_ids, top_logprobs


def _token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """Returns a token's text, with U+FFFD for incomplete characters, and its bytes."""
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", "replace"), list(data)
