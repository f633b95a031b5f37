"""Compiles a recipe's train step for TPUs or GPUs on this CPU host, and says what it will cost.

    python -m launch.aot --config=configs/pretrain.py:7b --topology=v5e:16x16 \\
        --seq_len=2048 --per_device_batch=4
    python -m launch.aot --config=configs/pods.py:7b,h100-8 --topology=h100:8

No TPU is needed, only the package libtpu, and no GPU, only requirements/aot-gpu.txt; a small slice
takes half a minute, hundreds of chips minutes. The step is the one `launch.pretrain` runs. One JSON
object goes to stdout: memory per device and whether it fits, collectives, FLOPs, and under
"prediction" what a static model of the chip makes of the compiler's schedule (for GPUs nothing, but
a "roofline"); no number of it was measured on hardware. Progress goes to stderr. Exit status: 0 it
fits, 1 it does not, 2 bad input.

With --search it looks for the per-device batch and the remat policy with the best predicted rate,
about ten compilations; --search_log=FILE keeps them, and the same command goes on after a kill. The
object is then that of the best, also after Ctrl-C.
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
from qwen_jax.aot.search import Log, search
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
SEARCH = flags.DEFINE_bool("search", False, "Find the batch and remat policy that fit best.")
SEARCH_LOG = flags.DEFINE_string("search_log", None, "Every try of a search as a line of JSON.")
DUMP_HLO = flags.DEFINE_string("dump_hlo", None, "Write the scheduled HLO here (.gz: compressed).")


def _job(devices: int) -> PretrainJob:
    """The recipe with this program's own flags put in."""
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
                    f"{rows:g} rows; choose one that makes a whole number of them"
                )
            config.data.global_batch = int(rows)
    return from_config_dict(PretrainJob, config)


def _xla() -> dict[str, str | bool]:
    for option in XLA.value:
        if "=" not in option:
            raise UserError(f"--xla={option} is not NAME=VALUE, such as --xla=xla_tpu_…=true")
    words = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in XLA.value)
    return {name: words.get(value, value) for name, value in pairs}


def _check_flags() -> None:
    """Refuses flags that say nothing together, and files that could not be written later."""
    if not TOPOLOGY.value:
        raise UserError("--topology is missing: give a slice, such as v5e:16x16 or h100:8")
    if SEARCH.value:
        for flag, why in (
            (PER_DEVICE_BATCH, "it chooses the batch"),
            (DUMP_HLO, "it compiles many steps; compile the one it finds by itself"),
        ):
            if flag.value is not None:
                raise UserError(f"--search has no use for --{flag.name}: {why}; leave it out")
    elif SEARCH_LOG.value:
        raise UserError("--search_log is only written with --search; give both or neither")
    if DUMP_HLO.value:
        folder = os.path.dirname(DUMP_HLO.value) or "."
        if os.path.isdir(DUMP_HLO.value) or not os.access(folder, os.W_OK):
            raise UserError(
                f"--dump_hlo={DUMP_HLO.value} cannot be written; give a file in a folder that is "
                "there and yours to write to"
            )


def _write(path: str, text: str) -> None:
    """Writes whole or not at all."""
    partial = f"{path}.partial"
    with (gzip.open if path.endswith(".gz") else open)(partial, "wt") as sink:
        sink.write(text)
    os.replace(partial, path)


def _compile(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    result = compile_for(job, pod, _xla())
    if DUMP_HLO.value and isinstance(result, CompiledStep):
        _write(DUMP_HLO.value, result.hlo)
    return report(job, pod, result)


def _asked(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    """What the tries of a search depend on, besides the batch and the rung."""
    asked = {"topology": pod.name, "--xla": _xla(), "data.seq_len": job.data.seq_len}
    asked |= versions(pod)
    for group in ("model", "options", "optimizer", "loss", "mesh"):
        for name, value in dataclasses.asdict(getattr(job, group)).items():
            asked[f"{group}.{name}"] = value
    del asked["options.remat"]
    return asked


def _search(job: PretrainJob, pod: Pod) -> dict[str, Any]:
    """The report of the best try; each is told on stderr as it is made."""

    def measure(batch: int, remat: str) -> dict[str, Any]:
        rows = batch * len(pod.devices)
        data = dataclasses.replace(job.data, global_batch=rows)
        train = dataclasses.replace(job.train, microbatches=1)
        options = dataclasses.replace(job.options, remat=remat)
        return _compile(dataclasses.replace(job, data=data, train=train, options=options), pod)

    log = Log(SEARCH_LOG.value, _asked(job, pod))
    kind = "at the roofline" if isinstance(pod, nodes.Nodes) else "predicted"
    interrupted = False
    try:
        for made in search(measure, log):
            rate = f"{made.rate:.0f} tokens/s per chip {kind}" if made.fits else "does not fit"
            print(f"batch {made.batch}, remat {made.remat}: {rate}", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; the best so far", file=sys.stderr)
    if log.best is None:
        if interrupted:
            raise UserError("interrupted before anything was found to fit; start it again")
        raise UserError(
            f"{pod.name} does not fit one row per chip even with remat=full; take a larger slice, "
            "or shorten --seq_len"
        )
    return log.best.report


def main() -> int:
    """Parses, compiles, reports."""
    _check_flags()
    describe = nodes.describe if nodes.is_gpu(TOPOLOGY.value) else topology.describe
    pod = describe(TOPOLOGY.value)
    job = _job(len(pod.devices))
    made = _search(job, pod) if SEARCH.value else _compile(job, pod)
    json.dump(made, sys.stdout, indent=2)
    print()
    return 0 if made["memory"]["fits"] else 1


if __name__ == "__main__":
    # First of all: looking for other devices, jax's CUDA plugin would ask for CUDA's libraries too.
    jax.config.update("jax_platforms", "cpu")
    program.run(main, recipe=PretrainJob)
