"""Golden losses: 50 steps of the toy recipe at a fixed seed, as files that a test compares with.

    python -m tests.golden.renew            # rewrites the files
    python -m tests.golden.renew --check    # prints how far the current code is from them

One file is of a single device, one of the recipe's mesh of 8 devices (4 fsdp × 2 tensor). Renew
them only in a commit that is meant to change the numbers of training, and say why in its message.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile

import jax

from configs import pretrain as recipes
from qwen_jax.data import data_fingerprint
from qwen_jax.parallel import MeshConfig
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.metrics import read_metrics
from tests.train import jobs

FOLDER = pathlib.Path(__file__).parent
STEPS = 50

TOLERANCES = {
    "loss": 1e-3,
    "bits_per_byte": 1e-3,
    "grad_norm": 6e-2,
    "update_norm": 8e-3,
    "param_norm": 2e-4,
    "lr": 1e-6,
    "tokens": 0.0,
    "skipped": 0.0,
    "eval/h/loss": 5e-4,
    "eval/h/bits_per_byte": 5e-4,
}
"""Largest relative difference allowed in each metric at any step.

On one machine with one version of jax the numbers are the same bits (`--check` prints zeros). What
a tolerance must allow is another order of sums, after which 50 steps in bf16 drift apart. Measured,
in relative loss: another instruction set (AVX2 or SSE4.2 for AVX-512) 4e-4, one device against 8
5e-4, two microbatches 7e-4; gradient norms on another model of CPU 3.4e-2. What it must
catch: a learning rate 1 % higher 2e-2, no weight decay 8e-3, float32 for bf16 1.6e-3; `param_norm`
catches these too, by factors of 3 to 10.
"""

MESHES = {1: MeshConfig(fsdp=1), 8: MeshConfig(fsdp=4, tensor=2)}
"""Number of devices -> the mesh of that golden run."""


def path(devices: int) -> pathlib.Path:
    """Returns the golden file of the run on so many devices."""
    return FOLDER / f"toy_{devices}_devices.jsonl"


def make_job(data: pathlib.Path, devices: int) -> PretrainJob:
    """Returns the toy recipe on the data of `jobs.write_data`, 50 steps, evaluated at 25 and 50."""
    toy = recipes.toy()
    return dataclasses.replace(
        toy,
        tokenizer=f"{data}/bytes.tiktoken",
        data=dataclasses.replace(toy.data, sources=f"{data}/a=2,{data}/b=1"),
        eval=f"h={data}/h",
        mesh=MESHES[devices],
        optimizer=dataclasses.replace(toy.optimizer, decay_steps=-1),
        train=dataclasses.replace(toy.train, steps=STEPS, eval_every=25, checkpoint_every=STEPS),
    )


def run(devices: int) -> tuple[dict, list[dict]]:
    """Trains, and returns the header and the rows of a golden file: what was run, then its metrics.

    Rows are those of `metrics.jsonl`, without times, speed and memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, workdir = pathlib.Path(folder, "data"), pathlib.Path(folder, "run")
        data.mkdir()
        jobs.write_data(data, seq_len=64)
        job = make_job(data, devices)
        assert jobs.run_on(job, workdir, devices).finished
        found = read_metrics(workdir / "metrics.jsonl")
        rows = [{k: row[k] for k in ("step", *TOLERANCES) if k in row} for row in found]
        header = {
            "recipe": "configs/pretrain.py:toy",
            "steps": STEPS,
            "mesh": dataclasses.asdict(job.mesh),
            "jax": jax.__version__,
            "data": data_fingerprint(job.data),
        }
    return header, rows


def read(devices: int) -> tuple[dict, list[dict]]:
    """Reads the header and the rows of a golden file."""
    header, *rows = (json.loads(line) for line in path(devices).read_text().splitlines())
    return header, rows


def deviations(rows: list[dict], expected: list[dict]) -> dict[str, float]:
    """Returns the largest relative difference of each metric over all steps.

    Raises:
      AssertionError: the two runs logged different steps or metrics.
    """
    assert [(row["step"], *row) for row in rows] == [(row["step"], *row) for row in expected]
    largest = dict.fromkeys(TOLERANCES, 0.0)
    for row, golden in zip(rows, expected, strict=True):
        for name in row.keys() - {"step"}:
            scale = max(abs(golden[name]), 1e-30)
            largest[name] = max(largest[name], abs(row[name] - golden[name]) / scale)
    return largest


def main(argv: list[str]) -> None:
    """Rewrites the golden files, or with `--check` prints the deviations from them."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    for devices in MESHES:
        header, rows = run(devices)
        if "--check" in argv:
            print(devices, "device(s):", deviations(rows, read(devices)[1]))
        else:
            path(devices).write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
            print(path(devices))


if __name__ == "__main__":
    main(sys.argv[1:])
