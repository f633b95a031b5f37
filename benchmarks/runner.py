"""Runs the rows of a benchmark in a child process, so that a crash or hang costs one row only.

A benchmark module defines `measure_row(**job) -> dict`, where job and row are JSON values.
`RowRunner(module)` calls it in this process. `RowRunner(module, seconds=60)` calls it in a child
process that measures one job after another; the child is killed when a row takes longer than that,
and is replaced after it has died or lost its device. Only the child opens the device, so two
processes never share its memory.
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
import types
from typing import Any

from absl import flags

from benchmarks.report import environment, error_summary

_PREFIX = "row: "
"""Begins the lines of a child's output that are meant for the parent."""
_START_SECONDS = 180
_MAX_LOST_ROWS = 2
"""Rows of one implementation that may hang or crash before its other rows are skipped."""


class RowRunner:
    """Measures rows of a benchmark, in this process or in a child process."""

    def __init__(self, module: str, seconds: float = 0, arguments: tuple[str, ...] = ()):
        """Prepares a runner; the child starts with the first row.

        Args:
          module: name of the benchmark module.
          seconds: longest that a row may take; 0 measures rows in this process.
          arguments: command-line flags of the child.
        """
        self._module, self._seconds, self._arguments = module, seconds, arguments
        self._child: subprocess.Popen[str] | None = None
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lost_rows: collections.Counter[str | None] = collections.Counter()
        self._environment: dict[str, str] | None = None

    def environment(self) -> dict[str, str]:
        """Returns `report.environment` of the process that measures the rows.

        Raises:
          RuntimeError: the child process ended before its first row.
        """
        if not self._seconds:
            return environment()
        if self._environment is None:
            self._start()
        assert self._environment is not None
        return self._environment

    def measure_row(self, **job: Any) -> dict[str, Any]:
        """Returns the row of a job, or {"failed": reason} if it raised, hung or crashed.

        After two hangs or crashes of one implementation (job["implementation"]) its other rows are
        not measured.
        """
        if not self._seconds:
            return _measure(_import_benchmark(self._module), job)
        implementation = job.get("implementation")
        if self._lost_rows[implementation] >= _MAX_LOST_ROWS:
            return {"failed": f"not tried: {_MAX_LOST_ROWS} rows of it hung or crashed"}
        if self._child is None:
            self._start()
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(job) + "\n")
            self._child.stdin.flush()
            message = self._receive(self._seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self._lost_rows[implementation] += 1
            status = self._kill()
            if isinstance(error, TimeoutError):
                return {"failed": f"no answer in {self._seconds:g} s"}
            return {"failed": f"its process ended with status {status}"}
        if not message["device_works"]:
            self._lost_rows[implementation] += 1
            self.close()
        return message["row"]

    def close(self) -> None:
        """Ends the child process, if there is one."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(20)
        self._kill()

    def _kill(self) -> int:
        """Kills the child and returns its exit status, its own one if it had ended already."""
        assert self._child is not None
        self._child.kill()
        status, self._child = self._child.wait(), None
        return status

    def _start(self) -> None:
        """Starts the child and waits for its environment. Raises RuntimeError if it ends first."""
        command = [sys.executable, "-m", "benchmarks.runner", self._module, *self._arguments]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._messages = queue.SimpleQueue()
        threading.Thread(
            target=_forward_output, args=(self._child, self._messages), daemon=True
        ).start()
        try:
            self._environment = self._receive(_START_SECONDS)
        except (TimeoutError, EOFError) as error:
            status = self._kill()
            raise RuntimeError(
                f"the process that runs {self._module} ended before its first row ({status})"
            ) from error

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Returns the child's next message.

        Raises:
          TimeoutError: none came within `seconds`.
          EOFError: the child has ended.
        """
        try:
            message = self._messages.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            raise EOFError
        return message


def _forward_output(child: subprocess.Popen[str], messages: queue.SimpleQueue) -> None:
    """Puts the messages of a child in a queue, None at its end, and other output on stderr."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(_PREFIX):
            messages.put(json.loads(line[len(_PREFIX) :]))
        else:  # output of libraries
            sys.stderr.write(line)
    messages.put(None)


def _import_benchmark(name: str) -> types.ModuleType:
    """Returns a module; the main program itself if it is that one, whose flags exist already."""
    program = sys.modules["__main__"]
    if getattr(getattr(program, "__spec__", None), "name", None) == name:
        return program
    return importlib.import_module(name)


def _measure(module: types.ModuleType, job: dict[str, Any]) -> dict[str, Any]:
    """Returns module.measure_row(**job), or {"failed": reason} if it raises."""
    try:
        return module.measure_row(**job)
    except Exception as error:
        return {"failed": error_summary(error)}


def _device_works() -> bool:
    """Returns whether the device still computes, which it does not after a fault in a kernel."""
    import jax
    import jax.numpy as jnp

    try:
        return int(jnp.ones((), jnp.int32) + 1) == 2
    except jax.errors.JaxRuntimeError:
        return False


def serve(name: str) -> None:
    """Measures rows in a child process: reads a JSON job per line of stdin and prints its row.

    Returns at the end of stdin, or once the device no longer works.

    name: of the benchmark module.
    """
    module = importlib.import_module(name)
    print(_PREFIX + json.dumps(environment()), flush=True)
    for line in sys.stdin:
        row = _measure(module, json.loads(line))
        works = _device_works()
        print(_PREFIX + json.dumps({"row": row, "device_works": works}), flush=True)
        if not works:
            return


if __name__ == "__main__":
    benchmark = sys.argv[1]
    importlib.import_module(benchmark)  # defines its flags
    flags.FLAGS(sys.argv[1:])
    serve(benchmark)
