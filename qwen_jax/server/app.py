"""The ASGI app: routes, and what every request passes through."""

from __future__ import annotations

import pathlib
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from qwen_jax.generate.service import Service
from qwen_jax.server.app_state import Front
from qwen_jax.server.chat_completions import chat
from qwen_jax.server.completions import completions
from qwen_jax.server.config import Limits, ServedModel
from qwen_jax.server.errors import ApiError, Json, respond
from qwen_jax.server.limits import AccessLog, Guard

PAGE = pathlib.Path(str(resources.files("qwen_jax.server"))) / "page"

# The page loads and calls nothing but this server, and no script that stands in a document runs.
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(service: Service, model: ServedModel, limits: Limits = Limits()) -> Starlette:
    """The app over a running service; `app.state.front` is its `Front`.

    Args:
      service: generates; it is not ended with the app.
      model: what is served. limits: what is let in.
    """
    front = Front(service, model, limits)
    middleware = [Middleware(AccessLog, count=front.metrics.count)]
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
    middleware.append(Middleware(Guard, limits=limits))
    app = Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Mount("/page", _Page(directory=PAGE)),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: respond, ApiError: respond, Exception: respond},
    )
    app.router.redirect_slashes = False
    app.state.front = front
    return app


class _Page(StaticFiles):
    """The page's script and style."""

    def file_response(self, *args, **kwargs) -> Response:
        """The file, with the headers of the page."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


async def page(request: Request) -> Response:
    """The chat page."""
    del request
    return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


async def health(request: Request) -> Response:
    """200 while requests are taken; 503 while draining, and when the engine has failed."""
    front: Front = request.app.state.front
    state = "ok"
    if front.gate.draining:
        state = "draining"
    if front.service.failed is not None:
        state = "failed"
    fields = {"status": state, "model": front.model.name, "active": front.gate.active}
    return Json(fields, 200 if state == "ok" else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = request.app.state.front.metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe(front: Front) -> dict[str, object]:
    model = front.model
    named = {"id": model.name, "object": "model", "created": model.created, "owned_by": "qwen_jax"}
    return {**named, "max_model_len": model.max_length}


async def models(request: Request) -> Response:
    """The one model there is."""
    return Json({"object": "list", "data": [_describe(request.app.state.front)]})


async def one_model(request: Request) -> Response:
    """The model, by its name."""
    front: Front = request.app.state.front
    front.check_model(request.path_params["name"])
    return Json(_describe(front))
