"""Tracing and compiling the training step, with the compiler options of each chip.

The loop and the ahead-of-time compiler go through here, so what is predicted is what runs.
"""

from __future__ import annotations

import functools

import jax

from qwen_jax.train.job import PretrainJob
from qwen_jax.train.step import Batch, TrainState, train_step

# Collectives run on the SparseCores, beside the TensorCores' products, instead of between them.
# Compiled for v5p:4x4x4 (7B's layers, 4 rows of 4,096), 37 ms of 730 that waited for the
# interconnect become 1.5, by prediction (libtpu 0.0.51, 2026-11-21). "Continuation" fusion of
# gathers into products, which does this on v5e by default, is refused there by the compiler.
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}

# Options of XLA's TPU compiler, by `device_kind`; v5e is best left as it is.
XLA_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v5": _SPARSE_CORES,  # v5p; v5e calls itself "TPU v5 lite"
    "TPU v5p": _SPARSE_CORES,
}


def xla_options(device_kind: str) -> dict[str, str]:
    """Compiler options for devices of this kind; none where nothing is known to help."""
    return dict(XLA_OPTIONS.get(device_kind, {}))


def lower_step(job: PretrainJob, abstract: TrainState, batch: Batch) -> jax.stages.Lowered:
    """The step with donated state, traced under the mesh in force.

    Whatever the options don't allow is refused here, before anything is compiled.

    Args:
      abstract: the state's shapes and shardings (`abstract_state`). batch: arrays or their shapes.
    """
    model = job.model
    drops = any((model.embed_dropout, model.attn_dropout, model.residual_dropout))
    key = jax.random.key(job.train.seed + 1) if drops else None
    step = functools.partial(train_step, config=job.step_config, dropout_key=key)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(abstract, batch)


def compile_step(lowered: jax.stages.Lowered, device_kind: str) -> jax.stages.Compiled:
    """Compiles the traced step with the options of its devices."""
    return lowered.compile(compiler_options=xla_options(device_kind))
