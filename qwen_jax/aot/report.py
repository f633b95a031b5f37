"""Report of one ahead-of-time compilation: facts and predictions as one JSON object."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

import jax

from qwen_jax.aot import hlo, nodes, timeline, topology
from qwen_jax.aot.compile import CompiledStep, OutOfMemory
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
    "a lower bound of this schedule, not a prediction: products and kernels at the data "
    "sheet's peak, the rest at full HBM bandwidth without hits in the L2 cache, collectives "
    "at full NVLink and network bandwidth; no latencies, no launches, no input, no checkpoints; "
    "real steps are slower"
)


def versions(pod: Pod | Nodes) -> dict[str, str]:
    """Returns package -> version of the compilers for these devices, as far as they are wheels."""
    packages = nodes.COMPILERS if isinstance(pod, Nodes) else topology.COMPILERS
    fields = {"jax": jax.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            fields[package] = importlib.metadata.version(package)
    return fields


def _inputs(job: PretrainJob, pod: Pod | Nodes, mesh) -> dict[str, Any]:
    """Returns the inputs of the compilation: topology, mesh, model, batch, options, versions."""
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


def _collective_totals(cost: timeline.StepCost, on_gpu: bool) -> dict[str, Any]:
    """Returns kind -> number and bytes of collectives."""
    fields = {}
    for kind, count in sorted(cost.counts.items()):
        fields[kind] = {"count": count, "bytes": cost.bytes[kind]}
        if on_gpu:
            fields[kind]["synchronous"] = cost.synchronous[kind]
    return fields


def _predicted_times(
    job: PretrainJob, pod: Pod | Nodes, cost: timeline.StepCost, model_flops: float
):
    """Returns the times and rates that follow from the simulated schedule.

    Args:
      job: the compiled job.
      pod: TPU slice or GPU nodes.
      cost: result of the simulation.
      model_flops: FLOPs of one step by `train.flops`.
    """
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


def report(
    job: PretrainJob, pod: Pod | Nodes, result: CompiledStep | OutOfMemory
) -> dict[str, Any]:
    """Returns the report of one compilation.

    Everything that is not a fact is under "prediction". For GPUs that is null, since there is
    nothing to base a prediction on; "roofline" has the least time that the schedule can take.

    Bytes are per device. `flops.model` is counted as in `train.flops`, `flops.executed` is what the
    program multiplies, recomputation included; both are of one step on all devices. Bytes of
    collectives are those of the array over its group (see `collectives.Collective`); on GPUs,
    "synchronous" is the number of collectives that overlap with nothing.

    Args:
      job: the compiled job.
      pod: TPU slice or GPU nodes.
      result: result of the compilation.
    """
    fields = _inputs(job, pod, result.mesh) | {
        "xla_options": result.options,
        "compile_seconds": round(result.seconds, 1),
    }
    if isinstance(result, OutOfMemory):
        return fields | {
            "memory": {
                "fits": False,
                "needed_bytes": result.needed,
                "hbm_bytes": pod.chip.hbm_bytes,
                "compiler": result.message,
            }
        }
    cost = timeline.predict(hlo.parse(result.hlo), pod, result.mesh)
    chip, devices = pod.chip, result.mesh.size
    tokens = job.data.global_batch * job.data.seq_len
    model_flops = train_flops_per_token(job.model, job.data.seq_len) * tokens
    executed = cost.flops * devices
    memory = result.memory
    times = _predicted_times(job, pod, cost, model_flops)
    on_gpu = isinstance(pod, Nodes)
    return fields | {
        "memory": {
            "fits": memory.peak <= chip.hbm_bytes,
            "argument_bytes": memory.arguments,
            "temp_bytes": memory.temporaries,
            "peak_bytes": memory.peak,
            "hbm_bytes": chip.hbm_bytes,
            "host_temp_bytes": memory.host,
        },
        "collectives": _collective_totals(cost, on_gpu),
        "flops": {
            "model": model_flops,
            "executed": executed,
            "executed_over_model": round(executed / model_flops, 4),
            "pallas": cost.kernel_flops * devices,
        },
        **({"prediction": None, "roofline": times} if on_gpu else {"prediction": times}),
    }
