"""Attention in plain jnp, all scores at once: what every kernel is judged by."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import MASKED, visible
from qwen_jax.parallel import on_mesh


def reference_attention(
    q, k, v, q_slots, k_slots, q_segments, k_segments, *, window, scale, dropout_rate, dropout_key
):
    """Materialises all scores [B,N,T,S]; q [B,T,N,H], k and v [B,S,N,H], with as many heads.

    q_slots int32 [B or 1,T] and k_slots int32 [1,S]; the rest as in `kernels.dispatch.attention`.
    """
    mask = visible(q_slots, k_slots, q_segments, k_segments, window)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * scale, MASKED), axis=-1)
    if dropout_rate:
        sharding = jax.typeof(weights).sharding.spec if on_mesh() else None
        keep = jax.random.bernoulli(
            dropout_key, 1 - dropout_rate, weights.shape, out_sharding=sharding
        )
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v)
    # A row without any key has the same score everywhere; its answer is 0, not the mean of v.
    return jnp.where(mask.any(axis=-1)[:, :, None, None], out, 0)
