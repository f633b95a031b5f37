"""Runs an app under uvicorn until it is told to end, and then lets running requests finish."""

from __future__ import annotations

import ipaddress
import logging as python_logging
import socket
import time
from types import FrameType

import uvicorn
from absl import logging
from starlette.applications import Starlette

from qwen_jax.errors import UserError
from qwen_jax.server.app_state import Front

# After answers were cut at the end of the drain: time for their last words to be sent.
_LAST_WORDS_S = 2.0

# How long an idle connection is kept. Longer than clients keep theirs (the official one: 5 s), for
# whoever sends on a connection that is just being closed gets an error.
_IDLE_S = 75


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
      UserError: the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{host}:{port} can't be served on ({reason}); choose another.") from error
    return made


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT: no new requests, running ones finish or are cut after a time.

    While it drains it still answers, so that `/health` can say so and new requests get a 503. A
    second signal cuts at once.
    """

    def __init__(self, app: Starlette):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
                lifespan="off",
            )
        )
        python_logging.getLogger("uvicorn.error").setLevel(python_logging.WARNING)
        self._front: Front = app.state.front
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: begins the drain, or ends it."""
        del sig, frame
        self.drain(0.0 if self._front.gate.draining else self._front.limits.drain_s)

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and ends when the running ones have, at most so much later."""
        self._front.gate.draining = True
        self._drain_until = time.monotonic() + seconds

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._drain_until is not None and not self.should_exit:
            late = time.monotonic() >= self._drain_until
            if late and self._front.gate.active:
                logging.warning("cutting %d requests", self._front.gate.active)
                self._front.cut()
            self.should_exit = late or not self._front.gate.active
        return await super().on_tick(counter)
