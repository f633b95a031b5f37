"""Work schedule of the Hopper attention kernels: mask bounds, tile tables and the work queue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.kernels.gpu import flash_schedule
from qwen_jax.kernels.gpu.flash_pipeline import BlockSchedule
from qwen_jax.kernels.mask import make_mask, visible


@st.composite
def masks(draw):
    """Draws (mask, T, S) with every option of a mask, segment ids ascending or not."""
    q_len, k_len = draw(st.sampled_from([(1, 1), (32, 32), (37, 37), (11, 40), (40, 7)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    start = q_ids = k_ids = None
    if draw(st.booleans()):
        start = jnp.asarray(rng.integers(0, k_len, 2), jnp.int32)
    if draw(st.booleans()):
        slots = rng.integers(0, 4, (2, 128))
        if draw(st.booleans()):
            slots.sort(axis=1)
        shift = 0 if start is None else int(start[0])
        q_ids, k_ids = (jnp.asarray(slots[:, a : a + n]) for a, n in ((shift, q_len), (0, k_len)))
    window = draw(st.sampled_from([None, 1, 5, 17, jnp.int32(9)]))
    return make_mask(start, q_ids, k_ids, window), q_len, k_len


def dense_mask(mask, q_len, k_len):
    """Returns the visibility of each key to each query, bool [2, T, S]."""
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    seen = visible(
        start[:, None] + jnp.arange(q_len),
        jnp.arange(k_len)[None],
        mask.q_segments,
        mask.k_segments,
        mask.any_window(),
    )
    return np.broadcast_to(seen, (2, q_len, k_len))


def dense_row_mask(row_mask):
    """Returns the visibility that a `RowMask` describes, bool [B or 1, R, C], C at least 200."""
    num_columns = 200 if row_mask.column_ids is None else row_mask.column_ids.shape[1]
    columns = np.arange(num_columns)
    seen = np.ones((1, 1, num_columns), bool)
    if row_mask.low is not None:
        seen = seen & (columns >= row_mask.low[..., None])
    if row_mask.high is not None:
        seen = seen & (columns < row_mask.high[..., None])
    if row_mask.ids is not None:
        seen = seen & (row_mask.ids[..., None] == row_mask.column_ids[:, None])
    return seen


@settings(max_examples=25, deadline=None)
@given(masks())
def test_row_masks_equal_the_dense_mask(case):
    mask, q_len, k_len = case
    pads = (-q_len % 16, -k_len % 16)
    seen = dense_mask(mask, q_len, k_len)
    queries = dense_row_mask(flash_schedule.query_row_mask(mask, q_len, k_len, *pads))
    assert (queries[:, :q_len, :k_len] == seen).all()
    assert not queries[:, :, k_len:].any()
    keys = dense_row_mask(flash_schedule.key_row_mask(mask, q_len, k_len, *pads))
    assert (keys[:, :k_len, :q_len] == seen.swapaxes(1, 2)).all()
    assert not keys[:, k_len:, : q_len + pads[0]].any()


@settings(max_examples=25, deadline=None)
@given(masks(), st.booleans(), st.booleans())
def test_every_visible_block_is_visited_once_and_masked_where_needed(
    case, tiles_are_keys, one_section
):
    mask, q_len, k_len = case
    tiles = -(-k_len // 16) if tiles_are_keys else -(-q_len // 8)
    queue = flash_schedule.make_work_queue(
        batch=2,
        tiles=tiles,
        heads=4,
        heads_per_operand=2,
        bytes_per_row=8,
        l2_bytes=100 if one_section else 4,
    )
    table = flash_schedule.make_tile_table(
        mask,
        flash_schedule.query_row_mask(mask, q_len, k_len, -q_len % 8, -k_len % 16),
        lengths=(q_len, k_len),
        block_sizes=(8, 16),
        batch=2,
        tiles_are_keys=tiles_are_keys,
        queue=queue,
    )
    table = np.asarray(table)
    assert len(table) == 2 * tiles
    assert len({(b, t) for b, t, *_ in table}) == 2 * tiles
    seen = dense_mask(mask, q_len, k_len)
    seen = np.pad(seen, ((0, 0), (0, -q_len % 8), (0, -k_len % 16)))
    seen = seen.reshape(2, -1, 8, seen.shape[2] // 16, 16).swapaxes(2, 3)
    some, every = seen.any(axis=(3, 4)), seen.all(axis=(3, 4))
    if tiles_are_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    for batch, tile, *ranges in table:
        schedule = BlockSchedule(*(int(x) for x in ranges))
        order = [int(schedule.block(t)) for t in range(schedule.steps)]
        assert order == [
            *(int(schedule.masked_block(t)) for t in range(schedule.masked_steps)),
            *(int(schedule.full_block(t)) for t in range(schedule.masked_steps, schedule.steps)),
        ]
        assert len(set(order)) == len(order)
        assert set(np.flatnonzero(some[batch, tile])) <= set(order)
        unmasked = order[schedule.masked_steps :]
        # Padding queries after the last one count as seeing what their slots would see.
        last_queries = [] if q_len % 8 == 0 else [q_len // 8]
        for block in unmasked:
            queries = block if tiles_are_keys else tile
            assert every[batch, tile, block] or queries in last_queries
    if not one_section:
        return
    lengths = table[:, -1] - table[:, 2]
    if mask.q_segments is not None or mask.q_start is not None:
        assert (np.diff(lengths) <= 0).all()


def tile_table(mask, length):
    """Returns the tile table of one row and head with blocks of 128 queries and 128 keys."""
    queue = flash_schedule.make_work_queue(
        batch=1, tiles=length // 128, heads=1, heads_per_operand=1, bytes_per_row=1, l2_bytes=1
    )
    return flash_schedule.make_tile_table(
        mask,
        flash_schedule.query_row_mask(mask, length, length, 0, 0),
        lengths=(length, length),
        block_sizes=(128, 128),
        batch=1,
        tiles_are_keys=False,
        queue=queue,
    )


def test_causal_mask_skips_half_of_the_blocks_and_masks_only_the_diagonal():
    table = np.asarray(tile_table(make_mask(None, None, None, None), 1024)).tolist()
    assert table[:-1] == [[0, i, 0, 0, i, i + 1] for i in reversed(range(1, 8))]
    assert table[-1] == [0, 0, 0, 1, 1, 1]


def test_packed_rows_skip_other_documents():
    ids = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 256)[None]
    table = np.asarray(tile_table(make_mask(None, ids, ids, None), 1024))
    ranges = {int(tile): (int(low), int(high)) for _, tile, low, _, _, high in table}
    assert ranges == {i: (i // 2 * 2, i + 1) for i in range(8)}


def test_a_tile_without_visible_scores_takes_one_masked_step():
    ids = jnp.where(jnp.arange(512) < 100, 1, 0)[None]
    table = tile_table(make_mask(None, ids, ids, None), 512)
    for _, tile, *ranges in np.asarray(flash_schedule.ensure_one_step(table)):
        schedule = BlockSchedule(*(int(x) for x in ranges))
        steps = (schedule.steps, schedule.masked_steps, int(schedule.block(0)))
        assert steps == (1, 1, 0), tile
    causal = tile_table(make_mask(None, None, None, None), 512)
    assert (flash_schedule.ensure_one_step(causal) == causal).all()


@pytest.mark.parametrize("l2_bytes", [1, 40, 1000])
def test_the_work_queue_holds_each_tile_of_each_head_once(l2_bytes):
    queue = flash_schedule.make_work_queue(
        batch=3, tiles=5, heads=8, heads_per_operand=2, bytes_per_row=60, l2_bytes=l2_bytes
    )
    places = zip(*jax.vmap(queue.locate)(jnp.arange(queue.items)), strict=True)
    places = [(int(row), int(head)) for row, head in places]
    assert len(set(places)) == queue.items == 3 * 5 * 8
    kv_heads = [head // 2 for _, head in places]
    sections = [len(set(kv_heads[i : i + queue.heads])) for i in range(0, 40, queue.heads)]
    assert max(sections) == (4 if l2_bytes >= 60 else max(1, l2_bytes * 4 // 60))
