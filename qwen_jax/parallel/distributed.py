"""Start-up of jobs of several processes, and collectives on host values.

One process drives the devices of one host. A program calls `initialize` before any other use of
JAX; for a single process it does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from qwen_jax.errors import UserError
from qwen_jax.parallel.launchers import VARIABLES, ProcessGroup, detect_group, explicit_group
from qwen_jax.parallel.rendezvous import wait_for_all

_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # set by mpirun; jax reads the rest


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Connects the processes of a job; does nothing for a single process or when already connected.

    Arguments left out are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    If these are not set either, the launcher is detected: SLURM, a TPU pod on GKE or a Cloud TPU VM
    (see launchers.py); under Open MPI, JAX finds all three itself. Otherwise the job has one
    process.

    Before JAX is initialised, the processes wait for each other over a plain socket (see
    rendezvous.py): JAX itself aborts with a C++ stack trace if a process is missing, whereas this
    error names the process and its host. After this call, an uncaught exception ends the process at
    once; by default Python's exit would wait minutes for the other hosts, which in turn wait for
    this one.

    Args:
      coordinator: "host:port" of process 0, reachable from every process.
      num_processes: number of processes.
      process_id: index of this process, 0 ≤ process_id < num_processes.
      timeout_s: how long the processes wait for each other, in seconds.

    Raises:
      UserError: some but not all of the three are given, one is malformed, or not all processes
        connected in time.
    """
    if jax.distributed.is_initialized():
        return
    group = _process_group((coordinator, num_processes, process_id))
    if group is None:
        if not os.environ.get(_OPEN_MPI):
            return
        logging.info("Connecting the processes started by Open MPI (at most %g s).", timeout_s)
        jax.distributed.initialize(initialization_timeout=int(timeout_s))
    elif group.count == 1:
        return
    else:
        _initialize_group(group, timeout_s)
    sys.excepthook = _exit_on_exception
    logging.info(
        "Process %d of %d, %d of %d devices.",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def _initialize_group(group: ProcessGroup, timeout_s: float) -> None:
    """Waits until all processes of the group have started, then initialises `jax.distributed`."""
    where = f" on {group.hosts[group.index]}" if group.hosts else ""
    logging.info(
        "Process %d of %d%s (according to %s) connects to process 0 at %s.",
        group.index,
        group.count,
        where,
        group.launcher,
        group.address,
    )
    wait_for_all(group.address, group.count, group.index, timeout_s=timeout_s, hosts=group.hosts)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        local_device_ids=None if group.local_device is None else [group.local_device],
        initialization_timeout=max(1, int(timeout_s)),
        # JAX's own detection would give each process one device under SLURM.
        cluster_detection_method=None if os.environ.get(_OPEN_MPI) else "deactivate",
    )


def _process_group(values: tuple[Any, Any, Any]) -> ProcessGroup | None:
    """Returns the group from arguments, JAX_… variables or the launcher; None for a single process.

    Args:
      values: coordinator address, number of processes and index, each None where not given.
    """
    address, count, index = (
        os.environ.get(name) if value is None else value
        for name, value in zip(VARIABLES, values, strict=True)
    )
    values = address, count, index
    if any(value is not None for value in values):
        return explicit_group(values)
    return detect_group()


def end_process(status: int) -> NoReturn:
    """Exits this process with `status`, without waiting for the other processes of the job.

    Programs use it instead of `sys.exit` for an error that may be raised on this process only. The
    launcher then ends the other processes. For a single process it is `sys.exit`.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    logging.error(
        "Process %d exits with status %d, which ends the job.", jax.process_index(), status
    )
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exception hook (`sys.excepthook`): prints the traceback and exits with status 1."""
    traceback.print_exception(kind, error, trace)
    end_process(1)


def on_first_process(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 only and returns its result on all processes.

    All processes must call it.

    Args:
      function: a function whose result has JSON types.

    Returns:
      The result; with several processes as parsed from JSON, so that tuples become lists.

    Raises:
      UserError: on all processes, if `function` raised one.
      RuntimeError: on the other processes, if `function` raised any other exception, which process
        0 raises unchanged.
    """
    if jax.process_count() == 1:
        return function()
    reply: dict = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            reply = {"value": function()}
        except Exception as error:  # sent to the others, which would otherwise wait for ever
            failure, user = error, isinstance(error, UserError)
            reply = {"error": str(error) if user else f"process 0: {error!r}", "user": user}
    text = json.dumps(reply).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.frombuffer(text.ljust(length, b" ")[:length], np.uint8)
    reply = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())
    if failure is not None:
        raise failure
    if "error" in reply:
        raise (UserError if reply["user"] else RuntimeError)(reply["error"])
    return reply["value"]


def all_gather_text(text: str) -> list[str]:
    """Gathers one text per process and returns all of them, in process order, on every process.

    All processes must call it.

    Args:
      text: text of this process; truncated to 400 bytes of UTF-8.
    """
    if jax.process_count() == 1:
        return [text]
    row = np.frombuffer(text.encode()[:400].ljust(400), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [r.tobytes().decode(errors="ignore").strip() for r in rows.reshape(-1, 400)]
