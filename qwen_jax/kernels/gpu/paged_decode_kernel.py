"""Paged decode attention kernel for Hopper GPUs: one split of a request's keys, for one kv head.

A CTA (thread block) is one warpgroup; two share a multiprocessor, so one computes while the other
waits. Keys and values come in blocks of 64 tokens through a ring of shared-memory buffers, filled
by the copy engine, which follows the page table a few blocks ahead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cache import SCALE_ROWS
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_schedule import LOG2E
from qwen_jax.kernels.gpu.mosaic import MemoryType
from qwen_jax.kernels.mask import MASKED
from qwen_jax.kernels.refs import Ref, bind_by_name

ROWS = 64
"""Rows of a wgmma instruction (its M)."""
BLOCK = 64
"""Tokens per step: 32 KiB of bf16 keys and values at H = 128."""
PLAN_FIELDS = ("first", "count", "tail", "masked", "start", "end", "window")
"""What a CTA knows of its split, int32 each.

first: its first block of tokens; count: number of blocks; tail: how many blocks at the end are cut
by the queries' own slots or the request's end; masked: how many in all need the mask, including
those at the beginning that the window cuts; start: slot of the first query; end: slot after the
last visible one; window: slots that a query sees.
"""
_STAGES = 3
"""Steps whose keys and values are in shared memory or under way."""
_CODE_OFFSET = 128.0
"""Codes are widened as signed bytes, code - 128, because these convert quickly to bf16."""


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """Sizes of a decode call that are known at compile time.

    Attributes:
      kv_heads: number of kv heads.
      groups: query heads per kv head.
      q_len: query tokens per request.
      rows: groups · q_len rounded up to a multiple of 8.
      head_dim: dimension of a head, 64 or 128.
      page_size: tokens per page.
      pages_per_request: columns of the page table.
      splits: parts that each request's keys are split into.
      scale: factor on q·k.
      quantised: whether pages are 8-bit codes.
    """

    kv_heads: int
    groups: int
    q_len: int
    rows: int
    head_dim: int
    page_size: int
    pages_per_request: int
    splits: int
    scale: float
    quantised: bool


def launch(
    shape: DecodeShape,
    q: jax.Array,
    pages: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    plan: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over each split of each request's keys.

    Args:
      shape: sizes of the call.
      q: [R, K, rows, H] (requests, kv heads, query rows of a kv head, head dimension) in the dtype
        of the products. Query rows are query tokens × query heads per kv head, padded to a
        multiple of 8.
      pages: [pages, K, page size, 2H], key and value of a token side by side.
      scales: float32 [pages, K, 4, page size] of 8-bit pages, or None.
      page_table: int32 [R, pages per request].
      plan: int32 [R·splits·7], the `PLAN_FIELDS` of each split.

    Returns:
      (out float32 [R, splits, K, rows, H], lse float32 [R, splits, K, rows]); 0 and `MASKED` where
      a query sees no key of the split.
    """
    requests, kv_heads, rows, head_dim = q.shape
    results = requests * shape.splits * kv_heads
    dtype = q.dtype
    # A tile of 64 query rows extends into the next kv head's rows; this padding ends the last one.
    q = jnp.pad(q.reshape(-1, head_dim), ((0, ROWS - rows), (0, 0)))
    inputs = {
        "q_ref": q,
        "table_ref": page_table.ravel(),
        "plan_ref": plan,
        "pages_ref": pages.reshape(-1, 2 * head_dim),
    }
    ring = [mosaic.smem_tile((_STAGES, BLOCK, head_dim), pages.dtype) for _ in ("k", "v")]
    widened: list[MemoryType] = []
    if scales is not None:
        inputs["scales_ref"] = scales.reshape(-1, shape.page_size)
        ring.append(plgpu.SMEM((_STAGES, len(SCALE_ROWS), BLOCK), jnp.float32))
        widened = [mosaic.smem_tile((BLOCK, head_dim), dtype) for _ in ("k", "v")]
    outputs = {
        "out_ref": jax.ShapeDtypeStruct((results * rows, head_dim), jnp.float32),
        "lse_ref": jax.ShapeDtypeStruct((results * ROWS,), jnp.float32),
    }
    scratch = {
        "q_smem": mosaic.smem_tile((ROWS, head_dim), dtype),
        # The result leaves through the memory that keys and values arrived in.
        "ring_or_out": mosaic.smem_union(ring, plgpu.SMEM((ROWS, head_dim), jnp.float32)),
        "widened": widened,
        "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
        "q_filled": plgpu.Barrier(),
        "ring_filled": plgpu.Barrier(num_arrivals=len(ring), num_barriers=_STAGES),
    }
    body = functools.partial(_decode_kernel, shape)
    out, lse = plgpu.kernel(
        bind_by_name(body, [*inputs, *outputs, *scratch]),
        out_type=tuple(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(shape.splits, kv_heads, requests),
        grid_names=("split", "head", "request"),
        compiler_params=mosaic.COMPILER_PARAMS,
        kernel_name="paged_decode",
    )(*inputs.values())
    leading = (requests, shape.splits, kv_heads)
    return out.reshape(*leading, rows, head_dim), lse.reshape(*leading, ROWS)[..., :rows]


@dataclasses.dataclass(frozen=True)
class _PageCopies:
    """Asynchronous copies from the pages of one split to the ring of shared-memory buffers.

    Attributes:
      shape: sizes of the call.
      table: page table in global memory, int32 [requests · pages per request].
      pages: pages in global memory, [pages · kv heads · page size, 2 · head dimension].
      scales: scales of 8-bit pages, float32 [pages · kv heads · 4, page size], or None.
      ring: buffers [stages, 64, …] for keys, values and, with 8-bit pages, scales.
      ring_filled: barriers [stages], completed when the copies of a step have arrived.
      request: index of the request, int32 scalar.
      head: index of the kv head.
      first: first block of tokens of the split.
      count: number of blocks of the split.
      tail: how many blocks at its end are cut by the queries' slots or the request's end.
    """

    shape: DecodeShape
    table: Ref
    pages: Ref
    scales: Ref | None
    ring: Sequence[Ref]
    ring_filled: Ref
    request: jax.Array
    head: jax.Array
    first: jax.Array
    count: jax.Array
    tail: jax.Array

    def block(self, step: jax.Array) -> jax.Array:
        """Returns the block of a step: first those cut at the end, then the others in order."""
        in_tail = step < self.tail
        return self.first + jnp.where(in_tail, self.count - 1 - step, step - self.tail)

    def locate(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (page, offset in it) of a step's block; an arbitrary page after the last step."""
        start = self.block(step) * BLOCK
        column = lax.div(start, jnp.int32(self.shape.page_size))
        offset = start - column * self.shape.page_size
        column = jnp.minimum(jnp.maximum(column, 0), self.shape.pages_per_request - 1)
        return self.table[self.request * self.shape.pages_per_request + column], offset

    def start(self, step: jax.Array, page: jax.Array, offset: jax.Array) -> None:
        """Starts the copies of a step's keys, values and scales; does nothing after the last step.

        Args:
          step: int32 scalar.
          page: page of the step's block (`locate`).
          offset: slot in the page at which the block begins.
        """

        def copy():
            shape, page_head = self.shape, page * self.shape.kv_heads + self.head
            slot = lax.rem(step, jnp.int32(_STAGES))
            tokens = pl.ds(page_head * shape.page_size + offset, BLOCK)
            sources = [
                self.pages.at[tokens, pl.ds(half * shape.head_dim, shape.head_dim)]
                for half in range(2)
            ]
            if self.scales is not None:
                rows = pl.ds(page_head * len(SCALE_ROWS), len(SCALE_ROWS))
                sources.append(self.scales.at[rows, pl.ds(offset, BLOCK)])
            for source, buffers in zip(sources, self.ring, strict=True):
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], self.ring_filled.at[slot])

        pl.when(step < self.count)(copy)


def _decode_kernel(
    shape: DecodeShape,
    *,
    q_ref: Ref,
    table_ref: Ref,
    plan_ref: Ref,
    pages_ref: Ref,
    scales_ref: Ref | None = None,
    out_ref: Ref,
    lse_ref: Ref,
    q_smem: Ref,
    ring_or_out: tuple[Sequence[Ref], Ref],
    widened: Sequence[Ref],
    lse_smem: Ref,
    q_filled: Ref,
    ring_filled: Ref,
) -> None:
    """Kernel body: attention of one kv head's query rows over one split of a request's keys.

    Args:
      shape: sizes of the call.
      q_ref: queries in global memory, [R · K · rows + padding, H] (requests, kv heads, query rows
        of a kv head, head dimension).
      table_ref: page table, int32 [R · pages per request].
      plan_ref: `PLAN_FIELDS` of each split, int32 [R · splits · 7].
      pages_ref: pages, [pages · K · page size, 2H].
      scales_ref: scales of 8-bit pages, float32 [pages · K · 4, page size], or None.
      out_ref: output in global memory, float32 [R · splits · K · rows, H].
      lse_ref: log-sum-exp in global memory, float32 [R · splits · K · 64].
      q_smem: queries in shared memory, [64, H].
      ring_or_out: (buffers of keys, values and scales, buffer of the output [64, H]) in the same
        shared memory.
      widened: keys and values of 8-bit pages as bf16, [64, H] each; empty otherwise.
      lse_smem: log-sum-exp in shared memory, float32 [64].
      q_filled: barrier completed when the queries have arrived.
      ring_filled: barriers [stages], completed when a step's copies have arrived.
    """
    ring, out_smem = ring_or_out
    split, head, request = (lax.axis_index(name) for name in ("split", "head", "request"))
    plan_row = (request * shape.splits + split) * len(PLAN_FIELDS)
    plan = {name: plan_ref[plan_row + i] for i, name in enumerate(PLAN_FIELDS)}
    copies = _PageCopies(
        shape=shape,
        table=table_ref,
        pages=pages_ref,
        scales=scales_ref,
        ring=ring,
        ring_filled=ring_filled,
        request=request,
        head=head,
        first=plan["first"],
        count=plan["count"],
        tail=plan["tail"],
    )
    q_rows = pl.ds((request * shape.kv_heads + head) * shape.rows, ROWS)
    plgpu.copy_gmem_to_smem(q_ref.at[q_rows], q_smem, q_filled)
    for step in range(_STAGES):
        copies.start(jnp.int32(step), *copies.locate(jnp.int32(step)))
    plgpu.barrier_wait(q_filled)
    q_sum = _row_sums(q_smem) if shape.quantised else None

    def compute_step(masked, step, state):
        next_page, statistics = state
        slot = lax.rem(step, jnp.int32(_STAGES))
        plgpu.barrier_wait(ring_filled.at[slot])
        mask = None
        if masked:
            first_slot = copies.block(step) * BLOCK
            mask = _BlockMask(first_slot, plan["start"], plan["end"], plan["window"])
        buffers = [x.at[slot] for x in ring]
        statistics = _attend_block(shape, mask, q_smem, q_sum, buffers, widened, statistics)
        # All of this step's buffers have been read: the copy waits for all warps.
        copies.start(step + _STAGES, *next_page)
        # The page of the next copy is looked up one step early, so its latency is hidden.
        return copies.locate(step + _STAGES + 1), statistics

    statistics = (
        mosaic.full((ROWS, shape.head_dim), 0.0, mosaic.MATRIX),
        mosaic.full((ROWS,), MASKED, mosaic.PER_ROW),
        mosaic.full((ROWS,), 0.0, mosaic.PER_ROW),
    )
    state = (copies.locate(jnp.int32(_STAGES)), statistics)
    masked_step, full_step = (functools.partial(compute_step, x) for x in (True, False))
    state = lax.fori_loop(0, plan["masked"], masked_step, state)
    _, statistics = lax.fori_loop(plan["masked"], plan["count"], full_step, state)
    acc, row_max, row_sum = statistics
    some = row_sum > 0
    out_smem[...] = acc * mosaic.broadcast_rows(jnp.where(some, 1.0 / row_sum, 0.0), shape.head_dim)
    lse = row_max * (1 / LOG2E) + jnp.log(jnp.where(some, row_sum, 1.0))
    lse_smem[...] = jnp.where(some, lse, MASKED)
    plgpu.commit_smem()
    index = (request * shape.splits + split) * shape.kv_heads + head
    out_rows = pl.ds(index * shape.rows, shape.rows)
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, shape.rows)], out_ref.at[out_rows])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[pl.ds(index * ROWS, ROWS)])
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _BlockMask:
    """Mask of one block of 64 tokens for the query rows of a request.

    Attributes:
      first_slot: slot of the block's first token, int32 scalar like the others.
      start: slot of the request's first query token.
      end: slot after the last visible one.
      window: slots that a query sees, its own included.
    """

    first_slot: jax.Array
    start: jax.Array
    end: jax.Array
    window: jax.Array

    def visible(self, shape: DecodeShape) -> jax.Array:
        """Returns bool [64 query rows, 64 tokens]: whether a row's query sees a token."""
        row = mosaic.iota((ROWS, BLOCK), 0)
        query = jnp.where(row >= shape.groups, self.start + 1, self.start)
        for t in range(2, shape.q_len):
            query = jnp.where(row >= t * shape.groups, self.start + t, query)
        slot = mosaic.iota((ROWS, BLOCK), 1) + self.first_slot
        # Two one-sided comparisons: ptxas of CUDA 13 has miscompiled a distance.
        return (slot <= jnp.minimum(query, self.end - 1)) & (slot > query - self.window)

    def written(self, width: int) -> jax.Array:
        """Returns bool [64 tokens, width]: whether a token belongs to the request."""
        return mosaic.iota((ROWS, width), 0) + self.first_slot < self.end


def _attend_block(
    shape: DecodeShape,
    mask: _BlockMask | None,
    q_smem: Ref,
    q_sum: jax.Array | None,
    buffers: Sequence[Ref],
    widened: Sequence[Ref],
    statistics: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds one block of 64 keys and values to the online softmax of 64 query rows.

    H is the head dimension.

    Args:
      shape: sizes of the call.
      mask: visible tokens of the block, or None if every query sees every token.
      q_smem: queries [64, H] in shared memory.
      q_sum: float32 [64], sum of each query over H, for 8-bit pages; None otherwise.
      buffers: keys [64, H], values [64, H] and, for 8-bit pages, scales [4, 64] in shared memory.
      widened: buffers for keys and values of 8-bit pages as bf16, [64, H] each; empty otherwise.
      statistics: (unnormalised output float32 [64, H], maximum score as an exponent of 2 [64], sum
        of the weights [64]) so far.

    Returns:
      the statistics with this block added.
    """
    acc, row_max, row_sum = statistics
    k_smem, v_smem, *scales_smem = buffers
    if shape.quantised:
        for codes, tile in zip(buffers[:2], widened, strict=True):
            _widen_codes(codes, tile)
        k_smem, v_smem = widened
        plgpu.commit_smem()
    elif mask is not None:
        # Slots never written may hold anything, and 0 · nan is nan. Codes are always finite.
        written = mask.written(shape.head_dim)
        values = jnp.where(written, mosaic.load(v_smem, mosaic.MATRIX), 0.0)
        v_smem[...] = values.astype(v_smem.dtype)
        plgpu.commit_smem()
    s = mosaic.matmul_transposed(q_smem, k_smem)
    visible = None if mask is None else mask.visible(shape)
    factor = shape.scale * LOG2E
    if shape.quantised:
        k_scale, k_zero, v_scale, v_zero = (
            mosaic.load(scales_smem[0].at[i], mosaic.PER_COLUMN) for i in range(4)
        )
        assert q_sum is not None
        q_sums = mosaic.broadcast_rows(q_sum, BLOCK)
        s = s - q_sums * mosaic.broadcast_columns(k_zero - _CODE_OFFSET, ROWS)
        s = s * mosaic.broadcast_columns(k_scale * factor, ROWS)
    else:
        s = s * factor
    if visible is not None:
        s = jnp.where(visible, s, MASKED)
    new_max = jnp.maximum(row_max, s.max(axis=1))
    rescale = jnp.exp2(row_max - new_max)
    p = jnp.exp2(s - mosaic.broadcast_rows(new_max, BLOCK))
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    row_sum = row_sum * rescale + p.sum(axis=1)
    acc = acc * mosaic.broadcast_rows(rescale, shape.head_dim)
    if shape.quantised:
        p = p * mosaic.broadcast_columns(v_scale, ROWS)
        if visible is not None:
            p = jnp.where(visible, p, 0.0)
        offset = p * mosaic.broadcast_columns(v_zero - _CODE_OFFSET, ROWS)
        if visible is not None:
            offset = jnp.where(visible, offset, 0.0)
        acc = acc - mosaic.broadcast_rows(offset.sum(axis=1), shape.head_dim)
    acc = mosaic.matmul_accumulate(acc, p.astype(q_smem.dtype), v_smem)
    return acc, new_max, row_sum


def _row_sums(ref: Ref) -> jax.Array:
    """Returns the sum of each row of a bf16 tile [64, columns] in shared memory, float32 [64]."""
    return mosaic.load(ref, mosaic.MATRIX).astype(jnp.float32).sum(axis=1)


def _widen_codes(codes_ref: Ref, widened_ref: Ref) -> None:
    """Writes uint8 codes [64, columns] as bf16 numbers code - 128, both in shared memory."""
    width = codes_ref.shape[-1]
    # A thread holds 8 adjacent numbers, a warp 256: reads of 8 bytes and writes of 16.
    rows = 256 // width
    tiling = plgpu.Tiling(((4 * rows, width), (rows, width), (8,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    codes = mosaic.load(codes_ref, layout) ^ jnp.uint8(128)
    # Not `bitcast_convert_type`: Mosaic GPU treats it as a no-op and leaves the numbers unsigned.
    widened_ref[...] = codes.astype(jnp.int8).astype(widened_ref.dtype)
