"""Compiles a recipe's train step for TPUs or GPUs on this CPU host and predicts its cost.

    python -m launch.aot --config=configs/pretrain.py:7b --topology=v5e:16x16 \\
        --seq_len=2048 --per_device_batch=4
    python -m launch.aot --config=configs/pods.py:7b,h100-8 --topology=h100:8

Needs no TPU, only the package libtpu, and no GPU, only requirements/aot-gpu.txt; a small slice
takes half a minute, hundreds of chips take minutes. The step is the one that `launch.pretrain`
runs. One JSON object is written to stdout: memory per device and whether it fits, collectives,
FLOPs, and under "prediction" the time that a static model of the chip assigns to the compiler's
schedule (for GPUs, a "roofline" only); none of it was measured on hardware. Progress is written to
stderr. Exit status: 0 if it fits, 1 if it does not, 2 for bad input.

With --search, it searches for the per-device batch and the remat policy with the highest predicted
rate, in about ten compilations; --search_log=FILE stores them, so that the same command resumes an
interrupted search. The JSON object is then that of the best trial, also after Ctrl-C.
"""

import dataclasses
import gzip
import json
import math
import os
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import program
from qwen_jax.aot import nodes, topology
from qwen_jax.aot.compile import CompiledStep, compile_for
from qwen_jax.aot.report import report, versions
from qwen_jax.aot.search import SearchLog, search
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.train.job import PretrainJob

Pod = topology.Pod | nodes.Nodes
CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, configs/pretrain.py:SIZE.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, such as v5e:16x16 or h100:8.")
SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens per row, instead of the recipe's.")
PER_DEVICE_BATCH = flags.DEFINE_float(
    "per_device_batch", None, "Rows per chip and step, instead of the recipe's global batch."
)
XLA = flags.DEFINE_multi_string("xla", [], "Further compiler option, NAME=VALUE; may be repeated.")
SEARCH = flags.DEFINE_bool("search", False, "Find the fastest batch and remat policy that fit.")
SEARCH_LOG = flags.DEFINE_string(
    "search_log", None, "Store every trial of a search here, as JSON lines."
)
DUMP_HLO = flags.DEFINE_string("dump_hlo", None, "Write the scheduled HLO here (.gz: compressed).")


def _make_job(devices: int) -> PretrainJob:
    """Returns the job of the recipe, with the flags of this program applied.

    Args:
      devices: number of devices of the topology.

    Raises:
      UserError: --config is missing, or a flag is out of range.
    """
    if CONFIG.value is None:
        raise UserError("--config is missing: give a recipe, such as configs/pretrain.py:7b")
    config = CONFIG.value
    with config.unlocked():
        if SEQ_LEN.value is not None:
            if SEQ_LEN.value < 2:
                raise UserError(f"--seq_len={SEQ_LEN.value} is too short; give 2 or more")
            if config.model.trained_length == config.model.max_length == config.data.seq_len:
                config.model.trained_length = SEQ_LEN.value
            config.data.seq_len = SEQ_LEN.value
            config.model.max_length = max(config.model.max_length, SEQ_LEN.value)
        if PER_DEVICE_BATCH.value is not None:
            rows = PER_DEVICE_BATCH.value * devices
            if not (1 <= rows < math.inf and rows == int(rows)):
                raise UserError(
                    f"--per_device_batch={PER_DEVICE_BATCH.value:g} on {devices} devices makes "
                    f"{rows:g} rows; choose a value that makes an integer"
                )
            config.data.global_batch = int(rows)
    return from_config_dict(PretrainJob, config)


def _xla_options() -> dict[str, str | bool]:
    """Returns the compiler options of --xla.

    Raises:
      UserError: one is not NAME=VALUE.
    """
    for option in XLA.value:
        if "=" not in option:
            raise UserError(f"--xla={option} is not NAME=VALUE, such as --xla=xla_tpu_…=true")
    booleans = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in XLA.value)
    return {name: booleans.get(value, value) for name, value in pairs}


def _check_flags() -> None:
    """Checks flags that exclude each other, and files that could not be written later.

    Raises:
      UserError: for the first problem.
    """
    if not TOPOLOGY.value:
        raise UserError("--topology is missing: give a slice, such as v5e:16x16 or h100:8")
    if SEARCH.value:
        for flag, why in (
            (PER_DEVICE_BATCH, "it varies the batch"),
            (DUMP_HLO, "it compiles many steps; compile its result separately"),
        ):
            if flag.value is not None:
                raise UserError(
                    f"--search cannot be combined with --{flag.name}: {why}; leave it out"
                )
    elif SEARCH_LOG.value:
        raise UserError("--search_log is only written with --search; give both or neither")
    if DUMP_HLO.value:
        folder = os.path.dirname(DUMP_HLO.value) or "."
        if os.path.isdir(DUMP_HLO.value) or not os.access(folder, os.W_OK):
            raise UserError(
                f"--dump_hlo={DUMP_HLO.value} cannot be written; give a file in an existing folder "
                "that you may write to"
            )


def _write_atomic(path: str, text: str) -> None:
    """Writes a text file atomically, compressed if its name ends in `.gz`."""
    partial = f"{path}.partial"
    with (gzip.open if path.endswith(".gz") else open)(partial, "wt") as sink:
        sink.write(text)
    os.replace(partial, path)


def _compile(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    """Compiles the job's step and returns its report; writes the HLO if --dump_hlo is given."""
    result = compile_for(job, pod, _xla_options())
    if DUMP_HLO.value and isinstance(result, CompiledStep):
        _write_atomic(DUMP_HLO.value, result.hlo)
    return report(job, pod, result)


def _search_inputs(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    """Returns what the trials of a search depend on, besides batch and remat policy."""
    inputs = {"topology": pod.name, "--xla": _xla_options(), "data.seq_len": job.data.seq_len}
    inputs |= versions(pod)
    for group in ("model", "options", "optimizer", "loss", "mesh"):
        for name, value in dataclasses.asdict(getattr(job, group)).items():
            inputs[f"{group}.{name}"] = value
    del inputs["options.remat"]
    return inputs


def _search(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    """Runs a search and returns the report of its best trial; prints each trial to stderr.

    Raises:
      UserError: no trial fits, or the search was interrupted before one did.
    """

    def measure(batch: int, remat: str) -> dict[str, Any]:
        """Compiles the step for a per-device batch and a remat policy, and returns its report."""
        rows = batch * len(pod.devices)
        data = dataclasses.replace(job.data, global_batch=rows)
        train = dataclasses.replace(job.train, microbatches=1)
        options = dataclasses.replace(job.options, remat=remat)
        return _compile(dataclasses.replace(job, data=data, train=train, options=options), pod)

    log = SearchLog(SEARCH_LOG.value, _search_inputs(job, pod))
    kind = "at the roofline" if isinstance(pod, nodes.Nodes) else "predicted"
    interrupted = False
    try:
        for trial in search(measure, log):
            rate = f"{trial.rate:.0f} tokens/s per chip {kind}" if trial.fits else "does not fit"
            print(f"batch {trial.batch}, remat {trial.remat}: {rate}", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; printing the best trial so far", file=sys.stderr)
    if log.best is None:
        if interrupted:
            raise UserError("interrupted before any trial fitted; start it again")
        raise UserError(
            f"{pod.name} does not fit one row per chip even with remat=full; choose a larger "
            "slice, or shorten --seq_len"
        )
    return log.best.report


def main() -> int:
    """Compiles the step, or runs a search, prints the report, and returns the exit status."""
    _check_flags()
    describe = nodes.describe if nodes.is_gpu(TOPOLOGY.value) else topology.describe
    pod = describe(TOPOLOGY.value)
    job = _make_job(len(pod.devices))
    result = _search(job, pod) if SEARCH.value else _compile(job, pod)
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0 if result["memory"]["fits"] else 1


if __name__ == "__main__":
    # Must be set first: otherwise JAX's CUDA plugin would try to load CUDA's libraries.
    jax.config.update("jax_platforms", "cpu")
    program.run(main, recipe=PretrainJob)
