"""uvicorn server that drains on SIGTERM, and the socket it listens on."""

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
from qwen_jax.server.app_state import AppState

# Time to send the error responses of answers that were cancelled at the end of the drain.
_SHUTDOWN_S = 2

# How long an idle connection is kept open. Longer than clients keep theirs (the official one: 5 s),
# because a request on a connection that the server is just closing fails.
_IDLE_CONNECTION_S = 75


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address; port 0 picks a free port.

    Raises:
      UserError: the address is in use or does not exist on this machine.
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
        raise UserError(
            f"The server cannot listen on {host}:{port} ({reason}); choose another address or port."
        ) from error
    return made


def is_loopback(host: str) -> bool:
    """Returns whether `host`, an IP address or a name, is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def socket_url(listener: socket.socket) -> str:
    """Returns the http:// URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn server that on SIGTERM and SIGINT lets running requests finish before it exits.

    While it drains it still responds, so that `/health` reports the state and new completion
    requests get a 503. After the drain time, or on a second signal, running answers are cancelled.
    """

    def __init__(self, app: Starlette):
        """Configures the server for an app of `create_app`; `run([socket])` starts it."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_CONNECTION_S,
                timeout_graceful_shutdown=_SHUTDOWN_S,
                lifespan="off",
            )
        )
        python_logging.getLogger("uvicorn.error").setLevel(python_logging.WARNING)
        self._state: AppState = app.state.app_state
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal: the first starts the drain, a second one cancels running answers."""
        del sig, frame
        self.drain(0.0 if self._state.gate.draining else self._state.limits.drain_s)

    def drain(self, seconds: float) -> None:
        """Stops admitting requests; the server exits when the running ones have finished.

        Requests that are still running after `seconds` are cancelled.
        """
        self._state.gate.draining = True
        self._drain_until = time.monotonic() + seconds

    async def on_tick(self, counter: int) -> bool:
        """Ends the drain when it is due, and returns whether the server exits.

        uvicorn calls this ten times per second.
        """
        if self._drain_until is not None and not self.should_exit:
            late = time.monotonic() >= self._drain_until
            if late and self._state.gate.active:
                logging.warning("cancelling %d running requests", self._state.gate.active)
                self._state.cancel_all()
            self.should_exit = late or not self._state.gate.active
        return await super().on_tick(counter)
