"""Start-up barrier over a plain socket that reports which processes of a job are missing.

JAX itself aborts with a C++ stack trace, or waits for minutes, if a process fails to start. Here
process 0 listens, the other processes connect to it, and each receives one line of text: empty, or
an error message.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

from qwen_jax.errors import UserError

_MAGIC = b"qwen_jax"  # Start of the greeting that a process sends after connecting.


class ProcessMissing(UserError):
    """Error of a job whose processes did not all connect in time; a restart may succeed."""

    status = 69  # EX_UNAVAILABLE of sysexits.h


def wait_for_all(
    address: str, count: int, index: int, *, timeout_s: float, hosts: Sequence[str] = ()
) -> None:
    """Blocks until all `count` processes have connected to process 0 at `address`.

    Process 0 listens. Each other process sends its index and the number of processes it expects,
    then keeps the connection open for the result, one line of text that is empty on success.

    Args:
      address: "host:port" of process 0.
      count: number of processes.
      index: index of this process.
      timeout_s: how long to wait for the others, in seconds.
      hosts: host of each process, for the error message; () if unknown.

    Raises:
      ProcessMissing: on every process that could be reached, with the indices and hosts of the
        missing ones; or the processes disagree about their number or indices.
    """
    deadline = time.monotonic() + timeout_s
    message = (
        _accept_all(address, count, hosts, deadline, timeout_s)
        if index == 0
        else _connect(address, count, index, deadline, timeout_s)
    )
    if message:
        raise ProcessMissing(message)


def _accept_all(
    address: str, count: int, hosts: Sequence[str], deadline: float, timeout_s: float
) -> str:
    """Accepts a connection from every other process and sends each the result; runs on process 0.

    Args:
      address: "host:port" to listen at.
      count: number of processes.
      hosts: host of each process, or ().
      deadline: value of `time.monotonic()` at which to give up.
      timeout_s: the timeout in seconds, for the error message.

    Returns:
      The message that was sent to all: "" on success, else what is wrong and how to correct it.
    """
    port = int(address.rpartition(":")[2])
    connections: dict[int, socket.socket] = {}
    message = ""
    try:
        server = _listen(port, count)
    except OSError as error:
        return (
            f"Process 0 cannot listen at {address} ({error.strerror}): choose a free port, and end "
            "processes left over from an earlier job."
        )
    with server:
        while len(connections) < count - 1 and not message:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                index, expected = _read_greeting(connection)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # connected but sent nothing: not a process of this job
                missing = [i for i in range(1, count) if i not in connections]
                message = (
                    f"After {timeout_s:g} s at {address}, {len(missing)} of {count} processes had "
                    f"not connected: {_format_processes(missing, hosts)}; check that they "
                    "started and can reach this address."
                )
                break
            except (OSError, ValueError):
                continue  # a port scanner, or a process that died
            if expected != count:
                message = (
                    f"Process {index} expects {expected} processes and process 0 expects {count}: "
                    "start all of them with the same number."
                )
            elif index in connections or not 0 < index < count:
                message = (
                    f"Process id {index} was used twice at {address}: number them 0 to {count - 1}."
                )
            connections[index if index not in connections else -1] = connection
        for connection in connections.values():
            try:
                connection.sendall((message + "\n").encode())
            except OSError:
                continue
            finally:
                connection.close()
    return message


def _listen(port: int, count: int) -> socket.socket:
    """Returns a socket that listens at a port on all interfaces, IPv4 and IPv6 where available."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count
        )
    return socket.create_server(("", port), backlog=count)


def _format_processes(processes: Sequence[int], hosts: Sequence[str], most: int = 20) -> str:
    """Formats process indices with their hosts, as in `1 (host a), 3 (host b)`.

    Args:
      processes: indices of processes.
      hosts: host of each process of the job, or () if unknown.
      most: maximum number of processes to list; if there are more, " and more" is appended.
    """
    names = [f"{i} (host {hosts[i]})" if hosts else str(i) for i in processes[:most]]
    return ", ".join(names) + (" and more" if len(processes) > most else "")


def _read_greeting(connection: socket.socket) -> tuple[int, int]:
    """Reads the greeting of a newly connected process.

    Returns:
      (index of the process, number of processes it expects).

    Raises:
      ValueError: the peer closed the connection early or is not a process of this program.
    """
    data = b""
    while len(data) < len(_MAGIC) + 8:
        part = connection.recv(64)
        if not part:
            raise ValueError("closed early")
        data += part
    if not data.startswith(_MAGIC):
        raise ValueError("not a process of this program")
    index, expected = struct.unpack("!II", data[len(_MAGIC) : len(_MAGIC) + 8])
    return index, expected


def _connect(address: str, count: int, index: int, deadline: float, timeout_s: float) -> str:
    """Connects to process 0, retrying until `deadline`; runs on every other process.

    Args:
      address: "host:port" of process 0.
      count: number of processes.
      index: index of this process.
      deadline: value of `time.monotonic()` at which to give up.
      timeout_s: the timeout in seconds, for the error message.

    Returns:
      The message that process 0 sent, "" on success; an error message if it cannot be reached.
    """
    host, _, port = address.rpartition(":")
    reason: Exception | str = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=left
            ) as connection:
                connection.sendall(_MAGIC + struct.pack("!II", index, count))
                # Process 0 gives up at its own deadline, which may be a little later than ours.
                connection.settimeout(max(0.0, deadline - time.monotonic()) + 10.0)
                with connection.makefile(encoding="utf-8") as reader:
                    answer = reader.readline()
            if answer:
                return answer.strip()
            reason = "it closed the connection"
        except OSError as error:
            reason = error
        time.sleep(0.1)
    return (
        f"Process {index} did not reach process 0 at {address} within {timeout_s:g} s ({reason}): "
        "check that process 0 started and that host and port are right and open."
    )
