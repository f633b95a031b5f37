"""Work schedule of the flash-attention kernels: mask bounds, block ranges, order of work items.

Everything here is plain jnp on small integer arrays, computed before the kernel starts. The kernels
read the result and neither load nor compute a block whose scores are all masked.

A tile is the group of queries (or keys, in the kernel for dk and dv) that one work item computes;
it visits blocks of keys (or queries).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mask import Mask, live_blocks

LOG2E = math.log2(math.e)

TILE_FIELDS = ("batch", "tile", "low", "full_low", "full_high", "high")
"""Columns of the table of `make_tile_table`; the last four are the results of `_block_ranges`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMask:
    """Attention mask of scores [rows, columns]: one column interval and one segment id per row.

    Column c is visible to row r if low[r] ≤ c < high[r] and column_ids[c] = ids[r]. Rows are
    queries and columns keys (`query_row_mask`), or the reverse (`key_row_mask`). Their numbers are
    multiples of the kernel's block sizes.

    Attributes:
      low: int32 [batch or 1, rows], or None where no row has a lower bound.
      high: int32 [batch or 1, rows], or None where no row has an upper bound.
      ids: int32 [batch, rows], segment id of each row, or None without segments. Ids of padding
        equal no other id.
      column_ids: int32 [batch, columns], segment id of each column, or None without segments.
    """

    low: jax.Array | None
    high: jax.Array | None
    ids: jax.Array | None
    column_ids: jax.Array | None


def _query_start(mask: Mask) -> jax.Array:
    """Returns the slot of the first query of each batch row: int32 [batch or 1, 1]."""
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    return start[:, None].astype(jnp.int32)


def _padded_segment_ids(
    mask: Mask, q_pad: int, k_pad: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns (segment ids of the queries, segment ids of the keys) with padding appended.

    Padding, whether part of the segments or appended, has id -1 in queries and 0 in keys.

    Args:
      mask: the attention mask.
      q_pad: padding queries to append.
      k_pad: padding keys to append.

    Returns:
      int32 [batch, queries + q_pad] and [batch, keys + k_pad]; (None, None) without segments.
    """
    if mask.q_segments is None:
        return None, None
    assert mask.k_segments is not None
    q_ids = jnp.pad(mask.q_segments, ((0, 0), (0, q_pad)))
    k_ids = jnp.pad(mask.k_segments, ((0, 0), (0, k_pad)))
    return jnp.where(q_ids > 0, q_ids, -1), jnp.maximum(k_ids, 0)


def query_row_mask(mask: Mask, q_len: int, k_len: int, q_pad: int, k_pad: int) -> RowMask:
    """Returns the attention mask with queries as rows and keys as columns.

    Padding keys are never visible. Padding queries continue the slot numbers: their outputs are cut
    off, and in the backward pass they contribute nothing because their d_out is 0.

    Args:
      mask: the attention mask.
      q_len: number of queries.
      k_len: number of keys.
      q_pad: padding queries appended to them.
      k_pad: padding keys appended to them.
    """
    slots = _query_start(mask) + jnp.arange(q_len + q_pad, dtype=jnp.int32)
    window = mask.any_window()
    low = None if window is None else jnp.maximum(slots - window + 1, 0)
    high = jnp.minimum(slots + 1, k_len)
    ids, column_ids = _padded_segment_ids(mask, q_pad, k_pad)
    return RowMask(low=low, high=high, ids=ids, column_ids=column_ids)


def key_row_mask(mask: Mask, q_len: int, k_len: int, q_pad: int, k_pad: int) -> RowMask:
    """Returns the attention mask with keys as rows and queries as columns.

    The same mask as `query_row_mask`, transposed, for the kernel that computes dk and dv.

    Args:
      mask: the attention mask.
      q_len: number of queries.
      k_len: number of keys.
      q_pad: padding queries appended to them.
      k_pad: padding keys appended to them; they see no query.
    """
    low = jnp.arange(k_len + k_pad, dtype=jnp.int32) - _query_start(mask)
    window = mask.any_window()
    high = None
    if window is not None:
        high = low + window
    if k_pad:
        high = jnp.full_like(low, q_len + q_pad) if high is None else high
        high = jnp.where(jnp.arange(k_len + k_pad) < k_len, high, 0)
    column_ids, ids = _padded_segment_ids(mask, q_pad, k_pad)
    return RowMask(low=low, high=high, ids=ids, column_ids=column_ids)


def _uniform_segment_ids(ids: jax.Array, block: int) -> jax.Array:
    """Returns the segment id that all tokens of a block share, or 0 or less if they do not.

    Args:
      ids: int32 [batch, tokens], 0 or less for padding; tokens a multiple of `block`.
      block: tokens per block.

    Returns:
      int32 [batch, blocks]; at most 0 where a block has several ids or padding only.
    """
    ids = ids.reshape(ids.shape[0], -1, block)
    lowest = ids.min(axis=-1)
    return jnp.where(lowest == ids.max(axis=-1), lowest, 0)


def full_blocks(row_mask: RowMask, k_blocks: int, block_q: int, block_k: int) -> jax.Array:
    """Returns which blocks of scores are entirely visible and need no mask.

    Args:
      row_mask: mask with queries as rows (`query_row_mask`).
      k_blocks: number of blocks of keys.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      bool [batch or 1, blocks of queries, blocks of keys].
    """
    assert row_mask.high is not None, "queries always have an upper bound"
    first = jnp.arange(k_blocks, dtype=jnp.int32) * block_k
    high = row_mask.high.reshape(row_mask.high.shape[0], -1, block_q).min(axis=-1)
    full = first + block_k <= high[:, :, None]
    if row_mask.low is not None:
        low = row_mask.low.reshape(row_mask.low.shape[0], -1, block_q).max(axis=-1)
        full &= low[:, :, None] <= first
    if row_mask.ids is not None:
        assert row_mask.column_ids is not None
        q_id = _uniform_segment_ids(row_mask.ids, block_q)
        k_id = _uniform_segment_ids(row_mask.column_ids, block_k)
        full &= (q_id[:, :, None] == k_id[:, None, :]) & (k_id > 0)[:, None, :]
    return full


def _block_ranges(live: jax.Array, full: jax.Array) -> tuple[jax.Array, ...]:
    """Returns (low, full_low, full_high, high): block numbers that delimit a tile's work.

    Every live block lies in [low, high), and every block in [full_low, full_high) is full. Blocks
    of [low, high) outside [full_low, full_high) are computed with the mask, whatever they are: ids
    that do not ascend may leave live or full blocks in several runs.

    Args:
      live: bool [..., blocks], whether a block has a visible score.
      full: bool [..., blocks], whether all scores of a block are visible.

    Returns:
      four int32 arrays [...].
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
class WorkQueue:
    """Order of the work items 0, 1, …; an item is one tile of one head.

    CTA c of n takes items c, c + n, c + 2n, …. Items are grouped into sections whose keys and
    values fit the L2 cache together. Within a section tiles are ordered longest first, and the
    heads of one tile are consecutive.

    Attributes:
      items: total number of work items.
      tiles: tiles per section.
      heads: heads per section.
      head_sections: consecutive sections that cover the same tiles with different heads.
    """

    items: int
    tiles: int
    heads: int
    head_sections: int

    def locate(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (row of the tile table, head) of an item, int32 scalars; usable in a kernel."""

        def split(x, by):
            return jax.lax.div(x, jnp.int32(by)), jax.lax.rem(x, jnp.int32(by))

        section, rest = split(item, self.tiles * self.heads)
        batch_section, head_section = split(section, self.head_sections)
        tile, head = split(rest, self.heads)
        return batch_section * self.tiles + tile, head_section * self.heads + head


def make_work_queue(
    *,
    batch: int,
    tiles: int,
    heads: int,
    heads_per_operand: int,
    bytes_per_row: int,
    l2_bytes: int,
) -> WorkQueue:
    """Returns a queue whose sections read at most about `l2_bytes` of operands shared by tiles.

    Args:
      batch: number of batch rows.
      tiles: tiles per batch row.
      heads: heads that items are counted over.
      heads_per_operand: how many of these heads read the same operands (1, or query heads per kv
        head).
      bytes_per_row: bytes of the shared operands of one batch row, all heads.
      l2_bytes: upper bound for a section, unless a single operand head is larger.
    """
    if batch * bytes_per_row <= l2_bytes:
        return WorkQueue(batch * tiles * heads, batch * tiles, heads, 1)
    operand_heads = heads // heads_per_operand
    fitting = max(1, min(operand_heads, l2_bytes * operand_heads // bytes_per_row))
    per_section = max(d for d in range(1, fitting + 1) if operand_heads % d == 0)
    return WorkQueue(
        items=batch * tiles * heads,
        tiles=tiles,
        heads=per_section * heads_per_operand,
        head_sections=operand_heads // per_section,
    )


def make_tile_table(
    mask: Mask,
    row_mask: RowMask,
    *,
    lengths: tuple[int, int],
    block_sizes: tuple[int, int],
    batch: int,
    tiles_are_keys: bool,
    queue: WorkQueue,
) -> jax.Array:
    """Returns which blocks each tile has to visit, one row per tile in order of work.

    Args:
      mask: the attention mask.
      row_mask: the same mask with queries as rows (`query_row_mask`).
      lengths: numbers of (queries, keys), without padding.
      block_sizes: (queries, keys) per block.
      batch: number of batch rows.
      tiles_are_keys: tiles are blocks of keys and ranges count blocks of queries, instead of the
        reverse.
      queue: decides whether tiles are ordered within a batch row or over the whole batch.

    Returns:
      int32 [batch · tiles, 6], the `TILE_FIELDS` of each tile.
    """
    nq, nk = (-(-n // block) for n, block in zip(lengths, block_sizes, strict=True))
    live = live_blocks(mask, *lengths, *block_sizes)
    full = full_blocks(row_mask, nk, *block_sizes)
    if tiles_are_keys:
        live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
    tiles = nk if tiles_are_keys else nq
    ranges = [jnp.broadcast_to(x, (batch, tiles)) for x in _block_ranges(live, full & live)]
    places = jnp.indices((batch, tiles), dtype=jnp.int32)
    table = jnp.stack([*places, *ranges], axis=-1)
    if queue.tiles == tiles * batch:  # one section over the whole batch: tile by tile
        table = table.swapaxes(0, 1).reshape(1, -1, len(TILE_FIELDS))
    if not tiles_are_keys:
        table = table[:, ::-1]  # with a causal mask alone, this is longest first already
    if mask.q_start is not None or mask.q_segments is not None:
        length = table[..., TILE_FIELDS.index("high")] - table[..., TILE_FIELDS.index("low")]
        order = jnp.argsort(-length, axis=1, stable=True)
        table = jnp.take_along_axis(table, order[..., None], axis=1)
    return table.reshape(-1, len(TILE_FIELDS))


def ensure_one_step(table: jax.Array) -> jax.Array:
    """Returns a tile table (`make_tile_table`) in which each tile has at least one block.

    A tile without visible scores gets block 0, computed with the mask.
    """
    return table.at[:, TILE_FIELDS.index("high")].max(1)


def base2_scale(scale: float) -> float:
    """Returns `scale` · log₂ e, so that exp(scale · s) = 2^(result · s) for a score s."""
    return scale * LOG2E
