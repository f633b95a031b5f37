"""Detection of the processes of a job from the environment of its launcher.

A launcher starts the same program on several hosts: SLURM's srun, a TPU pod on GKE, the tools of
Cloud TPU VMs, or a script that sets three variables. The environment (on a Cloud TPU VM, its
metadata server) then gives the number of processes, the index of this one, the address of process 0
and the hosts. JAX reads the same sources (jax/_src/clusters); they are read here as well so that
error messages can name the hosts of missing processes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from qwen_jax.errors import UserError

Environment = Mapping[str, str]

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_PORT = 8482  # jax's own choice for the coordinator on TPU hosts
_METADATA_PATH = "/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Processes of a job: how many, the index of this one, and how to reach process 0.

    Attributes:
      address: "host:port" of process 0, reachable from every process.
      count: number of processes.
      index: index of this process, 0 ≤ index < count.
      hosts: host of each process, or () if the launcher does not give them.
      launcher: source of this information, for the log.
      local_device: index of the only device of this host that the process drives; None: all of
        them.
    """

    address: str
    count: int
    index: int
    hosts: tuple[str, ...] = ()
    launcher: str = "the environment"
    local_device: int | None = None


def detect_group(
    environment: Environment = os.environ, *, read_metadata: Callable[[str], str] | None = None
) -> ProcessGroup | None:
    """Returns the group of processes this process was started in, or None if there is no launcher.

    Args:
      environment: environment variables.
      read_metadata: returns a metadata attribute of this virtual machine by name; by default the
        metadata server is read, but only if JAX has found TPU chips.

    Raises:
      UserError: a launcher was found, but its variables contradict each other.
    """
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return _slurm_group(environment)
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        logging.warning(
            "A single process in a SLURM job of several tasks; to start all of them, use srun."
        )
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers:
        return _gke_group(workers, environment)
    if read_metadata is None and _may_have_tpu(environment):
        read_metadata = _read_metadata
    return _tpu_vm_group(environment, read_metadata) if read_metadata else None


def explicit_group(
    values: tuple[Any, Any, Any], environment: Environment = os.environ
) -> ProcessGroup:
    """Returns the group described by an address, a number of processes and an index.

    Args:
      values: these three, in the order of `VARIABLES`, as strings or numbers; None where not given.
      environment: environment variables; under SLURM they determine the device of this process.

    Raises:
      UserError: some are given and some are not, or one is malformed.
    """
    for name, value in zip(VARIABLES, values, strict=True):
        if value is None:
            raise UserError(
                f"{name} is not set, but one of {', '.join(VARIABLES)} is: set all three (or pass "
                "them as flags), or none for a single process."
            )
    numbers = []
    for name, value in zip(VARIABLES[1:], values[1:], strict=True):
        try:
            numbers.append(int(value))
        except ValueError:
            raise UserError(f"{name}={value!r} must be an integer.") from None
    address, (count, index) = values[0], numbers
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"Coordinator address {address!r} must be host:port, such as 10.0.0.2:1234."
        )
    return ProcessGroup(
        address, count, _checked_index(index, count), local_device=_local_device(environment)
    )


def expand_hosts(text: str) -> tuple[str, ...]:
    """Expands SLURM's node lists: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
      UserError: a bracket is not closed, or its content is not a list of ranges.
    """
    hosts: list[str] = []
    # Commas inside brackets belong to the range.
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(part, text)
    if not hosts:
        raise UserError(f"SLURM's node list {text!r} is empty: start the job with srun.")
    return tuple(hosts)


def _expand(part: str, text: str) -> list[str]:
    """Expands the first bracket of `part` and, recursively, those after it.

    Args:
      part: one element of a node list, such as "rack[1-2]node[01-04]".
      text: the complete node list, for the error message.

    Raises:
      UserError: the content of a bracket is not a list of ranges.
    """
    opening = part.find("[")
    if opening < 0:
        return [part]
    prefix, (ranges, _, rest) = part[:opening], part[opening + 1 :].partition("]")
    names = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not match:
            raise UserError(
                f"SLURM's node list {text!r} has {item!r} in brackets; set "
                f"{', '.join(VARIABLES)} instead."
            )
        first, last = match[1], match[2] or match[1]
        numbers = range(int(first), int(last) + 1)
        names += [f"{prefix}{number:0{len(first)}d}" for number in numbers]
    return [name + tail for name in names for tail in _expand(rest, text)]


def _slurm_group(environment: Environment) -> ProcessGroup:
    """Returns the group of the tasks of an srun step, with the address that JAX would choose.

    Raises:
      UserError: a SLURM variable is missing or malformed.
    """
    nodes = expand_hosts(environment["SLURM_STEP_NODELIST"])
    count = _integer(environment, "SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS"))
    index = _integer(environment, "SLURM_PROCID")
    # 4,096 ports below 65,536, by the job's number: two jobs on a node rarely share one.
    port = environment.get("JAX_COORDINATOR_PORT") or str(
        61440 + _integer(environment, "SLURM_JOB_ID") % 4096
    )
    return ProcessGroup(
        f"{nodes[0]}:{port}",
        count,
        _checked_index(index, count),
        _hosts_of_tasks(nodes, count, index, environment),
        "SLURM",
        _local_device(environment),
    )


def _hosts_of_tasks(
    nodes: tuple[str, ...], count: int, index: int, environment: Environment
) -> tuple[str, ...]:
    """Returns the node of every task, or () if it cannot be told from SLURM's variables.

    Block and cyclic distributions are supported.

    Args:
      nodes: nodes of the step.
      count: number of tasks.
      index: index of this task, whose node is known, to check the result.
      environment: environment variables.
    """
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(tasks) != len(nodes) or sum(tasks) != count:
        return ()
    if environment.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        rounds = [
            [n for n, k in zip(nodes, tasks, strict=True) if k > i] for i in range(max(tasks))
        ]
        hosts = [node for one in rounds for node in one]
    else:
        hosts = [node for node, k in zip(nodes, tasks, strict=True) for _ in range(k)]
    here = environment.get("SLURMD_NODENAME", hosts[index])
    return tuple(hosts) if hosts[index] == here else ()


def tasks_per_node(text: str) -> list[int]:
    """Expands SLURM's "8(x2),4" to [8, 8, 4]; returns [] for text of another form."""
    tasks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not match:
            return []
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _local_device(environment: Environment) -> int | None:
    """Returns the index of this task's GPU if several tasks share a node and each sees all GPUs.

    None otherwise: the process then drives all devices it sees. JAX's own detection gives a task
    one GPU even if it is the only task on a node of eight.
    """
    if "SLURM_LOCALID" not in environment:
        return None
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = environment.get("SLURM_NODEID", "0")
    here = tasks[int(node)] if node.isdigit() and int(node) < len(tasks) else 1
    bound = environment.get("CUDA_VISIBLE_DEVICES", "")
    if here == 1 or (bound and "," not in bound):
        return None
    return _integer(environment, "SLURM_LOCALID")


def _gke_group(workers: str, environment: Environment) -> ProcessGroup:
    """Returns the group of a TPU pod on GKE.

    GKE's TPU webhook sets TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and the MEGASCALE_* variables.

    Args:
      workers: hosts of this slice's workers, separated by commas, each with or without a port.
      environment: environment variables.
    """
    names = tuple(name.strip().split(":")[0] for name in workers.split(",") if name.strip())
    index = _integer(environment, "TPU_WORKER_ID", "0" if len(names) == 1 else None)
    return _multislice_group(
        names, index, environment.get, environment, "the TPU pod's environment"
    )


def _tpu_vm_group(environment: Environment, read: Callable[[str], str]) -> ProcessGroup | None:
    """Returns the group of a Cloud TPU VM from its metadata; None for other machines.

    Args:
      environment: environment variables.
      read: returns a metadata attribute of this virtual machine by name, "" if it does not exist.
    """
    number = read("agent-worker-number").strip()
    if not number:
        return None
    # Each is a host name, or name:id:address in an older format.
    endpoints = [e.split(":")[-1] for e in read("worker-network-endpoints").strip().split(",")]
    pairs = (line.partition(":") for line in read("tpu-env").splitlines())
    facts = {key.strip(): value.strip().strip("'\"") for key, _, value in pairs}
    names = tuple(endpoints)
    return _multislice_group(names, int(number), facts.get, environment, "the TPU VM's metadata")


def _multislice_group(
    names: tuple[str, ...],
    worker: int,
    get: Callable[[str], str | None],
    environment: Environment,
    launcher: str,
) -> ProcessGroup:
    """Returns the group of the workers of all slices, numbered slice by slice as JAX does.

    Args:
      names: hosts of the workers of this slice.
      worker: index of this worker within its slice.
      get: returns a MEGASCALE_* variable by name, or None.
      environment: environment variables.
      launcher: source of the information, for the log.

    Raises:
      UserError: an index is out of range.
    """
    slices, this = int(get("MEGASCALE_NUM_SLICES") or 1), int(get("MEGASCALE_SLICE_ID") or 0)
    _checked_index(worker, len(names))
    first = (get("MEGASCALE_COORDINATOR_ADDRESS") or "").split(":")[0] or names[0]
    hosts = [
        _host_in_slice(name, i, this, s) for s in range(slices) for i, name in enumerate(names)
    ]
    port = environment.get("JAX_COORDINATOR_PORT") or _TPU_PORT
    index = this * len(names) + worker
    return ProcessGroup(
        f"{first}:{port}", len(hosts), _checked_index(index, len(hosts)), tuple(hosts), launcher
    )


def _host_in_slice(name: str, worker: int, this: int, other: int) -> str:
    """Returns the host name of a worker in slice `other`.

    JobSet's pods are called JOBSET-JOB-SLICE-WORKER.SUBDOMAIN; for other names a description is
    returned instead.

    Args:
      name: host name of the worker with the same index in slice `this`.
      worker: index of the worker within its slice.
      this: index of the slice that `name` belongs to.
      other: index of the slice of the wanted worker.
    """
    if this == other:
        return name
    match = re.fullmatch(rf"(.+)-{this}-{worker}(\..*)?", name)
    if match:
        return f"{match[1]}-{other}-{worker}{match[2] or ''}"
    return f"worker {worker} of slice {other}"


def _may_have_tpu(environment: Environment) -> bool:
    """Returns False if JAX has recorded in `environment` that this machine has no TPU chips."""
    # On import, JAX looks for TPU chips on the PCI bus and sets this if there are none.
    return "TPU_SKIP_MDS_QUERY" not in environment


def _read_metadata(name: str) -> str:
    """Returns an attribute of this virtual machine from its metadata server.

    "" if there is no such attribute, or no server.
    """
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}{_METADATA_PATH}{name}", headers={"Metadata-Flavor": "Google"}
    )
    # The metadata server is local to the machine, never behind a configured proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempt in range(4):
        time.sleep(attempt)
        try:
            with opener.open(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:  # not a TPU VM, or it has no such attribute
                return ""
        except OSError:
            continue
    logging.warning("The metadata server %s did not return %r; treated as absent.", server, name)
    return ""


def _integer(environment: Environment, name: str, default: str | None = None) -> int:
    """Returns an environment variable as an integer.

    Raises:
      UserError: it is not an integer, or missing and without a default.
    """
    text = environment.get(name, default)
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name}={text!r} must be an integer.") from None


def _checked_index(index: int, count: int) -> int:
    """Returns `index` if it is valid for `count` processes.

    Raises:
      UserError: it is out of range.
    """
    if not 0 <= index < count:
        raise UserError(
            f"Process id {index} of {count} processes must be from 0 to {count - 1}: number the "
            "processes from 0, or raise the number of processes."
        )
    return index
