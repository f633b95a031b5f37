"""What goes wrong in a request, always answered in OpenAI's error format."""

from __future__ import annotations

import json
import math
from typing import Any

from absl import logging
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.errors import UserError
from qwen_jax.generate.service import Closed, EngineFailed, Overloaded

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP. message: one plain sentence.
      param: the field that is wrong, such as "messages[0].content"; None where it is none.
      type, code: as OpenAI's clients know them.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.type, self.headers = code, type, headers

    def body(self) -> dict[str, Any]:
        """The error object that clients expect."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}


class Json(Response):
    """A JSON response; half a surrogate pair, which JSON can carry and UTF-8 can't, becomes `?`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return dump(content)


def dump(value: Any) -> bytes:
    """`value` as JSON in UTF-8, on one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of `error`; of our own defects no more than that there is one."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            seconds = str(math.ceil(error.retry_after))
            return ApiError(
                429, str(error), type="rate_limit_error", code="overloaded",
                headers={"retry-after": seconds},
            )  # fmt: skip
        case Closed():
            return draining()
        case UserError():
            return ApiError(400, str(error))
        case EngineFailed():
            message = "The engine has failed; whoever runs this server finds the cause in its log."
            return ApiError(500, message, type=SERVER, code="engine_failed")
    logging.error("a request failed", exc_info=error)
    message = "The server failed on this request; whoever runs it finds the cause in its log."
    return ApiError(500, message, type=SERVER, code="internal_error")


def draining() -> ApiError:
    """The server is about to end and takes no more requests."""
    return ApiError(
        503, "This server is shutting down and takes no new requests; try another one.",
        type=SERVER, code="draining", headers={"retry-after": "5"},
    )  # fmt: skip


async def respond(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for every kind of exception."""
    if isinstance(error, HTTPException):
        error = _of_http(request, error)
    told = as_api_error(error)
    return Json(told.body(), told.status, headers=told.headers)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return ApiError(404, f"There is nothing at {path:.100}.", code="unknown_url")
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "another method")
        message = f"{path:.100} does not take {method:.20}; use {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
