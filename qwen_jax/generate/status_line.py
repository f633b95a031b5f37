"""A status line for terminals and notebooks, which is overwritten in place and finally erased."""

from __future__ import annotations

import contextlib
import logging as python_logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from absl import logging


class StatusLine:
    """Context manager that shows one line of text with the elapsed time, and erases it at the end.

    The line is redrawn every second. Nothing is written if the stream is neither a terminal nor the
    output of a notebook.
    """

    def __init__(self, stream: TextIO | None = None):
        """Writes to `stream`, by default stderr."""
        self._stream = stream or sys.stderr
        self._visible = self._stream.isatty() or "ipykernel" in sys.modules
        self._text, self._width = "", 0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def show(self, text: str) -> None:
        """Replaces the text of the line."""
        self._text = text
        self._draw()

    def __enter__(self) -> StatusLine:
        if self._visible:
            threading.Thread(target=self._redraw_until_closed, name="status", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Erases the line."""
        with self._lock:
            self._closed.set()
            if self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()

    def _redraw_until_closed(self) -> None:
        """Redraws the line every second, so that the elapsed time advances."""
        while not self._closed.wait(1.0):
            self._draw()

    def _draw(self) -> None:
        """Writes text and elapsed time over the previous line, cut to the width of the terminal."""
        seconds = f" ({time.monotonic() - self._start:.0f} s)"
        room = shutil.get_terminal_size().columns - 1 - len(seconds)
        with self._lock:
            if not self._visible or self._closed.is_set() or not self._text:
                return
            line = self._text[:room] + seconds
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = max(self._width, len(line))


@contextlib.contextmanager
def forward_log(show: Callable[[str], None]) -> Iterator[None]:
    """Passes this package's log messages to `show`, including INFO below the current verbosity.

    What is logged otherwise does not change.
    """
    logger = logging.get_absl_logger()
    level = logger.getEffectiveLevel()

    def forward(record: python_logging.LogRecord) -> bool:
        """Shows a record of this package; returns whether it is also logged."""
        if "qwen_jax" in record.pathname and record.levelno <= python_logging.INFO:
            show(record.getMessage())
        return record.levelno >= level

    level_before = logger.level
    logger.addFilter(forward)
    logger.setLevel(min(level, python_logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeFilter(forward)
