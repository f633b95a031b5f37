"""ASGI middleware for all requests: host name and API key checks, access log and request ids."""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable

from absl import logging
from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_jax.server.config import ServerLimits
from qwen_jax.server.errors import ApiError

LOG_FIELDS = "qwen_jax.log"
"""Key of an ASGI scope; its value is a dict of fields that handlers add to the access log line.

The field "status" replaces the status of the response.
"""


class AccessMiddleware:
    """ASGI middleware that checks the host name of all requests and the API key of those to /v1."""

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        """Wraps `app`; API keys and allowed host names are taken from `limits`."""
        self._app = app
        # Digests have equal lengths, so the time of a comparison reveals nothing about the keys.
        self._key_digests = [hashlib.sha256(key.encode()).digest() for key in limits.api_keys]
        self._hosts = {host.lower() for host in limits.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an allowed request to the app, and answers any other with an error response."""
        if scope["type"] == "http":
            try:
                self._check_host(scope)
                self._check_key(scope)
            except ApiError as error:
                return await error.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """Checks that the host name of a request is allowed, or raises ApiError (403)."""
        if "*" in self._hosts:
            return
        try:
            host = URL(scope=scope).hostname or ""
        except ValueError:
            host = ""
        if host.lower() not in self._hosts:
            message = (
                f"The host name {host!r:.60} is not allowed on this server; the flag "
                "--allowed_host can allow it."
            )
            raise ApiError(403, message, code="host_not_allowed")

    def _check_key(self, scope: Scope) -> None:
        """Checks the API key of a request to /v1, or raises ApiError (401)."""
        path = scope["path"]
        if not self._key_digests or not (path == "/v1" or path.startswith("/v1/")):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "The API key is missing; send the header Authorization: Bearer KEY."
            raise _authentication_error(message, "missing_api_key")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # All keys are compared, so that the time does not depend on which one matches.
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        if not any(matches):
            message = "The API key is not valid for this server; check it."
            raise _authentication_error(message, "invalid_api_key")


def _authentication_error(message: str, code: str) -> ApiError:
    """Returns an HTTP 401 error that asks the client for a bearer token."""
    return ApiError(
        401,
        message,
        type="authentication_error",
        code=code,
        headers={"www-authenticate": "Bearer"},
    )


class AccessLogMiddleware:
    """ASGI middleware that logs one line per request, without its content.

    It also adds the header x-request-id to each response.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]):
        """Wraps `app`; `count` is called with the path and the status of each finished request."""
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the app; logs and counts it when it has ended.

        The status is 499 if the client disconnected before a response began.
        """
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 0
        request_id = f"req_{uuid.uuid4().hex}"
        fields = scope[LOG_FIELDS] = {}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            status = fields.pop("status", status or 499)
            self._count(scope["path"], status)
            logging.info(
                "%s %s %.100r %d %.3fs%s",
                request_id,
                scope["method"],
                scope["path"],  # logged with %r, because it may contain line breaks
                status,
                seconds,
                "".join(f" {name}={value}" for name, value in fields.items()),
            )
