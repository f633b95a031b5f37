"""Attention in plain jnp: the reference every kernel is judged by, and a memory-lean form of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_jax.parallel import on_mesh

# Large enough that exp underflows to 0 in float32, small enough that differences stay finite.
MASKED = -1e30


def attention_mask(
    q_index: jax.Array,
    k_index: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
) -> jax.Array:
    """Which keys each query sees: bool [B or 1, T, S].

    Causal by slot index, limited to `window` slots, and to keys of the same nonzero segment.
    """
    distance = q_index[:, :, None] - k_index[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None:
        mask &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return mask


def _attend(q, k, v, mask, scale, dropout_rate=0.0, dropout_key=None):
    """q [B,T,N,H], k, v [B,S,N,H], mask [B or 1,T,S] -> [B,T,N,H]."""
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


def reference_attention(
    q, k, v, q_index, k_index, q_segments, k_segments, *, window, scale, dropout_rate, dropout_key
):
    """Materialises all scores [B,N,T,S]; k and v have as many heads as q.

    q_index int32 [B or 1,T] and k_index int32 [1,S] are slots; the rest as in
    `kernels.dispatch.attention`.
    """
    mask = attention_mask(q_index, k_index, q_segments, k_segments, window)
    return _attend(q, k, v, mask, scale, dropout_rate, dropout_key)


def chunked_attention(
    q, k, v, q_index, k_index, q_segments, k_segments, *, window, scale, chunk: int
):
    """As the reference, `chunk` queries at a time: O(chunk · S) memory, forward and backward.

    Each chunk sees all keys, so its softmax is exact; the backward pass recomputes the scores.
    """
    length = q.shape[1]
    q_index = jnp.broadcast_to(q_index, (q_index.shape[0], length))
    pad = -length % chunk
    n = (length + pad) // chunk

    def split(x):  # [B,T,...] -> [n,B,chunk,...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def one(_, piece):
        q_piece, index, segments = piece
        mask = attention_mask(index, k_index, segments, k_segments, window)
        return None, _attend(q_piece, k, v, mask, scale)

    segments = None if q_segments is None else split(q_segments)
    _, out = jax.lax.scan(one, None, (split(q), split(q_index), segments))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], n * chunk, *out.shape[3:])[:, :length]
