"""Writes of new tokens into the pages of a KV cache on TPU, in place.

Memory is read and written in tiles, of 16 tokens in bf16 and 32 in 8 bits, so a single token cannot
be written. Each grid step reads one tile for a few layers, inserts the tokens and writes the tile
back; the pipeline overlaps the steps. XLA's own scatter would copy the entire cache to another
layout and back: always for 8-bit pages, and for bf16 inside a loop over steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.cache import PagedCache
from qwen_jax.kernels.refs import Ref
from qwen_jax.kernels.tpu.mosaic import LANES

TILE = {4: 8, 2: 16, 1: 32}
"""Tokens of a memory tile, by bytes per element."""
_LAYERS = 4
"""Layers per grid step, if that divides the number of layers: fewer, longer copies."""


def unsupported_reason(cache: PagedCache) -> str | None:
    """Returns one clause saying why this kernel cannot write to a cache, or None if it can."""
    page, width = cache.page_size, 2 * cache.head_dim
    tile = LANES if cache.quantised else TILE[cache.pages.dtype.itemsize]
    if page % tile or width % LANES:
        return (
            f"pages of {page} tokens with heads of {cache.head_dim}; on TPU pages hold a multiple "
            f"of {tile} tokens for this cache, and heads are multiples of 64"
        )
    return None


def paged_append(
    cache: PagedCache,
    tokens: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
) -> PagedCache:
    """Returns the cache with new tokens written into their slots; arrays are local to a device.

    Token t of request r is written to slot lengths[r] + t if t < counts[r].

    Args:
      cache: the cache, updated in place if it is donated.
      tokens: keys and values side by side in the pages' dtype, [L, R, T, K, 2H] (layers, requests,
        new tokens per request, kv heads, head dimension H).
      scales: float32 [L, R, T, K, 4], the scales of 8-bit tokens; None otherwise.
      page_table: int32 [R, pages per request].
      lengths: int32 [R], tokens of each request in the cache before.
      counts: int32 [R], how many of the T tokens of each request to write.
    """
    tile = TILE[cache.pages.dtype.itemsize]
    pages = _write_tiles(cache.pages, tokens, page_table, lengths, counts, tile=tile)
    if scales is None:
        return PagedCache(pages)
    assert cache.scales is not None
    # Tokens of scales are along the lanes, so a tile has 128 of them, in the last axis.
    new_scales = _write_tiles(cache.scales, scales, page_table, lengths, counts, tile=LANES)
    return PagedCache(pages, new_scales)


def _write_tiles(
    target: jax.Array,
    new: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    *,
    tile: int,
) -> jax.Array:
    """Returns pages or scales with new tokens written into the memory tiles they belong to.

    Args:
      target: pages [L, P, K, page, 2H] or scales [L, P, K, 4, page] (layers, pages, kv heads,
        tokens per page, head dimension H).
      new: [L, R, T, K, 2H] or [L, R, T, K, 4] (R requests, T new tokens per request).
      page_table: int32 [R, pages per request].
      lengths: int32 [R], tokens of each request before.
      counts: int32 [R], tokens to write.
      tile: tokens per tile; LANES for scales, and only for them.
    """
    is_scales = tile == LANES
    layers, _, kv_heads = target.shape[:3]
    requests, steps = new.shape[1:3]
    page_size = target.shape[4 if is_scales else 3]
    tiles = (steps + tile - 2) // tile + 1  # largest number of tiles that one request writes to
    plan = _tile_plan(page_table, lengths, counts, tiles, page_size, tile)
    new = _align_to_tiles(new, lengths, tiles, tile)
    depth = next(n for n in (_LAYERS, 2, 1) if layers % n == 0)
    if is_scales:
        new, block = jnp.moveaxis(new, 2, 4), (depth, 1, kv_heads, target.shape[3], tile)
    else:
        # The kernel can address single rows of 32-bit elements, but not of narrower ones.
        wide = jnp.int32 if target.dtype == jnp.uint8 else jnp.float32
        new, block = new.swapaxes(2, 3).astype(wide), (depth, 1, kv_heads, tile, target.shape[4])

    def target_index(layer, i, plan):
        """Returns the block index of the tile that grid step i reads and writes."""
        return (layer, plan[0, i], 0, *((0, plan[1, i]) if is_scales else (plan[1, i], 0)))

    target_spec = pl.BlockSpec(block, target_index)
    new_spec = pl.BlockSpec((depth, 1, *new.shape[2:]), lambda layer, i, plan: (layer, i, 0, 0, 0))
    moved = layers * requests * tiles * kv_heads * block[3] * block[4] * target.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_append_kernel, 4 if is_scales else 3),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layers // depth, requests * tiles),
            in_specs=[new_spec, target_spec],
            out_specs=target_spec,
        ),
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * moved),
        name="paged_append",
    )(plan, new, target)


def _align_to_tiles(new: jax.Array, lengths: jax.Array, tiles: int, tile: int) -> jax.Array:
    """Returns new tokens at the positions that they take in the tiles they are written to.

    Positions outside a request's new tokens hold copies of some of them. A single new token is not
    repeated: the kernel broadcasts it over the tile.

    Args:
      new: [L, R, T, K, ·] (layers, requests, new tokens per request, kv heads).
      lengths: int32 [R], tokens of each request before.
      tiles: tiles per request.
      tile: tokens per tile.

    Returns:
      [L, R·tiles, tile, K, ·], or [L, R·tiles, 1, K, ·] if T is 1.
    """
    layers, requests, steps, kv_heads, width = new.shape
    if steps == 1:
        new = jnp.broadcast_to(new[:, :, None], (layers, requests, tiles, *new.shape[2:]))
    else:
        offsets = jnp.arange(tiles * tile) - (lengths % tile)[:, None]
        picked = jnp.clip(offsets, 0, steps - 1)[None, :, :, None, None]
        new = jnp.take_along_axis(new, picked, axis=2)
    return new.reshape(layers, requests * tiles, -1, kv_heads, width)


_PAGE, _TILE, _LOW, _HIGH, _REPEAT = range(5)
"""Rows of `_tile_plan`."""


def _tile_plan(
    page_table: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    tiles: int,
    page_size: int,
    tile: int,
) -> jax.Array:
    """Returns which tile each grid step writes, and which of its tokens.

    A step with nothing to write repeats the tile of the last step that had something to write, or,
    before the first such step, the tile of that step: any other tile might belong to another
    request, whose tokens would be overwritten with old contents.

    Args:
      page_table: int32 [R, pages per request] (R requests).
      lengths: int32 [R], tokens of each request before.
      counts: int32 [R], tokens to write.
      tiles: tiles per request; each request has as many grid steps.
      page_size: tokens per page.
      tile: tokens per tile.

    Returns:
      int32 [5, R·tiles]. Rows: page; tile within the page; first token of the tile to write; the
      one after the last; 1 if the tile is that of the previous step, else 0.
    """
    index = lengths[:, None] // tile + jnp.arange(tiles, dtype=jnp.int32)  # [R, tiles]
    low = jnp.clip(lengths[:, None] - index * tile, 0, tile)
    high = jnp.clip((lengths + counts)[:, None] - index * tile, 0, tile)
    slots = index * tile
    page = jnp.take_along_axis(page_table, slots // page_size, axis=1, mode="clip")
    rows = [x.reshape(-1) for x in (page, slots % page_size // tile, low, high)]
    some = rows[_HIGH] > rows[_LOW]
    step = jax.lax.cummax(jnp.where(some, jnp.arange(some.size), -1))
    step = jnp.where(step < 0, jnp.argmax(some), step)
    # If there is nothing to write at all, page 0 is rewritten unchanged.
    page, page_tile = (jnp.where(some.any(), x[step], 0) for x in rows[:2])
    repeat = jnp.concatenate([jnp.zeros(1, bool), step[1:] == step[:-1]])
    empty = jnp.where(some, 0, tile)
    return jnp.stack([page, page_tile, rows[_LOW] + empty, rows[_HIGH], repeat]).astype(jnp.int32)


def _append_kernel(axis: int, plan_ref: Ref, new_ref: Ref, old_ref: Ref, out_ref: Ref) -> None:
    """Kernel body: copies a tile and replaces the tokens that the plan says.

    Args:
      axis: axis of the tokens in a block.
      plan_ref: `_tile_plan` in scalar memory.
      new_ref: new tokens of the tile, see `_align_to_tiles`.
      old_ref: the tile before.
      out_ref: the tile after; aliases `old_ref` in memory.
    """
    i = pl.program_id(1)

    # For a repeated tile, only the output block has what earlier steps wrote.
    @pl.when(plan_ref[_REPEAT, i] == 0)
    def copy_old_tile():
        out_ref[...] = old_ref[...]

    @pl.when(plan_ref[_LOW, i] < plan_ref[_HIGH, i])
    def insert_new_tokens():
        shape = out_ref.shape
        token = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        is_new = (token >= plan_ref[_LOW, i]) & (token < plan_ref[_HIGH, i])
        wide = new_ref.dtype
        new = jnp.broadcast_to(new_ref[...], shape)
        out_ref[...] = jnp.where(is_new, new, out_ref[...].astype(wide)).astype(out_ref.dtype)
