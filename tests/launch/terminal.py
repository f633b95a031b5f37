"""A program in a real pseudo-terminal, with the screen that a person would see."""

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time

import pyte

from tests.programs import ROOT

# Takes the terminal as its own, so that Ctrl-C reaches it; forking here would endanger jax.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
_TAKE += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class PseudoTerminal:
    """Runs `python -m module flags…`; `type` sends keys, `wait` looks at the screen."""

    def __init__(self, module, flags, env, columns=100, lines=40):
        # Scrolled-off lines are kept: a fast answer may leave the screen before it is looked at.
        self.screen = pyte.HistoryScreen(columns, lines, history=5000)
        self.screen.write_process_input = self.type  # it answers the program's questions
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._keys, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE, "-m", module, *flags],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "JAX_PLATFORMS": "cpu", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, keys):
        with contextlib.suppress(OSError):  # nobody reads any more
            os.write(self._keys, keys.encode())

    def text(self):
        """Everything that was shown, line by line."""
        above = [
            "".join(line[x].data for x in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def wait(self, *found, timeout=120.0, times=1):
        """Reads until each text of `found` stands there so many times; returns all there is."""
        end = time.monotonic() + timeout
        while not all(self.text().count(text) >= times for text in found):
            assert time.monotonic() < end, f"{found} × {times} not in\n{self.text()}"
            assert self.read() or self.process.poll() is None, f"it has ended:\n{self.text()}"
        return self.text()

    def settle(self, seconds=0.3):
        """Reads until nothing has come for a while."""
        while self.read(seconds):
            pass
        return self.text()

    def end(self, timeout=60.0):
        """Waits for the program's end and returns its exit status."""
        limit = time.monotonic() + timeout
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < limit, f"it does not end:\n{self.text()}"
        os.close(self._keys)
        return self.process.returncode

    def read(self, timeout=0.1):
        """Takes what has been printed; False when nothing came in that time."""
        if not select.select([self._keys], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._keys, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)
