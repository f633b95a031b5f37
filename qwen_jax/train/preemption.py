"""Preemption: SIGTERM from a scheduler, or Ctrl-C, stops a run after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging


class Preemption:
    """Stop flag that SIGTERM and the first Ctrl-C set, and on which all processes of a job agree.

    Use::

        with Preemption() as preemption:
            for step in ...:
                state = train_step(state)
                if preemption.should_stop(step):
                    checkpoints.save(step, state, info, wait=True)
                    break

    A second Ctrl-C raises KeyboardInterrupt at once. Leaving the block restores the previous signal
    handlers. Outside the main thread Python allows no handlers, so only `request` works there.
    """

    def __init__(self):
        """Makes the flag; signal handlers are installed by the `with` block."""
        self._requested = ""
        self._previous: dict[int, Any] = {}
        self._pending: jax.Array | None = None
        self._mesh: jax.sharding.Mesh | None = None
        self._stopped_at: int | None = None

    def request(self, reason: str) -> None:
        """Requests a stop, as a signal does; `reason` is logged."""
        self._requested = self._requested or reason

    def should_stop(self, step: int) -> bool:
        """Returns whether to save and stop after `step`, the same on all processes.

        In a job of several processes each must call this once per step. The flags are combined by
        a small all-reduce that is queued after the training step and read in the next call, so the
        host does not wait for the device; the run stops one or two steps after a signal.
        """
        if self._stopped_at is not None:
            return True
        if jax.process_count() == 1:
            stop = bool(self._requested)
        else:
            stop = self._pending is not None and bool(self._pending.addressable_data(0))
            self._pending = None if stop else self._any_process(bool(self._requested))
        if stop:
            self._stopped_at = step
            logging.warning(
                "Stopping after step %d: %s.",
                step,
                self._requested or "another process was asked to stop",
            )
        return stop

    def _any_process(self, flag: bool) -> jax.Array:
        """Dispatches the logical or of the flags of all processes; does not wait for it.

        Returns:
          int32 scalar, 1 if any flag is set.
        """
        if self._mesh is None:
            self._mesh = jax.make_mesh((jax.device_count(),), ("all",))
        flags = jax.make_array_from_process_local_data(
            jax.NamedSharding(self._mesh, jax.P("all")),
            np.full(jax.local_device_count(), flag, np.int32),
        )
        with jax.set_mesh(self._mesh):
            return _maximum(flags)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # None: a handler installed by C code, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT: sets the flag, or raises on a second Ctrl-C."""
        del frame
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self.request("SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
        # Not through logging, which this handler may have interrupted.
        hint = "; press again to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self._requested}: stopping after this step{hint}.\n".encode())


@jax.jit
def _maximum(flags: jax.Array) -> jax.Array:
    """Returns the maximum of int32 flags over all devices, replicated."""
    return jnp.max(flags)
