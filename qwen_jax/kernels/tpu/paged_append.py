"""Writing new tokens into the pages of a cache on TPU, in place.

Memory is laid out in tiles, of 16 tokens in bf16 and 32 in 8 bits: one token can't be written
alone. Each grid step reads the tile it belongs to for a few layers, puts the tokens in and writes
it back; the pipeline overlaps the steps. For the compiler's own scatter the whole cache would be
copied to another layout and back, for 8-bit pages always and for bf16 inside a loop over steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.cache import PagedCache

TILE = {4: 8, 2: 16, 1: 32}
"""Tokens of a memory tile by bytes a number."""
_LANES = 128
_LAYERS = 4
"""Layers a grid step, where that divides them: fewer, longer copies."""


def unsupported_reason(cache: PagedCache) -> str | None:
    """Why these kernels can't write to a cache; None if they can."""
    page, width = cache.page_size, 2 * cache.head_dim
    tile = _LANES if cache.quantised else TILE[cache.pages.dtype.itemsize]
    if page % tile or width % _LANES:
        return (
            f"pages of {page} tokens with heads of {cache.head_dim}; on TPU pages hold a multiple "
            f"of {tile} tokens for this cache, and heads are multiples of 64"
        )
    return None


def paged_append(cache: PagedCache, tokens, scales, page_table, lengths, counts) -> PagedCache:
    """Puts tokens [L,R,T,K,2H] and, for 8-bit ones, scales float32 [L,R,T,K,4] into their slots.

    Token t of request r goes to slot lengths[r] + t if t < counts[r]. All arrays are device-local;
    tokens have the pages' dtype.
    """
    where = (page_table, lengths, counts)
    pages = _put(cache.pages, tokens, *where, tile=TILE[cache.pages.dtype.itemsize])
    if scales is None:
        return PagedCache(pages)
    # Tokens of scales lie along the lanes, so that a tile is 128 of them, in the last axis.
    return PagedCache(pages, _put(cache.scales, scales, *where, tile=_LANES))


def _put(into, new, page_table, lengths, counts, *, tile: int):
    """Writes new [L,R,T,K,·] into `into`, whose tokens are axis 3 (pages) or 4 (scales)."""
    last = tile == _LANES
    layers, _, kv_heads = into.shape[:3]
    requests, steps = new.shape[1:3]
    page_size = into.shape[4 if last else 3]
    tiles = (steps + tile - 2) // tile + 1  # so many may be touched by one request
    plan = _plan(page_table, lengths, counts, tiles, page_size, tile)
    # Lined up with the tiles: [L,R·tiles,tile or 1,K,·]. One token alone goes wherever it belongs.
    if steps == 1:
        new = jnp.broadcast_to(new[:, :, None], (layers, requests, tiles, *new.shape[2:]))
    else:
        offsets = jnp.arange(tiles * tile) - (lengths % tile)[:, None]
        picked = jnp.clip(offsets, 0, steps - 1)[None, :, :, None, None]
        new = jnp.take_along_axis(new, picked, axis=2)
    new = new.reshape(layers, requests * tiles, -1, kv_heads, new.shape[-1])
    depth = next(n for n in (_LAYERS, 2, 1) if layers % n == 0)
    if last:
        new, block = jnp.moveaxis(new, 2, 4), (depth, 1, kv_heads, into.shape[3], tile)
    else:
        # Single rows of 32-bit numbers can be handled, of shorter ones not.
        wide = jnp.int32 if into.dtype == jnp.uint8 else jnp.float32
        new, block = new.swapaxes(2, 3).astype(wide), (depth, 1, kv_heads, tile, into.shape[4])

    def place(layer, i, plan):
        return (layer, plan[0, i], 0, *((0, plan[1, i]) if last else (plan[1, i], 0)))

    there = pl.BlockSpec(block, place)
    here = pl.BlockSpec((depth, 1, *new.shape[2:]), lambda layer, i, plan: (layer, i, 0, 0, 0))
    moved = layers * requests * tiles * kv_heads * block[3] * block[4] * into.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, 4 if last else 3),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layers // depth, requests * tiles),
            in_specs=[here, there],
            out_specs=there,
        ),
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * moved),
        name="paged_append",
    )(plan, new, into)


_PAGE, _PLACE, _LOW, _HIGH, _SAME = range(5)


def _plan(page_table, lengths, counts, tiles: int, page_size: int, tile: int) -> jax.Array:
    """int32 [5,R·tiles], for every tile that may get tokens, in the order of the grid.

    Rows: page; tile within it; first and one after the last token of the tile to be written;
    whether this is the tile of the step before. A step with nothing to write stays at the last tile
    that had something, or before that at the first that will: any other tile might belong to
    another request, whose tokens would be overwritten with what stood there before.
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
    # With nothing to write at all, page 0 is written as it was.
    page, place = (jnp.where(some.any(), x[at], 0) for x in rows[:2])
    same = jnp.concatenate([jnp.zeros(1, bool), at[1:] == at[:-1]])
    empty = jnp.where(some, 0, tile)
    return jnp.stack([page, place, rows[_LOW] + empty, rows[_HIGH], same]).astype(jnp.int32)


def _kernel(axis: int, plan_ref, new_ref, old_ref, out_ref):
    """out = new where the plan says so, else what is there."""
    i = pl.program_id(1)

    # The block read does not hold what earlier steps put into this tile; the one written does.
    @pl.when(plan_ref[_SAME, i] == 0)
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
