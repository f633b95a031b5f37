"""Runs a program in a pseudo-terminal and emulates its screen."""

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

# Makes the terminal the controlling one, so that Ctrl-C sends SIGINT. Done in a new process because
# forking the test process is unsafe with jax.
_SET_CONTROLLING_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
_SET_CONTROLLING_TERMINAL += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class PseudoTerminal:
    """Runs `python -m module flags…`; `type` sends keys, `wait` reads the screen."""

    def __init__(self, module, flags, env, columns=100, lines=40):
        # Lines that scroll off are kept: a fast answer may leave the screen before it is read.
        self.screen = pyte.HistoryScreen(columns, lines, history=5000)
        self.screen.write_process_input = self.type  # answers terminal queries
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._keys, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SET_CONTROLLING_TERMINAL, "-m", module, *flags],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "JAX_PLATFORMS": "cpu", **env},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, keys):
        with contextlib.suppress(OSError):  # the program has ended
            os.write(self._keys, keys.encode())

    def text(self):
        """Returns everything that was displayed, line by line."""
        above = [
            "".join(line[x].data for x in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def wait(self, *found, timeout=120.0, times=1):
        """Reads until each text of `found` was displayed `times` times; returns all text."""
        end = time.monotonic() + timeout
        while not all(self.text().count(text) >= times for text in found):
            assert time.monotonic() < end, f"{found} × {times} not in\n{self.text()}"
            assert self.read() or self.process.poll() is None, (
                f"the program has ended:\n{self.text()}"
            )
        return self.text()

    def settle(self, seconds=0.3):
        """Reads until there is no output for `seconds`; returns all text."""
        while self.read(seconds):
            pass
        return self.text()

    def end(self, timeout=60.0):
        """Waits for the program to end and returns its exit status."""
        limit = time.monotonic() + timeout
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < limit, f"the program does not end:\n{self.text()}"
        os.close(self._keys)
        return self.process.returncode

    def read(self, timeout=0.1):
        """Reads available output; returns False if there was none within `timeout` seconds."""
        if not select.select([self._keys], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._keys, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)
