"""Server-sent events, and cancellation of work when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen_jax.server.errors import encode_json

T = TypeVar("T")

KEEP_ALIVE = b": still working\n\n"
"""A comment, which clients ignore."""

DONE = b"data: [DONE]\n\n"
"""OpenAI's last event of a stream."""

_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # tells nginx as a proxy to pass each event on without buffering
}


def encode_event(value: Any) -> bytes:
    """Returns the bytes of one server-sent event with `value` as JSON data."""
    return b"data: " + encode_json(value) + b"\n\n"


async def cancel_on_disconnect(
    receive: Receive, work: Awaitable[T], on_disconnect: Callable[[], None]
) -> T:
    """Awaits `work` and returns its result, unless the client disconnects first.

    Args:
      receive: the ASGI receive channel, whose request body has been read.
      work: cancelled when the client disconnects.
      on_disconnect: called when the client disconnects, before `work` is cancelled.

    Raises:
      ClientDisconnect: the client disconnected.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        on_disconnect()
        raise ClientDisconnect
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


class EventStreamResponse(StreamingResponse):
    """A streaming response of server-sent events that stops when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]):
        """Prepares the response.

        Args:
          events: encoded events, sent as they are generated.
          on_end: called as soon as the client disconnects, and at the end of the stream; it may be
            called twice.
        """
        super().__init__(events, headers=_HEADERS)
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events to the client, or stops when it disconnects."""
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                await cancel_on_disconnect(receive, self.stream_response(send), self._on_end)
        finally:
            await self._events.aclose()
            self._on_end()
