"""Writes the file with which a cluster scheduler runs a training job, or estimates its cost.

    python -m launch.cluster gke --config=configs/pretrain.py:7b --slice=v5e-256 --slices=2 \\
        --image=IMAGE --workdir=/work/7b --mount=/work=gs://BUCKET/work \\
        --checkpoints=gs://BUCKET/7b --config.data.sources=/work/web=1 --out=7b.yaml
    python -m launch.cluster slurm --config=configs/pretrain.py:7b --nodes=16 --workdir=/nfs/7b …
    python -m launch.cluster cost --report=7b.json --tokens=2.4e12 --price_per_chip_hour=1.2

Commands: gke (JobSet on Kubernetes), xpk, tpu_vm (TPU VMs, a bash script), slurm (sbatch), cost.
Nothing is submitted. The recipe is parsed and checked against the devices first; its --config flags
are passed to launch.pretrain unchanged, with --compile_cache and --start_timeout. See
docs/launch.md.
"""

from __future__ import annotations

import dataclasses
import os
import sys

from absl import flags
from ml_collections import config_flags

from launch import program
from launch.cluster import cost as costs
from launch.cluster.job import ClusterJob, fit_recipe, parse_pairs, recipe_flags
from launch.cluster.render import TEMPLATES, render
from launch.cluster.slices import find_slice
from qwen_jax.artifact import write_text
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.train.job import PretrainJob

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, configs/pretrain.py:SIZE.")
OUT = flags.DEFINE_string("out", None, "File to write; standard output by default.")

TEXTS = {
    "workdir": "Folder for metrics and profiles, as a path on the hosts.",
    "checkpoints": "Folder for checkpoints, gs:// too; WORKDIR/checkpoints by default.",
    "python": "Interpreter on the hosts or in the image.",
    "code": "This repository on the hosts or in the image; /app in images.",
    "image": "gke, xpk: container image with this repository and its requirements.",
    "project": "xpk, tpu_vm: Google Cloud project.",
    "zone": "xpk, tpu_vm: zone of the TPUs.",
    "cluster": "gke, xpk: name of the Kubernetes cluster.",
    "namespace": "gke: Kubernetes namespace.",
    "queue": "gke: Kueue local queue.",
    "service_account": "gke, tpu_vm: account the job runs as.",
    "runtime_version": "tpu_vm: software version of the TPU VMs, if not the default.",
    "reservation": "gke, tpu_vm, slurm: reserved capacity.",
    "partition": "slurm: partition.",
    "account": "slurm: account to charge.",
    "time_limit": "slurm: time limit of one start, D-HH:MM:SS.",
}
for _name, _help in TEXTS.items():
    flags.DEFINE_string(_name, "", _help)
NAME = flags.DEFINE_string("name", "qwen", "Name of the job.")
SLICE = flags.DEFINE_string("slice", None, "gke, xpk, tpu_vm: TPU slice, such as v5e-256.")
NUMBERS = {
    "slices": (1, "gke, xpk, tpu_vm: number of TPU slices; mesh.data spans them."),
    "nodes": (1, "slurm: number of nodes."),
    "gpus_per_node": (8, "slurm: GPUs of a node."),
    "grace_s": (300, "Seconds to save a checkpoint after SIGTERM."),
    "restarts": (20, "Restarts after failures; on gke, preemptions are not counted."),
}
for _name, (_value, _help) in NUMBERS.items():
    flags.DEFINE_integer(_name, _value, _help)
TASKS = flags.DEFINE_integer(
    "tasks_per_node", None, "slurm: processes per node; by default one per GPU."
)
SPOT = flags.DEFINE_bool("spot", False, "gke, tpu_vm: use capacity that may be preempted.")
ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE: an environment variable of the processes.")
SECRET = flags.DEFINE_multi_string(
    "secret",
    [],
    "NAME=WHERE: an environment variable whose value the scheduler fetches from SECRET/KEY of "
    "Kubernetes (gke), a secret of Secret Manager (tpu_vm), or a file only you can read (slurm).",
)
MOUNT = flags.DEFINE_multi_string(
    "mount",
    [],
    "/FOLDER=gs://BUCKET/FOLDER: mounted storage (gke, tpu_vm); on gke also /FOLDER=CLAIM.",
)
REPORT = flags.DEFINE_multi_string("report", [], "cost: NAME=FILE or FILE, report of launch.aot.")
RATE = flags.DEFINE_multi_string(
    "rate", [], "cost: NAME=TOKENS_PER_SECOND_PER_CHIP, a measured throughput."
)
TOKENS = flags.DEFINE_float("tokens", None, "cost: tokens to train on.")
CHIPS = flags.DEFINE_integer("chips", None, "cost: number of chips, to compute days.")
PRICE = flags.DEFINE_float("price_per_chip_hour", None, "cost: price in any currency.")
GOODPUT = flags.DEFINE_float("goodput", 1.0, "cost: share of the time in which steps run.")


def main(command: str) -> None:
    """Writes the job file of a scheduler, or the table of costs."""
    text = cost_table() if command == "cost" else render(command, cluster_job(command))
    if OUT.value:
        write_text(OUT.value, text)
    else:
        print(text, end="")


def _rates() -> list[tuple[str, float, str]]:
    """Returns (name, tokens per second per chip, source) of each --report and --rate."""
    rates = []
    for item in REPORT.value:
        name, separator, path = item.partition("=")
        path = path if separator else name
        name = name if separator else os.path.basename(path).removesuffix(".json")
        rates.append((name, costs.read_rate(path), "predicted"))
    for name, text in parse_pairs("rate", RATE.value).items():
        rates.append((name, costs.parse_rate(name, text), "given"))
    return rates


def cost_table() -> str:
    """Returns a Markdown table with a row for each --report and --rate.

    Raises:
      UserError: a required flag is missing, or a report cannot be used.
    """
    if not (REPORT.value or RATE.value) or TOKENS.value is None:
        raise UserError(
            "cost needs --report=FILE.json or --rate=NAME=NUMBER, and --tokens, such as "
            "--tokens=2.4e12"
        )
    rows = [costs.HEADER]
    for name, rate, source in _rates():
        found = costs.run_cost(
            TOKENS.value,
            rate,
            chips=CHIPS.value,
            price_per_chip_hour=PRICE.value,
            goodput=GOODPUT.value,
        )
        rows.append(costs.table_row(name, TOKENS.value, rate, source, found, CHIPS.value))
    return "\n".join(rows) + "\n"


def cluster_job(scheduler: str) -> ClusterJob:
    """Returns the job of the flags, with the recipe checked against its devices.

    Args:
      scheduler: "gke", "xpk", "tpu_vm" or "slurm".

    Raises:
      UserError: a flag is missing or invalid, or the recipe does not fit the devices.
    """
    if CONFIG.value is None:
        raise UserError("--config is missing: give a recipe, such as configs/pretrain.py:7b")
    values = {name: flags.FLAGS[name].value for name in (*TEXTS, *NUMBERS)}
    if not values["checkpoints"] and values["workdir"]:
        values["checkpoints"] = f"{values['workdir'].rstrip('/')}/checkpoints"
    if scheduler == "tpu_vm":
        values["python"] = values["python"] or "/opt/qwen_jax/venv/bin/python"
    values["python"] = values["python"] or "python3"
    job = ClusterJob(
        **values,
        name=NAME.value,
        flags=recipe_flags(sys.argv[2:]) + _forwarded_flags(),
        slice=find_slice(SLICE.value) if SLICE.value else None,
        tasks_per_node=values["gpus_per_node"] if TASKS.value is None else TASKS.value,
        env=parse_pairs("env", ENV.value),
        secrets=parse_pairs("secret", SECRET.value),
        mounts=parse_pairs("mount", MOUNT.value),
        spot=SPOT.value,
    )
    recipe = from_config_dict(PretrainJob, CONFIG.value)
    more = fit_recipe(recipe, job.devices, job.slices)
    return dataclasses.replace(job, flags=job.flags + more)


def _forwarded_flags() -> tuple[str, ...]:
    """Returns the given flags of this program that are also flags of launch.pretrain."""
    given = [program.COMPILE_CACHE, program.START_TIMEOUT, program.CPU_DEVICES]
    return tuple(f"--{flag.name}={flag.value}" for flag in given if flag.present)


if __name__ == "__main__":
    program.run(main, recipe=PretrainJob, commands=(*TEMPLATES, "cost"), devices=False)
