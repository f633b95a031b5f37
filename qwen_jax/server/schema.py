"""What requests may say: OpenAI's fields, our extensions, and a reason for each that is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from qwen_jax.engine.request import MAX_LOGPROBS, MAX_STOP_IDS
from qwen_jax.errors import nearest
from qwen_jax.server.errors import ApiError

MAX_CHOICES = 16
MAX_STOPS = 4
MAX_STOP_LENGTH = 1_000

# Fields of OpenAI's schema that change nothing here: whatever they say is taken and dropped.
IGNORED = frozenset(
    (
        *("metadata", "moderation", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
        "verbosity",
    )
)

# Fields that can't be served -> values that ask for nothing, and what to say of all others.
_NOT_SERVED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "the model writes text only"),
    "best_of": ((1,), "use n, and choose by logprobs"),
    "function_call": ((), "use tool_choice"),
    "functions": ((), "use tools"),
    "logit_bias": (({},), "leave it out"),
    "modalities": ((["text"],), "the model writes text only"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": ((), 'use chat_template_kwargs {"enable_thinking": false}'),
    "response_format": (({"type": "text"},), "ask for JSON in the prompt"),
    "suffix": (("",), "leave it out"),
    "web_search_options": ((), "leave it out"),
}

Stop = str | list[str] | None


class _Model(pydantic.BaseModel):
    # Strict: "5" is no number and true is no 1, so that a client's mistake is not guessed at.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Model):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Function(_Model):
    """A function that the model may ask for."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    """Names a function."""

    name: str


class ToolChoice(_Model):
    """The one tool to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Model):
    """A call as a reply had it."""

    name: str
    arguments: str


class ToolCall(_Model):
    """A call as a reply had it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(_Model):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart] | None, Field(union_mode="left_to_right")] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TemplateOptions(_Model):
    """How the prompt is built."""

    enable_thinking: bool | None = None


class _Sampling(_Model):
    """What both kinds of requests have; None is the default of the model."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[Stop, Field(union_mode="left_to_right")] = None
    stop_token_ids: Annotated[list[int] | None, Field(max_length=MAX_STOP_IDS)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs_of: Literal["raw", "sampled"] | None = None

    @pydantic.field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Stop) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has {len(stops)} strings; give at most {MAX_STOPS}")
        if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"has a string without or with over {MAX_STOP_LENGTH:,} characters")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(_Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    allow_special_tokens: bool | None = None


R = TypeVar("R", bound=_Sampling)


def parse(kind: type[R], body: bytes) -> R:
    """Reads a request.

    Raises:
      ApiError: 400, with the field and what it must be.
    """
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: byte {error.start} can't be read."
        raise ApiError(400, message, code="invalid_utf8") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        message = f"The body is a JSON {_kind(fields)}; it must be an object."
        raise ApiError(400, message, code="invalid_type")
    try:
        return kind.model_validate(_served(kind, fields))
    except pydantic.ValidationError as error:
        raise _explain(kind, fields, error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _served(kind: type[R], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that change nothing; ApiError for those that can't be served."""
    kept = {}
    for name, value in fields.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in _NOT_SERVED:
            neutral, remedy = _NOT_SERVED[name]
            if value is not None and value not in neutral:
                message = f"{name} is {_show(value)}, which this server does not serve; {remedy}."
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        elif name not in IGNORED:
            hint = nearest(name, [*kind.model_fields, *_NOT_SERVED, *IGNORED])
            message = f"{_show(name)} is not a field of this request{hint}."
            raise ApiError(400, message, param=name[:100], code="unknown_parameter")
    return kept


# pydantic's name of the error -> what is said of the value; {} are filled from its context.
_RULES = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null, or left out",
    "string_pattern_mismatch": "1 to 64 letters, digits, and _ . -",
    "too_long": "a list of at most {max_length} items",
    "too_short": "a list of at least {min_length} item",
}


def _explain(kind: type[R], fields: Any, error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong, as one sentence about one field."""
    problems = error.errors(include_url=False)
    problem = _deepest(fields, problems)
    path, value, _ = _follow(fields, problem["loc"])
    code, context = "invalid_value", problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            path = f"{path}.{problem['loc'][-1]}".lstrip(".")
            code, message = "missing_parameter", "is missing"
        case "extra_forbidden":
            hint = nearest(str(problem["loc"][-1]), _names_beside(problem["loc"]))
            code, message = "unknown_parameter", f"is not a field of this request{hint}"
        case "value_error":
            message = str(context["error"])
        case _ if path.endswith(".type") and ".content[" in path:
            code, message = "unsupported_content", f"is {_show(value)}; the model reads text only"
        case _:
            rules = [_rule(p) for p in problems if _follow(fields, p["loc"])[0] == path]
            message = f"is {_show(value)}; it must be {' or '.join(dict.fromkeys(rules))}"
            code = "invalid_type" if problem["type"].endswith("_type") else code
    return ApiError(400, f"{path} {message}.", param=path, code=code)


def _rule(problem: dict[str, Any]) -> str:
    rule = _RULES.get(problem["type"])
    return rule.format(**problem.get("ctx", {})) if rule else f"valid ({problem['msg']})"


def _deepest(fields: Any, problems: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ways in which a value fits none of several types, the one that came furthest."""
    same = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    return max(same, key=lambda p: _follow(fields, p["loc"])[2] + (p["type"] == "missing"))


def _follow(fields: Any, loc: tuple[int | str, ...]) -> tuple[str, Any, int]:
    """The path that a client would write, the value there, and how many steps it has.

    pydantic puts names of types among the names of fields; those that lead nowhere are left out.
    """
    path, value, steps = "", fields, 0
    for step in loc:
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path, value, steps = f"{path}[{step}]", value[step], steps + 1
        elif isinstance(value, dict) and step in value:
            path, value, steps = f"{path}.{step}".lstrip("."), value[step], steps + 1
    return path, value, steps


_BY_FIELD: Mapping[str, type[pydantic.BaseModel]] = {
    "messages": Message,
    "tools": Tool,
    "stream_options": StreamOptions,
    "tool_calls": ToolCall,
    "content": TextPart,
    "tool_choice": ToolChoice,
    "function": Function,
}


def _names_beside(loc: tuple[int | str, ...]) -> list[str]:
    """Fields that may stand where the last step of `loc` is."""
    parents = [step for step in loc[:-1] if step in _BY_FIELD]
    return list(_BY_FIELD[parents[-1]].model_fields) if parents else []


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _show(value: Any) -> str:
    """The value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
