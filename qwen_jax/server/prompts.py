"""Rendering of chat requests as prompts, with tools in the format of the model's family."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from qwen_jax.chat import hermes, react
from qwen_jax.chat.reply import PlainReplyParser, ReplyParser, ToolCall, ToolDefinition
from qwen_jax.server.config import ServedModel
from qwen_jax.server.errors import ApiError
from qwen_jax.server.schema import ChatMessage, ChatRequest
from qwen_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Turn:
    """One closed ChatML turn of a prompt.

    Attributes:
      role: "system", "user" or "assistant".
      text: content of the turn.
      tags: control tokens to encode as such where they occur in `text`; all others are encoded as
        plain text.
    """

    role: str
    text: str
    tags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation, and how to parse the reply that continues it.

    Attributes:
      turns: closed turns; None if `template_ids` and `assistant_prefix` are the whole prompt.
      template_ids: token ids written by the model's chat template, if it has one.
      assistant_prefix: text at the end of the prompt that the reply continues: the beginning of the
        open assistant turn. For a base model, the whole prompt.
      prefix_tags: control tokens to encode as such in `assistant_prefix`.
      stop: strings that end the reply, in addition to the request's own.
      tool_names: names of the tools that the model may call.
      reply_prefix: the end of `assistant_prefix` that is parsed as the beginning of the reply, such
        as the beginning of a forced tool call.
      is_react: whether the reply is in the ReAct format.
      may_think: whether the reply may begin with a `<think>` block.
      in_think_block: whether the prompt ends inside a `<think>` block.
      parallel_calls: whether the reply may contain more than one tool call.
    """

    turns: tuple[Turn, ...] | None
    template_ids: tuple[int, ...] = ()
    assistant_prefix: str = ""
    prefix_tags: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    tool_names: tuple[str, ...] = ()
    reply_prefix: str = ""
    is_react: bool = False
    may_think: bool = False
    in_think_block: bool = False
    parallel_calls: bool = True

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the token ids of the prompt.

        Role, newline and content of a ChatML turn are encoded separately, as in the release.
        """
        newline = tokenizer.encode("\n")

        def encode_text(text: str, tags: tuple[str, ...]) -> list[int]:
            known = [tag for tag in tags if tag in tokenizer.special_tokens]
            return tokenizer.encode(text, allowed_special=known)

        prefix_ids = encode_text(self.assistant_prefix, self.prefix_tags)
        if self.turns is None:
            return [*self.template_ids, *prefix_ids] or [tokenizer.eod_id]
        ids: list[int] = []
        for turn in self.turns:
            ids += [tokenizer.im_start_id, *tokenizer.encode(turn.role), *newline]
            ids += [*encode_text(turn.text, turn.tags), tokenizer.im_end_id, *newline]
        ids += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
        return ids + prefix_ids

    def parser(self) -> ReplyParser:
        """Returns a new parser for one reply to this prompt."""
        if self.is_react:
            return react.ReactReplyParser(self.tool_names, self.reply_prefix)
        inner = None
        if self.tool_names:
            inner = hermes.HermesReplyParser(
                self.tool_names, self.reply_prefix, self.parallel_calls
            )
        if self.may_think:
            return hermes.ThinkParser(inner, self.in_think_block)
        return inner or PlainReplyParser()


def chat_prompt(request: ChatRequest, model: ServedModel) -> ChatPrompt:
    """Renders the conversation of a chat request, with its tools, as a prompt for `model`.

    Args:
      request: the chat request, parsed by `parse_request`.
      model: determines the chat format and the tool format.

    Raises:
      ApiError: 400 if the messages are not a valid conversation, tool calls and tool results do not
        match, `tool_choice` names no tool of the request, or tools are given to a base model.
    """
    results = _tool_results(request.messages)
    selection = _select_tools(request)
    if not model.is_chat_model:
        if selection.tools:
            _raise_invalid("tools", "are not supported by a base model, which continues plain text")
        text = "".join(message.text for message in request.messages)
        return ChatPrompt(turns=None, assistant_prefix=text)
    system_texts = [m.text for m in request.messages if m.role in ("system", "developer")]
    if not system_texts and model.default_system is not None:
        system_texts = [model.default_system]
    system = "\n\n".join(system_texts) if system_texts else None
    messages = [m for m in request.messages if m.role not in ("system", "developer")]
    if model.uses_react:
        return _react_prompt(messages, results, system, selection)
    options = request.chat_template_kwargs
    no_thinking = options is not None and options.enable_thinking is False
    if model.template is not None:
        return _template_prompt(request, model, selection, no_thinking)
    may_think = hermes.THINK_OPEN in model.tokenizer.special_tokens
    return _hermes_prompt(messages, system, selection, may_think, no_thinking)


@dataclasses.dataclass(frozen=True)
class _ToolSelection:
    """The tools shown to the model, and whether it must or may call them (`tool_choice`).

    Attributes:
      tools: the tools to show.
      forced: the tool that must be called: its name, "" for any tool, or None for no obligation.
      disabled: whether calls are forbidden (`tool_choice` "none"); `tools` is then empty.
      parallel: whether the model may make more than one call.
    """

    tools: tuple[ToolDefinition, ...] = ()
    forced: str | None = None
    disabled: bool = False
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools shown."""
        return tuple(tool.name for tool in self.tools)


def _select_tools(request: ChatRequest) -> _ToolSelection:
    """Returns the tool selection that `tools` and `tool_choice` of a request ask for.

    Raises:
      ApiError: 400 for duplicate names, or a choice that is not among the tools.
    """
    tools = tuple(
        ToolDefinition(t.function.name, t.function.description or "", t.function.parameters or {})
        for t in request.tools or ()
    )
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        _raise_invalid("tools", f"has {duplicate!r} more than once")
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    if choice == "none":
        return _ToolSelection(disabled=True)
    if choice is None or choice == "auto":
        return _ToolSelection(tools, parallel=parallel)
    if not tools:
        _raise_invalid("tool_choice", "requires a tool call, but there are no tools")
    if choice == "required":
        return _ToolSelection(tools, names[0] if len(names) == 1 else "", parallel=parallel)
    if (name := choice.function.name) not in names:
        _raise_invalid("tool_choice.function.name", f"is {name!r:.60}, which is not among tools")
    return _ToolSelection(tools, name, parallel=False)


def _tool_results(messages: Sequence[ChatMessage]) -> dict[str, str]:
    """Checks that messages form a valid conversation and returns its tool results.

    Returns:
      The trimmed text of each tool message, by the id of the call it answers.

    Raises:
      ApiError: 400 that names the first offending field.
    """
    call_fields: dict[str, str] = {}  # id of a call -> the field that contains it
    results: dict[str, str] = {}
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if message.tool_calls and message.role != "assistant":
            _raise_invalid(f"{field}.tool_calls", "is allowed in assistant messages only")
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            _raise_invalid(f"{field}.content", "is missing; give a text", "missing_parameter")
        if message.role == "tool":
            id_field = f"{field}.tool_call_id"
            if message.tool_call_id is None:
                problem = "is missing; give the id of the call that this result belongs to"
                _raise_invalid(id_field, problem, "missing_parameter")
            if message.tool_call_id not in call_fields:
                problem = f"is {message.tool_call_id!r:.60}, which is the id of no earlier call"
                _raise_invalid(id_field, problem)
            results[message.tool_call_id] = _trim(message.text)
        call_fields |= {call.id: f"{field}.tool_calls" for call in message.tool_calls or ()}
    if unanswered := [id for id in call_fields if id not in results]:
        problem = f"has the call {unanswered[0]!r:.60}, for which there is no result"
        _raise_invalid(call_fields[unanswered[0]], problem)
    if messages[-1].role not in ("user", "tool"):
        problem = f"is {messages[-1].role!r}; the last message must have the role user or tool"
        _raise_invalid(f"messages[{len(messages) - 1}].role", problem)
    return results


def _raise_invalid(param: str, problem: str, code: str = "invalid_value") -> NoReturn:
    """Raises a 400 with the message "PARAM PROBLEM."."""
    raise ApiError(400, f"{param} {problem}.", param=param, code=code)


def _trim(text: str) -> str:
    """Returns a message's text as the release writes it after a ReAct label.

    Leading newlines and trailing whitespace are removed.
    """
    return text.lstrip("\n").rstrip()


def _tool_calls(message: ChatMessage) -> list[ToolCall]:
    """Returns the tool calls of an assistant message; none for other messages."""
    calls = message.tool_calls or ()
    return [ToolCall(call.function.name, call.function.arguments) for call in calls]


def _react_prompt(
    messages: Sequence[ChatMessage],
    results: dict[str, str],
    system: str | None,
    selection: _ToolSelection,
) -> ChatPrompt:
    """Renders a conversation for Qwen v1, with tools in the ReAct format.

    Tools are listed in a user turn; calls, their results and the answer share one assistant turn.

    Args:
      messages: the conversation without system messages.
      results: texts of tool results by id of the call.
      system: the system prompt, or None.
      selection: the tools to show.
    """
    turns = [] if system is None else [Turn("system", system)]
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    ends_with_result = messages[-1].role == "tool"
    # As in the release, tools are listed in the user turn of the last finished pair, or in the only
    # user turn. A turn whose calls have their results counts as finished.
    tools_at = users[-1 if ends_with_result or len(users) == 1 else -2] if users else None
    steps: list[str] = []  # calls and results of the assistant turn that is still open
    for i, message in enumerate(messages):
        if message.role == "user":
            text = message.text
            if selection.tools or steps:
                text = _trim(text)
            if steps:
                turns.append(Turn("assistant", "\n".join(steps)))
                steps = []
            if selection.tools and i == tools_at:
                text = react.format_question(selection.tools, text)
            turns.append(Turn("user", text))
        elif message.tool_calls:
            calls = zip(message.tool_calls, _tool_calls(message), strict=True)
            for k, (requested, call) in enumerate(calls):
                steps.append(react.format_tool_call(message.text if k == 0 else "", call))
                steps.append(react.format_observation(results[requested.id]))
        elif message.role == "assistant" and (selection.tools or steps):
            answer = react.format_final_answer(_trim(message.text))
            turns.append(Turn("assistant", "\n".join([*steps, answer])))
            steps = []
        elif message.role == "assistant":
            turns.append(Turn("assistant", message.text))
    return _open_react_turn(turns, steps, selection)


def _open_react_turn(turns: list[Turn], steps: list[str], selection: _ToolSelection) -> ChatPrompt:
    """Returns a ReAct prompt whose open assistant turn begins with `steps`.

    Args:
      turns: closed turns.
      steps: lines of tool calls and their results.
      selection: if it forces a call, the turn continues with the beginning of the call; if tools
        are disabled, with `Final Answer:`.
    """
    if selection.forced is not None:
        reply_prefix = react.tool_call_prefix(selection.forced or None)
    elif steps:
        final_answer = react.format_final_answer("").rstrip()
        reply_prefix = final_answer if selection.disabled else "Thought:"
    else:
        reply_prefix = ""
    is_react = bool(selection.tools or steps)
    return ChatPrompt(
        tuple(turns),
        assistant_prefix="\n".join([*steps, reply_prefix]),
        reply_prefix=reply_prefix,
        tool_names=selection.names,
        is_react=is_react,
        stop=(react.STOP_STRING,) if is_react else (),
    )


def _hermes_prompt(
    messages: Sequence[ChatMessage],
    system: str | None,
    selection: _ToolSelection,
    may_think: bool,
    no_thinking: bool,
) -> ChatPrompt:
    """Renders a conversation in ChatML with tools in the hermes format.

    Tools are listed in the system turn, results are written in user turns, and reasoning is left
    out of the turns before the last user message.

    Args:
      messages: the conversation without system messages.
      system: the system prompt, or None.
      selection: the tools to show.
      may_think: whether the model has `<think>` tags.
      no_thinking: whether the request disables thinking.
    """
    if selection.tools:
        system = hermes.format_system_prompt(system or "", selection.tools)
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
            parts = [message.text] if message.text else []
            parts += map(hermes.format_tool_call, _tool_calls(message))
            text = "\n".join(parts)
            if may_think and i > last_user and message.reasoning_content:
                text = hermes.format_think_block(message.reasoning_content) + text
            turns.append(Turn("assistant", text, hermes.ASSISTANT_TAGS))
    reply_prefix = _hermes_reply_prefix(selection)
    skip_thinking = may_think and (no_thinking or bool(reply_prefix))
    return ChatPrompt(
        tuple(turns),
        assistant_prefix=(hermes.format_think_block("") if skip_thinking else "") + reply_prefix,
        prefix_tags=hermes.ASSISTANT_TAGS,
        reply_prefix=reply_prefix,
        tool_names=selection.names,
        may_think=may_think,
        parallel_calls=selection.parallel,
        stop=_hermes_stop(selection),
    )


def _template_prompt(
    request: ChatRequest, model: ServedModel, selection: _ToolSelection, no_thinking: bool
) -> ChatPrompt:
    """Renders a conversation with the model's chat template, for replies in the hermes format.

    If a tool call is forced, its beginning is appended to the template's text.

    Args:
      request: the chat request, validated.
      model: a model with a chat template.
      selection: the tools to show.
      no_thinking: whether the request disables thinking.
    """
    assert model.template is not None
    reply_prefix = _hermes_reply_prefix(selection)
    options = {"enable_thinking": False} if no_thinking or reply_prefix else {}
    messages = [_template_message(message) for message in request.messages]
    tools = None
    if selection.tools:
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    template_ids = model.template.encode(model.tokenizer, messages, tools, **options)
    # Templates of models that always think end with an open <think> block.
    opens_block = model.tokenizer.decode(template_ids[-8:]).rstrip().endswith(hermes.THINK_OPEN)
    close_block = f"\n{hermes.THINK_CLOSE}\n\n" if opens_block and reply_prefix else ""
    return ChatPrompt(
        turns=None,
        template_ids=tuple(template_ids),
        assistant_prefix=close_block + reply_prefix,
        prefix_tags=hermes.ASSISTANT_TAGS,
        reply_prefix=reply_prefix,
        tool_names=selection.names,
        may_think=opens_block or hermes.THINK_OPEN in model.tokenizer.special_tokens,
        in_think_block=opens_block and not reply_prefix,
        parallel_calls=selection.parallel,
        stop=_hermes_stop(selection),
    )


def _hermes_reply_prefix(selection: _ToolSelection) -> str:
    """Returns the beginning of the tool call that `selection` forces; "" if it forces none."""
    return "" if selection.forced is None else hermes.tool_call_prefix(selection.forced or None)


def _hermes_stop(selection: _ToolSelection) -> tuple[str, ...]:
    """Returns the stop strings that end a reply after its first call if only one is allowed."""
    return () if selection.parallel or not selection.names else (hermes.TOOL_CALL_CLOSE,)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """Returns a message in the form that chat templates expect.

    The role developer becomes system, and the arguments of tool calls become objects if they are
    valid JSON.
    """
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": message.text}
    if message.reasoning_content is not None:
        fields["reasoning_content"] = message.reasoning_content
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    calls = [call.model_dump(exclude_none=True) for call in message.tool_calls or ()]
    for call in calls:
        with contextlib.suppress(ValueError, RecursionError):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    if calls:
        fields["tool_calls"] = calls
    return fields
