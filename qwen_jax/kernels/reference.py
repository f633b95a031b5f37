"""Reference attention in plain jnp: materialises all scores. Kernels are tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import MASKED, visible
from qwen_jax.parallel import on_mesh


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_slots: jax.Array,
    k_slots: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    window: jax.Array | int | None,
    scale: float,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Computes causal attention from the full matrix of scores [B, N, T, S].

    Args:
      q: [B, T, N, H] (batch, queries, heads, head dimension).
      k: keys [B, S, N, H] (S keys), with as many heads as q.
      v: values [B, S, N, H].
      q_slots: position of each query in the sequence, int32 [B or 1, T]; a query attends to keys in
        slots up to its own.
      k_slots: position of each key, int32 [1, S].
      q_segments: segment id of each query, int32 [B, T]; None: one segment. A query attends only to
        keys of its own segment; segment 0 is padding and never attended to.
      k_segments: segment id of each key, int32 [B, S], or None.
      window: a query attends to at most this many slots, its own included; None: all.
      scale: factor on q·k.
      dropout_rate: probability of dropping an attention weight; 0: no dropout.
      dropout_key: PRNG key for dropout; may be None without it.

    Returns:
      [B, T, N, H] in v's dtype, softmax in float32; queries without a visible key give 0.
    """
    mask = visible(q_slots, k_slots, q_segments, k_segments, window)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * scale, MASKED), axis=-1)
    if dropout_rate:
        assert dropout_key is not None
        sharding = jax.typeof(weights).sharding.spec if on_mesh() else None
        keep = jax.random.bernoulli(
            dropout_key, 1 - dropout_rate, weights.shape, out_sharding=sharding
        )
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)
    # A query without a visible key has equal scores everywhere; its output is 0, not the mean of v.
    return jnp.where(mask.any(axis=-1)[:, :, None, None], out, 0)
