"""Description of a training job for a cluster, checked before any file is written."""

from __future__ import annotations

import dataclasses
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import jax

from launch.cluster.slices import TpuSlice
from qwen_jax.errors import UserError
from qwen_jax.parallel import AXES, mesh_sizes
from qwen_jax.train.config import check_mesh
from qwen_jax.train.job import PretrainJob

STOPPED_STATUS = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a run that was asked to stop and has saved."""


@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """A training job for a cluster.

    Values are plain text, which templates quote where they insert it.

    Attributes:
      name: name of the job: lower-case letters, digits and dashes, as Kubernetes requires.
      flags: flags of launch.pretrain.
      workdir: folder for metrics and profiles.
      checkpoints: folder for checkpoints that every host can reach.
      python: interpreter on the hosts.
      code: folder of this repository on the hosts.
      slice: TPU slice; None on GPUs.
      slices: number of slices.
      nodes: number of GPU nodes.
      gpus_per_node: GPUs of a node.
      tasks_per_node: processes of a node.
      grace_s: seconds between SIGTERM and SIGKILL.
      restarts: restarts after failures, preemptions not counted.
      env: environment variables.
      secrets: environment variable -> where the scheduler finds its value, never the value itself.
      mounts: folder in the container -> gs://BUCKET/FOLDER or the name of a volume claim.
      spot: whether to use capacity that may be preempted.
      image: container image.
      project: Google Cloud project.
      zone: zone of the TPUs.
      cluster: name of the Kubernetes cluster.
      namespace: Kubernetes namespace.
      queue: local queue of Kueue.
      service_account: account the job runs as.
      runtime_version: software version of the TPU VMs; "": the default of the generation.
      reservation: name of reserved capacity.
      partition: SLURM partition.
      account: SLURM account.
      time_limit: SLURM time limit, D-HH:MM:SS.

    Raises:
      UserError: a value is out of range or has control characters.
    """

    name: str
    flags: tuple[str, ...]
    workdir: str
    checkpoints: str
    python: str = "python3"
    code: str = ""
    slice: TpuSlice | None = None
    slices: int = 1
    nodes: int = 1
    gpus_per_node: int = 8
    tasks_per_node: int = 8
    grace_s: int = 300
    restarts: int = 20
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mounts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spot: bool = False
    image: str = ""
    project: str = ""
    zone: str = ""
    cluster: str = ""
    namespace: str = ""
    queue: str = ""
    service_account: str = ""
    runtime_version: str = ""
    reservation: str = ""
    partition: str = ""
    account: str = ""
    time_limit: str = ""

    def __post_init__(self):
        _check_characters(self)
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--name={self.name} is not a valid job name: give up to 40 lower-case letters, "
                "digits and dashes, beginning with a letter"
            )
        for flag in ("slices", "nodes", "gpus_per_node", "grace_s"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag}={getattr(self, flag)} must be at least 1")
        if self.restarts < 0:
            raise UserError(f"--restarts={self.restarts} must be at least 0")
        if self.tasks_per_node not in (1, self.gpus_per_node):
            raise UserError(
                f"--tasks_per_node={self.tasks_per_node} must be {self.gpus_per_node}, one process "
                "per GPU, or 1, one process per node"
            )

    @property
    def devices(self) -> int:
        """Returns the number of JAX devices of all processes."""
        if self.slice:
            return self.slice.devices * self.slices
        return self.nodes * self.gpus_per_node

    @property
    def processes(self) -> int:
        """Returns the number of processes."""
        if self.slice:
            return self.slice.hosts * self.slices
        return self.nodes * self.tasks_per_node

    @property
    def command(self) -> tuple[str, ...]:
        """Returns the command that every process runs."""
        folders = (f"--workdir={self.workdir}", f"--checkpoints={self.checkpoints}")
        status = f"--stopped_status={STOPPED_STATUS}"
        return (self.python, "-m", "launch.pretrain", *self.flags, *folders, status)


def _check_characters(job: ClusterJob) -> None:
    """Checks that no value has line breaks or control characters, which quoting cannot preserve.

    Raises:
      UserError: a value has one.
    """
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if isinstance(value, str):
            texts: Iterable[str] = (value,)
        elif isinstance(value, Mapping):
            texts = (*value.keys(), *value.values())
        else:
            texts = value if isinstance(value, tuple) else ()
        for text in texts:
            if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text):
                raise UserError(
                    f"--{field.name} has {text!r}, with a line break or control character; "
                    "leave it out"
                )
            # The plain words of schedulers: nothing in them ever needs a quote.
            plain = field.name in _PLAIN and text and not re.fullmatch(r"[\w.:@/+-]+", text)
            if plain:
                raise UserError(
                    f"--{field.name}={text} may only have letters, digits and . _ - : @ / +"
                )
    for name in (*job.env, *job.secrets):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"{name!r} is no name for an environment variable; write NAME=VALUE")


_PLAIN = (
    "image", "project", "zone", "cluster", "namespace", "queue", "service_account",
    "runtime_version", "reservation", "partition", "account", "time_limit",
)  # fmt: skip


def parse_pairs(flag: str, items: Sequence[str]) -> dict[str, str]:
    """Parses the NAME=VALUE items of a repeated flag.

    Raises:
      UserError: an item has no `=` or no name, or a name occurs twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name or not value:
            raise UserError(f"--{flag}={item} must be NAME=VALUE")
        if name in pairs:
            raise UserError(f"--{flag} has {name} twice; leave one out")
        pairs[name] = value
    return pairs


def recipe_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """Returns the flags of a command line that belong to the recipe: --config and --config.KEY."""
    flags: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--end"], strict=True):
        if re.match(r"--?(no)?config([.=]|$)", argument):
            flags.append(argument)
            # `--config FILE` may be two arguments; boolean flags have no value.
            no_value = argument.lstrip("-").startswith("no") or re.match(r"--?[A-Za-z]", following)
            if "=" not in argument and not no_value:
                flags[-1] += f"={following}"
    return tuple(flags)


def fit_recipe(job: PretrainJob, devices: int, slices: int) -> tuple[str, ...]:
    """Checks that a recipe can run on these devices, and returns flags that adapt it to slices.

    Only `mesh.data` crosses slices. If the recipe has 1 there, one replica per slice is intended,
    and the flag that sets it is returned.

    Args:
      job: the recipe.
      devices: number of devices of all slices.
      slices: number of slices.

    Raises:
      UserError: data.sources is empty, or the mesh fits neither the devices nor the model.
    """
    if not job.data.sources:
        raise UserError("data.sources is empty; give --config.data.sources=FOLDER=weight,…")
    mesh, flags = job.mesh, ()
    if slices > 1 and mesh.data == 1:
        mesh = dataclasses.replace(mesh, data=slices)
        flags = (f"--config.mesh.data={slices}",)
    check_mesh(
        job.model,
        jax.sharding.AbstractMesh(mesh_sizes(mesh, devices, slices), AXES),
        global_batch=job.data.global_batch,
        microbatches=job.train.microbatches,
        seq_len=job.data.seq_len,
    )
    return flags


def is_below(path: str, folder: str) -> bool:
    """Returns whether `path` is `folder` or inside it."""
    path, folder = posixpath.normpath(path), posixpath.normpath(folder)
    return path == folder or path.startswith(folder.rstrip("/") + "/")
