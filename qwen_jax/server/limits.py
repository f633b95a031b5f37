"""Who may ask, how much, and how many at once."""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable

from absl import logging
from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_jax.server.config import Limits
from qwen_jax.server.errors import ApiError, Json, draining

LOG = "qwen_jax.log"
"""Key of an ASGI scope under which a handler leaves what the access log tells of it."""


# A client that is still sending would not see the answer, only a broken connection; so what is too
# long is read on, up to so many times the limit, and thrown away.
_READ_ON = 8


class Gate:
    """Counts the requests for text that are under way, and closes when the server is to end."""

    def __init__(self, most: int):
        self.active = 0
        self.draining = False
        self._most = most

    def enter(self) -> Callable[[], None]:
        """Lets a request in; returns what to call, once or more, when it is over.

        Raises:
          ApiError: 503 while draining, 429 where too many are under way.
        """
        if self.draining:
            raise draining()
        if self.active >= self._most:
            raise ApiError(
                429, f"{self.active} requests are under way already; try again in a second.",
                type="rate_limit_error", code="overloaded", headers={"retry-after": "1"},
            )  # fmt: skip
        self.active += 1
        inside = [True]

        def leave() -> None:
            if inside:
                inside.clear()
                self.active -= 1

        return leave


async def read_body(request: Request, most: int) -> bytes:
    """The body of a JSON request.

    Raises:
      ApiError: 413 where it is longer than `most` bytes; 415 where it isn't said to be JSON, which
        also keeps pages of other sites from posting here: a browser asks before it sends JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"is {kind!r:.60}" if kind else "is missing"
        message = f"The header Content-Type {found}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > _READ_ON * most:
        raise _too_long(most)
    body, seen = bytearray(), 0
    async for piece in request.stream():
        seen += len(piece)
        if seen <= most:
            body += piece
        elif seen > _READ_ON * most:
            break
    if seen > most:
        raise _too_long(most)
    return bytes(body)


def _too_long(most: int) -> ApiError:
    message = f"The body is longer than {most:,} bytes, the most that this server reads."
    return ApiError(413, message, code="request_too_large", headers={"connection": "close"})


class Guard:
    """ASGI middleware: the host that was asked for, and the API key of what is under /v1."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        # Compared as digests: equal lengths, so that time tells nothing of the keys.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in limits.api_keys]
        self._hosts = {host.lower() for host in limits.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it with an error."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                response = Json(error.body(), error.status, headers=error.headers)
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if "*" not in self._hosts:
            try:
                host = URL(scope=scope).hostname or ""
            except ValueError:
                host = ""
            if host.lower() not in self._hosts:
                message = (
                    f"This server is not to be called by the name {host!r:.60}; whoever runs it "
                    "can allow it with --allowed_host."
                )
                raise ApiError(403, message, code="host_not_allowed")
        path = scope["path"]
        if self._keys and (path == "/v1" or path.startswith("/v1/")):
            self._check_key(Headers(scope=scope).get("authorization", ""))

    def _check_key(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        challenge = {"www-authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not key.strip():
            message = "The API key is missing; send the header Authorization: Bearer KEY."
            kind = "authentication_error"
            raise ApiError(401, message, type=kind, code="missing_api_key", headers=challenge)
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        if not any(found):
            message = "The API key is not one of this server's; check it."
            kind = "authentication_error"
            raise ApiError(401, message, type=kind, code="invalid_api_key", headers=challenge)


class AccessLog:
    """ASGI middleware: a line per request without its content, an id, and the counts."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int, float], None]):
        """`count` is given path, status and seconds of each request."""
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and tells of it when it is over."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 0
        request_id = f"req_{uuid.uuid4().hex}"
        notes = scope[LOG] = {}

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            seconds = time.monotonic() - started
            status = notes.pop("status", status or 499)
            self._count(scope["path"], status, seconds)
            told = "".join(f" {name}={value}" for name, value in notes.items())
            # %r: a path may hold line breaks.
            logging.info(
                "%s %s %.100r %d %.3fs%s",
                *(request_id, scope["method"], scope["path"], status, seconds, told),
            )
