"""Runs programs of `launch/` many times for the price of one start.

A server process imports what the programs import (seconds) and forks for each call, before any
device exists; the child then runs the module as `python -m` does, in a fresh absl flag registry.
Flags, exit status and output are those of a real run. A program that must be killed is started
as a process of its own instead: `start`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@dataclasses.dataclass(frozen=True)
class Done:
    """How a program ended, with what it wrote to stdout and stderr together."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def run(calls: list[list[str]], timeout: float = 300.0) -> list[Done]:
    """Runs [module, flag, flag, …] for each call, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "calls.json").write_text(json.dumps(calls))
        done = subprocess.run(
            [sys.executable, "-m", "tests.programs", folder],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        statuses = json.loads(pathlib.Path(folder, "statuses.json").read_text())
        return [
            Done(status, pathlib.Path(folder, f"output.{i}").read_text(errors="replace"))
            for i, status in enumerate(statuses)
        ]


def start(module: str, flags: list[str], output: pathlib.Path) -> subprocess.Popen:
    """Starts `python -m module` with its output in a file."""
    with output.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def _child(call: list[str], output: pathlib.Path) -> None:
    sink = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.argv = list(call)
    status = 1
    try:
        runpy.run_module(call[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(folder: pathlib.Path) -> None:
    import launch.program  # noqa: F401
    import qwen_jax.interop
    import qwen_jax.train.pretrain  # noqa: F401

    statuses = []
    for i, call in enumerate(json.loads((folder / "calls.json").read_text())):
        child = os.fork()
        if not child:
            _child(call, folder / f"output.{i}")
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    _serve(pathlib.Path(sys.argv[1]))
