"""Tracing and compiling the training step, with the compiler options of each chip.

The loop and the ahead-of-time compiler go through here, so what is predicted is what runs.
"""

from __future__ import annotations

import functools

import jax

from qwen_jax.train.job import PretrainJob
from qwen_jax.train.step import Batch, TrainState, train_step

# Options of XLA's TPU compiler, by a piece of `device_kind`; the first that fits counts.
XLA_OPTIONS: dict[str, dict[str, str]] = {}


def xla_options(device_kind: str) -> dict[str, str]:
    """Compiler options for devices of this kind; none where nothing is known to help."""
    for kind, options in XLA_OPTIONS.items():
        if kind.lower() in device_kind.lower():
            return dict(options)
    return {}


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
