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

from qwen_jax.parallel import RULES, current_mesh, on_mesh, platform, spec
from qwen_jax.train import loss_chunk
from qwen_jax.train.vocab_split import vocab_split

_TOKEN_AXES = (*RULES["batch"], RULES["sequence"])


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


def _per_device(hidden, kernel, targets, weights, *, z_loss, chunk, split, sharded, with_grads):
    """Loss of this device's tokens, and gradients already summed over the mesh.

    hidden [b,t,D], kernel [D/fsdp,V/tensor] as at rest, targets, weights [b,t].
    """
    tokens, channels = targets.size, hidden.shape[-1]
    chunk_loss = loss_chunk.FORMS.get(platform()[0], loss_chunk.whole)
    if sharded or chunk_loss is loss_chunk.whole:  # what travels is cast before it does
        kernel = split.collect_kernel(kernel.astype(hidden.dtype))
    chunk = min(-(-chunk // split.parts), tokens)  # what this device adds to its group's chunk
    pad = -tokens % chunk

    def pieces(x, *trailing):
        x = jnp.pad(x.reshape(tokens, *trailing), [(0, pad)] + [(0, 0)] * len(trailing))
        return x.reshape((tokens + pad) // chunk, chunk, *trailing)

    def one(carry, piece):
        h, target, weight = piece
        total, d_kernel = carry
        h = split.collect_tokens(h, 0)
        sums, d_h, d_kernel = chunk_loss(h, kernel, d_kernel, target, weight, z_loss, split)
        total = jax.tree.map(jnp.add, total, sums)
        if with_grads:
            d_h = split.scatter_tokens(d_h).astype(hidden.dtype)
        return (total, d_kernel), d_h

    zero = jnp.zeros((), jnp.float32)
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if with_grads else None
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
