"""One optimizer step for any objective, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qwen_jax.model import Params, decay_mask
from qwen_jax.train.config import StepConfig
from qwen_jax.train.objective import LossSums, Objective
from qwen_jax.train.optimizer import adamw, learning_rate
from qwen_jax.train.state import Batch, Metrics, TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    config: StepConfig,
    objective: Objective,
    key: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Computes one optimizer step over one global batch.

    Gradients of summed losses are added over microbatches and divided once by the total weight, so
    neither accumulation nor sharding changes the scale of the loss. A step with a non-finite loss,
    gradient or update changes nothing but the counters.

    Args:
      state: parameters, optimizer state and counters.
      batch: arrays as `objective` takes them.
      config: model, optimizer and number of microbatches.
      objective: the loss that is minimised.
      key: PRNG key of the run for the objective (dropout), folded with the step number here; None
        runs without randomness.

    Returns:
      The next state, and float32 scalars: the objective's metrics, grad_norm (before clipping),
      update_norm, param_norm, lr, skipped, skipped_in_a_row.
    """
    key = None if key is None else jax.random.fold_in(key, state.step)
    grads, sums = summed_gradients(state.params, batch, config, objective, key)
    weight = jnp.maximum(sums.weight, 1.0)
    with jax.named_scope("optimizer"):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
        grad_norm = optax.tree.norm(grads)
        clip = jnp.minimum(1.0, config.optimizer.clip_norm / grad_norm)
        grads = jax.tree.map(lambda g: clip * g, grads)
        lr = learning_rate(config.optimizer, state.step)
        optimizer = adamw(config.optimizer, decay_mask(config.model))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -lr * u, updates)
        params = optax.apply_updates(state.params, updates)
        update_norm = optax.tree.norm(updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums.objective) & jnp.isfinite(update_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    skip = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + skip) * skip,
    )
    metrics = objective.metrics(sums) | {
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": optax.tree.norm(params),
        "lr": lr,
        "skipped": new_state.skipped.astype(jnp.float32),
        "skipped_in_a_row": new_state.skipped_in_a_row.astype(jnp.float32),
    }
    return new_state, metrics


def summed_gradients(
    params: Params,
    batch: Batch,
    config: StepConfig,
    objective: Objective,
    key: jax.Array | None,
) -> tuple[Params, LossSums]:
    """Computes the gradient of the objective's sum over all microbatches, not divided by weight.

    Args:
      params: weights to differentiate with respect to.
      batch: global batch; `config.microbatches` divides the first axis of every array.
      config: `microbatches`, and what `objective` reads.
      objective: the loss.
      key: PRNG key of this step, split over the microbatches; None for none.

    Returns:
      Gradient with the structure and dtype of `params`, and the loss sums.
    """

    def differentiated(params, batch, key):
        sums = objective(params, batch, config, key)
        return sums.objective, sums

    grad = jax.grad(differentiated, has_aux=True)
    n = config.microbatches
    if n == 1:
        return grad(params, batch, key)
    pieces = jax.tree.map(lambda x: _split_batch(x, n), batch)
    keys = None if key is None else jax.random.split(key, n)

    def add(total, piece):
        batch, key = piece
        return jax.tree.map(jnp.add, total, grad(params, batch, key)), None

    def first_sums(params, pieces, keys):
        first, key = jax.tree.map(lambda x: x[0], (pieces, keys))
        return objective(params, first, config, key)

    sums = jax.eval_shape(first_sums, params, pieces, keys)
    start = (
        jax.tree.map(jnp.zeros_like, params),
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
    )
    return jax.lax.scan(add, start, (pieces, keys))[0]


def _split_batch(x: jax.Array, n: int) -> jax.Array:
    """Reshapes [B, …] to [n, B/n, …], keeping the sharding of the batch axis on axis 1.

    Devices exchange a few rows of token ids for it.
    """
    sharding = jax.typeof(x).sharding
    out = None if sharding.mesh.empty else jax.P(None, *sharding.spec)
    return jax.lax.reshape(x, (n, x.shape[0] // n, *x.shape[1:]), out_sharding=out)


def bind_step(
    config: StepConfig, objective: Objective, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns `train_step` as a function of (state, batch) alone, as the loop and aot compile it.

    Args:
      config: settings of the step.
      objective: the loss.
      seed: seed of dropout; unused when the model has none.
    """
    model = config.model
    has_dropout = any((model.embed_dropout, model.attn_dropout, model.residual_dropout))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The key is made while tracing: an eager one would run on the mesh, whose devices need not
        # exist when a program is compiled ahead of time.
        key = jax.random.key(seed) if has_dropout else None
        return train_step(state, batch, config, objective, key)

    step.__name__ = train_step.__name__  # of the compiled program
    return step
