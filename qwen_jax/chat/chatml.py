"""ChatML: encodes conversations as token ids with loss masks (report, sections 3.1 and A.1.1).

A turn is `<|im_start|>role\\ncontent<|im_end|>\\n`. Role, newline and content are encoded one by
one and concatenated, as in the released code, so that no BPE merge crosses their boundaries.
Control tokens are disallowed in them: `<|im_end|>` typed by a user is plain text and ends no turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from qwen_jax.errors import UserError, nearest
from qwen_jax.tokenizer.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
# `max_window_size` of the chat models 7B (first release), 1.8B and 14B, in tokens.
DEFAULT_MAX_WINDOW = 6_144

LossMask = Literal["released", "assistant"]


@dataclasses.dataclass(frozen=True)
class RenderedConversation:
    """A conversation encoded as token ids, with its loss mask. T is the number of tokens.

    Attributes:
      ids: np.int32[T], token ids.
      loss_mask: np.bool[T], True where the token contributes to the loss as a target. It is aligned
        with `ids`, not shifted: the prediction made at position t-1 counts if loss_mask[t] is True.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    mask: LossMask = "released",
) -> RenderedConversation:
    """Encodes a conversation in ChatML and marks the tokens that contribute to the loss.

    No turn is added; for the default system prompt, pass it as the first message with the content
    `DEFAULT_SYSTEM`. Rendering preserves prefixes: the first k messages with a generation prompt
    give a prefix of the whole conversation if message k + 1 is the assistant's.

    Args:
      messages: at least one dict with `role` and `content`; other keys are ignored.
      tokenizer: encodes roles and contents.
      add_generation_prompt: whether to end with an open assistant turn, `<|im_start|>assistant\\n`.
      mask: which targets contribute to the loss. "released": every `<|im_start|>`, every
        `<|im_end|>` with the newline after it, and the content of assistant turns, but neither role
        names with their newline nor the content of system and user turns (maintainers' rule for
        Qwen-7B-Chat and the released finetune.py). "assistant": only the content of assistant turns
        and their `<|im_end|>`.

    Returns:
      Token ids and loss mask of the conversation.

    Raises:
      UserError: `messages` is empty, a message lacks a key, a role or `mask` is unknown, or a
        content is not a string.
    """
    if mask not in get_args(LossMask):
        raise UserError(
            f"Loss mask {mask!r} is unknown{nearest(mask, get_args(LossMask))}: use 'released' or "
            "'assistant'."
        )
    if isinstance(messages, Mapping | str) or not len(messages):
        raise UserError("A conversation must be a list of at least one message.")
    released = mask == "released"
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    loss: list[bool] = []

    def append(tokens: list[int], in_loss: bool) -> None:
        ids.extend(tokens)
        loss.extend([in_loss] * len(tokens))

    for number, message in enumerate(messages, start=1):
        role, content = _check_message(message, number)
        is_assistant = role == "assistant"
        append([tokenizer.im_start_id], released)
        append(tokenizer.encode(role) + newline, False)
        append(tokenizer.encode(content), is_assistant)
        append([tokenizer.im_end_id], released or is_assistant)
        append(newline, released)
    if add_generation_prompt:
        append([tokenizer.im_start_id], released)
        append(tokenizer.encode("assistant") + newline, False)
    return RenderedConversation(np.asarray(ids, np.int32), np.asarray(loss, np.bool_))


def build_context(
    query: str,
    history: Sequence[tuple[str, str]],
    system: str,
    tokenizer: Tokenizer,
    max_window_tokens: int = DEFAULT_MAX_WINDOW,
) -> np.ndarray:
    """Returns the ChatML prompt for the next answer, truncated as by the released `make_context`.

    Pairs of the history are kept, newest first, as long as the system turn and the kept pairs have
    fewer than `max_window_tokens` tokens in total; the first pair that does not fit and all older
    ones are dropped as a whole. The query is always included and not counted, so the prompt can be
    longer than the window.

    Args:
      query: the user's new message.
      history: pairs (query, answer) of earlier turns, oldest first.
      system: the system prompt; "" gives an empty system turn, as in the released code.
      tokenizer: encodes roles and contents.
      max_window_tokens: `max_window_size` of the generation config; 6,144, or 24,000 for the last
        release of Qwen-7B-Chat.

    Returns:
      np.int32[T], the T token ids of the prompt; it ends with an open assistant turn.
    """
    newline = tokenizer.encode("\n")

    def turn(role: str, content: str) -> list[int]:
        inner = tokenizer.encode(role) + newline + tokenizer.encode(content)
        return [tokenizer.im_start_id, *inner, tokenizer.im_end_id]

    head = turn("system", system)
    kept: list[int] = []
    for past_query, answer in reversed(history):
        pair = newline + turn("user", past_query) + newline + turn("assistant", answer)
        if len(head) + len(pair) + len(kept) >= max_window_tokens:
            break
        kept = pair + kept
    open_turn = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    ids = head + kept + newline + turn("user", query) + newline + open_turn
    return np.asarray(ids, np.int32)


def _check_message(message: Mapping[str, str], number: int) -> tuple[str, str]:
    """Returns role and content of the `number`-th message (from 1), or raises UserError."""
    if not isinstance(message, Mapping):
        raise UserError(
            f"Message {number} is a {type(message).__name__}; it must be a dict with role and "
            "content."
        )
    for key in ("role", "content"):
        if key not in message:
            raise UserError(
                f"Message {number} has no {key!r}{nearest(key, map(str, message))}: it has "
                f"{', '.join(map(repr, message)) or 'no keys'}; give role and content."
            )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise UserError(
            f"Message {number} has the role {role!r}{nearest(str(role), ROLES)}: use system, user "
            "or assistant."
        )
    if not isinstance(content, str):
        raise UserError(
            f"Message {number} ({role}) has content of type {type(content).__name__}; it must be "
            "a string."
        )
    return role, content
