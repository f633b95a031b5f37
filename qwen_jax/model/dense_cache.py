"""A KV cache as one dense block of slots per row, for whole batches that decode side by side.

Serving uses pages instead (`model/paged.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.model.config import ModelConfig
from qwen_jax.parallel import context_size, spec


class KVCache(NamedTuple):
    """Keys (already rotated) and values of earlier tokens, one dense block of slots per row.

    Padding of a ragged prompt stands on the right: its slots are written over by the next tokens.
    The caller sees to it that length + new tokens never exceed the slots.

    Attributes:
      keys, values: [L,B,S,K,H].
      segments: int32 [B,S], 0 where a slot is empty or padding.
      length: int32 [B], slots in use; the next token of row b goes into slot length[b].
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    length: jax.Array


def init_cache(config: ModelConfig, batch: int, slots: int, dtype=jnp.bfloat16) -> KVCache:
    """An empty cache of `slots` tokens for each of `batch` rows."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    axes = ("layers", "batch", None, "kv_heads", "head_dim")
    return KVCache(
        keys=jnp.zeros(shape, dtype, out_sharding=spec(*axes)),
        values=jnp.zeros(shape, dtype, out_sharding=spec(*axes)),
        segments=jnp.zeros((batch, slots), jnp.int32, out_sharding=spec("batch", None)),
        length=jnp.zeros((batch,), jnp.int32, out_sharding=spec("batch")),
    )


def check_room(cache: KVCache, length: int) -> None:
    """Refuses more tokens than there are slots, and a mesh that spreads the sequence.

    Raises:
      UserError: one of the two.
    """
    if length > cache.segments.shape[1]:
        raise UserError(
            f"{length} new tokens don't fit in a cache of {cache.segments.shape[1]} slots; make a "
            "larger one"
        )
    if context_size() > 1:
        raise UserError("a KV cache needs mesh.context=1; use fsdp, data or tensor instead")


def append(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `new` [B,T,…] into `cache` [B,S,…] at slot `start` [B] of each row."""

    def row(cache, new, start):
        index = (start,) + (0,) * (cache.ndim - 1)
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), index)

    return jax.vmap(row)(cache, new, start)


def attend_cached(q, k, v, layer, segments, slots_segments, start, **how):
    """Writes a layer's new keys and values into its cache and attends to all of it.

    Args:
      q: [B,T,N,H]; k, v: [B,T,K,H].
      layer: (keys, values) [B,S,K,H] of this layer.
      segments: int32 [B,T] of the new tokens; slots_segments: int32 [B,S] with them in.
      start: int32 [B], slot of the first new token.
      **how: as `kernels.attention` takes it.

    Returns:
      ([B,T,N,H], (keys, values) with the new tokens in).
    """
    keys, values = append(layer[0], k, start), append(layer[1], v, start)
    out = attention(
        *(q, keys.astype(k.dtype), values.astype(v.dtype)),
        q_segments=segments,
        k_segments=slots_segments,
        q_start=start,
        **how,
    )
    return out, (keys, values)
