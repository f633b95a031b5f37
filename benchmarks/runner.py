"""Rows of a benchmark in a process of their own: a kernel that hangs or crashes costs its row only.

A benchmark module has `row(**job) -> dict`, job and row in JSON types. `Runner(module)` calls it in
this process; `Runner(module, seconds=60)` in a child that answers one job after another, is killed
when a row takes longer than that, and replaced when it died or lost its device. Only the child
opens the device then, so two processes never share its memory.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import queue
import subprocess
import sys
import threading

from absl import flags

from benchmarks.report import environment, reason

_MARK = "row: "
_START_SECONDS = 180
_PATIENCE = 2
"""Rows of an implementation that may hang or crash before no more of its rows are tried."""


class Runner:
    """Answers jobs with rows; a row lost to a hang or a crash is {"failed": why}."""

    def __init__(self, module: str, seconds: float = 0, arguments: tuple[str, ...] = ()):
        """seconds: longest a row may take; 0: run in this process. arguments: the child's flags."""
        self._module, self._seconds, self._arguments = module, seconds, arguments
        self._child: subprocess.Popen | None = None
        self._lost: collections.Counter = collections.Counter()
        self._environment: dict | None = None

    def environment(self) -> dict:
        """Of the process that runs the rows.

        Raises:
          RuntimeError: the child doesn't start.
        """
        if not self._seconds:
            return environment()
        if self._environment is None:
            self._start()
        return self._environment

    def row(self, **job) -> dict:
        """The row of a job."""
        if not self._seconds:
            return _row(_loaded(self._module), job)
        key = job.get("implementation")
        if self._lost[key] >= _PATIENCE:
            return {"failed": f"not tried: {_PATIENCE} rows of it hung or crashed"}
        if self._child is None:
            self._start()
        try:
            self._child.stdin.write(json.dumps(job) + "\n")
            self._child.stdin.flush()
            answer = self._answer(self._seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as problem:
            self._lost[key] += 1
            status = self._kill()
            if isinstance(problem, TimeoutError):
                return {"failed": f"no answer in {self._seconds:g} s"}
            return {"failed": f"its process ended with status {status}"}
        if not answer["device_well"]:
            self._lost[key] += 1
            self.close()
        return answer["row"]

    def close(self) -> None:
        """Ends the child."""
        if self._child is None:
            return
        self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(20)
        self._kill()

    def _kill(self) -> int:
        """The child's exit status, its own if it ended by itself."""
        self._child.kill()
        status, self._child = self._child.wait(), None
        return status

    def _start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.runner", self._module, *self._arguments]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._child, self._lines), daemon=True).start()
        try:
            self._environment = self._answer(_START_SECONDS)
        except (TimeoutError, EOFError) as problem:
            status = self._kill()
            raise RuntimeError(
                f"the process that runs {self._module} ended before its first row ({status})"
            ) from problem

    def _answer(self, seconds: float) -> dict:
        """The child's next line. Raises TimeoutError, or EOFError where it ended."""
        try:
            answer = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if answer is None:
            raise EOFError
        return answer


def _read(child: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    for line in child.stdout:
        if line.startswith(_MARK):
            lines.put(json.loads(line[len(_MARK) :]))
        else:  # what the libraries print
            sys.stderr.write(line)
    lines.put(None)


def _loaded(module: str):
    """The module; where it is the program itself, that one, whose flags are defined already."""
    program = sys.modules["__main__"]
    if getattr(getattr(program, "__spec__", None), "name", None) == module:
        return program
    return importlib.import_module(module)


def _row(module, job: dict) -> dict:
    try:
        return module.row(**job)
    except Exception as problem:
        return {"failed": reason(problem)}


def _device_well() -> bool:
    """Whether the device still computes; after a fault in a kernel it doesn't."""
    import jax
    import jax.numpy as jnp

    try:
        return int(jnp.ones((), jnp.int32) + 1) == 2
    except jax.errors.JaxRuntimeError:
        return False


def serve(module: str) -> None:
    """The child: a line of JSON in, a row out, until the input ends or the device is lost."""
    loaded = importlib.import_module(module)
    print(_MARK + json.dumps(environment()), flush=True)
    for line in sys.stdin:
        answer = _row(loaded, json.loads(line))
        well = _device_well()
        print(_MARK + json.dumps({"row": answer, "device_well": well}), flush=True)
        if not well:
            return


if __name__ == "__main__":
    name = sys.argv[1]
    importlib.import_module(name)  # its flags
    flags.FLAGS(sys.argv[1:])
    serve(name)
