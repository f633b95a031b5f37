"""Server-sent events, and giving up at once when the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen_jax.server.errors import dump

T = TypeVar("T")

KEEP_ALIVE = b": still working\n\n"
_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy in between (nginx) is to pass each event on as it comes
}

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One event that carries `value` as JSON."""
    return b"data: " + dump(value) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T], give_up: Callable[[], None]) -> T:
    """The result of `work`; when the client goes away, `give_up` is called and `work` cancelled.

    Raises:
      ClientDisconnect: it went.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        give_up()
        raise ClientDisconnect
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


class EventStream(StreamingResponse):
    """A stream of events; `on_end` is called at its end, and at once when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]):
        super().__init__(events, headers=_HEADERS)
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                await unless_gone(receive, self.stream_response(send), self._on_end)
        finally:
            await self._events.aclose()
            self._on_end()
