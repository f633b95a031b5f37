"""Starting a job of several processes, and the few things its processes must agree on.

One process drives the devices of one host. `initialize` is the first thing a program does, before
any other use of jax; for a single process it does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from qwen_jax.errors import UserError

_MAGIC = b"qwen_jax"
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Set by the launchers whose clusters jax recognises by itself.
_CLUSTERS = (
    "SLURM_JOB_ID",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
) -> None:
    """Joins the processes of a job; does nothing for one process or when already joined.

    Arguments left out come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    When these are absent too and the launcher is one that jax recognises (SLURM, Open MPI, a TPU
    pod), jax finds all three itself; with none of this, the job is this one process.

    With an explicit address the processes first meet there over a plain socket. jax itself aborts
    with a C++ stack trace when one is missing; the meeting says which one and where, on every host.
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
    given = _settings(coordinator, num_processes, process_id)
    if given is None:
        if not any(os.environ.get(name) for name in _CLUSTERS):
            return
        logging.info("Joining the processes that the launcher started (at most %g s).", timeout_s)
        jax.distributed.initialize(initialization_timeout=int(timeout_s))
    else:
        address, count, index = given
        if count == 1:
            return
        logging.info("Process %d of %d joins the others at %s.", index, count, address)
        meet(address, count, index, timeout_s=timeout_s)
        jax.distributed.initialize(
            address, count, index, initialization_timeout=max(1, int(timeout_s))
        )
    sys.excepthook = _end_at_once
    logging.info(
        "Process %d of %d, %d of %d devices.",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def _settings(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int] | None:
    """Returns the three settings from arguments or environment, or None when none is given."""
    values: list[Any] = [
        os.environ.get(name) if value is None else value
        for name, value in zip(_VARIABLES, (coordinator, num_processes, process_id), strict=True)
    ]
    if all(value is None for value in values):
        return None
    for name, value in zip(_VARIABLES, values, strict=True):
        if value is None:
            raise UserError(
                f"{name} is not set, but one of {', '.join(_VARIABLES)} is: set all three (or pass "
                "them as flags), or none for a single process."
            )
    for place in (1, 2):
        try:
            values[place] = int(values[place])
        except ValueError:
            raise UserError(
                f"{_VARIABLES[place]}={values[place]!r} must be a whole number."
            ) from None
    address, count, index = values
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"Coordinator address {address!r} must be host:port, such as 10.0.0.2:1234."
        )
    if not 0 <= index < count:
        raise UserError(
            f"Process id {index} of {count} processes must be from 0 to {count - 1}: number the "
            "processes from 0, or raise the number of processes."
        )
    return address, count, index


def meet(address: str, count: int, index: int, *, timeout_s: float) -> None:
    """Returns when all `count` processes have reported to process 0 at `address`.

    Process 0 listens; each other one sends its number and how many it expects, and keeps the line
    open for the verdict, one line of text that is empty when all is well.

    Raises:
      UserError: on every process that could be reached, with the numbers of those missing.
    """
    deadline = time.monotonic() + timeout_s
    verdict = (
        _gather(address, count, deadline, timeout_s)
        if index == 0
        else _report(address, count, index, deadline, timeout_s)
    )
    if verdict:
        raise UserError(verdict)


def _gather(address: str, count: int, deadline: float, timeout_s: float) -> str:
    """Process 0: hears the others until `deadline`, tells all of them how it went."""
    port = int(address.rpartition(":")[2])
    lines: dict[int, socket.socket] = {}
    verdict = ""
    try:
        server = (
            socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count
            )
            if socket.has_dualstack_ipv6()
            else socket.create_server(("", port), backlog=count)
        )
    except OSError as error:
        return (
            f"Process 0 cannot listen at {address} ({error.strerror}): choose a free port, and end "
            "what is left of an earlier job."
        )
    with server:
        while len(lines) < count - 1 and not verdict:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line, _ = server.accept()
                line.settimeout(5.0)
                index, expected = _read_report(line)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # a stranger that said nothing
                missing = [str(i) for i in range(1, count) if i not in lines]
                verdict = (
                    f"After {timeout_s:g} s at {address}, {len(missing)} of {count} processes had "
                    f"not reported: {', '.join(missing[:20])}; see whether they started and reach "
                    "this address."
                )
                break
            except (OSError, ValueError):
                continue  # a port scanner or a process that died: not one of ours
            if expected != count:
                verdict = (
                    f"Process {index} expects {expected} processes and process 0 expects {count}: "
                    "start all with the same number."
                )
            elif index in lines or not 0 < index < count:
                verdict = (
                    f"Process id {index} was used twice at {address}: number them 0 to {count - 1}."
                )
            lines[index if index not in lines else -1] = line
        for line in lines.values():
            try:
                line.sendall((verdict + "\n").encode())
            except OSError:
                continue
            finally:
                line.close()
    return verdict


def _read_report(line: socket.socket) -> tuple[int, int]:
    data = b""
    while len(data) < len(_MAGIC) + 8:
        part = line.recv(64)
        if not part:
            raise ValueError("closed early")
        data += part
    if not data.startswith(_MAGIC):
        raise ValueError("not a process of this program")
    index, expected = struct.unpack("!II", data[len(_MAGIC) : len(_MAGIC) + 8])
    return index, expected


def _report(address: str, count: int, index: int, deadline: float, timeout_s: float) -> str:
    """The others: report to process 0, again and again while nobody listens, and hear it out."""
    host, _, port = address.rpartition(":")
    reason: Exception | str = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as line:
                line.sendall(_MAGIC + struct.pack("!II", index, count))
                # Process 0 gives up at its own deadline, which may be a little later than ours.
                line.settimeout(max(0.0, deadline - time.monotonic()) + 10.0)
                with line.makefile(encoding="utf-8") as reader:
                    answer = reader.readline()
            if answer:
                return answer.strip()
            reason = "it closed the line"
        except OSError as error:
            reason = error
        time.sleep(0.1)
    return (
        f"Process {index} did not reach process 0 at {address} within {timeout_s:g} s ({reason}): "
        "see whether process 0 started, and whether host and port are right and open."
    )


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
