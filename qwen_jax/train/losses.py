"""Losses and log-probabilities over a large vocabulary, computed without holding the logits.

At Qwen's 151,936 vocabulary entries the float32 logits of one 2,048-token sequence take 1.16 GiB.
Here tokens are processed one chunk at a time: the logits of a chunk are computed, turned into loss
*and* gradients (or log-probabilities), and dropped. Because the loss is a sum over tokens, its
gradients with respect to hidden states and output projection are final as soon as a chunk is done,
so the forward pass computes them and the backward pass only scales them: three matrix products of
tokens × D × V in all (D: hidden size, V: vocabulary size), as many as the plain form that keeps
every logit. Devices split the vocabulary as described in `vocab_split`.

`next_token_loss` is a weighted sum of negative log-probabilities; `logprob_loss` is any function of
the log-probabilities of given tokens, such as a DPO or policy-gradient loss; `token_logprobs` are
those log-probabilities without a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cpu_matmul import matmul_f32
from qwen_jax.parallel import current_mesh, mesh_axes, mesh_axis, on_mesh, spec
from qwen_jax.train.vocab_split import VocabSplit, vocab_split

_TOKEN_AXES = (*mesh_axes("batch"), *mesh_axes("sequence"))
_PADDING_LOGIT = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenSums:
    """Sums over the tokens that carry loss, all float32 scalars.

    Attributes:
      objective: Σ weight·(nll + z_loss·lse²) in nats, where nll is −log p(target) and lse the
        log-normaliser of the softmax; the differentiable sum.
      nll: Σ weight·nll in nats; not differentiable.
      weight: Σ weight; not differentiable.
    """

    objective: jax.Array
    nll: jax.Array
    weight: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def next_token_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    chunk: int = 1024,
    vocab_parts: int = 0,
) -> NextTokenSums:
    """Computes the weighted sum of −log p(target), vocabulary-parallel and in chunks of tokens.

    Shapes: B batch, T sequence, D hidden size, V vocabulary size.

    Args:
      hidden: [B, T, D] in the compute dtype, in which the matrix products run.
      kernel: float32 [D, V], the output projection, sharded (`embed`, `vocab`) under a mesh.
      targets: int32 [B, T], the token ids to predict.
      weights: float32 [B, T], factor of each token's loss; 0 where a token carries none, negative
        where its log-probability is to be lowered.
      z_loss: factor of the squared log-normaliser (PaLM §5 uses 1e-4); 0 adds none.
      chunk: number of tokens whose logits exist at one time. A device holds their logits in its
        columns, 6 bytes each. Larger chunks read and write the gradient of the kernel less often.
      vocab_parts: number of neighbours along the mesh axis `fsdp` that split the vocabulary, each
        holding V/(tensor·vocab_parts) columns with 6·D bytes of kernel and gradient per column; 0
        selects the number that moves the fewest bytes (`vocab_split.best_parts`).

    Returns:
      The sums; `objective` is differentiable in `hidden` and `kernel`.

    Raises:
      UserError: `vocab_parts` does not divide the `fsdp` axis.
    """
    sums = _run_loss(hidden, kernel, targets, weights, z_loss, chunk, vocab_parts, with_grads=False)
    return NextTokenSums(*sums)


def _next_token_forward(hidden, kernel, targets, weights, z_loss, chunk, vocab_parts):
    """Forward rule of `next_token_loss`: its sums, and both gradients as residuals."""
    objective, nll, weight, *gradients = _run_loss(
        hidden, kernel, targets, weights, z_loss, chunk, vocab_parts, with_grads=True
    )
    return NextTokenSums(objective, nll, weight), tuple(gradients)


def _next_token_backward(z_loss, chunk, vocab_parts, gradients, cotangent):
    """Backward rule of `next_token_loss`: scales the gradients of the forward pass."""
    del z_loss, chunk, vocab_parts
    return (*_scale(gradients, cotangent.objective), None, None)


next_token_loss.defvjp(_next_token_forward, _next_token_backward)


def token_logprobs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    chunk: int = 1024,
    vocab_parts: int = 0,
) -> jax.Array:
    """Computes log p(target) of every token, chunked and vocabulary-parallel like the loss.

    Not differentiable; `logprob_loss` is.

    Args:
      hidden: [B, T, D] (batch, sequence, hidden size) in the compute dtype.
      kernel: float32 [D, V] (V: vocabulary size), the output projection.
      targets: int32 [B, T], the token ids whose log-probabilities are returned.
      chunk: number of tokens whose logits exist at one time.
      vocab_parts: as in `next_token_loss`.

    Returns:
      float32 [B, T], in nats.

    Raises:
      UserError: `vocab_parts` does not divide the `fsdp` axis.
    """
    hidden, kernel = jax.lax.stop_gradient((hidden, kernel))
    split, sharded = _split_here(targets, kernel, vocab_parts)
    local = functools.partial(_device_logprobs, chunk=chunk, split=split)
    if not sharded:
        return local(hidden, kernel, targets)
    tokens = spec("batch", "sequence")
    return jax.shard_map(
        local,
        in_specs=(spec("batch", "sequence", "channels"), spec("embed", "vocab"), tokens),
        out_specs=tokens,
        check_vma=False,
    )(hidden, kernel, targets)


def logprob_loss(
    loss: Callable[[jax.Array], tuple[jax.Array, Any]],
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    chunk: int = 1024,
    vocab_parts: int = 0,
) -> tuple[jax.Array, Any]:
    """Computes a differentiable loss of the targets' log-probabilities in two vocabulary passes.

    The first pass computes the log-probabilities without a gradient; `loss` and its gradient g with
    respect to them follow; the second pass, which runs only when the result is differentiated, is
    `next_token_loss` with the weights −g, whose gradient is that of `loss`.

    Args:
      loss: maps the log-probabilities float32 [B, T] (batch, sequence) to a float32 scalar and
        auxiliary results that are not differentiated. It may be any differentiable function, also
        of several tokens together.
      hidden: [B, T, D] (D: hidden size) in the compute dtype.
      kernel: float32 [D, V] (V: vocabulary size), the output projection.
      targets: int32 [B, T], the token ids.
      chunk: number of tokens whose logits exist at one time.
      vocab_parts: as in `next_token_loss`.

    Returns:
      The scalar, differentiable in `hidden` and `kernel` through the log-probabilities, and the
      auxiliary results.
    """
    logprobs = token_logprobs(hidden, kernel, targets, chunk, vocab_parts)
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    weights = jax.lax.stop_gradient(-gradient)
    return _with_gradient(value, hidden, kernel, targets, weights, chunk, vocab_parts), aux


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _with_gradient(value, hidden, kernel, targets, weights, chunk, vocab_parts):
    """Returns the scalar `value`, whose gradient is that of `next_token_loss` with `weights`."""
    del hidden, kernel, targets, weights, chunk, vocab_parts
    return value


def _with_gradient_forward(value, hidden, kernel, targets, weights, chunk, vocab_parts):
    """Forward rule of `_with_gradient`: `value`, and the gradients of the loss as residuals."""
    *_, d_hidden, d_kernel = _run_loss(
        hidden, kernel, targets, weights, 0.0, chunk, vocab_parts, with_grads=True
    )
    return value, (d_hidden, d_kernel)


def _with_gradient_backward(chunk, vocab_parts, gradients, cotangent):
    """Backward rule of `_with_gradient`: scales the gradients of the forward pass."""
    del chunk, vocab_parts
    return (cotangent, *_scale(gradients, cotangent), None, None)


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _scale(gradients: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiplies the gradients of hidden states and kernel by a float32 scalar, keeping dtypes."""
    d_hidden, d_kernel = gradients
    return d_hidden * scale.astype(d_hidden.dtype), d_kernel * scale


# --- over all devices ------------------------------------------------------------------------


def _split_here(targets: jax.Array, kernel: jax.Array, parts: int) -> tuple[VocabSplit, bool]:
    """Returns how the current mesh splits the vocabulary, and whether there is a mesh.

    Args:
      targets: [B, T], for the number of tokens per device.
      kernel: [D, V], for the vocabulary size.
      parts: neighbours along `fsdp` that split the vocabulary; 0 selects the best number.
    """
    sharded = on_mesh()
    devices = math.prod(current_mesh().shape[axis] for axis in _TOKEN_AXES) if sharded else 1
    return vocab_split(targets.size // devices, kernel.shape[1], parts), sharded


def _run_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    chunk: int,
    parts: int,
    *,
    with_grads: bool,
) -> tuple[jax.Array, ...]:
    """Computes (objective, nll, weight) and, with `with_grads`, their gradients.

    Arguments are those of `next_token_loss`. The gradients of the objective are d_hidden [B, T, D]
    in the compute dtype and d_kernel float32 [D, V], both sharded as their arguments.
    """
    split, sharded = _split_here(targets, kernel, parts)
    local = functools.partial(
        _device_loss,
        z_loss=z_loss,
        chunk=chunk,
        split=split,
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
        check_vma=False,  # nothing in here is differentiated: it computes the gradients itself
    )(hidden, kernel, targets, weights)


# --- on one device, inside shard_map ---------------------------------------------------------


def _device_loss(hidden, kernel, targets, weights, *, z_loss, chunk, split, sharded, with_grads):
    """Computes the loss of this device's tokens, and gradients already summed over the mesh.

    Args:
      hidden: [b, t, D], this device's tokens in the compute dtype.
      kernel: float32 [D/fsdp, V/tensor], this device's shard of the output projection.
      targets: int32 [b, t].
      weights: float32 [b, t].
      z_loss: factor of the squared log-normaliser.
      chunk: number of tokens, over all devices of a group, whose logits exist at one time.
      split: how the vocabulary is split.
      sharded: whether this runs inside `shard_map`.
      with_grads: whether gradients are computed too.

    Returns:
      (objective, nll, weight) summed over the mesh, float32 scalars; with `with_grads` followed by
      d_hidden [b, t, D] and d_kernel float32 [D/fsdp, V/tensor].
    """
    dtype, channels = hidden.dtype, hidden.shape[-1]
    kernel = split.collect_kernel(kernel.astype(dtype))

    def one(carry, piece):
        h, target, weight = piece
        h = split.collect_tokens(h, 0)
        sums, d_logits = _chunk_loss(h, kernel, target, weight, z_loss, split)
        total, d_kernel = carry
        total = jax.tree.map(jnp.add, total, sums)
        if not with_grads:
            return (total, d_kernel), None
        # Computed once and read by two products: fused into both, XLA would recompute the
        # exponentials for every tile.
        d_logits = jax.lax.optimization_barrier(d_logits.astype(dtype))
        d_h = matmul_f32("CV,DV->CD", d_logits, kernel)
        d_kernel += matmul_f32("CD,CV->DV", h, d_logits)
        return (total, d_kernel), split.scatter_tokens(d_h).astype(dtype)

    zero = jnp.zeros((), jnp.float32)
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if with_grads else zero
    xs = tuple(_chunks(chunk, split, hidden, targets, weights))
    ((objective, nll), d_kernel), d_hidden = jax.lax.scan(one, ((zero, zero), d_kernel), xs)
    weight = weights.sum()
    if sharded:
        # Every device of a group has summed over the tokens of all of them.
        objective, nll = objective / split.parts, nll / split.parts
        objective, nll, weight = jax.lax.psum((objective, nll, weight), _TOKEN_AXES)
    if not with_grads:
        return objective, nll, weight
    if sharded:
        d_kernel = split.scatter_kernel(d_kernel)
        d_kernel = jax.lax.psum(d_kernel, tuple(a for a in _TOKEN_AXES if a != mesh_axis("embed")))
    d_hidden = d_hidden.reshape(-1, channels)[: targets.size].reshape(hidden.shape)
    return objective, nll, weight, d_hidden, d_kernel


def _device_logprobs(hidden, kernel, targets, *, chunk, split):
    """Computes log p(target) of this device's tokens; arguments as in `_device_loss`.

    Returns:
      float32 [b, t].
    """
    kernel = split.collect_kernel(kernel.astype(hidden.dtype))

    def one(_, piece):
        h, target = piece
        softmax = _chunk_softmax(split.collect_tokens(h, 0), kernel, target, split)
        return None, split.own_tokens(softmax.target_logit - softmax.lse)

    _, logprobs = jax.lax.scan(one, None, tuple(_chunks(chunk, split, hidden, targets)))
    return logprobs.reshape(-1)[: targets.size].reshape(targets.shape)


def _chunks(
    chunk: int, split: VocabSplit, hidden: jax.Array, *per_token: jax.Array
) -> Iterator[jax.Array]:
    """Yields arrays of this device's tokens cut into chunks, to be scanned over together.

    Args:
      chunk: tokens per chunk over all devices of a group (`split.parts` of them).
      split: how the vocabulary is split; decides how many devices form a group.
      hidden: [b, t, D], of which each device keeps its own: yields [n, c, D] for n chunks of c
        tokens, the last one padded with zeros.
      *per_token: [b, t] arrays of numbers, small enough to collect for all chunks at once: yields
        [n, parts·c], the tokens of the group.
    """
    tokens = hidden.shape[0] * hidden.shape[1]
    size = min(-(-chunk // split.parts), tokens)
    pad = -tokens % size

    def pieces(x, *trailing):
        x = jnp.pad(x.reshape(tokens, *trailing), [(0, pad)] + [(0, 0)] * len(trailing))
        return x.reshape((tokens + pad) // size, size, *trailing)

    yield pieces(hidden, hidden.shape[-1])
    for x in per_token:
        yield split.collect_tokens(pieces(x), 1)


class _ChunkSoftmax(NamedTuple):
    """Softmax statistics of one chunk of C tokens, V' of the columns being on this device.

    Attributes:
      exp: float32 [C, V'], exp(logit − local_max).
      is_target: bool [C, V'], whether a column is the token's target.
      local_max: float32 [C], highest logit among this device's columns.
      max: float32 [C], highest logit of all columns.
      total: float32 [C], Σ exp(logit − max) over all columns.
      target_logit: float32 [C], logit of the target.
    """

    exp: jax.Array
    is_target: jax.Array
    local_max: jax.Array
    max: jax.Array
    total: jax.Array
    target_logit: jax.Array

    @property
    def lse(self) -> jax.Array:
        """Log-normaliser of the softmax, float32 [C]."""
        return jnp.log(self.total) + self.max


def _chunk_softmax(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, split: VocabSplit
) -> _ChunkSoftmax:
    """Computes the softmax statistics of one chunk, merged over the devices that split V.

    Args:
      hidden: [C, D], the chunk's tokens in the compute dtype.
      kernel: [D, V'], this device's columns of the output projection in the compute dtype.
      targets: int32 [C], vocabulary ids.
      split: how the vocabulary is split.
    """
    first, real = split.first_column()
    columns = jnp.arange(kernel.shape[-1], dtype=jnp.int32)
    logits = matmul_f32("CD,DV->CV", hidden, kernel)
    if split.padding:
        logits = jnp.where(columns < real, logits, _PADDING_LOGIT)
    own = jnp.where(targets - first < real, targets - first, -1)
    is_target = own[:, None] == columns
    local_max = logits.max(axis=-1)
    exp = jnp.exp(logits - local_max[:, None])
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    merged = split.merge(local_max, exp.sum(axis=-1), target_logit)
    return _ChunkSoftmax(exp, is_target, local_max, *merged)


def _chunk_loss(hidden, kernel, targets, weights, z_loss, split):
    """Computes loss sums and the gradient of the logits for one chunk.

    Args:
      hidden, kernel, targets, split: as in `_chunk_softmax`.
      weights: float32 [C].
      z_loss: factor of the squared log-normaliser.

    Returns:
      (Σ objective, Σ nll), float32 scalars over the chunk's tokens, and d objective/d logits,
      float32 [C, V'].
    """
    softmax = _chunk_softmax(hidden, kernel, targets, split)
    lse = softmax.lse
    nll = lse - softmax.target_logit
    objective = nll + z_loss * jnp.square(lse)
    # d nll/d logits = softmax − onehot;  d lse²/d logits = 2·lse·softmax
    scale = weights * (1.0 + 2.0 * z_loss * lse)
    scale = scale * jnp.exp(softmax.local_max - softmax.max) / softmax.total
    d_logits = softmax.exp * scale[:, None] - jnp.where(softmax.is_target, weights[:, None], 0.0)
    return (jnp.sum(weights * objective), jnp.sum(weights * nll)), d_logits
