"""Rendering of a cluster job with one template per scheduler."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shlex
from collections.abc import Callable

import jinja2

from launch.cluster.job import STOPPED_STATUS, ClusterJob, is_below
from launch.cluster.slices import CHIPS_PER_HOST
from qwen_jax.errors import UserError
from qwen_jax.parallel.rendezvous import ProcessMissing

TEMPLATES = {
    "gke": "gke.yaml.j2",
    "xpk": "xpk.sh.j2",
    "tpu_vm": "tpu_vm.sh.j2",
    "slurm": "slurm.sh.j2",
}


def render(scheduler: str, job: ClusterJob) -> str:
    """Returns the file that starts a job on a scheduler.

    Args:
      scheduler: a key of `TEMPLATES`.
      job: the job.

    Raises:
      UserError: a value that this scheduler needs is missing, or it cannot use one that is given.
    """
    _CHECKS[scheduler](job)
    template = _environment().get_template(TEMPLATES[scheduler])
    return template.render(
        job=job,
        stopped_status=STOPPED_STATUS,
        chips_per_host=CHIPS_PER_HOST,
        tpu_env=_tpu_env(job),
        xpk=_xpk_command(job) if job.slice else "",
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns the template environment with filters that quote for shell, YAML and Kubernetes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # every value passes through a filter that quotes it for its file
    )
    environment.filters |= {
        "sh": shlex.quote,
        "join_sh": shlex.join,
        "yaml": to_yaml,
        "k8s": to_k8s,
    }
    environment.tests["a_bucket"] = lambda source: source.startswith("gs://")
    environment.globals["gcs_options"] = _gcs_options
    environment.globals["gcs_flags"] = _gcs_flags
    return environment


def to_yaml(value: object) -> str:
    """Returns a value as YAML on one line, using that JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def to_k8s(text: str) -> str:
    """Returns text as YAML with $ doubled, so that Kubernetes does not expand $(NAME) in it."""
    return to_yaml(text.replace("$", "$$"))


def _gcs_options(source: str) -> str:
    """Returns the options of Cloud Storage FUSE for a bucket or one folder of it.

    `implicit-dirs` makes folders without marker objects visible.
    """
    folder = source.removeprefix("gs://").partition("/")[2].strip("/")
    return f"implicit-dirs,only-dir={folder}" if folder else "implicit-dirs"


def _gcs_flags(source: str) -> list[str]:
    """Returns the same options as flags of the command gcsfuse."""
    return [f"--{option}" for option in _gcs_options(source).split(",")]


def _xpk_command(job: ClusterJob) -> str:
    """Returns the `xpk workload create` command of the job."""
    flags = {
        "workload": job.name,
        "cluster": job.cluster or "CLUSTER",
        "project": job.project or "PROJECT",
        "zone": job.zone or "ZONE",
        "tpu-type": job.slice.accelerator,
        "num-slices": job.slices,
        "docker-image": job.image,
        "max-restarts": job.restarts,
        # xpk restarts on 42 and 127-255 anyway; 1 is a crash in Python.
        "restart-on-exit-codes": f"1,{ProcessMissing.status},{STOPPED_STATUS}",
        "termination-grace-period-seconds": job.grace_s,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += [f"--env={name}={value}" for name, value in _tpu_env(job).items()]
    inner = f"cd {shlex.quote(job.code or '/app')} && exec {shlex.join(job.command)}"
    words = [shlex.quote(word) for word in (*words, f"--command={inner}")]
    return " \\\n    ".join(["xpk workload create", *words])


def _tpu_env(job: ClusterJob) -> dict[str, str]:
    """Returns the environment variables of processes on TPU hosts."""
    # If the TPUs fail to start, JAX would otherwise fall back to CPUs silently.
    return {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"} | dict(job.env)


def _require(job: ClusterJob, scheduler: str, *names: str) -> None:
    """Checks that the named values are given.

    Raises:
      UserError: one is missing.
    """
    for name in names:
        if not getattr(job, name):
            example = _EXAMPLES.get(name, f"--{name}=…")
            raise UserError(f"--{name} is missing, which {scheduler} needs; give {example}")


def _refuse(job: ClusterJob, scheduler: str, why: str, *names: str) -> None:
    """Checks that the named values are not given.

    Raises:
      UserError: one is given; the message has the reason `why`.
    """
    for name in names:
        if getattr(job, name):
            raise UserError(f"{scheduler} does not use --{name}: {why}; leave it out")


_EXAMPLES = {
    "slice": "--slice=v5e-256",
    "image": "--image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/qwen_jax:TAG",
    "zone": "--zone=us-west4-a",
    "checkpoints": "--checkpoints=gs://BUCKET/FOLDER",
    "workdir": "--workdir=FOLDER",
}


def _check_mounts(job: ClusterJob, *, claims: bool) -> None:
    """Checks that mounts are /FOLDER=gs://BUCKET, or also /FOLDER=CLAIM if `claims`.

    Raises:
      UserError: one has another form.
    """
    known = r"gs://[^,:/][^,:]*|[a-z0-9.-]+" if claims else "gs://[^,:/][^,:]*"
    for folder, source in job.mounts.items():
        if not folder.startswith("/") or folder == "/" or not re.fullmatch(known, source):
            raise UserError(
                f"--mount={folder}={source} must be /FOLDER=gs://BUCKET"
                + (" or /FOLDER=CLAIM" if claims else "")
            )


def _check_gke(job: ClusterJob) -> None:
    """Checks a job for GKE; raises UserError for the first problem."""
    _require(job, "gke", "slice", "image", "workdir", "checkpoints")
    _check_mounts(job, claims=True)
    for flag, path in (("workdir", job.workdir), ("checkpoints", job.checkpoints)):
        remote = path.startswith("gs://") and flag == "checkpoints"
        if not remote and not any(is_below(path, folder) for folder in job.mounts):
            raise UserError(
                f"--{flag}={path} would be deleted with the pod; mount storage there, such as "
                f"--mount={path if path.startswith('/') else '/work'}=gs://BUCKET/FOLDER"
            )
    for name, place in job.secrets.items():
        if place.count("/") != 1:
            raise UserError(
                f"--secret={name}={place} must be {name}=SECRET/KEY of a Kubernetes secret"
            )
    _refuse(job, "gke", "pods run --image", "runtime_version", "partition", "account")


def _check_xpk(job: ClusterJob) -> None:
    """Checks a job for xpk; raises UserError for the first problem."""
    _require(job, "xpk", "slice", "image", "cluster", "project", "zone", "workdir", "checkpoints")
    _require_bucket(job, "xpk")
    _refuse(job, "xpk", "it would write the values into its manifest; use gke", "secrets")
    _refuse(job, "xpk", "attach storage to the cluster with xpk storage", "mounts")


def _check_tpu_vm(job: ClusterJob) -> None:
    """Checks a job for TPU VMs; raises UserError for the first problem."""
    _require(job, "tpu_vm", "slice", "project", "zone", "workdir", "checkpoints")
    _require_bucket(job, "tpu_vm")
    if not job.slice.generation.accelerator:
        raise UserError(f"--slice={job.slice.name} is only available on GKE; use gke or xpk")
    if not job.workdir.startswith("/"):
        raise UserError(f"--workdir={job.workdir} must be an absolute path on the TPU VM: /home/…")
    _check_mounts(job, claims=False)
    _refuse(job, "tpu_vm", "programs run on the machine itself", "image", "cluster")


def _check_slurm(job: ClusterJob) -> None:
    """Checks a job for SLURM; raises UserError for the first problem."""
    _require(job, "slurm", "workdir", "checkpoints")
    for flag in ("workdir", "checkpoints"):
        path = getattr(job, flag)
        if not path.startswith(("/", "gs://") if flag == "checkpoints" else "/"):
            raise UserError(f"--{flag}={path} must be an absolute path on shared storage")
    why = "SLURM runs processes on its nodes"
    _refuse(job, "slurm", why, "slice", "image", "mounts", "project", "zone", "cluster", "queue")


def _require_bucket(job: ClusterJob, scheduler: str) -> None:
    """Checks that checkpoints are in a bucket, since the hosts share no disk.

    Raises:
      UserError: they are not.
    """
    if not job.checkpoints.startswith("gs://"):
        raise UserError(
            f"--checkpoints={job.checkpoints} must be gs://BUCKET/FOLDER with {scheduler}, whose "
            "hosts share no disk"
        )


_CHECKS: dict[str, Callable[[ClusterJob], None]] = {
    "gke": _check_gke,
    "xpk": _check_xpk,
    "tpu_vm": _check_tpu_vm,
    "slurm": _check_slurm,
}
