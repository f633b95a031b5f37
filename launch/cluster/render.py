"""One small template per scheduler, filled with a job."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shlex
from collections.abc import Callable

import jinja2

from launch.cluster.job import STOPPED_STATUS, ClusterJob, below
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
    """The file that starts `job` on a scheduler of TEMPLATES.

    Raises:
      UserError: something this scheduler needs is missing, or something given that it can't use.
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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # every value passes a filter that quotes for its file
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
    """A value as YAML on one line: JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def to_k8s(text: str) -> str:
    """Text as YAML where Kubernetes would replace $(NAME): a doubled $ is a plain one."""
    return to_yaml(text.replace("$", "$$"))


def _gcs_options(source: str) -> str:
    """Options of Cloud Storage FUSE: folders without marker objects, and one folder only."""
    folder = source.removeprefix("gs://").partition("/")[2].strip("/")
    return f"implicit-dirs,only-dir={folder}" if folder else "implicit-dirs"


def _gcs_flags(source: str) -> list[str]:
    """The same for the command gcsfuse."""
    return [f"--{option}" for option in _gcs_options(source).split(",")]


def _xpk_command(job: ClusterJob) -> str:
    """`xpk workload create` for the job."""
    flags = {
        "workload": job.name,
        "cluster": job.cluster or "CLUSTER",
        "project": job.project or "PROJECT",
        "zone": job.zone or "ZONE",
        "tpu-type": job.slice.accelerator,
        "num-slices": job.slices,
        "docker-image": job.image,
        "max-restarts": job.restarts,
        # xpk restarts on 42 and 127-255 by itself; 1 is a crash in Python.
        "restart-on-exit-codes": f"1,{ProcessMissing.status},{STOPPED_STATUS}",
        "termination-grace-period-seconds": job.grace_s,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += [f"--env={name}={value}" for name, value in _tpu_env(job).items()]
    inner = f"cd {shlex.quote(job.code or '/app')} && exec {shlex.join(job.command)}"
    words = [shlex.quote(word) for word in (*words, f"--command={inner}")]
    return " \\\n    ".join(["xpk workload create", *words])


def _tpu_env(job: ClusterJob) -> dict[str, str]:
    # With TPUs that do not start jax would go on, on the CPUs, without a word.
    return {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"} | dict(job.env)


def _needs(job: ClusterJob, scheduler: str, *names: str) -> None:
    for name in names:
        if not getattr(job, name):
            example = _EXAMPLES.get(name, f"--{name}=…")
            raise UserError(f"--{name} is missing, which {scheduler} needs; give {example}")


def _leave_out(job: ClusterJob, scheduler: str, why: str, *names: str) -> None:
    for name in names:
        if getattr(job, name):
            raise UserError(f"{scheduler} has no use for --{name}: {why}; leave it out")


_EXAMPLES = {
    "slice": "--slice=v5e-256",
    "image": "--image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/qwen_jax:TAG",
    "zone": "--zone=us-west4-a",
    "checkpoints": "--checkpoints=gs://BUCKET/FOLDER",
    "workdir": "--workdir=FOLDER",
}


def _check_mounts(job: ClusterJob, *, claims: bool) -> None:
    known = r"gs://[^,:/][^,:]*|[a-z0-9.-]+" if claims else "gs://[^,:/][^,:]*"
    for folder, source in job.mounts.items():
        if not folder.startswith("/") or folder == "/" or not re.fullmatch(known, source):
            raise UserError(
                f"--mount={folder}={source} must be /FOLDER=gs://BUCKET"
                + (" or /FOLDER=CLAIM" if claims else "")
            )


def _check_gke(job: ClusterJob) -> None:
    _needs(job, "gke", "slice", "image", "workdir", "checkpoints")
    _check_mounts(job, claims=True)
    for flag, path in (("workdir", job.workdir), ("checkpoints", job.checkpoints)):
        remote = path.startswith("gs://") and flag == "checkpoints"
        if not remote and not any(below(path, folder) for folder in job.mounts):
            raise UserError(
                f"--{flag}={path} would be lost with the pod; mount storage there, such as "
                f"--mount={path if path.startswith('/') else '/work'}=gs://BUCKET/FOLDER"
            )
    for name, place in job.secrets.items():
        if place.count("/") != 1:
            raise UserError(
                f"--secret={name}={place} must be {name}=SECRET/KEY of a Kubernetes secret"
            )
    _leave_out(job, "gke", "pods run --image", "runtime_version", "partition", "account")


def _check_xpk(job: ClusterJob) -> None:
    _needs(job, "xpk", "slice", "image", "cluster", "project", "zone", "workdir", "checkpoints")
    _needs_bucket(job, "xpk")
    _leave_out(job, "xpk", "it would write the values into its manifest; use gke", "secrets")
    _leave_out(job, "xpk", "attach storage to the cluster with xpk storage", "mounts")


def _check_tpu_vm(job: ClusterJob) -> None:
    _needs(job, "tpu_vm", "slice", "project", "zone", "workdir", "checkpoints")
    _needs_bucket(job, "tpu_vm")
    if not job.slice.generation.accelerator:
        raise UserError(f"--slice={job.slice.name} is only to be had on GKE; use gke or xpk")
    if not job.workdir.startswith("/"):
        raise UserError(f"--workdir={job.workdir} must be a whole path on the TPU VM: /home/…")
    _check_mounts(job, claims=False)
    _leave_out(job, "tpu_vm", "programs run on the machine itself", "image", "cluster")


def _check_slurm(job: ClusterJob) -> None:
    _needs(job, "slurm", "workdir", "checkpoints")
    for flag in ("workdir", "checkpoints"):
        path = getattr(job, flag)
        if not path.startswith(("/", "gs://") if flag == "checkpoints" else "/"):
            raise UserError(f"--{flag}={path} must be a whole path on storage that all nodes see")
    why = "SLURM runs processes on its nodes"
    _leave_out(job, "slurm", why, "slice", "image", "mounts", "project", "zone", "cluster", "queue")


def _needs_bucket(job: ClusterJob, scheduler: str) -> None:
    if not job.checkpoints.startswith("gs://"):
        raise UserError(
            f"--checkpoints={job.checkpoints} must be gs://BUCKET/FOLDER with {scheduler}: its "
            "hosts share no disk"
        )


_CHECKS: dict[str, Callable[[ClusterJob], None]] = {
    "gke": _check_gke,
    "xpk": _check_xpk,
    "tpu_vm": _check_tpu_vm,
    "slurm": _check_slurm,
}
