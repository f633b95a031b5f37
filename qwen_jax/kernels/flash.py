"""Interface of flash-attention kernels (`FlashKernel`), made differentiable by `flash_attention`.

A kernel is a pair of functions, forward and backward, on device-local arrays. The forward function
also returns the log-sum-exp of each query's scores. Results over disjoint sets of keys can then be
merged (`merge`), and the backward pass of any part needs only the log-sum-exp of the whole: ring
attention and decoding use the same pair. FlashAttention-2 (arXiv:2307.08691), §3.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.mask import MASKED, Mask

OUTPUT, NORMALIZER = "attention", "attention_lse"
"""Checkpoint names of a kernel's output and of its log-sum-exp, for remat policies."""

KernelForward: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, Mask, float], tuple[jax.Array, jax.Array]
]
"""Type of `FlashKernel.forward`."""
KernelBackward: TypeAlias = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""Type of `FlashKernel.backward`."""


@dataclasses.dataclass(frozen=True)
class FlashKernel:
    """Attention kernel: a forward and a backward function on device-local arrays.

    Shapes: B batch rows, T queries, S keys, N query heads, K kv heads (N a multiple of K), H head
    dimension.

    Attributes:
      name: name of the implementation, for logs.
      forward: computes attention: (q [B, T, N, H], k [B, S, K, H], v [B, S, K, H], mask, scale) ->
        (out [B, T, N, H] in q's dtype, lse float32 [B, N, T], natural logarithm). A query without
        visible keys has out 0 and lse `MASKED`.
      backward: computes gradients: (q, k, v, mask, scale, lse, d_out [B, T, N, H], delta float32
        [B, N, T], grad_dtype) -> (dq, dk, dv) in grad_dtype, or in the dtypes of q, k and v if
        grad_dtype is None. With s = scale·q·k, p = exp(s - lse) where visible and 0 elsewhere, and
        ds = p·(d_out·v - delta): dq = scale·ds·k, dk = scale·dsᵀ·q, dv = pᵀ·d_out. lse and delta
        may be those of attention over more keys than the k passed (ring attention).
    """

    name: str
    forward: KernelForward
    backward: KernelBackward


def row_delta(out: jax.Array, d_out: jax.Array, d_lse: jax.Array | None = None) -> jax.Array:
    """Computes the term that the softmax's gradient subtracts from d_out·v: Σ_H out·d_out - d_lse.

    Args:
      out: attention output [B, T, N, H] (batch, queries, heads, head dimension).
      d_out: its gradient, same shape.
      d_lse: gradient of the log-sum-exp, float32 [B, N, T]; None: zero.

    Returns:
      float32 [B, N, T].
    """
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32)
    return delta if d_lse is None else delta - d_lse


_Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, Mask, jax.Array, jax.Array]
"""(q, k, v, mask, out, lse) of a forward pass, as the backward pass needs them."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, kernel: FlashKernel
) -> tuple[jax.Array, jax.Array]:
    """Computes attention with a kernel; differentiable in q, k and v through both results.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: which keys a query sees.
      scale: factor on q·k.
      kernel: the implementation.

    Returns:
      (out [B, T, N, H] in q's dtype, lse float32 [B, N, T]): the output and the natural logarithm
      of the sum of exponentiated scores; 0 and `MASKED` for a query without visible keys.
    """
    return kernel.forward(q, k, v, mask, scale)


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, kernel: FlashKernel
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    """Returns ((out, lse), residuals): the forward rule of `flash_attention`."""
    out, lse = kernel.forward(q, k, v, mask, scale)
    # Named here, before they become residuals: if a remat policy saves both, the backward pass does
    # not run the forward kernel again.
    out, lse = checkpoint_name(out, OUTPUT), checkpoint_name(lse, NORMALIZER)
    return (out, lse), (q, k, v, mask, out, lse)


def _flash_backward(
    scale: float,
    kernel: FlashKernel,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Returns the gradients of (q, k, v, mask), None for the mask: the backward rule.

    Args:
      scale: factor on q·k.
      kernel: the implementation.
      residuals: (q, k, v, mask, out, lse) of the forward pass.
      cotangents: gradients of (out, lse).
    """
    q, k, v, mask, out, lse = residuals
    d_out, d_lse = cotangents
    delta = row_delta(out, d_out, d_lse)
    d_out = d_out.astype(q.dtype)
    dq, dk, dv = kernel.backward(q, k, v, mask, scale, lse, d_out, delta, None)
    return dq, dk, dv, None


flash_attention.defvjp(_flash_forward, _flash_backward)


def merge(
    out: jax.Array, lse: jax.Array, other_out: jax.Array, other_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Combines attention over two disjoint sets of keys into attention over their union.

    Args:
      out: output over one set, float32 [B, T, N, H] (batch, queries, heads, head dimension).
      lse: its log-sum-exp, float32 [B, N, T]; `MASKED` where a query sees no key of the set.
      other_out: output over the other set, shape as `out`.
      other_lse: its log-sum-exp, shape as `lse`.

    Returns:
      (out, lse) over the union, in the same shapes.
    """
    highest = jnp.maximum(lse, other_lse)
    a, b = jnp.exp(lse - highest), jnp.exp(other_lse - highest)
    total = a + b
    weights = (jnp.moveaxis(x / total, 1, 2)[..., None] for x in (a, b))
    merged = jnp.asarray(sum(w * x for w, x in zip(weights, (out, other_out), strict=True)))
    has_keys = highest > MASKED / 2
    return merged, jnp.where(has_keys, highest + jnp.log(total), MASKED)
