"""State shared by all endpoints, and the life cycle of a completion request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from qwen_jax.errors import nearest
from qwen_jax.generate.service import Service, TextChunk
from qwen_jax.server.completion_job import CompletionJob, PromptRequest
from qwen_jax.server.config import ServedModel, ServerLimits
from qwen_jax.server.errors import ApiError, JsonResponse, as_api_error
from qwen_jax.server.event_stream import (
    DONE,
    KEEP_ALIVE,
    EventStreamResponse,
    cancel_on_disconnect,
    encode_event,
)
from qwen_jax.server.limits import AdmissionGate
from qwen_jax.server.metrics import ServerMetrics
from qwen_jax.server.middleware import LOG_FIELDS

T = TypeVar("T")


class ResponseWriter(Protocol):
    """Formatter of the answers to one request, as stream events or as one response object."""

    def first_events(self) -> list[dict[str, Any]]:
        """Returns the stream events that precede all generated text."""

    def push(self, index: int, chunk: TextChunk) -> list[dict[str, Any]]:
        """Appends a chunk to answer `index` and returns the stream events for it."""

    def usage_event(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the stream event that reports the token counts `usage`."""

    def response(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Returns the response object with all chunks pushed so far and the token counts."""


class AppState:
    """State of a server: the model with its service, limits, metrics and requests in progress.

    Attributes:
      service: generates the answers.
      model: configuration of the served model.
      limits: access and resource limits.
      gate: admission control of completion requests.
      metrics: Prometheus metrics of this server.
    """

    def __init__(self, service: Service, model: ServedModel, limits: ServerLimits):
        self.service, self.model, self.limits = service, model, limits
        self.gate = AdmissionGate(limits.max_requests)
        self.metrics = ServerMetrics(service)
        self._jobs: set[CompletionJob] = set()

    @staticmethod
    def of(request: Request) -> AppState:
        """Returns the state of the app that received `request`."""
        return request.app.state.app_state

    def check_model(self, name: str) -> None:
        """Checks that `name` is the id of the served model.

        Raises:
          ApiError: 404 for any other name.
        """
        if name != self.model.name:
            message = (
                f"The model {name!r:.100} does not exist{nearest(name, [self.model.name])}; "
                f"this server has {self.model.name!r}."
            )
            raise ApiError(404, message, param="model", code="model_not_found")

    async def run_in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Returns `work(*args)`, run in a thread.

        For work that would block the event loop, such as parsing a long body or encoding a long
        prompt.
        """
        return await asyncio.to_thread(work, *args)

    async def respond(
        self,
        request: Request,
        prompt_requests: Sequence[PromptRequest],
        writer: ResponseWriter,
        leave: Callable[[], None],
        *,
        stream: bool,
        include_usage: bool,
    ) -> Response:
        """Generates all answers of a request and returns them, whole or as an event stream.

        Args:
          request: the HTTP request, whose body has been read.
          prompt_requests: the prompts and how to continue them.
          writer: formats the answers.
          leave: called when the request has ended, for a stream after its last event.
          stream: whether to return an event stream.
          include_usage: whether a stream ends with an event that reports token counts.

        Raises:
          ApiError, UserError, Overloaded, ServiceClosed, EngineFailed: the request failed before
            anything was sent.
        """
        answers, max_answers = sum(p.n for p in prompt_requests), self.service.max_waiting
        if answers > max_answers:  # it would never fit, so 429 (retry later) would be wrong
            message = (
                f"The request asks for {answers} answers; this server accepts {max_answers} at "
                "once."
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        job = CompletionJob(self.service, prompt_requests)
        self._jobs.add(job)

        def end() -> None:
            job.cancel()
            self._jobs.discard(job)
            request.scope[LOG_FIELDS].update(prompt=job.prompt_tokens, new=job.new_tokens)
            leave()

        if stream:
            return EventStreamResponse(self._events(job, writer, include_usage), end)
        try:
            return await cancel_on_disconnect(
                request.receive, self._whole_response(job, writer), job.cancel
            )
        finally:
            end()

    async def _whole_response(self, job: CompletionJob, writer: ResponseWriter) -> Response:
        """Waits for all answers of `job` and returns them as one JSON response."""
        async for item in job.chunks(self.limits.request_timeout_s):
            assert item is not None, "no keep-alive interval was given"
            writer.push(*item)
        return JsonResponse(writer.response(job.usage()))

    async def _events(
        self, job: CompletionJob, writer: ResponseWriter, include_usage: bool
    ) -> AsyncGenerator[bytes]:
        """Yields the encoded events of a stream; an error becomes the last event."""
        limits = self.limits
        try:
            for value in writer.first_events():
                yield encode_event(value)
            async for item in job.chunks(limits.request_timeout_s, limits.keep_alive_s):
                if item is None:
                    yield KEEP_ALIVE
                    continue
                for value in writer.push(*item):
                    yield encode_event(value)
            if include_usage:
                yield encode_event(writer.usage_event(job.usage()))
            yield DONE
        except Exception as error:
            # The status has been sent already; the official client raises an error for this event.
            yield encode_event(as_api_error(error).body())

    def cancel_all(self) -> None:
        """Cancels the answers of all requests in progress."""
        for job in list(self._jobs):
            job.cancel()


def completion_endpoint(
    handle: Callable[[Request, AppState, Callable[[], None]], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Wraps a handler of completion requests with admission control and error responses.

    Args:
      handle: called with the request, the app's state, and a function that marks the request as
        finished in the admission gate. It returns the response; its exceptions become errors in
        OpenAI's format.

    Returns:
      A Starlette endpoint.
    """

    async def run(request: Request) -> Response:
        state = AppState.of(request)
        leave: Callable[[], None] | None = None
        try:
            leave = state.gate.enter()
            response = await handle(request, state, leave)
        except ClientDisconnect:
            request.scope[LOG_FIELDS]["status"] = 499
            response = Response(status_code=499)
        except Exception as error:
            response = as_api_error(error).response()
        if leave and not isinstance(response, EventStreamResponse):
            leave()
        return response

    return run


def new_id(prefix: str) -> str:
    """Returns a unique object id that begins with `prefix`."""
    return f"{prefix}-{uuid.uuid4().hex}"
