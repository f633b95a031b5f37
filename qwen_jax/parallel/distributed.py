"""Starting a job of several processes, and the few things its processes must agree on.

One process drives the devices of one host. `initialize` is the first thing a program does, before
any other use of jax; for a single process it does nothing.
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
from qwen_jax.parallel.launchers import VARIABLES, Group, find_group, given_group
from qwen_jax.parallel.rendezvous import meet

_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"  # set by mpirun; jax reads the rest


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Joins the processes of a job; does nothing for one process or when already joined.

    Arguments left out come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    When these are absent too, the launcher is asked: SLURM, a TPU pod on GKE or a Cloud TPU VM
    (see launchers.py); under Open MPI jax finds all three itself. With none of this, the job is
    this one process.

    The processes first meet at the address over a plain socket (see meeting.py). jax itself aborts
    with a C++ stack trace when one is missing; the meeting says which one and on which host.
    An exception that nobody catches afterwards ends its process at once: without this, Python's
    exit waits minutes for the other hosts, which wait for this one.

    Args:
      coordinator: "host:port" of process 0, as every process reaches it.
      num_processes: how many there are.
      process_id: which one this is, 0 ≤ process_id < num_processes.
      timeout_s: how long the processes wait for each other, in seconds.

    Raises:
      UserError: some but not all of the three are given, one is malformed, or the processes did
        not find each other in time.
    """
    if jax.distributed.is_initialized():
        return
    group = _group((coordinator, num_processes, process_id))
    if group is None:
        if not os.environ.get(_OPEN_MPI):
            return
        logging.info("Joining the processes that Open MPI started (at most %g s).", timeout_s)
        jax.distributed.initialize(initialization_timeout=int(timeout_s))
    elif group.count == 1:
        return
    else:
        _join(group, timeout_s)
    sys.excepthook = _end_at_once
    logging.info(
        "Process %d of %d, %d of %d devices.",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def _join(group: Group, timeout_s: float) -> None:
    """Meets the others, then starts jax's own service with them."""
    where = f" on {group.hosts[group.index]}" if group.hosts else ""
    logging.info(
        "Process %d of %d%s, says %s, joins the others at %s.",
        *(group.index, group.count, where, group.launcher, group.address),
    )
    meet(group.address, group.count, group.index, timeout_s=timeout_s, hosts=group.hosts)
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        local_device_ids=None if group.local_device is None else [group.local_device],
        initialization_timeout=max(1, int(timeout_s)),
        # All is known. Detecting again, jax would take one device per process under SLURM.
        cluster_detection_method=None if os.environ.get(_OPEN_MPI) else "deactivate",
    )


def _group(values: tuple[Any, Any, Any]) -> Group | None:
    """The group from arguments, else JAX_… variables, else the launcher; None for one process."""
    values = tuple(
        os.environ.get(name) if value is None else value
        for name, value in zip(VARIABLES, values, strict=True)
    )
    if any(value is not None for value in values):
        return given_group(values)
    return find_group()


def end_process(status: int) -> NoReturn:
    """Ends this process now; in a job of several, without waiting for the others at the exit.

    Programs use it in place of `sys.exit` for an error that the other processes may not share.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    logging.error(
        "Process %d ends with status %d, and the job with it.", jax.process_index(), status
    )
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    traceback.print_exception(kind, error, trace)
    end_process(1)


def on_first_process(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 and returns its JSON-able result, or raises, on all."""
    if jax.process_count() == 1:
        return function()
    reply: dict = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            reply = {"value": function()}
        except Exception as error:  # the others must hear of it, or they wait for ever
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


def from_all_processes(text: str) -> list[str]:
    """Returns the `text` (cut to 400 bytes) of every process, on every process."""
    if jax.process_count() == 1:
        return [text]
    row = np.frombuffer(text.encode()[:400].ljust(400), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [r.tobytes().decode(errors="ignore").strip() for r in rows.reshape(-1, 400)]
