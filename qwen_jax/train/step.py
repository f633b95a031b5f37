"""The pretraining step as one pure function, and the state it carries.

Every stage of this project is `step(state, batch) -> (state, metrics)`, jitted with donated state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax.errors import UserError
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    Params,
    decay_mask,
    hidden_states,
    init_params,
    output_kernel,
)
from qwen_jax.parallel import batch_devices, spec
from qwen_jax.train.losses import LossSums, next_token_loss
from qwen_jax.train.optimizer import OptimizerConfig, adamw, learning_rate

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss over the vocabulary is taken; see `losses.next_token_loss`.

    Attributes:
      z_loss: factor of log²Z (0: none). chunk: tokens whose logits exist at one time.
      vocab_parts: neighbours along `fsdp` that divide the vocabulary among them. More of them hold
        less each; 0: the number that moves the fewest bytes.
    """

    z_loss: float = 0.0
    chunk: int = 1024
    vocab_parts: int = 0

    def __post_init__(self):
        if not self.z_loss >= 0 or self.chunk < 1 or self.vocab_parts < 0:
            raise UserError(
                f"loss.z_loss={self.z_loss} and loss.vocab_parts={self.vocab_parts} must be at "
                f"least 0, loss.chunk={self.chunk} at least 1"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes while training; float32 master weights and moments.

    Attributes:
      step: int32, batches consumed; the data position and the schedule's argument.
      params: the network. opt_state: Adam's moments.
      skipped: int32, steps left out because of non-finite numbers; skipped_in_a_row: the latest.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What the step is made of. microbatches: pieces of a batch whose gradients are added up."""

    model: ModelConfig
    options: ForwardOptions
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    microbatches: int = 1


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
    """Fresh state; call it under `jax.jit` (and a mesh), so that it is born sharded."""
    params = init_params(config.model, key)
    # One buffer each: donation refuses a buffer that stands in two places.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
    opt_state = adamw(config.optimizer, decay_mask(config.model)).init(params)
    return TrainState(zeros[0], params, opt_state, zeros[1], zeros[2])


def abstract_state(config: StepConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The state as `ShapeDtypeStruct`s with concrete shardings on `mesh`; computes nothing."""
    with jax.set_mesh(mesh):
        # The key is made inside: an eager one would run on `mesh`, which may be fictitious.
        shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))

    def concrete(x):
        sharding = jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(concrete, shapes)


def check_mesh(model: ModelConfig, mesh, *, global_batch: int, microbatches: int, seq_len: int):
    """Refuses a mesh that doesn't divide the model or the batch, before anything is compiled.

    Raises:
      UserError: names the axis, the dimension it doesn't divide, and what to change.
    """
    shape = mesh.shape
    rows, tensor, fsdp = batch_devices(mesh), shape["tensor"], shape["fsdp"]
    if global_batch % (rows * microbatches):
        raise UserError(
            f"data.global_batch={global_batch} is not a multiple of data×fsdp×microbatches = "
            f"{shape['data']}×{fsdp}×{microbatches} = {rows * microbatches}; change the batch, "
            "train.microbatches or the mesh"
        )
    divided = [
        ("tensor", tensor, "model.n_heads", model.n_heads),
        ("tensor", tensor, "model.n_kv_heads", model.n_kv_heads),
        ("tensor", tensor, "model.d_ff", model.d_ff),
        ("tensor", tensor, "model.vocab_size", model.vocab_size),
        ("fsdp×tensor", fsdp * tensor, "model.d_model", model.d_model),
        # Two chunks for each device of the ring (zigzag order).
        *([("context×2", 2 * shape["context"], "data.seq_len", seq_len)] * (shape["context"] > 1)),
    ]
    for axis, size, name, dim in divided:
        if dim % size:
            raise UserError(
                f"mesh.{axis}={size} does not divide {name}={dim}; choose a mesh size that does"
            )


def loss_sums(
    params: Params, batch: Batch, config: StepConfig, dropout_key: jax.Array | None = None
) -> LossSums:
    """Loss sums of one batch; also the evaluation step.

    batch: tokens, targets, segment_ids, positions int32 [B,T]; loss_mask float32 [B,T].
    """
    hidden, _ = hidden_states(
        params,
        batch["tokens"],
        config.model,
        config.options,
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        dropout_key=dropout_key,
    )
    with jax.named_scope("loss"):
        kernel = output_kernel(params, config.model)
        return next_token_loss(
            *(hidden, kernel, batch["targets"], batch["loss_mask"]),
            config.loss.z_loss,
            config.loss.chunk,
            config.loss.vocab_parts,
        )


def _gradients(params, batch, config: StepConfig, key) -> tuple[Params, LossSums]:
    """Gradient of Σ objective and the sums, over all microbatches; not yet divided by weight."""

    def objective(params, batch, key):
        sums = loss_sums(params, batch, config, key)
        return sums.objective, sums

    grad = jax.grad(objective, has_aux=True)
    n = config.microbatches
    if n == 1:
        return grad(params, batch, key)

    def split(x):  # [B,…] -> [n,B/n,…]; a small exchange of token ids between devices
        shape = (n, x.shape[0] // n, *x.shape[1:])
        axes = ("batch", "sequence")[: x.ndim]
        return jax.lax.reshape(x, shape, out_sharding=spec(None, *axes))

    def add(total, piece):
        batch, key = piece
        return jax.tree.map(jnp.add, total, grad(params, batch, key)), None

    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(jnp.zeros_like, params), LossSums(zero, zero, zero))
    keys = None if key is None else jax.random.split(key, n)
    return jax.lax.scan(add, start, (jax.tree.map(split, batch), keys))[0]


def train_step(
    state: TrainState, batch: Batch, config: StepConfig, dropout_key: jax.Array | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step over one global batch.

    Gradients of summed losses are added over microbatches and divided once by the total weight, so
    neither accumulation nor sharding changes the loss. A step with a non-finite loss, gradient or
    update changes nothing but the counters.

    Args:
      batch: as in `loss_sums`, and n_bytes float32 [B], the text bytes its loss stands for.
      dropout_key: constant over the run; folded with the step. None: no dropout.

    Returns:
      The next state, and float32 scalars: loss (nats per token), bits_per_byte, grad_norm (before
      clipping), update_norm, param_norm, lr, tokens (that carry loss), skipped, skipped_in_a_row.
    """
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
    grads, sums = _gradients(state.params, batch, config, key)
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
    metrics = {
        "loss": sums.nll / weight,
        "bits_per_byte": sums.nll / jnp.log(2.0) / jnp.maximum(batch["n_bytes"].sum(), 1.0),
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": optax.tree.norm(params),
        "lr": lr,
        "tokens": sums.weight,
        "skipped": new_state.skipped.astype(jnp.float32),
        "skipped_in_a_row": new_state.skipped_in_a_row.astype(jnp.float32),
    }
    return new_state, metrics
