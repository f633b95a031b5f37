"""Parsing of request bodies, with validation errors as one sentence about one field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import pydantic
from pydantic_core import ErrorDetails

from qwen_jax.errors import nearest
from qwen_jax.server.errors import ApiError
from qwen_jax.server.schema import (
    ChatMessage,
    CompletionFields,
    FunctionDefinition,
    FunctionTool,
    MessageToolCall,
    NamedToolChoice,
    StreamOptions,
    TextContentPart,
)

# Fields of OpenAI's schema that have no effect here: any value is accepted and ignored.
IGNORED = frozenset(
    (
        "metadata",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    )
)

# Unsupported fields of OpenAI's schema -> values that are accepted because they request nothing,
# and the remedy that the error message gives for all others.
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
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

# Type of a pydantic error -> requirement on the value; placeholders are filled from its context.
_REQUIREMENTS = {
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

# Name of a field -> schema of the objects it contains.
_SCHEMA_OF_FIELD: Mapping[int | str, type[pydantic.BaseModel]] = {
    "messages": ChatMessage,
    "tools": FunctionTool,
    "stream_options": StreamOptions,
    "tool_calls": MessageToolCall,
    "content": TextContentPart,
    "tool_choice": NamedToolChoice,
    "function": FunctionDefinition,
}

R = TypeVar("R", bound=CompletionFields)


def parse_request(schema: type[R], body: bytes) -> R:
    """Parses and validates the JSON body of a request.

    Args:
      schema: `ChatRequest` or `CompletionRequest`.
      body: bytes of the body.

    Raises:
      ApiError: 400 that names the first offending field, its value and what it must be.
    """
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: byte {error.start} is invalid."
        raise ApiError(400, message, code="invalid_utf8") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        message = f"The body is a JSON {_json_type(fields)}; it must be an object."
        raise ApiError(400, message, code="invalid_type")
    try:
        return schema.model_validate(_supported_fields(schema, fields))
    except pydantic.ValidationError as error:
        raise _as_api_error(fields, error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None


def _reject_constant(name: str) -> NoReturn:
    """Raises ValueError: hook of `json.loads` for the constants NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not a JSON number")


def _supported_fields(schema: type[R], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request body that `schema` contains, and drops those without effect.

    Args:
      schema: `ChatRequest` or `CompletionRequest`.
      fields: top-level fields of the parsed body.

    Raises:
      ApiError: 400 for an unsupported field that requests something, and for an unknown field.
    """
    kept = {}
    for name, value in fields.items():
        if name in schema.model_fields:
            kept[name] = value
        elif name in _UNSUPPORTED:
            accepted, remedy = _UNSUPPORTED[name]
            if value is not None and value not in accepted:
                message = f"{name} is {_as_text(value)}, which is not supported; {remedy}."
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        elif name not in IGNORED:
            hint = nearest(name, [*schema.model_fields, *_UNSUPPORTED, *IGNORED])
            message = f"{_as_text(name)} is not a field of this request{hint}."
            raise ApiError(400, message, param=name[:100], code="unknown_parameter")
    return kept


def _as_api_error(fields: Any, error: pydantic.ValidationError) -> ApiError:
    """Converts pydantic's errors to a 400 with one sentence about the first offending field.

    Args:
      fields: the parsed body.
      error: the failed validation of `fields`.
    """
    problems = error.errors(include_url=False)
    problem = _most_specific(fields, problems)
    path, value, _ = _resolve(fields, problem["loc"])
    code, context = "invalid_value", problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            path = f"{path}.{problem['loc'][-1]}".lstrip(".")
            code, message = "missing_parameter", "is missing"
        case "extra_forbidden":
            hint = nearest(str(problem["loc"][-1]), _sibling_fields(problem["loc"]))
            code, message = "unknown_parameter", f"is not a field of this request{hint}"
        case "value_error":
            message = str(context["error"])
        case _ if path.endswith(".type") and ".content[" in path:
            code = "unsupported_content"
            message = f"is {_as_text(value)}; the model reads text only"
        case _:
            same_path = [p for p in problems if _resolve(fields, p["loc"])[0] == path]
            requirements = dict.fromkeys(map(_requirement, same_path))
            message = f"is {_as_text(value)}; it must be {' or '.join(requirements)}"
            code = "invalid_type" if problem["type"].endswith("_type") else code
    return ApiError(400, f"{path} {message}.", param=path, code=code)


def _requirement(problem: ErrorDetails) -> str:
    """Returns what the value must be according to one of pydantic's errors, such as "at most 2"."""
    requirement = _REQUIREMENTS.get(problem["type"])
    if requirement is None:
        return f"valid ({problem['msg']})"
    return requirement.format(**problem.get("ctx", {}))


def _most_specific(fields: Any, problems: list[ErrorDetails]) -> ErrorDetails:
    """Selects the validation error to report: the deepest one in the first offending field.

    For a value that may have several types, pydantic reports an error for each of them. The one
    deepest in the body belongs to the type that the client most likely meant.

    Args:
      fields: the parsed body.
      problems: all errors that pydantic reports; the first one determines the top-level field.
    """
    same_field = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]]
    return max(same_field, key=lambda p: _resolve(fields, p["loc"])[2] + (p["type"] == "missing"))


def _resolve(fields: Any, loc: tuple[int | str, ...]) -> tuple[str, Any, int]:
    """Follows pydantic's location of an error in the parsed body.

    pydantic inserts names of types between names of fields; steps that do not exist in the body are
    skipped.

    Returns:
      The path as clients write it, such as "messages[0].content"; the value there; and the depth,
      which is the number of steps taken.
    """
    path, value, depth = "", fields, 0
    for step in loc:
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            path, value, depth = f"{path}[{step}]", value[step], depth + 1
        elif isinstance(value, dict) and step in value:
            path, value, depth = f"{path}.{step}".lstrip("."), value[step], depth + 1
    return path, value, depth


def _sibling_fields(loc: tuple[int | str, ...]) -> list[str]:
    """Returns the valid field names of the object in which pydantic found an unknown field.

    Args:
      loc: pydantic's location of the unknown field.
    """
    parents = [step for step in loc[:-1] if step in _SCHEMA_OF_FIELD]
    return list(_SCHEMA_OF_FIELD[parents[-1]].model_fields) if parents else []


def _json_type(value: Any) -> str:
    """Returns the JSON type name of a parsed value that is not an object."""
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _as_text(value: Any) -> str:
    """Returns a parsed value as JSON text, shortened to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
