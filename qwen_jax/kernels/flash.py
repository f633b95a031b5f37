"""The contract of a block kernel, and the one place where it becomes differentiable.

An implementation is a pair of functions on device-local arrays. The forward pass also returns the
log-sum-exp of each query's scores, so partial results over different keys can be merged (`merge`)
and the backward pass of any part needs nothing but the total's log-sum-exp: ring attention and
decoding build on the same pair. FlashAttention-2 (arXiv:2307.08691), §3.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.mask import MASKED, Mask

OUTPUT, NORMALIZER = "attention", "attention_lse"
"""Names under which remat policies know a kernel's output and its log-sum-exp."""


@dataclasses.dataclass(frozen=True)
class FlashKernel:
    """An attention kernel. N query heads, K kv heads, N a multiple of K; all arrays device-local.

    Attributes:
      name: what the log calls it.
      forward: (q [B,T,N,H], k [B,S,K,H], v [B,S,K,H], mask: Mask, scale: float) ->
        (out [B,T,N,H] in q's dtype, lse float32 [B,N,T], natural log). A query that sees no key has
        out 0 and lse `MASKED`.
      backward: (q, k, v, mask, scale, lse, d_out [B,T,N,H], delta float32 [B,N,T], grad_dtype) ->
        (dq, dk, dv) in grad_dtype (None: the dtypes of q, k, v). With s = scale·q·k,
        p = exp(s − lse) where seen and 0 elsewhere, ds = p·(d_out·v − delta):
        dq = scale·ds·k, dk = scale·dsᵀ·q, dv = pᵀ·d_out. lse and delta may belong to more keys than
        those given.
    """

    name: str
    forward: Callable
    backward: Callable


def row_delta(out: jax.Array, d_out: jax.Array, d_lse: jax.Array | None = None) -> jax.Array:
    """Σ_H out·d_out − d_lse, float32 [B,N,T]: what the softmax's gradient subtracts."""
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32)
    return delta if d_lse is None else delta - d_lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, kernel: FlashKernel
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) as `FlashKernel.forward`, differentiable in q, k, v through both results."""
    return kernel.forward(q, k, v, mask, scale)


def _forward(q, k, v, mask, scale, kernel):
    out, lse = kernel.forward(q, k, v, mask, scale)
    # Named here and not by the caller: with both kept, the backward pass never runs forward again.
    out, lse = checkpoint_name(out, OUTPUT), checkpoint_name(lse, NORMALIZER)
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(scale, kernel, residuals, cotangents):
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    delta = row_delta(out, d_out, d_lse)
    d_out = d_out.astype(q.dtype)
    return *kernel.backward(q, k, v, mask, scale, lse, d_out, delta, None), None


flash_attention.defvjp(_forward, _backward)


def merge(
    out: jax.Array, lse: jax.Array, other_out: jax.Array, other_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    out, other_out: float32 [B,T,N,H]; lse, other_lse: float32 [B,N,T].
    """
    highest = jnp.maximum(lse, other_lse)
    a, b = jnp.exp(lse - highest), jnp.exp(other_lse - highest)
    total = a + b
    weights = (jnp.moveaxis(x / total, 1, 2)[..., None] for x in (a, b))
    merged = sum(w * x for w, x in zip(weights, (out, other_out), strict=True))
    seen = highest > MASKED / 2
    return merged, jnp.where(seen, highest + jnp.log(total), MASKED)
