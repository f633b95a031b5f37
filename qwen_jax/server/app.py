"""The ASGI application: routes, middleware, and the endpoints that are not completions."""

from __future__ import annotations

import pathlib
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from qwen_jax.generate.service import Service
from qwen_jax.server.app_state import AppState
from qwen_jax.server.chat_completions import chat_completions
from qwen_jax.server.completions import completions
from qwen_jax.server.config import ServedModel, ServerLimits
from qwen_jax.server.errors import ApiError, JsonResponse, handle_exception
from qwen_jax.server.middleware import AccessLogMiddleware, AccessMiddleware

PAGE_FOLDER = pathlib.Path(str(resources.files("qwen_jax.server"))) / "page"

# The page may load from and connect to this server only, and inline scripts are blocked.
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(
    service: Service, model: ServedModel, limits: ServerLimits = ServerLimits()
) -> Starlette:
    """Creates the ASGI app of a server; its `AppState` is `app.state.app_state`.

    Args:
      service: generates the answers; the caller closes it.
      model: configuration of the served model.
      limits: access and resource limits.
    """
    state = AppState(service, model, limits)
    middleware = [Middleware(AccessLogMiddleware, count=state.metrics.count)]
    if limits.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=limits.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware.append(Middleware(AccessMiddleware, limits=limits))
    app = Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Mount("/page", _PageFiles(directory=PAGE_FOLDER)),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", get_model, methods=["GET"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            HTTPException: handle_exception,
            ApiError: handle_exception,
            Exception: handle_exception,
        },
    )
    app.router.redirect_slashes = False
    app.state.app_state = state
    return app


class _PageFiles(StaticFiles):
    """The script and the style sheet of the chat page, served with the page's headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Returns the response of `StaticFiles` with the security headers of the page."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


async def page(request: Request) -> Response:
    """`GET /`: returns the chat page."""
    del request
    return FileResponse(PAGE_FOLDER / "index.html", headers=_PAGE_HEADERS)


async def health(request: Request) -> Response:
    """`GET /health`: returns 200 while requests are accepted, else 503 with the reason.

    The field `status` is "ok", "draining", or "failed" if the engine has failed.
    """
    state = AppState.of(request)
    status = "ok"
    if state.gate.draining:
        status = "draining"
    if state.service.failed is not None:
        status = "failed"
    fields = {"status": status, "model": state.model.name, "active": state.gate.active}
    return JsonResponse(fields, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """`GET /metrics`: returns the metrics in Prometheus' text format."""
    text = AppState.of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: returns a list with the served model."""
    return JsonResponse({"object": "list", "data": [_model_object(AppState.of(request).model)]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/NAME`: returns the served model; 404 for any other name."""
    state = AppState.of(request)
    state.check_model(request.path_params["name"])
    return JsonResponse(_model_object(state.model))


def _model_object(model: ServedModel) -> dict[str, Any]:
    """Returns OpenAI's model object, with the maximum length as `max_model_len`."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "qwen_jax",
        "max_model_len": model.max_length,
    }
