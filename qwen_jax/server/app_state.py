"""What the endpoints share: the service, the limits, and the course of a request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from qwen_jax.errors import nearest
from qwen_jax.generate.service import Chunk, Service
from qwen_jax.server.config import Limits, ServedModel
from qwen_jax.server.errors import ApiError, Json, as_api_error
from qwen_jax.server.job import Ask, Job
from qwen_jax.server.limits import LOG, Gate
from qwen_jax.server.metrics import Metrics
from qwen_jax.server.stream import DONE, KEEP_ALIVE, EventStream, event, unless_gone


class Writer(Protocol):
    """Writes the answers of one kind of request, whole or as events."""

    def begin(self) -> list[dict[str, Any]]:
        """The events before any text."""

    def push(self, number: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The events of a chunk of answer `number`."""

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that tells the usage."""

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Everything pushed, as one response."""


class Front:
    """A served model and who is being served.

    Attributes:
      service, model, limits: as given. gate, metrics: of this server.
    """

    def __init__(self, service: Service, model: ServedModel, limits: Limits):
        self.service, self.model, self.limits = service, model, limits
        self.gate = Gate(limits.max_requests)
        self.metrics = Metrics(service)
        self._jobs: set[Job] = set()

    def check_model(self, name: str) -> None:
        """Refuses every model but the one there is.

        Raises:
          ApiError: 404.
        """
        if name != self.model.name:
            message = (
                f"The model {name!r:.100} is not served{nearest(name, [self.model.name])}; "
                f"this server has {self.model.name!r}."
            )
            raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Runs what would hold up the event loop: reading a long body, encoding a long prompt."""
        return await asyncio.to_thread(work, *args)

    async def answer(
        self,
        request: Request,
        asks: Sequence[Ask],
        writer: Writer,
        leave: Callable[[], None],
        *,
        stream: bool,
        include_usage: bool,
    ) -> Response:
        """Generates, and answers whole or as a stream; `leave` is called when it is over.

        Raises:
          ApiError, UserError, Overloaded, Closed, EngineFailed: before anything was sent.
        """
        wanted, most = sum(ask.n for ask in asks), self.service.max_waiting
        if wanted > most:  # to be told to try again would be no help
            message = f"The request asks for {wanted} answers; this server takes {most} at once."
            raise ApiError(400, message, param="n", code="invalid_value")
        job = Job(self.service, asks)
        self._jobs.add(job)

        def end() -> None:
            job.cancel()
            self._jobs.discard(job)
            request.scope[LOG].update(prompt=job.prompt_tokens, new=job.new_tokens)
            leave()

        if stream:
            return EventStream(self._events(job, writer, include_usage), end)
        try:
            return await unless_gone(request.receive, self._whole(job, writer), job.cancel)
        finally:
            end()

    async def _whole(self, job: Job, writer: Writer) -> Response:
        async for number, chunk in job.chunks(self.limits.request_timeout_s):
            writer.push(number, chunk)
        return Json(writer.whole(job.usage()))

    async def _events(self, job: Job, writer: Writer, include_usage: bool) -> AsyncGenerator[bytes]:
        limits = self.limits
        try:
            for value in writer.begin():
                yield event(value)
            async for item in job.chunks(limits.request_timeout_s, limits.keep_alive_s):
                if item is None:
                    yield KEEP_ALIVE
                    continue
                for value in writer.push(*item):
                    yield event(value)
            if include_usage:
                yield event(writer.usage(job.usage()))
            yield DONE
        except Exception as error:
            # The status is sent already; the official client raises what such an event says.
            yield event(as_api_error(error).body())

    def cut(self) -> None:
        """Ends everything that runs, at the end of the drain."""
        for job in list(self._jobs):
            job.cancel()


def endpoint(
    handle: Callable[[Request, Front, Callable[[], None]], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """A handler of requests for text, let in by the gate, with errors in OpenAI's format."""

    async def run(request: Request) -> Response:
        front: Front = request.app.state.front
        leave: Callable[[], None] | None = None
        try:
            leave = front.gate.enter()
            response = await handle(request, front, leave)
        except ClientDisconnect:
            request.scope[LOG]["status"] = 499
            response = Response(status_code=499)
        except Exception as error:
            told = as_api_error(error)
            response = Json(told.body(), told.status, headers=told.headers)
        if leave and not isinstance(response, EventStream):
            leave()
        return response

    return run


def new_id(prefix: str) -> str:
    """An id that no other object has."""
    return f"{prefix}-{uuid.uuid4().hex}"
