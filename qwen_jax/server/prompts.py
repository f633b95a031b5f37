"""Conversations of the API as prompts: ChatML, with tools in the form that the family learned."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

from qwen_jax.chat import hermes, react
from qwen_jax.chat.reply import ReplyPart, TextPart, ToolCall, ToolDefinition
from qwen_jax.server import schema
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.tokenizer.tokenizer import Tokenizer


class Reader(Protocol):
    """Reads a reply as it comes, whatever its format."""

    def push(self, text: str) -> list[ReplyPart]:
        """Takes the next piece; returns the parts that are certain by now."""

    def finish(self) -> list[ReplyPart]:
        """Ends the reply; returns the rest."""


class PlainReader:
    """A reply that is nothing but its text."""

    def push(self, text: str) -> list[ReplyPart]:
        """The text."""
        return [TextPart(text)] if text else []

    def finish(self) -> list[ReplyPart]:
        """Nothing is ever held back."""
        return []


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of ChatML.

    Attributes:
      role: system, user or assistant.
      text: what stands in it.
      tags: tokens that are written in `text` as control tokens; all others are plain text.
    """

    role: str
    text: str
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A conversation ready to be continued.

    Attributes:
      turns: the closed turns; None: `head` and `opening` are the whole prompt.
      head: token ids that a chat template made.
      opening: what the assistant's open turn has already.
      tags: as in `Turn`, of `opening`.
      stop: strings that end the reply beside the request's own.
      names: the tools that may be called. begun: what of `opening` belongs to the new reply.
      react: the reply is in ReAct's form. thinks: it may begin with a `<think>` block, which is
      open already with thinking.
      parallel: more than one call may come.
    """

    turns: tuple[Turn, ...] | None
    head: tuple[int, ...] = ()
    opening: str = ""
    tags: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    begun: str = ""
    react: bool = False
    thinks: bool = False
    thinking: bool = False
    parallel: bool = True

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt's tokens: role, newline and content apart, as the release encodes them."""
        newline = tokenizer.encode("\n")

        def encode(text: str, tags: tuple[str, ...]) -> list[int]:
            known = [tag for tag in tags if tag in tokenizer.special_tokens]
            return tokenizer.encode(text, allowed_special=known)

        if self.turns is None:
            return [*self.head, *encode(self.opening, self.tags)] or [tokenizer.eod_id]
        ids: list[int] = []
        for turn in self.turns:
            ids += [tokenizer.im_start_id, *tokenizer.encode(turn.role), *newline]
            ids += [*encode(turn.text, turn.tags), tokenizer.im_end_id, *newline]
        ids += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
        return ids + encode(self.opening, self.tags)

    def reader(self) -> Reader:
        """Reads one reply to this prompt."""
        if self.react:
            return react.ReactReplyParser(self.names, self.begun)
        inner = None
        if self.names:
            inner = hermes.HermesReplyParser(self.names, self.begun, self.parallel)
        if self.thinks:
            return hermes.ThinkParser(inner, self.thinking)
        return inner or PlainReader()


def chat_prompt(request: schema.ChatRequest, model: ServedModel) -> ChatPrompt:
    """Turns a chat request into a prompt.

    Raises:
      ApiError: messages in an order that makes no conversation, a tool's result without a call, a
        `tool_choice` without its tool, tools for a base model.
    """
    results = _check(request.messages)
    offer = _offer(request)
    if not model.chats:
        if offer.tools:
            _refuse("tools", "are given to a base model; it only continues text")
        return ChatPrompt(None, opening="".join(message.text for message in request.messages))
    said = [m.text for m in request.messages if m.role in ("system", "developer")]
    if not said and model.default_system is not None:
        said = [model.default_system]
    system = "\n\n".join(said) if said else None
    messages = [m for m in request.messages if m.role not in ("system", "developer")]
    if model.react:
        return _react_prompt(messages, results, system, offer)
    options = request.chat_template_kwargs
    silent = options is not None and options.enable_thinking is False
    if model.template is not None:
        return _template_prompt(request, model, offer, silent)
    thinks = hermes.THINK_OPEN in model.tokenizer.special_tokens
    return _hermes_prompt(messages, system, offer, thinks, silent)


@dataclasses.dataclass(frozen=True)
class _Offer:
    """Which tools the model is shown, and whether it must call: one, any ("") or none (None)."""

    tools: tuple[ToolDefinition, ...] = ()
    forced: str | None = None
    barred: bool = False
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.name for tool in self.tools)


def _offer(request: schema.ChatRequest) -> _Offer:
    tools = tuple(
        ToolDefinition(t.function.name, t.function.description or "", t.function.parameters or {})
        for t in request.tools or ()
    )
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        _refuse("tools", f"has {twice!r} more than once")
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    if choice == "none":
        return _Offer(barred=True)
    if choice is None or choice == "auto":
        return _Offer(tools, parallel=parallel)
    if not tools:
        _refuse("tool_choice", "asks for a call, but there are no tools")
    if choice == "required":
        return _Offer(tools, names[0] if len(names) == 1 else "", parallel=parallel)
    if (name := choice.function.name) not in names:
        _refuse("tool_choice.function.name", f"is {name!r:.60}, which is none of the tools")
    return _Offer(tools, name, parallel=False)


def _check(messages: Sequence[schema.Message]) -> dict[str, str]:
    """Refuses what is no conversation; returns the tools' results by the ids of the calls."""
    calls: dict[str, str] = {}
    results: dict[str, str] = {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.tool_calls and message.role != "assistant":
            _refuse(f"{where}.tool_calls", "belongs to the assistant's messages only")
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            _refuse(f"{where}.content", "is missing; give a text", "missing_parameter")
        if message.role == "tool":
            if message.tool_call_id is None:
                remedy = "is missing; it says which call this answers"
                _refuse(f"{where}.tool_call_id", remedy, "missing_parameter")
            if message.tool_call_id not in calls:
                found = f"is {message.tool_call_id!r:.60}, which is the id of no earlier call"
                _refuse(f"{where}.tool_call_id", found)
            results[message.tool_call_id] = _trim(message.text)
        calls |= {call.id: f"{where}.tool_calls" for call in message.tool_calls or ()}
    if open_calls := [id for id in calls if id not in results]:
        _refuse(calls[open_calls[0]], f"has {open_calls[0]!r:.60}, for which there is no result")
    if messages[-1].role not in ("user", "tool"):
        found = f"is {messages[-1].role!r}; the last message must be the user's or a tool's"
        _refuse(f"messages[{len(messages) - 1}].role", found)
    return results


def _refuse(param: str, found: str, code: str = "invalid_value") -> None:
    raise ApiError(400, f"{param} {found}.", param=param, code=code)


def _trim(text: str) -> str:
    """A message as the release puts it between ReAct's labels."""
    return text.lstrip("\n").rstrip()


def _react_prompt(
    messages: Sequence[schema.Message], results: dict[str, str], system: str | None, offer: _Offer
) -> ChatPrompt:
    """The tools stand in a user's turn; calls, results and the answer in one turn of the model."""
    turns = [] if system is None else [Turn("system", system)]
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    continues = messages[-1].role == "tool"
    # As in the release: in the user's turn of the last finished pair, or in the only one. A turn
    # that waits for nothing but its results counts as finished.
    shown_at = users[-1 if continues or len(users) == 1 else -2] if users else None
    steps: list[str] = []  # of the model's turn that has calls
    for i, message in enumerate(messages):
        if message.role == "user":
            text = message.text
            if offer.tools or steps:
                text = _trim(text)
            if steps:
                turns.append(Turn("assistant", "\n".join(steps)))
                steps = []
            if offer.tools and i == shown_at:
                text = react.format_question(offer.tools, text)
            turns.append(Turn("user", text))
        elif message.tool_calls:
            for k, called in enumerate(message.tool_calls):
                call = ToolCall(called.function.name, called.function.arguments)
                steps.append(react.format_tool_call(message.text if k == 0 else "", call))
                steps.append(react.format_observation(results[called.id]))
        elif message.role == "assistant" and (offer.tools or steps):
            turns.append(
                Turn(
                    "assistant", "\n".join([*steps, react.format_final_answer(_trim(message.text))])
                )
            )
            steps = []
        elif message.role == "assistant":
            turns.append(Turn("assistant", message.text))
    return _open_react(turns, steps, offer)


def _open_react(turns: list[Turn], steps: list[str], offer: _Offer) -> ChatPrompt:
    if offer.forced is not None:
        begun = react.tool_call_prefix(offer.forced or None)
    elif steps:
        begun = react.format_final_answer("").rstrip() if offer.barred else "Thought:"
    else:
        begun = ""
    in_form = bool(offer.tools or steps)
    return ChatPrompt(
        tuple(turns),
        opening="\n".join([*steps, begun]),
        begun=begun,
        names=offer.names,
        react=in_form,
        stop=(react.STOP_STRING,) if in_form else (),
    )


def _hermes_prompt(
    messages: Sequence[schema.Message],
    system: str | None,
    offer: _Offer,
    thinks: bool,
    silent: bool,
) -> ChatPrompt:
    """The tools stand in the system turn, results in user turns, thoughts in no past turn."""
    if offer.tools:
        system = hermes.format_system_prompt(system or "", offer.tools)
    turns = [] if system is None else [Turn("system", system)]
    last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    for i, message in enumerate(messages):
        if message.role == "tool":
            text = hermes.format_tool_response(message.text)
            if i and messages[i - 1].role == "tool":
                text = f"{turns.pop().text}\n{text}"
            turns.append(Turn("user", text, hermes.TOOL_RESPONSE_TAGS))
        elif message.role == "user":
            turns.append(Turn("user", message.text))
        else:
            calls = [
                ToolCall(c.function.name, c.function.arguments) for c in message.tool_calls or ()
            ]
            parts = [message.text] * bool(message.text) + [
                hermes.format_tool_call(call) for call in calls
            ]
            text = "\n".join(parts)
            if thinks and i > last_user and message.reasoning_content:
                text = hermes.format_think_block(message.reasoning_content) + text
            turns.append(Turn("assistant", text, hermes.ASSISTANT_TAGS))
    begun = "" if offer.forced is None else hermes.tool_call_prefix(offer.forced or None)
    silent = thinks and (silent or bool(begun))
    return ChatPrompt(
        tuple(turns),
        opening=(hermes.format_think_block("") if silent else "") + begun,
        tags=hermes.ASSISTANT_TAGS,
        begun=begun,
        names=offer.names,
        thinks=thinks,
        parallel=offer.parallel,
        stop=() if offer.parallel or not offer.names else (hermes.TOOL_CALL_CLOSE,),
    )


def _template_prompt(
    request: schema.ChatRequest, model: ServedModel, offer: _Offer, silent: bool
) -> ChatPrompt:
    """The model's own template writes everything but the beginning of a call that is forced."""
    begun = "" if offer.forced is None else hermes.tool_call_prefix(offer.forced or None)
    options = {"enable_thinking": False} if silent or begun else {}
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    messages = [_as_template_wants(message) for message in request.messages]
    tools = tools if offer.tools else None
    head = model.template.encode(model.tokenizer, messages, tools, **options)
    # Templates of models that always think open the block themselves.
    thinking = model.tokenizer.decode(head[-8:]).rstrip().endswith(hermes.THINK_OPEN)
    closed = f"\n{hermes.THINK_CLOSE}\n\n" if thinking and begun else ""
    return ChatPrompt(
        turns=None,
        head=tuple(head),
        opening=closed + begun,
        tags=hermes.ASSISTANT_TAGS,
        begun=begun,
        names=offer.names,
        thinks=thinking or hermes.THINK_OPEN in model.tokenizer.special_tokens,
        thinking=thinking and not begun,
        parallel=offer.parallel,
        stop=() if offer.parallel or not offer.names else (hermes.TOOL_CALL_CLOSE,),
    )


def _as_template_wants(message: schema.Message) -> dict[str, Any]:
    """A message as chat templates know it: calls with arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": message.text}
    if message.reasoning_content is not None:
        told["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    calls = [call.model_dump(exclude_none=True) for call in message.tool_calls or ()]
    for call in calls:
        with contextlib.suppress(ValueError, RecursionError):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return told | ({"tool_calls": calls} if calls else {})
