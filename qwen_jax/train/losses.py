"""Next-token loss over a large vocabulary, without ever holding the logits.

At Qwen's 151,936 rows the float32 logits of one 2,048-token sequence are 1.16 GiB. Here tokens are
taken a chunk at a time: the chunk's logits are formed, turned into loss *and* into gradients, and
dropped. Because the loss is a sum over tokens, gradients with respect to hidden states and kernel
need nothing from later, so the forward pass makes them and the backward pass only scales them:
three products of tokens × D × V in all, as many as the plain form that keeps every logit.
The vocabulary may be split over the `tensor` axis; the kernel is split over `fsdp` at rest.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen_jax.parallel import RULES, on_mesh, spec

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


def _chunk_loss(hidden, kernel, targets, weights, z_loss, vocab_axis, offset):
    """One chunk, hidden [c,D], against this device's columns of the kernel [D,v].

    Returns (Σ objective, Σ nll) and d objective/d logits, float32 [c,v].
    """
    logits = jnp.einsum("CD,DV->CV", hidden, kernel, preferred_element_type=jnp.float32)
    highest = logits.max(axis=-1)
    if vocab_axis:
        highest = jax.lax.pmax(highest, vocab_axis)
    exp = jnp.exp(logits - highest[:, None])
    total = exp.sum(axis=-1)
    column = targets - offset
    is_target = column[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    if vocab_axis:
        total, target_logit = jax.lax.psum((total, target_logit), vocab_axis)
    lse = jnp.log(total) + highest
    nll = lse - target_logit
    objective = nll + z_loss * jnp.square(lse)
    # d nll/d logits = softmax − onehot;  d lse²/d logits = 2·lse·softmax
    softmax_scale = weights * (1.0 + 2.0 * z_loss * lse) / total
    d_logits = exp * softmax_scale[:, None] - jnp.where(is_target, weights[:, None], 0.0)
    return (jnp.sum(weights * objective), jnp.sum(weights * nll)), d_logits


def _per_device(hidden, kernel, targets, weights, *, z_loss, chunk, dtype, sharded, with_grads):
    """Loss of this device's tokens, and gradients already summed over the mesh.

    hidden [b,t,D], kernel [D/fsdp, V/tensor] as at rest, targets, weights [b,t].
    """
    vocab_axis = RULES["vocab"] if sharded else None
    kernel = kernel.astype(dtype)
    if sharded:
        kernel = jax.lax.all_gather(kernel, RULES["embed"], axis=0, tiled=True)
    offset = jax.lax.axis_index(vocab_axis).astype(jnp.int32) * kernel.shape[1] if sharded else 0
    tokens, channels = targets.size, hidden.shape[-1]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk

    def split(x, *trailing):
        x = jnp.pad(x.reshape(tokens, *trailing), [(0, pad)] + [(0, 0)] * len(trailing))
        return x.reshape((tokens + pad) // chunk, chunk, *trailing)

    def one(carry, piece):
        h, target, weight = piece
        sums, d_logits = _chunk_loss(h, kernel, target, weight, z_loss, vocab_axis, offset)
        total, d_kernel = carry
        total = jax.tree.map(jnp.add, total, sums)
        if not with_grads:
            return (total, d_kernel), None
        d_logits = d_logits.astype(dtype)
        d_h = jnp.einsum("CV,DV->CD", d_logits, kernel, preferred_element_type=jnp.float32)
        d_kernel += jnp.einsum("CD,CV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return (total, d_kernel), d_h

    zero = jnp.zeros((), jnp.float32)
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if with_grads else zero
    pieces = (split(hidden, channels), split(targets), split(weights))
    ((objective, nll), d_kernel), d_hidden = jax.lax.scan(one, ((zero, zero), d_kernel), pieces)
    weight = weights.sum()
    if sharded:
        objective, nll, weight = jax.lax.psum((objective, nll, weight), _TOKEN_AXES)
    if not with_grads:
        return objective, nll, weight
    if sharded:
        d_hidden = jax.lax.psum(d_hidden, vocab_axis)
        d_kernel = jax.lax.psum_scatter(d_kernel, RULES["embed"], scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in _TOKEN_AXES if axis != RULES["embed"])
        d_kernel = jax.lax.psum(d_kernel, others)
    d_hidden = d_hidden.reshape(-1, channels)[:tokens].reshape(hidden.shape).astype(hidden.dtype)
    return objective, nll, weight, d_hidden, d_kernel


def _run(hidden, kernel, targets, weights, z_loss, chunk, with_grads):
    local = functools.partial(
        _per_device,
        z_loss=z_loss,
        chunk=chunk,
        dtype=hidden.dtype,
        sharded=on_mesh(),
        with_grads=with_grads,
    )
    if not on_mesh():
        return local(hidden, kernel, targets, weights)
    tokens = spec("batch", "sequence")
    activations, weight = spec("batch", "sequence", "channels"), spec("embed", "vocab")
    return jax.shard_map(
        local,
        in_specs=(activations, weight, tokens, tokens),
        out_specs=(jax.P(),) * 3 + ((activations, weight) if with_grads else ()),
        check_vma=False,  # nothing here is differentiated through; gradients are made by hand
    )(hidden, kernel, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def next_token_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> LossSums:
    """Weighted sum of −log p(target), vocabulary-parallel and chunked over tokens.

    Args:
      hidden: [B,T,D] in the compute dtype (its dtype decides the matmuls').
      kernel: float32 [D,V], sharded (`embed`, `vocab`) when a mesh is in force.
      targets: int32 [B,T]. weights: float32 [B,T], 0 where a token carries no loss.
      z_loss: factor of the squared log-normaliser (PaLM §5 uses 1e-4), 0 for none.
      chunk: tokens per device whose logits exist at one time: chunk · V/tensor · 4 bytes.

    Returns:
      `LossSums`, of which `objective` is differentiable in `hidden` and `kernel`.
    """
    return LossSums(*_run(hidden, kernel, targets, weights, z_loss, chunk, with_grads=False))


def _forward(hidden, kernel, targets, weights, z_loss, chunk):
    out = _run(hidden, kernel, targets, weights, z_loss, chunk, with_grads=True)
    return LossSums(*out[:3]), out[3:]


def _backward(z_loss, chunk, gradients, cotangent):
    del z_loss, chunk
    d_hidden, d_kernel = gradients
    scale = cotangent.objective
    return (d_hidden * scale.astype(d_hidden.dtype), d_kernel * scale, None, None)


next_token_loss.defvjp(_forward, _backward)
