"""Runs a function in N processes of M CPU devices each, joined by `jax.distributed`.

Eight virtual devices in one process do not prove that code works on several hosts; two processes
with gloo collectives do. A test names a module-level function of an importable module and the
JSON-able arguments it is called with; what the function returns (JSON-able) comes back, one
value per process::

    def _global_sum(scale: float) -> float: ...          # in tests/train/test_x.py

    def test_sum():
        assert multiprocess.run(_global_sum, processes=2, devices=4, scale=2.0) == [16.0, 16.0]

For tests that must touch a running process (signals, kill -9), `start` returns the `Group` before
it ends. Leaving a `Group`'s `with` block kills whatever still runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Self

ROOT = pathlib.Path(__file__).resolve().parent.parent


class ProcessFailed(AssertionError):
    """A process of the group ended badly or too late; the message holds the output of all."""


def free_port() -> int:
    """Returns a TCP port that was free on localhost a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclasses.dataclass
class Group:
    """N running worker processes; `wait` collects what they returned."""

    processes: list[subprocess.Popen]
    folder: pathlib.Path  # of its own: arguments, results and captured output
    _cleanup: tempfile.TemporaryDirectory

    def output(self, index: int) -> str:
        """Returns what process `index` has written to stdout and stderr so far."""
        return (self.folder / f"output.{index}").read_text(errors="replace")

    def wait_for_output(self, index: int, text: str, *, timeout: float = 60.0) -> None:
        """Blocks until process `index` has written `text`; fails when it ends without."""
        deadline = time.monotonic() + timeout
        while text not in self.output(index):
            ended = self.processes[index].poll() is not None
            if (ended and text not in self.output(index)) or time.monotonic() > deadline:
                raise ProcessFailed(f"process {index} never wrote {text!r}.\n{self._all_output()}")
            time.sleep(0.01)

    def send_signal(self, index: int, number: int) -> None:
        """Sends a signal to process `index` alone."""
        self.processes[index].send_signal(number)

    def wait(self, *, timeout: float = 120.0, check: bool = True) -> list[Any]:
        """Waits for all; returns their results in process order (None where there is none).

        Raises ProcessFailed when one is still running after `timeout` seconds or, with `check`,
        as soon as one ends with another status than 0: the others would wait for it.
        """
        deadline = time.monotonic() + timeout
        while any(p.poll() is None for p in self.processes):
            if check and any(p.poll() not in (None, 0) for p in self.processes):
                time.sleep(0.5)  # the others may be about to say why
                break
            if time.monotonic() > deadline:
                statuses = [p.poll() for p in self.processes]
                raise ProcessFailed(
                    f"no end after {timeout:.0f} s; exit statuses {statuses} (None: running).\n"
                    + self._all_output()
                )
            time.sleep(0.02)
        statuses = [p.poll() for p in self.processes]
        if check and any(statuses):
            raise ProcessFailed(f"exit statuses {statuses}.\n{self._all_output()}")
        return [self._result(i) for i in range(len(self.processes))]

    def kill(self) -> None:
        """Kills (SIGKILL) every process that still runs, and reaps it."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _result(self, index: int) -> Any:
        path = self.folder / f"result.{index}"
        return json.loads(path.read_text()) if path.exists() else None

    def _all_output(self) -> str:
        parts = []
        for index in range(len(self.processes)):
            parts.append(f"--- process {index} ---\n{self.output(index)[-8000:]}")
        return "\n".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.kill()
        self._cleanup.cleanup()


def start(
    function: Callable[..., Any],
    *,
    processes: int = 2,
    devices: int = 4,
    distributed: bool = True,
    numbered: bool = False,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> Group:
    """Starts `processes` Python processes with `devices` CPU devices each, running `function`.

    Args:
      function: module-level function of an importable module; called as `function(**arguments)`.
      processes: how many; with more than one they are joined before `function` is called.
      devices: CPU devices in each.
      distributed: False leaves `jax.distributed` alone (for tests of the start-up itself).
      numbered: sets JAX_PROCESS_ID for each process.
      env: variables added to the environment of all.
      **arguments: JSON-able keyword arguments, the same for all processes.
    """
    cleanup = tempfile.TemporaryDirectory(prefix="qwen_jax_multiprocess_")
    folder = pathlib.Path(cleanup.name)
    job = {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": arguments,
        "processes": processes,
        "devices": devices,
        "coordinator": f"127.0.0.1:{free_port()}" if distributed and processes > 1 else None,
    }
    (folder / "job.json").write_text(json.dumps(job))
    # A proxy for the network outside must not stand between two processes of one machine.
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    path = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH")]))
    settings = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    running = []
    for index in range(processes):
        with (folder / f"output.{index}").open("w") as sink:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.multiprocess", str(folder), str(index)],
                    cwd=ROOT,
                    env={
                        **clean,
                        **settings,
                        **({"JAX_PROCESS_ID": str(index)} if numbered else {}),
                        **(env or {}),
                    },
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )
    return Group(running, folder, cleanup)


def run(
    function: Callable[..., Any],
    *,
    processes: int = 2,
    devices: int = 4,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Runs `function(**arguments)` in every process (see `start`); returns what each returned.

    Raises ProcessFailed, with the output of every process, when one fails or `timeout` seconds
    have passed.
    """
    with start(function, processes=processes, devices=devices, env=env, **arguments) as group:
        return group.wait(timeout=timeout)


def _worker(folder: pathlib.Path, index: int) -> None:
    """Entry of a worker process: set up jax, join the others, call, write the result."""
    job = json.loads((folder / "job.json").read_text())
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)  # as in conftest.py
    jax.config.update("jax_num_cpu_devices", job["devices"])
    # After the line above: what a test module or its conftest sets on import must not undo it.
    module = importlib.import_module(job["module"])
    jax.config.update("jax_num_cpu_devices", job["devices"])
    if job["coordinator"]:
        from qwen_jax.parallel import distributed

        distributed.initialize(job["coordinator"], job["processes"], index, timeout_s=60)
    result = getattr(module, job["function"])(**job["arguments"])
    partial = folder / f"result.{index}.partial"
    partial.write_text(json.dumps(result))
    os.replace(partial, folder / f"result.{index}")
    if job["coordinator"]:
        jax.distributed.shutdown()


if __name__ == "__main__":
    _worker(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
