"""Attention in plain jnp: the reference every kernel is judged by, and a memory-lean form of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_jax.parallel import spec

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


def _attend(q, k, v, mask, scale, dropout_rate, dropout_key):
    """q [B,T,K,G,H], k, v [B,S,K,H], mask [B,T,S] -> [B,T,K,G,H]."""
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, MASKED)
    scores -= jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    # Masked a second time: in a row without any key every score is the same, and must give 0.
    weights = jnp.where(mask, jnp.exp(scores), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= jnp.where(total > 0, total, 1.0)
    if dropout_rate:
        keep = jax.random.bernoulli(
            dropout_key, 1 - dropout_rate, weights.shape, out_sharding=_sharding_of(weights)
        )
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)


def _sharding_of(x):
    return jax.typeof(x).sharding.spec if spec() is not None else None


def reference_attention(
    q, k, v, q_index, k_index, q_segments, k_segments, *, window, scale, dropout_rate, dropout_key
):
    """Materialises all scores [B,N,T,S]; arguments as in `kernels.dispatch.attention`."""
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
        return None, _attend(q_piece, k, v, mask, scale, 0.0, None)

    segments = None if q_segments is None else split(q_segments)
    _, out = jax.lax.scan(one, None, (split(q), split(q_index), segments))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], n * chunk, *out.shape[3:])[:, :length]
