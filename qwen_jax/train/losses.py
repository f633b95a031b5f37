"""Next-token loss over a large vocabulary, without ever holding the logits.

At Qwen's 151,936 rows the float32 logits of one 2,048-token sequence are 1.16 GiB. Here tokens are
taken a chunk at a time: the chunk's logits are formed, turned into loss *and* into gradients, and
dropped. Because the loss is a sum over tokens, gradients with respect to hidden states and kernel
need nothing from later, so the forward pass makes them and the backward pass only scales them:
three products of tokens × D × V in all, as many as the plain form that keeps every logit.
Devices divide the vocabulary among them as `vocab_split` says.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cpu_matmul import accumulated
from qwen_jax.parallel import RULES, current_mesh, on_mesh, spec
from qwen_jax.train.vocab_split import vocab_split

_TOKEN_AXES = (*RULES["batch"], RULES["sequence"])
_NEVER = -1e30  # logit of a column that stands for no token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the tokens that carry loss; divide by `weight` once, after every accumulation.

    Attributes:
      objective: Σ w·(nll + z_loss·lse²), the differentiated quantity, in nats. float32 scalar.
      nll: Σ w·nll. weight: Σ w. Both float32 scalars, not differentiated.
    """

    objective: jax.Array
    nll: jax.Array
    weight: jax.Array


def _chunk_loss(hidden, kernel, targets, weights, z_loss, split):
    """One chunk, hidden [C,D], against this device's columns of the kernel [D,V].

    Returns (Σ objective, Σ nll) and d objective/d logits, float32 [C,V].
    """
    first, real = split.first_column()
    columns = jnp.arange(kernel.shape[-1], dtype=jnp.int32)
    logits = accumulated("CD,DV->CV", hidden, kernel)
    if split.padding:
        logits = jnp.where(columns < real, logits, _NEVER)
    own = jnp.where(targets - first < real, targets - first, -1)
    is_target = own[:, None] == columns
    own_highest = logits.max(axis=-1)
    exp = jnp.exp(logits - own_highest[:, None])
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    highest, total, target_logit = split.merge(own_highest, exp.sum(axis=-1), target_logit)
    lse = jnp.log(total) + highest
    nll = lse - target_logit
    objective = nll + z_loss * jnp.square(lse)
    # d nll/d logits = softmax − onehot;  d lse²/d logits = 2·lse·softmax
    softmax_scale = weights * (1.0 + 2.0 * z_loss * lse) * jnp.exp(own_highest - highest) / total
    d_logits = exp * softmax_scale[:, None] - jnp.where(is_target, weights[:, None], 0.0)
    return (jnp.sum(weights * objective), jnp.sum(weights * nll)), d_logits


def _per_device(hidden, kernel, targets, weights, *, z_loss, chunk, split, sharded, with_grads):
    """Loss of this device's tokens, and gradients already summed over the mesh.

    hidden [b,t,D], kernel [D/fsdp,V/tensor] as at rest, targets, weights [b,t].
    """
    dtype, (tokens, channels) = hidden.dtype, (targets.size, hidden.shape[-1])
    kernel = split.collect_kernel(kernel.astype(dtype))
    chunk = min(-(-chunk // split.parts), tokens)  # what this device adds to its group's chunk
    pad = -tokens % chunk

    def pieces(x, *trailing):
        x = jnp.pad(x.reshape(tokens, *trailing), [(0, pad)] + [(0, 0)] * len(trailing))
        return x.reshape((tokens + pad) // chunk, chunk, *trailing)

    def one(carry, piece):
        h, target, weight = piece
        h = split.collect_tokens(h, 0)
        sums, d_logits = _chunk_loss(h, kernel, target, weight, z_loss, split)
        total, d_kernel = carry
        total = jax.tree.map(jnp.add, total, sums)
        if not with_grads:
            return (total, d_kernel), None
        # Made once and read twice: fused into both products, the exponentials are taken per tile.
        d_logits = jax.lax.optimization_barrier(d_logits.astype(dtype))
        d_h = accumulated("CV,DV->CD", d_logits, kernel)
        d_kernel += accumulated("CD,CV->DV", h, d_logits)
        return (total, d_kernel), split.scatter_tokens(d_h).astype(dtype)

    zero = jnp.zeros((), jnp.float32)
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if with_grads else zero
    small = (split.collect_tokens(pieces(x), 1) for x in (targets, weights))
    xs = (pieces(hidden, channels), *small)
    ((objective, nll), d_kernel), d_hidden = jax.lax.scan(one, ((zero, zero), d_kernel), xs)
    weight = weights.sum()
    if sharded:
        # Every member of a group has summed over the tokens of all.
        objective, nll = objective / split.parts, nll / split.parts
        objective, nll, weight = jax.lax.psum((objective, nll, weight), _TOKEN_AXES)
    if not with_grads:
        return objective, nll, weight
    if sharded:
        d_kernel = split.scatter_kernel(d_kernel)
        d_kernel = jax.lax.psum(d_kernel, tuple(a for a in _TOKEN_AXES if a != RULES["embed"]))
    d_hidden = d_hidden.reshape(-1, channels)[:tokens].reshape(hidden.shape)
    return objective, nll, weight, d_hidden, d_kernel


def _run(hidden, kernel, targets, weights, z_loss, chunk, parts, with_grads):
    sharded = on_mesh()
    devices = math.prod(current_mesh().shape[axis] for axis in _TOKEN_AXES) if sharded else 1
    local = functools.partial(
        _per_device,
        z_loss=z_loss,
        chunk=chunk,
        split=vocab_split(targets.size // devices, kernel.shape[1], parts),
        sharded=sharded,
        with_grads=with_grads,
    )
    if not sharded:
        return local(hidden, kernel, targets, weights)
    tokens = spec("batch", "sequence")
    activations, weight = spec("batch", "sequence", "channels"), spec("embed", "vocab")
    return jax.shard_map(
        local,
        in_specs=(activations, weight, tokens, tokens),
        out_specs=(jax.P(),) * 3 + ((activations, weight) if with_grads else ()),
        check_vma=False,  # nothing here is differentiated through; gradients are made by hand
    )(hidden, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def next_token_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    chunk: int = 1024,
    vocab_parts: int = 0,
) -> LossSums:
    """Weighted sum of −log p(target), vocabulary-parallel and chunked over tokens.

    Args:
      hidden: [B,T,D] in the compute dtype (its dtype decides the matmuls').
      kernel: float32 [D,V], sharded (`embed`, `vocab`) when a mesh is in force.
      targets: int32 [B,T]. weights: float32 [B,T], 0 where a token carries no loss.
      z_loss: factor of the squared log-normaliser (PaLM §5 uses 1e-4), 0 for none.
      chunk: tokens whose logits exist at one time; a device holds their logits in its columns, 6
        bytes each. Larger chunks read and write the gradient of the kernel less often.
      vocab_parts: neighbours along `fsdp` that divide the vocabulary among them, each holding
        V/(tensor·vocab_parts) columns, with 6·D bytes of kernel and gradient for each; 0: the
        number that moves the fewest bytes, `vocab_split.best_parts`.

    Returns:
      `LossSums`, of which `objective` is differentiable in `hidden` and `kernel`.

    Raises:
      UserError: `vocab_parts` does not divide the `fsdp` axis.
    """
    return LossSums(*_run(hidden, kernel, targets, weights, z_loss, chunk, vocab_parts, False))


def _forward(hidden, kernel, targets, weights, z_loss, chunk, vocab_parts):
    out = _run(hidden, kernel, targets, weights, z_loss, chunk, vocab_parts, with_grads=True)
    return LossSums(*out[:3]), out[3:]


def _backward(z_loss, chunk, vocab_parts, gradients, cotangent):
    del z_loss, chunk, vocab_parts
    d_hidden, d_kernel = gradients
    scale = cotangent.objective
    return (d_hidden * scale.astype(d_hidden.dtype), d_kernel * scale, None, None)


next_token_loss.defvjp(_forward, _backward)
