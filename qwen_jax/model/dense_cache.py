"""A KV cache as one dense block of slots per row, for whole batches that decode together.

The engine uses pages instead (`model/paged.py`). Letters in shapes: L layers, B batch rows, S cache
slots per row, T new tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.model.config import ModelConfig
from qwen_jax.parallel import context_size, spec


class KVCache(NamedTuple):
    """Rotated keys, and values, of earlier tokens, in one dense block of slots per row.

    Ragged prompts are padded on the right: the slots of padding are overwritten by the next tokens.
    The caller makes sure that length + new tokens never exceed the slots.

    Attributes:
      keys: [L, B, S, K, H].
      values: [L, B, S, K, H].
      segments: int32 [B, S], segment id of each slot, 0 where it is empty or padding.
      length: int32 [B], slots in use; the next token of row b is written to slot length[b].
    """

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    length: jax.Array


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.bfloat16) -> KVCache:
    """Returns an empty cache of `slots` tokens for each of `batch` rows, initialised sharded."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    axes = ("layers", "batch", None, "kv_heads", "head_dim")
    return KVCache(
        keys=jnp.zeros(shape, dtype, out_sharding=spec(*axes)),
        values=jnp.zeros(shape, dtype, out_sharding=spec(*axes)),
        segments=jnp.zeros((batch, slots), jnp.int32, out_sharding=spec("batch", None)),
        length=jnp.zeros((batch,), jnp.int32, out_sharding=spec("batch")),
    )


def check_capacity(cache: KVCache, length: int) -> None:
    """Checks that `length` new tokens can fit and that the mesh does not shard the sequence.

    Raises:
      UserError: otherwise.
    """
    if length > cache.segments.shape[1]:
        raise UserError(
            f"{length} new tokens don't fit in a cache of {cache.segments.shape[1]} slots; make a "
            "larger one"
        )
    if context_size() > 1:
        raise UserError("a KV cache needs mesh.context=1; use fsdp, data or tensor instead")


def append(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Returns cache [B, S, …] with `new` [B, T, …] written from slot `start` [B] of each row."""

    def row(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        index = (start,) + (0,) * (cache.ndim - 1)
        return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), index)

    return jax.vmap(row)(cache, new, start)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_cache: tuple[jax.Array, jax.Array],
    segments: jax.Array,
    slot_segments: jax.Array,
    start: jax.Array,
    **how: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes a layer's new keys and values into its cache and attends to all of it.

    Args:
      q: [B, T, N, H], queries of the new tokens.
      k: [B, T, K, H], their keys.
      v: [B, T, K, H], their values.
      layer_cache: (keys, values) of this layer, [B, S, K, H] each.
      segments: int32 [B, T], segment ids of the new tokens.
      slot_segments: int32 [B, S], segment ids of all slots, the new tokens included.
      start: int32 [B], slot of the first new token.
      **how: further keyword arguments of `kernels.attention`.

    Returns:
      (output [B, T, N, H], (keys, values) with the new tokens written).
    """
    keys, values = append(layer_cache[0], k, start), append(layer_cache[1], v, start)
    out = attention(
        q,
        keys.astype(k.dtype),
        values.astype(v.dtype),
        q_segments=segments,
        k_segments=slot_segments,
        q_start=start,
        **how,
    )
    return out, (keys, values)
