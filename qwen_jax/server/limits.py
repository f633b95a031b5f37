"""Admission control of completion requests: a limit on their number and on the size of bodies."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request

from qwen_jax.server.errors import ApiError, draining_error

# A client that is still sending would see a broken connection instead of the error response. So an
# oversized body is read and discarded, up to this multiple of the limit.
_DISCARD_FACTOR = 8


class AdmissionGate:
    """Counter of the completion requests in progress, which rejects those above a maximum.

    Attributes:
      active: number of admitted requests that have not finished.
      draining: whether the server is shutting down; if True, every new request is rejected.
    """

    def __init__(self, max_requests: int):
        """Creates an open gate that admits at most `max_requests` requests at a time."""
        self.active = 0
        self.draining = False
        self._max_requests = max_requests

    def enter(self) -> Callable[[], None]:
        """Admits a request and counts it as active.

        Returns:
          A function that marks the request as finished; calling it again has no effect.

        Raises:
          ApiError: 503 while draining, 429 if the maximum is reached.
        """
        if self.draining:
            raise draining_error()
        if self.active >= self._max_requests:
            raise ApiError(
                429,
                f"{self.active} requests are in progress, the maximum of this server; try again in "
                "a second.",
                type="rate_limit_error",
                code="overloaded",
                headers={"retry-after": "1"},
            )
        self.active += 1
        ended = False

        def leave() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self.active -= 1

        return leave


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads the body of a JSON request.

    The content type is required to be JSON also because browsers let pages of other sites send JSON
    only after a CORS preflight request.

    Args:
      request: a request whose body has not been read.
      max_bytes: maximum size of the body.

    Raises:
      ApiError: 413 if the body is larger than `max_bytes`, 415 if Content-Type is not
        application/json.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"is {kind!r:.60}" if kind else "is missing"
        message = f"The header Content-Type {found}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > _DISCARD_FACTOR * max_bytes:
        raise _body_too_large(max_bytes)
    body, received = bytearray(), 0
    async for piece in request.stream():
        received += len(piece)
        if received <= max_bytes:
            body += piece
        elif received > _DISCARD_FACTOR * max_bytes:
            break
    if received > max_bytes:
        raise _body_too_large(max_bytes)
    return bytes(body)


def _body_too_large(max_bytes: int) -> ApiError:
    """Returns the HTTP 413 error for a body above `max_bytes`, which closes the connection."""
    message = f"The body is larger than {max_bytes:,} bytes, the limit of this server; shorten it."
    return ApiError(413, message, code="request_too_large", headers={"connection": "close"})
