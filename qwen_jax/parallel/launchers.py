"""Who the processes of this job are, as its launcher tells through the environment.

A launcher is whatever starts the same program on several hosts: SLURM's srun, GKE's TPU webhook,
the metadata server of a Cloud TPU VM, or a person who sets three variables. Each says how many
processes there are, which one this is, where process 0 listens and on which hosts they run.
jax reads the same sources (jax/_src/clusters); read here, the hosts that do not come have names.
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
class Group:
    """The processes of a job.

    Attributes:
      address: "host:port" of process 0, as every process reaches it.
      count: how many there are. index: which one this is, 0 ≤ index < count.
      hosts: the host of each process, or () where the launcher does not say.
      launcher: where this comes from, for the log.
      local_device: the one device of this host's that the process drives; None for all of them.
    """

    address: str
    count: int
    index: int
    hosts: tuple[str, ...] = ()
    launcher: str = "the environment"
    local_device: int | None = None


def find_group(
    environment: Environment = os.environ, *, read_metadata: Callable[[str], str] | None = None
) -> Group | None:
    """The group this process was started in, or None where no launcher is seen.

    Args:
      environment: variables to read.
      read_metadata: returns an attribute of this virtual machine by name; by default the metadata
        server is asked, and only where jax has seen TPU chips.

    Raises:
      UserError: a launcher is there, but what it says does not fit together.
    """
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        logging.warning("One process in a SLURM job of several tasks: srun would start them all.")
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers:
        return _tpu_pod(workers, environment)
    if read_metadata is None and _has_tpu(environment):
        read_metadata = _metadata
    return _tpu_vm(environment, read_metadata) if read_metadata else None


def given_group(values: tuple[Any, Any, Any], environment: Environment = os.environ) -> Group:
    """The group that an address, a count and an index describe.

    Args:
      values: in the order of VARIABLES, texts or numbers; None where not given.
      environment: tells which device is this process's where SLURM started it.

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
            raise UserError(f"{name}={value!r} must be a whole number.") from None
    address, (count, index) = values[0], numbers
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"Coordinator address {address!r} must be host:port, such as 10.0.0.2:1234."
        )
    return Group(address, count, _checked(index, count), local_device=_local_device(environment))


def expand_hosts(text: str) -> tuple[str, ...]:
    """Expands SLURM's node lists: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
      UserError: brackets that do not close, or a range that is none.
    """
    hosts: list[str] = []
    # Commas inside brackets belong to the range.
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(part, text)
    if not hosts:
        raise UserError(f"SLURM's node list {text!r} names no node: start the job with srun.")
    return tuple(hosts)


def _expand(part: str, text: str) -> list[str]:
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


def _slurm(environment: Environment) -> Group:
    """A task of an srun step; the address is the one jax would choose."""
    nodes = expand_hosts(environment["SLURM_STEP_NODELIST"])
    count = _number(environment, "SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS"))
    index = _number(environment, "SLURM_PROCID")
    port = environment.get("JAX_COORDINATOR_PORT")
    if not port:
        # 4,096 ports below 65,536, by the job's number: two jobs on a node rarely share one.
        port = 61440 + _number(environment, "SLURM_JOB_ID") % 4096
    return Group(
        f"{nodes[0]}:{port}",
        count,
        _checked(index, count),
        _hosts_of_tasks(nodes, count, index, environment),
        "SLURM",
        _local_device(environment),
    )


def _hosts_of_tasks(
    nodes: tuple[str, ...], count: int, index: int, environment: Environment
) -> tuple[str, ...]:
    """The node of every task, or () where tasks are laid out in a way not known here."""
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
    """Expands SLURM's "8(x2),4" to [8, 8, 4]; [] for text of another form."""
    tasks: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if not match:
            return []
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _local_device(environment: Environment) -> int | None:
    """Under SLURM, one GPU per task where a node has several tasks and each sees all GPUs.

    jax alone gives a task its one GPU even where it is the only task on a node of eight.
    """
    if "SLURM_LOCALID" not in environment:
        return None
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = environment.get("SLURM_NODEID", "0")
    here = tasks[int(node)] if node.isdigit() and int(node) < len(tasks) else 1
    bound = environment.get("CUDA_VISIBLE_DEVICES", "")
    if here == 1 or (bound and "," not in bound):
        return None
    return _number(environment, "SLURM_LOCALID")


def _tpu_pod(workers: str, environment: Environment) -> Group | None:
    """A pod on GKE: the TPU webhook sets TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*."""
    names = tuple(name.strip().split(":")[0] for name in workers.split(",") if name.strip())
    index = _number(environment, "TPU_WORKER_ID", "0" if len(names) == 1 else None)
    return _slices(names, index, environment.get, environment, "the TPU pod's environment")


def _tpu_vm(environment: Environment, read: Callable[[str], str]) -> Group | None:
    """A Cloud TPU VM: who its fellow workers are stands in the metadata of the machine."""
    number = read("agent-worker-number").strip()
    if not number:
        return None
    # Each is a host name or, in the older form, name:id:address.
    endpoints = [e.split(":")[-1] for e in read("worker-network-endpoints").strip().split(",")]
    pairs = (line.partition(":") for line in read("tpu-env").splitlines())
    facts = {key.strip(): value.strip().strip("'\"") for key, _, value in pairs}
    names = tuple(endpoints)
    return _slices(names, int(number), facts.get, environment, "the TPU VM's metadata")


def _slices(
    names: tuple[str, ...],
    worker: int,
    get: Callable[[str], str | None],
    environment: Environment,
    launcher: str,
) -> Group:
    """The workers of all slices, slice after slice; as jax numbers them."""
    slices, this = int(get("MEGASCALE_NUM_SLICES") or 1), int(get("MEGASCALE_SLICE_ID") or 0)
    _checked(worker, len(names))
    first = (get("MEGASCALE_COORDINATOR_ADDRESS") or "").split(":")[0] or names[0]
    hosts = [
        _host_in_slice(name, i, this, s) for s in range(slices) for i, name in enumerate(names)
    ]
    port = environment.get("JAX_COORDINATOR_PORT") or _TPU_PORT
    index = this * len(names) + worker
    return Group(f"{first}:{port}", len(hosts), _checked(index, len(hosts)), tuple(hosts), launcher)


def _host_in_slice(name: str, worker: int, this: int, other: int) -> str:
    """The name of a worker of slice `other`, given the one of slice `this` in the same place.

    JobSet's pods are called JOBSET-JOB-SLICE-WORKER.SUBDOMAIN; other names tell nothing.
    """
    if this == other:
        return name
    told = re.fullmatch(rf"(.+)-{this}-{worker}(\..*)?", name)
    if told:
        return f"{told[1]}-{other}-{worker}{told[2] or ''}"
    return f"worker {worker} of slice {other}"


def _has_tpu(environment: Environment) -> bool:
    # On import jax looks for TPU chips on the PCI bus and sets this where it finds none.
    return "TPU_SKIP_MDS_QUERY" not in environment


def _metadata(name: str) -> str:
    """An attribute of this virtual machine, "" where there is no such attribute or no server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}{_METADATA_PATH}{name}", headers={"Metadata-Flavor": "Google"}
    )
    # The server is a neighbour, never behind the proxy of the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for attempt in range(4):
        time.sleep(attempt)
        try:
            with opener.open(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:  # the machine is no TPU VM, or has no such attribute
                return ""
        except OSError:
            continue
    logging.warning("The metadata server %s does not tell %r: taken as absent.", server, name)
    return ""


def _number(environment: Environment, name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name}={text!r} must be a whole number.") from None


def _checked(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise UserError(
            f"Process id {index} of {count} processes must be from 0 to {count - 1}: number the "
            "processes from 0, or raise the number of processes."
        )
    return index
