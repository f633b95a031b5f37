"""Training state of one set of parameters: the pytree that a training step carries and returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.model import Params, decay_mask, init_params
from qwen_jax.train.config import StepConfig
from qwen_jax.train.optimizer import adamw

Batch = dict[str, jax.Array]
"""Global batch of one step: arrays by name, the first axis of each is the batch."""

Metrics = dict[str, jax.Array]
"""Named scalars of one step, still on the device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Trained parameters with their optimizer state and counters; saved in checkpoints as it is.

    Attributes:
      step: int32 scalar, number of batches consumed: the position in the data and the argument of
        the learning-rate schedule.
      params: float32 master weights of the network, nested dicts of arrays.
      opt_state: state of the optimizer, Adam's moments in float32.
      skipped: int32 scalar, number of steps skipped so far because of non-finite numbers.
      skipped_in_a_row: int32 scalar, how many of those were the most recent steps.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
    """Returns the state of step 0 with random weights.

    Call it under `jax.jit` and a mesh, so that the arrays are initialised sharded.

    Args:
      config: model and optimizer.
      key: PRNG key of the weights.
    """
    return state_from_params(config, init_params(config.model, key))


def state_from_params(config: StepConfig, params: Params) -> TrainState:
    """Returns the state of step 0 that starts from given weights, with fresh optimizer moments.

    Args:
      config: model and optimizer.
      params: float32 weights of `config.model`.
    """
    # One buffer per counter: donation rejects a buffer that occurs twice in the state.
    step, skipped, skipped_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = adamw(config.optimizer, decay_mask(config.model)).init(params)
    return TrainState(step, params, opt_state, skipped, skipped_in_a_row)


def abstract_state(config: StepConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state as `ShapeDtypeStruct`s with concrete shardings on `mesh`.

    Computes nothing, so the devices of `mesh` need not exist.
    """
    with jax.set_mesh(mesh):
        # The key is made inside: an eager one would run on `mesh`, whose devices may not exist.
        shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(concrete, shapes)
