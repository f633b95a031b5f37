"""Errors of the HTTP API in OpenAI's format, and the mapping of exceptions to them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from absl import logging
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qwen_jax.errors import UserError
from qwen_jax.generate.service import EngineFailed, Overloaded, ServiceClosed

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
"""Values of `type` in OpenAI's error objects."""


class ApiError(Exception):
    """An error response of the API.

    Attributes:
      status: HTTP status code.
      message: one plain sentence for the client.
      param: path of the offending request field, such as "messages[0].content", or None.
      code: machine-readable cause, such as "invalid_value", or None.
      type: OpenAI's error class, such as "invalid_request_error".
      headers: additional response headers, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = INVALID_REQUEST,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.type, self.headers = code, type, headers

    def body(self) -> dict[str, Any]:
        """Returns the response body: OpenAI's error object under the key "error"."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}

    def response(self) -> JsonResponse:
        """Returns the complete HTTP response: status, headers and JSON body."""
        return JsonResponse(self.body(), self.status, headers=self.headers)


class JsonResponse(Response):
    """A JSON response encoded by `encode_json`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns `content` as the bytes of a response body."""
        return encode_json(content)


def encode_json(value: Any) -> bytes:
    """Serialises `value` as one line of JSON in UTF-8.

    Lone surrogates, which JSON can contain but UTF-8 cannot, become `?`.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def as_api_error(error: BaseException) -> ApiError:
    """Converts any exception to the error response that the client receives.

    Unexpected exceptions are logged, and become a generic 500 without details.
    """
    match error:
        case ApiError():
            return error
        case Overloaded():
            return ApiError(
                429,
                str(error),
                type="rate_limit_error",
                code="overloaded",
                headers={"retry-after": str(math.ceil(error.retry_after))},
            )
        case ServiceClosed():
            return draining_error()
        case UserError():
            return ApiError(400, str(error))
        case EngineFailed():
            message = "The engine has failed; the log of the server has the cause."
            return ApiError(500, message, type=SERVER_ERROR, code="engine_failed")
    logging.error("a request failed", exc_info=error)
    message = "The server failed on this request; the log of the server has the cause."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def draining_error() -> ApiError:
    """Returns the HTTP 503 error for requests that arrive while the server shuts down."""
    return ApiError(
        503,
        "This server is shutting down and accepts no new requests; send them to another one.",
        type=SERVER_ERROR,
        code="draining",
        headers={"retry-after": "5"},
    )


async def handle_exception(request: Request, error: Exception) -> Response:
    """Returns the error response for an exception; registered as handler of all exceptions."""
    if isinstance(error, HTTPException):
        error = _from_http_exception(request, error)
    return as_api_error(error).response()


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """Converts an exception of Starlette's routing (404, 405, …) to an `ApiError`."""
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return ApiError(404, f"The URL {path:.100} does not exist.", code="unknown_url")
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "another method")
        message = f"{path:.100} does not support {method:.20}; use {allowed}."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), headers=error.headers)
