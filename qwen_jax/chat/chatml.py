"""ChatML: conversations as ids, with the tokens that carry loss (report, sections 3.1, A.1.1).

A turn is `<|im_start|>role\\ncontent<|im_end|>\\n`. Role, newline and content are encoded apart and
joined, as the released code does, so that no merge crosses a seam; and with control tokens
disallowed, so that a user who types `<|im_end|>` sends plain text, not the end of a turn.
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
# Tokens of context that the chat models of 7B (first release), 1.8B and 14B keep.
DEFAULT_MAX_WINDOW = 6_144

LossMask = Literal["released", "assistant"]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as ids.

    Attributes:
      ids: np.int32[T].
      loss_mask: np.bool[T]; True where the token, as a target, carries loss. It is aligned with
        `ids`, not shifted: the prediction made at position t-1 counts where loss_mask[t] is True.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


def render(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    mask: LossMask = "released",
) -> Rendered:
    """Renders `messages`, each a dict with `role` and `content` (other keys are not looked at).

    Nothing is added: for the default system prompt put it first, `DEFAULT_SYSTEM`. Rendering is
    prefix-preserving: the first k turns with a generation prompt are the beginning of the whole.

    Args:
      messages: at least one turn.
      tokenizer: the tokenizer.
      add_generation_prompt: end with an open assistant turn, `<|im_start|>assistant\\n`.
      mask: which targets carry loss. "released": every `<|im_start|>`, `<|im_end|>` and the
        newline after it, and the content of the assistant; neither role names with their newline
        nor the content of system and user (maintainers' rule for Qwen-7B-Chat and the released
        finetune.py). "assistant": only the content of the assistant and its `<|im_end|>`.

    Raises:
      UserError: no messages, a missing key, an unknown role or mask, content that is no string.
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

    def append(tokens: list[int], carries_loss: bool) -> None:
        ids.extend(tokens)
        loss.extend([carries_loss] * len(tokens))

    for number, message in enumerate(messages, start=1):
        role, content = _check_message(message, number)
        answer = role == "assistant"
        append([tokenizer.im_start_id], released)
        append(tokenizer.encode(role) + newline, False)
        append(tokenizer.encode(content), answer)
        append([tokenizer.im_end_id], released or answer)
        append(newline, released)
    if add_generation_prompt:
        append([tokenizer.im_start_id], released)
        append(tokenizer.encode("assistant") + newline, False)
    return Rendered(np.asarray(ids, np.int32), np.asarray(loss, np.bool_))


def build_context(
    query: str,
    history: Sequence[tuple[str, str]],
    system: str,
    tokenizer: Tokenizer,
    max_window_tokens: int = DEFAULT_MAX_WINDOW,
) -> np.ndarray:
    """Returns the prompt for the next answer, np.int32[T], as the released `make_context`.

    Past pairs are taken newest first while the system turn, the pair and the pairs kept so far are
    together shorter than `max_window_tokens`; the first pair that does not fit, and all before it,
    are dropped whole. The query is always there and is not counted, so that the prompt can be
    longer than the window.

    Args:
      query: what the user says now.
      history: pairs (query, answer), oldest first.
      system: the system prompt; "" gives an empty system turn, as in the released code.
      tokenizer: the tokenizer.
      max_window_tokens: `max_window_size` of the generation config; 6,144, or 24,000 for the last
        Qwen-7B-Chat.
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
    """Returns role and content of the `number`-th message, or says what is wrong with it."""
    if not isinstance(message, Mapping):
        raise UserError(
            f"Message {number} is a {type(message).__name__}: a dict with role and content was "
            "expected."
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
            f"Message {number} ({role}) has content of type {type(content).__name__}: a string "
            "was expected."
        )
    return role, content
