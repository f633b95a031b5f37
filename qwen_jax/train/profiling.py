"""Profiler traces of selected training steps, for XProf, TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from absl import logging

from qwen_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int] | None:
    """Parses `train.profile_steps`.

    Args:
      text: "FIRST,LAST", 1-based steps as in the log, or "".

    Returns:
      Both steps, or None for "".

    Raises:
      UserError: the text is malformed, or the steps are in the wrong order.
    """
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(
            f"train.profile_steps is {text!r}; write FIRST,LAST such as 10,15, or '' for no profile"
        )
    first, last = map(int, parts)
    if not 1 <= first <= last:
        raise UserError(
            f"train.profile_steps is {text!r}; the steps must be in order and the first at least 1"
        )
    return first, last


class Profiler:
    """Tracer of a range of training steps, on process 0, into a folder.

    Writes FOLDER/plugins/profile/TIME/: HOST.xplane.pb for XProf and TensorBoard,
    perfetto_trace.json.gz for ui.perfetto.dev. Each step is annotated with its number, for XProf's
    step view. After a resume, only those steps of the range are traced that are still to run.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: str, *, done: int = 0):
        """Prepares to trace; nothing starts yet.

        Args:
          steps: first and last 1-based step to trace, both included; None traces nothing.
          folder: where traces are written.
          done: number of steps that earlier starts of this run have done.
        """
        self._folder, self._running = folder, False
        self._steps = steps if jax.process_index() == 0 else None
        if self._steps and self._steps[1] <= done:
            logging.info(
                "train.profile_steps=%d,%d: these steps are done, no profile", *self._steps
            )
            self._steps = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager for the dispatch of 1-based step `number`.

        Starts the trace if it is due, and annotates the step in a running trace.
        """
        if self._steps and not self._running and self._steps[0] <= number <= self._steps[1]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event per Python call would slow the steps down
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options
            )
            self._running = True
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Returns whether 1-based step `number` is the last of the running trace."""
        return self._running and self._steps is not None and number >= self._steps[1]

    def stop(self) -> None:
        """Ends a running trace and writes it; its steps must have completed on the device."""
        if not self._running:
            return
        self._running, self._steps = False, None
        jax.profiler.stop_trace()
        logging.info("profile written to %s", os.path.join(self._folder, "plugins", "profile"))
