"""Stopping on request: SIGTERM from a scheduler, or Ctrl-C, ends a run after the step it is in."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into a flag on which all processes of a job agree.

    Use::

        with Preemption() as preemption:
            for step in ...:
                state = train_step(state)
                if preemption.should_stop(step):
                    checkpoints.save(step, state, info, wait=True)
                    break

    A second Ctrl-C raises KeyboardInterrupt at once. Leaving the block puts the handlers that were
    there before back. Outside the main thread Python allows no handlers: only `request` works then.
    """

    def __init__(self):
        self._requested = ""
        self._previous: dict[int, object] = {}
        self._pending: jax.Array | None = None
        self._mesh: jax.sharding.Mesh | None = None
        self._stopped_at: int | None = None

    def request(self, reason: str) -> None:
        """Asks for a stop from inside the program, as a signal does from outside."""
        self._requested = self._requested or reason

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same answer on all processes.

        In a job of several processes every one must call this once per step. The flags are joined
        by one small all-reduce that runs behind the training step and is read a call later, so the
        host does not wait for the device; a signal is answered one step after the next.
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
                self._requested or "another process was told to",
            )
        return stop

    def _any_process(self, flag: bool) -> jax.Array:
        """Dispatches the maximum of the flags of all processes; does not wait for it."""
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
            # None: installed by C code, which Python can neither name nor put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self.request("SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
        # Not through logging: this may interrupt it half-way.
        hint = "; once more to stop at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self._requested}: stopping after this step{hint}.\n".encode())


@jax.jit
def _maximum(flags: jax.Array) -> jax.Array:
    return jnp.max(flags)
