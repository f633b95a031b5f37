"""Writes of new tokens into the pages of a KV cache on TPU, in place.

Memory consists of tiles, of 16 tokens in bf16 and 32 in 8 bits, and a single token cannot be
written. Each grid step reads one tile for a few layers, inserts the tokens and writes the tile
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

TILE = {4: 8, 2: 16, 1: 32}
"""Tokens of a memory tile, by bytes per element."""
_LANES = 128
_LAYERS = 4
"""Layers per grid step if they are a multiple of it: fewer, longer copies."""


def unsupported_reason(cache: PagedCache) -> str | None:
    """Returns why these kernels cannot write to a cache; None if they can."""
    page, width = cache.page_size, 2 * cache.head_dim
    tile = _LANES if cache.quantised else TILE[cache.pages.dtype.itemsize]
    if page % tile or width % _LANES:
        return (
            f"pages of {page} tokens with heads of {cache.head_dim}; on TPU pages hold a multiple "
            f"of {tile} tokens for this cache, and heads are multiples of 64"
        )
    return None


def paged_append(cache: PagedCache, tokens, scales, page_table, lengths, counts) -> PagedCache:
    """Writes new tokens into their slots; the contract of `kernels.paged._scatter`, device-local.

    Token t of request r is written to slot lengths[r] + t if t < counts[r].

    Args:
      cache: the cache.
      tokens: keys and values side by side in the pages' dtype, [L, R, T, K, 2H].
      scales: float32 [L, R, T, K, 4] for an 8-bit cache, else None.
      page_table: int32 [R, pages per request].
      lengths: tokens of each request in the cache before, int32 [R].
      counts: number of tokens to write, int32 [R].
    """
    slots = (page_table, lengths, counts)
    pages = _write_tiles(cache.pages, tokens, *slots, tile=TILE[cache.pages.dtype.itemsize])
    if scales is None:
        return PagedCache(pages)
    # Tokens of scales are along the lanes, so a tile has 128 of them, in the last axis.
    return PagedCache(pages, _write_tiles(cache.scales, scales, *slots, tile=_LANES))


def _write_tiles(target, new, page_table, lengths, counts, *, tile: int):
    """Writes new tokens into pages or scales.

    Args:
      target: pages, whose tokens are axis 3, or scales, whose tokens are axis 4.
      new: [L, R, T, K, ·].
      page_table: int32 [R, pages per request].
      lengths: int32 [R].
      counts: int32 [R].
      tile: tokens per tile; `_LANES` for scales.
    """
    is_scales = tile == _LANES
    layers, _, kv_heads = target.shape[:3]
    requests, steps = new.shape[1:3]
    page_size = target.shape[4 if is_scales else 3]
    tiles = (steps + tile - 2) // tile + 1  # largest number of tiles that one request writes to
    plan = _tile_plan(page_table, lengths, counts, tiles, page_size, tile)
    # Aligned with the tiles: [L,R·tiles,tile or 1,K,·]. A single token is broadcast to its tile.
    if steps == 1:
        new = jnp.broadcast_to(new[:, :, None], (layers, requests, tiles, *new.shape[2:]))
    else:
        offsets = jnp.arange(tiles * tile) - (lengths % tile)[:, None]
        picked = jnp.clip(offsets, 0, steps - 1)[None, :, :, None, None]
        new = jnp.take_along_axis(new, picked, axis=2)
    new = new.reshape(layers, requests * tiles, -1, kv_heads, new.shape[-1])
    depth = next(n for n in (_LAYERS, 2, 1) if layers % n == 0)
    if is_scales:
        new, block = jnp.moveaxis(new, 2, 4), (depth, 1, kv_heads, target.shape[3], tile)
    else:
        # The kernel can address single rows of 32-bit elements, but not of narrower ones.
        wide = jnp.int32 if target.dtype == jnp.uint8 else jnp.float32
        new, block = new.swapaxes(2, 3).astype(wide), (depth, 1, kv_heads, tile, target.shape[4])

    def target_block(layer, i, plan):
        """Returns the block index of the tile of grid step i."""
        return (layer, plan[0, i], 0, *((0, plan[1, i]) if is_scales else (plan[1, i], 0)))

    target_spec = pl.BlockSpec(block, target_block)
    new_spec = pl.BlockSpec((depth, 1, *new.shape[2:]), lambda layer, i, plan: (layer, i, 0, 0, 0))
    moved = layers * requests * tiles * kv_heads * block[3] * block[4] * target.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, 4 if is_scales else 3),
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


_PAGE, _TILE, _LOW, _HIGH, _REPEAT = range(5)


def _tile_plan(page_table, lengths, counts, tiles: int, page_size: int, tile: int) -> jax.Array:
    """Returns, for every tile that may be written, in the order of the grid, what to write.

    A step with nothing to write repeats the last tile that had something, or before the first such
    tile, that one: any other tile might belong to another request, whose tokens would be
    overwritten with old contents.

    Args:
      page_table: int32 [R, pages per request].
      lengths: int32 [R].
      counts: int32 [R].
      tiles: tiles per request.
      page_size: tokens per page.
      tile: tokens per tile.

    Returns:
      int32 [5, R·tiles]: page; tile within it; first token of the tile to write, and the one after
      the last; whether the tile is that of the step before.
    """
    index = lengths[:, None] // tile + jnp.arange(tiles, dtype=jnp.int32)  # [R,tiles]
    low = jnp.clip(lengths[:, None] - index * tile, 0, tile)
    high = jnp.clip((lengths + counts)[:, None] - index * tile, 0, tile)
    slots = index * tile
    page = jnp.take_along_axis(page_table, slots // page_size, axis=1, mode="clip")
    rows = [x.reshape(-1) for x in (page, slots % page_size // tile, low, high)]
    some = rows[_HIGH] > rows[_LOW]
    at = jax.lax.cummax(jnp.where(some, jnp.arange(some.size), -1))
    at = jnp.where(at < 0, jnp.argmax(some), at)
    # If there is nothing to write at all, page 0 is rewritten unchanged.
    page, target_block = (jnp.where(some.any(), x[at], 0) for x in rows[:2])
    same = jnp.concatenate([jnp.zeros(1, bool), at[1:] == at[:-1]])
    empty = jnp.where(some, 0, tile)
    return jnp.stack([page, target_block, rows[_LOW] + empty, rows[_HIGH], same]).astype(jnp.int32)


def _kernel(axis: int, plan_ref, new_ref, old_ref, out_ref):
    """Copies a tile, with new tokens where the plan says so.

    Args:
      axis: axis of the tokens in a block.
      plan_ref: scalar reference to `_tile_plan`.
      new_ref: aligned new tokens.
      old_ref: the tile before.
      out_ref: the tile after; aliases `old_ref` in memory.
    """
    i = pl.program_id(1)

    # For a repeated tile, only the output block has what earlier steps wrote.
    @pl.when(plan_ref[_REPEAT, i] == 0)
    def _():
        out_ref[...] = old_ref[...]

    @pl.when(plan_ref[_LOW, i] < plan_ref[_HIGH, i])
    def _():
        shape = out_ref.shape
        token = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        fresh = (token >= plan_ref[_LOW, i]) & (token < plan_ref[_HIGH, i])
        wide = new_ref.dtype
        new = jnp.broadcast_to(new_ref[...], shape)
        out_ref[...] = jnp.where(fresh, new, out_ref[...].astype(wide)).astype(out_ref.dtype)
