"""What a job on a cluster is, checked before anything is written: names, places, the recipe."""

from __future__ import annotations

import dataclasses
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import jax

from launch.cluster.slices import Slice
from qwen_jax.errors import UserError
from qwen_jax.parallel import AXES, mesh_sizes
from qwen_jax.train.config import check_mesh
from qwen_jax.train.job import PretrainJob

STOPPED_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: asked to stop, saved, to be started again."""


@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """One training job for a cluster; values are plain text, quoted where they are rendered.

    Attributes:
      name: of the job: lower-case letters, digits and dashes, as Kubernetes wants it.
      flags: of launch.pretrain, after `python -m launch.pretrain`.
      workdir: folder for metrics and profiles. checkpoints: folder every host sees.
      python: interpreter on the hosts; code: folder of this repository there.
      slice, slices: TPU slice and how many of them; None on GPUs.
      nodes, gpus_per_node, tasks_per_node: of a GPU cluster; processes on a node.
      grace_s: seconds between SIGTERM and SIGKILL. restarts: after failures, not preemptions.
      env: variables. secrets: variable -> where the scheduler finds it, never the secret itself.
      mounts: folder in the container -> gs://BUCKET/FOLDER or the name of a volume claim.
      spot: capacity that may be taken away; others: the scheduler's own names, "" where not given.
    """

    name: str
    flags: tuple[str, ...]
    workdir: str
    checkpoints: str
    python: str = "python3"
    code: str = ""
    slice: Slice | None = None
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
        _check_texts(self)
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--name={self.name} is no name for a job: up to 40 lower-case letters, digits and "
                "dashes, beginning with a letter"
            )
        for flag in ("slices", "nodes", "gpus_per_node", "grace_s"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag}={getattr(self, flag)} must be at least 1")
        if self.restarts < 0:
            raise UserError(f"--restarts={self.restarts} must be at least 0")
        if self.tasks_per_node not in (1, self.gpus_per_node):
            raise UserError(
                f"--tasks_per_node={self.tasks_per_node} must be {self.gpus_per_node}, one process "
                "per GPU, or 1 for a node"
            )

    @property
    def devices(self) -> int:
        """Devices that jax will show to the job, over all processes."""
        if self.slice:
            return self.slice.devices * self.slices
        return self.nodes * self.gpus_per_node

    @property
    def processes(self) -> int:
        """Processes of the job."""
        if self.slice:
            return self.slice.hosts * self.slices
        return self.nodes * self.tasks_per_node

    @property
    def command(self) -> tuple[str, ...]:
        """The command that every process runs."""
        folders = (f"--workdir={self.workdir}", f"--checkpoints={self.checkpoints}")
        status = f"--stopped_status={STOPPED_STATUS}"
        return (self.python, "-m", "launch.pretrain", *self.flags, *folders, status)


def _check_texts(job: ClusterJob) -> None:
    """No line breaks or control characters anywhere: no quoting survives them in every file."""
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
    """Parses NAME=VALUE items of a repeated flag.

    Raises:
      UserError: one without a `=` or a name, or a name that comes twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name or not value:
            raise UserError(f"--{flag}={item} must be NAME=VALUE")
        if name in pairs:
            raise UserError(f"--{flag} names {name} twice; leave one out")
        pairs[name] = value
    return pairs


def recipe_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """The flags of a command line that belong to the recipe: --config and --config.KEY."""
    flags: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--end"], strict=True):
        if re.match(r"--?(no)?config([.=]|$)", argument):
            flags.append(argument)
            # `--config FILE` in two words; what is true or false may stand alone.
            alone = argument.lstrip("-").startswith("no") or re.match(r"--?[A-Za-z]", following)
            if "=" not in argument and not alone:
                flags[-1] += f"={following}"
    return tuple(flags)


def fit_recipe(job: PretrainJob, devices: int, slices: int) -> tuple[str, ...]:
    """Refuses a recipe that cannot run on these devices; returns flags that make it fit.

    Only `mesh.data` crosses slices. Where the recipe leaves it at 1, one replica per slice is what
    several slices mean, and the flag for it is returned.

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


def below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it."""
    path, folder = posixpath.normpath(path), posixpath.normpath(folder)
    return path == folder or path.startswith(folder.rstrip("/") + "/")
