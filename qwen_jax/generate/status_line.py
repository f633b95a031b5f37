"""One line that says what is being loaded or compiled, and goes away when it is done."""

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
    """Writes each text over the one before it; where nobody could see that, nothing at all.

    Terminals and notebooks can; a pipe or a file can't. The clock runs on its own, so that a person
    sees that long work goes on.
    """

    def __init__(self, stream: TextIO | None = None):
        """Over `stream`, stderr by default."""
        self._stream = stream or sys.stderr
        self._shows = self._stream.isatty() or "ipykernel" in sys.modules
        self._text, self._width = "", 0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def show(self, text: str) -> None:
        """Puts `text` in place of what stands there."""
        self._text = text
        self._write()

    def __enter__(self) -> StatusLine:
        if self._shows:
            threading.Thread(target=self._tick, name="status", daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        with self._lock:
            self._over.set()
            if self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()

    def _tick(self) -> None:
        while not self._over.wait(1.0):
            self._write()

    def _write(self) -> None:
        seconds = f" ({time.monotonic() - self._start:.0f} s)"
        room = shutil.get_terminal_size().columns - 1 - len(seconds)
        with self._lock:
            if not self._shows or self._over.is_set() or not self._text:
                return
            line = self._text[:room] + seconds
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = max(self._width, len(line))


@contextlib.contextmanager
def watch_log(show: Callable[[str], None]) -> Iterator[None]:
    """Passes what this package logs to `show` too, also what is below the verbosity in force."""
    logger = logging.get_absl_logger()
    level = logger.getEffectiveLevel()

    def watch(record: python_logging.LogRecord) -> bool:
        if "qwen_jax" in record.pathname and record.levelno <= python_logging.INFO:
            show(record.getMessage())
        return record.levelno >= level

    before = logger.level
    logger.addFilter(watch)
    logger.setLevel(min(level, python_logging.INFO))
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeFilter(watch)
