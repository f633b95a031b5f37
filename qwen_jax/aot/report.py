"""One JSON object of what compiling a step has shown and what it predicts."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import jax

from qwen_jax.aot import hlo, nodes, timeline, topology
from qwen_jax.aot.compile import CompiledStep, TooLarge
from qwen_jax.aot.nodes import Nodes
from qwen_jax.aot.topology import Pod
from qwen_jax.model import count_params
from qwen_jax.train.flops import train_flops_per_token
from qwen_jax.train.job import PretrainJob

_ASSUMED = (
    "static estimate, nothing ran: compiler cycles per operation or the roofline, whichever is "
    "longer; Pallas kernels by their declared FLOPs at kernel_efficiency of peak; collectives at "
    "link bandwidth; no latencies, no input, no checkpoints"
)

_ROOFLINE = (
    "no prediction, the least that this schedule can take: products and kernels at the data "
    "sheet's peak, the rest at full HBM bandwidth with nothing found in the L2 cache, collectives "
    "at full NVLink and network bandwidth; no latencies, no launches, no input, no checkpoints; "
    "real steps are slower"
)


def versions(pod: Pod | Nodes) -> dict[str, str]:
    """Of what compiles for these devices; a name is left out where it did not come as a wheel."""
    packages = nodes.COMPILERS if isinstance(pod, Nodes) else topology.COMPILERS
    made = {"jax": jax.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            made[package] = importlib.metadata.version(package)
    return made


def _asked(job: PretrainJob, pod: Pod | Nodes, mesh) -> dict[str, Any]:
    """What was compiled."""
    rows, devices = job.data.global_batch, mesh.size
    return {
        "topology": pod.name,
        "devices": devices,
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "family": job.model.family,
        "parameters": count_params(job.model),
        "seq_len": job.data.seq_len,
        "global_batch": rows,
        "per_device_batch": rows / devices,
        "microbatches": job.train.microbatches,
        "dtype": job.options.dtype,
        "remat": job.options.remat,
        "attention": job.options.attention,
        "versions": versions(pod),
    }


def _collectives(cost: timeline.Cost, on_gpu: bool) -> dict[str, Any]:
    made = {}
    for kind, count in sorted(cost.counts.items()):
        made[kind] = {"count": count, "bytes": cost.bytes[kind]}
        if on_gpu:
            made[kind]["synchronous"] = cost.synchronous[kind]
    return made


def _times(job: PretrainJob, pod: Pod | Nodes, cost: timeline.Cost, model_flops: float):
    """What the schedule makes of time."""
    chip, devices = pod.chip, len(pod.devices)
    tokens = job.data.global_batch * job.data.seq_len
    return {
        "step_seconds": round(cost.seconds, 6),
        "tokens_per_second_per_chip": round(tokens / devices / cost.seconds, 1),
        "mfu": round(model_flops / devices / cost.seconds / chip.peak_flops, 4),
        "compute_seconds": round(cost.compute, 6),
        "waiting_seconds": {k: round(v, 6) for k, v in sorted(cost.waiting.items())},
        "collective_seconds": {k: round(v, 6) for k, v in sorted(cost.busy.items())},
        "host_transfer_bytes": cost.host_bytes,
        "pallas_calls_without_estimate": cost.unpriced_kernels,
        "kernel_efficiency": round(chip.kernel_efficiency, 3),
        "assumptions": _ROOFLINE if isinstance(pod, Nodes) else _ASSUMED,
    }


def report(job: PretrainJob, pod: Pod | Nodes, result: CompiledStep | TooLarge) -> dict[str, Any]:
    """The report of one compilation; everything that is not a fact is under "prediction".

    For GPUs that is null: there is nothing to predict from, and "roofline" says what the schedule
    takes at the very least.

    Bytes are per device. `flops.model` counts as `train.flops` does, `flops.executed` what the
    program multiplies, recomputation included; both are of one step on all devices. Collectives'
    bytes are of the whole array over its group (see `collectives.Collective`); of those of GPUs
    "synchronous" says how many run beside nothing.
    """
    made = _asked(job, pod, result.mesh) | {
        "xla_options": result.options,
        "compile_seconds": round(result.seconds, 1),
    }
    if isinstance(result, TooLarge):
        memory = {"fits": False, "needed_bytes": result.needed, "hbm_bytes": pod.chip.hbm_bytes}
        return made | {"memory": memory | {"compiler": result.message}}
    cost = timeline.predict(hlo.parse(result.hlo), pod, result.mesh)
    chip, devices = pod.chip, result.mesh.size
    tokens = job.data.global_batch * job.data.seq_len
    model_flops = train_flops_per_token(job.model, job.data.seq_len) * tokens
    executed = cost.flops * devices
    memory = result.memory
    times = _times(job, pod, cost, model_flops)
    on_gpu = isinstance(pod, Nodes)
    return made | {
        "memory": {
            "fits": memory.peak <= chip.hbm_bytes,
            "argument_bytes": memory.arguments,
            "temp_bytes": memory.temporaries,
            "peak_bytes": memory.peak,
            "hbm_bytes": chip.hbm_bytes,
            "host_temp_bytes": memory.host,
        },
        "collectives": _collectives(cost, on_gpu),
        "flops": {
            "model": model_flops,
            "executed": executed,
            "executed_over_model": round(executed / model_flops, 4),
            "pallas": cost.kernel_flops * devices,
        },
        **({"prediction": None, "roofline": times} if on_gpu else {"prediction": times}),
    }
