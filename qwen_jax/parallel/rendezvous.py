"""Processes of a job meet over a plain socket before jax starts, and name who is missing.

jax aborts with a C++ stack trace when a process does not come, or waits for minutes. Here process 0
listens, the others report to it, and each hears one line of text: empty, or what is wrong.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

from qwen_jax.errors import UserError

_MAGIC = b"qwen_jax"


class NotAllHere(UserError):
    """The processes of a job did not find each other; the next start may well succeed."""

    status = 69  # EX_UNAVAILABLE of sysexits.h


def meet(
    address: str, count: int, index: int, *, timeout_s: float, hosts: Sequence[str] = ()
) -> None:
    """Returns when all `count` processes have reported to process 0 at `address`.

    Process 0 listens; each other one sends its number and how many it expects, and keeps the line
    open for the verdict, one line of text that is empty when all is well.

    Args:
      address: "host:port" of process 0.
      count, index: how many processes there are, and which one this is.
      timeout_s: how long to wait for the others, in seconds.
      hosts: the host of each process, for the names of those missing; () where unknown.

    Raises:
      NotAllHere: on every process that could be reached, with the numbers and hosts of those
        missing.
    """
    deadline = time.monotonic() + timeout_s
    verdict = (
        _gather(address, count, hosts, deadline, timeout_s)
        if index == 0
        else _report(address, count, index, deadline, timeout_s)
    )
    if verdict:
        raise NotAllHere(verdict)


def _gather(
    address: str, count: int, hosts: Sequence[str], deadline: float, timeout_s: float
) -> str:
    """Process 0: hears the others until `deadline`, tells all of them how it went."""
    port = int(address.rpartition(":")[2])
    lines: dict[int, socket.socket] = {}
    verdict = ""
    try:
        server = _listen(port, count)
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
                missing = [i for i in range(1, count) if i not in lines]
                verdict = (
                    f"After {timeout_s:g} s at {address}, {len(missing)} of {count} processes had "
                    f"not reported: {_named(missing, hosts)}; see whether they started and reach "
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


def _listen(port: int, count: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count
        )
    return socket.create_server(("", port), backlog=count)


def _named(processes: Sequence[int], hosts: Sequence[str], most: int = 20) -> str:
    """Numbers with the hosts they belong to: `1 (host a), 3 (host b)`."""
    names = [f"{i} (host {hosts[i]})" if hosts else str(i) for i in processes[:most]]
    return ", ".join(names) + (" and more" if len(processes) > most else "")


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
