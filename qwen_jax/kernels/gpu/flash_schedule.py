"""What a kernel will do, worked out beforehand: bounds per query, blocks per tile, order of work.

All of it is a handful of small integer arrays made by plain jnp operations; the kernels read them
and neither load nor compute a block that no query of the tile sees.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import Mask, live_blocks

LOG2E = math.log2(math.e)

FIELDS = ("batch", "tile", "low", "full_low", "full_high", "high")
"""Columns of a `Queue`'s table; the last four are block numbers, see `_ranges`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The mask of scores [rows, columns] per row: columns in [low, high) whose id equals the row's.

    Rows are queries and columns keys, or the reverse; lengths R and C are multiples of the blocks.

    Attributes:
      low, high: int32 [B or 1, R], or None where the scores' own edge is the bound.
      ids, column_ids: int32 [B,R] and [B,C], both or neither; no id of padding equals another.
    """

    low: jax.Array | None
    high: jax.Array | None
    ids: jax.Array | None
    column_ids: jax.Array | None


def _start(mask: Mask) -> jax.Array:
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    return start[:, None].astype(jnp.int32)


def _ids(mask: Mask, q_pad: int, k_pad: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Ids of queries and keys; -1 and 0 for padding."""
    if mask.q_segments is None:
        return None, None
    q_ids = jnp.pad(mask.q_segments, ((0, 0), (0, q_pad)))
    k_ids = jnp.pad(mask.k_segments, ((0, 0), (0, k_pad)))
    return jnp.where(q_ids > 0, q_ids, -1), jnp.maximum(k_ids, 0)


def query_rows(mask: Mask, q_len: int, k_len: int, q_pad: int, k_pad: int) -> Rows:
    """`Rows` of q_len queries and k_len keys, made q_pad and k_pad longer.

    The queries added go on counting slots: what they compute is cut off, and in gradients they
    weigh nothing because their d_out is 0. Keys added are never seen.
    """
    slots = _start(mask) + jnp.arange(q_len + q_pad, dtype=jnp.int32)
    window = mask.any_window()
    low = None if window is None else jnp.maximum(slots - window + 1, 0)
    return Rows(low, jnp.minimum(slots + 1, k_len), *_ids(mask, q_pad, k_pad))


def key_rows(mask: Mask, q_len: int, k_len: int, q_pad: int, k_pad: int) -> Rows:
    """The same mask with keys as rows and queries as columns."""
    first = jnp.arange(k_len + k_pad, dtype=jnp.int32) - _start(mask)
    window = mask.any_window()
    high = None
    if window is not None:
        high = first + window
    if k_pad:
        high = jnp.full_like(first, q_len + q_pad) if high is None else high
        high = jnp.where(jnp.arange(k_len + k_pad) < k_len, high, 0)
    return Rows(first, high, *_ids(mask, q_pad, k_pad)[::-1])


def _one_id(ids: jax.Array, block: int) -> jax.Array:
    """The id that all of a block has, 0 or less if it has several or padding: int32 [B,n]."""
    ids = ids.reshape(ids.shape[0], -1, block)
    lowest = ids.min(axis=-1)
    return jnp.where(lowest == ids.max(axis=-1), lowest, 0)


def full_blocks(rows: Rows, k_blocks: int, block_q: int, block_k: int) -> jax.Array:
    """Whether every query of a block sees every key of a block: bool [B or 1, nq, nk].

    rows: `query_rows`.
    """
    first = jnp.arange(k_blocks, dtype=jnp.int32) * block_k
    high = rows.high.reshape(rows.high.shape[0], -1, block_q).min(axis=-1)
    full = first + block_k <= high[:, :, None]
    if rows.low is not None:
        low = rows.low.reshape(rows.low.shape[0], -1, block_q).max(axis=-1)
        full &= low[:, :, None] <= first
    if rows.ids is not None:
        q_id, k_id = _one_id(rows.ids, block_q), _one_id(rows.column_ids, block_k)
        full &= (q_id[:, :, None] == k_id[:, None, :]) & (k_id > 0)[:, None, :]
    return full


def _ranges(live: jax.Array, full: jax.Array) -> tuple[jax.Array, ...]:
    """Along the last axis (low, full_low, full_high, high), int32 without that axis.

    Live blocks lie in [low, high); those in [full_low, full_high) need no mask. What ids in any
    order leave live or full outside one run is covered by the masked part.
    """
    n = live.shape[-1]
    index = jnp.arange(n, dtype=jnp.int32)
    low = jnp.where(live, index, n).min(axis=-1)
    high = jnp.where(live, index + 1, 0).max(axis=-1)
    some = high > 0
    low = jnp.where(some, low, 0)
    full_low = jnp.minimum(jnp.where(full, index, n).min(axis=-1), high)
    after = ~full & (index >= full_low[..., None])
    full_high = jnp.minimum(jnp.where(after, index, n).min(axis=-1), high)
    return low, full_low, full_high, high


@dataclasses.dataclass(frozen=True)
class Queue:
    """The order of work: items 0, 1, … are (tile, head) pairs, dealt to the CTAs in turn.

    An item is one tile of one head. Within a section the heads of one tile follow each other, and
    the tiles stand longest first; sections keep the keys and values in use inside the L2 cache.

    Attributes:
      items: how many there are.
      tiles, heads: tiles and heads of one section.
      head_sections: sections that differ in heads only, innermost.
    """

    items: int
    tiles: int
    heads: int
    head_sections: int

    def locate(self, item):
        """(row of the table, head) of an item, int32 scalars inside a kernel."""

        def split(x, by):
            return jax.lax.div(x, jnp.int32(by)), jax.lax.rem(x, jnp.int32(by))

        section, rest = split(item, self.tiles * self.heads)
        batch_section, head_section = split(section, self.head_sections)
        tile, head = split(rest, self.heads)
        return batch_section * self.tiles + tile, head_section * self.heads + head


def make_queue(batch: int, tiles: int, heads: int, groups: int, row_bytes: int, budget: int):
    """A `Queue` whose sections stream at most about `budget` bytes of operands shared by tiles.

    heads: those of an item; groups: how many of them share streamed operands; row_bytes: what one
    row of the batch streams for all its heads.
    """
    if batch * row_bytes <= budget:
        return Queue(batch * tiles * heads, batch * tiles, heads, 1)
    shared = heads // groups
    fitting = max(1, min(shared, budget * shared // row_bytes))
    per_section = max(d for d in range(1, fitting + 1) if shared % d == 0)
    return Queue(batch * tiles * heads, tiles, per_section * groups, shared // per_section)


def make_table(
    mask: Mask,
    rows: Rows,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    batch: int,
    *,
    keys: bool,
    queue: Queue,
) -> jax.Array:
    """The table a kernel reads, int32 [B·tiles, 6]: `FIELDS` of each tile in order of work.

    lengths: (T, S) before padding. blocks: (queries, keys) a block. keys: tiles are blocks of keys
    and the ranges count blocks of queries, instead of the reverse.
    """
    nq, nk = (-(-n // block) for n, block in zip(lengths, blocks, strict=True))
    live = live_blocks(mask, *lengths, *blocks)
    full = full_blocks(rows, nk, *blocks)
    if keys:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    tiles = nk if keys else nq
    ranges = [jnp.broadcast_to(x, (batch, tiles)) for x in _ranges(live, full & live)]
    places = jnp.indices((batch, tiles), dtype=jnp.int32)
    table = jnp.stack([*places, *ranges], axis=-1)
    if queue.tiles == tiles * batch:  # one section over the whole batch: tile by tile
        table = table.swapaxes(0, 1).reshape(1, -1, len(FIELDS))
    if not keys:
        table = table[:, ::-1]  # with causality alone, this is longest first already
    if mask.q_start is not None or mask.q_segments is not None:
        length = table[..., FIELDS.index("high")] - table[..., FIELDS.index("low")]
        order = jnp.argsort(-length, axis=1, stable=True)
        table = jnp.take_along_axis(table, order[..., None], axis=1)
    return table.reshape(-1, len(FIELDS))


def at_least_one_step(table: jax.Array) -> jax.Array:
    """A table (`make_table`) in which a tile that sees nothing takes one block, masked."""
    return table.at[:, FIELDS.index("high")].max(1)


def fold_scale(scale: float) -> float:
    """The factor that takes scores to base-2 exponents."""
    return scale * LOG2E
