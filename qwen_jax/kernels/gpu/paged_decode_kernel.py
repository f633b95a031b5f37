"""The kernel of `decode`: one part of a request's keys, for one kv head.

A thread block is one warpgroup; two share a multiprocessor, so that one computes while the other
waits. Keys and values come in blocks of 64 tokens through a ring of buffers filled by the copy
engine, which follows the page table a few blocks ahead.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cache import SCALE_ROWS
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_schedule import LOG2E
from qwen_jax.kernels.mask import MASKED

ROWS = 64
"""M of a wgmma instruction."""
BLOCK = 64
"""Tokens of a step: 32 KiB of bf16 keys and values at H = 128."""
_STAGES = 3
FIELDS = 7
"""Numbers that a thread block is told of its part, see `decode`'s plan."""
_SIGN = 128.0
"""Codes are widened as signed bytes, code − 128: there is a fast way from those to bf16."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Everything known when compiling."""

    kv_heads: int
    groups: int  # query heads a kv head
    q_len: int
    rows: int  # groups · q_len, filled up to a multiple of 8
    width: int  # H
    page: int
    columns: int  # of the page table
    splits: int
    scale: float
    quantised: bool


def launch(sizes: Sizes, q, pages, scales, page_table, plan):
    """(out float32 [R,splits,K,rows,H], lse float32 [R,splits,K,rows]) of each part.

    q [R,K,rows,H] in the dtype of the products; plan int32 [R·splits·`FIELDS`].
    """
    requests, kv_heads, rows, width = q.shape
    splits, parts = sizes.splits, requests * sizes.splits * kv_heads
    dtype = q.dtype
    # A tile of 64 queries reads on into the next head's rows; these end it for the last.
    q = jnp.pad(q.reshape(-1, width), ((0, ROWS - rows), (0, 0)))
    operands = [q, page_table.ravel(), plan, pages.reshape(-1, 2 * width)]
    ring = [mosaic.tile_memory((_STAGES, BLOCK, width), pages.dtype) for _ in "kv"]
    extra = []
    if sizes.quantised:
        operands.append(scales.reshape(-1, sizes.page))
        ring.append(plgpu.SMEM((_STAGES, len(SCALE_ROWS), BLOCK), jnp.float32))
        extra = [mosaic.tile_memory((BLOCK, width), dtype) for _ in "kv"]
    out, lse = plgpu.kernel(
        functools.partial(_kernel, sizes),
        out_type=(
            jax.ShapeDtypeStruct((parts * rows, width), jnp.float32),
            jax.ShapeDtypeStruct((parts * ROWS,), jnp.float32),
        ),
        scratch_types=[
            mosaic.tile_memory((ROWS, width), dtype),
            # The result leaves through the memory that keys and values came in by.
            mosaic.share(ring, plgpu.SMEM((ROWS, width), jnp.float32)),
            extra,
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(ring), num_barriers=_STAGES),
        ],
        grid=(splits, kv_heads, requests),
        grid_names=("split", "head", "request"),
        compiler_params=mosaic.PARAMS,
        kernel_name="paged_decode",
    )(*operands)
    shape = (requests, splits, kv_heads)
    return out.reshape(*shape, rows, width), lse.reshape(*shape, ROWS)[..., :rows]


@dataclasses.dataclass(frozen=True)
class _Copies:
    """From a part's pages to the ring of buffers in shared memory.

    Attributes:
      first, count, tail: blocks of the part, see `decode`'s plan.
      ring, ready: buffers for keys, values and scales, and the barriers that say they are filled.
    """

    sizes: Sizes
    table: jax.Array
    pages: jax.Array
    scales: jax.Array | None
    ring: list
    ready: jax.Array
    request: jax.Array
    head: jax.Array
    first: jax.Array
    count: jax.Array
    tail: jax.Array

    def block(self, step):
        """Block of a step: those cut at the end come first, then from the first one on."""
        in_tail = step < self.tail
        return self.first + jnp.where(in_tail, self.count - 1 - step, step - self.tail)

    def locate(self, step):
        """(page of a step's block, block's first slot in it); any page after the last step."""
        start = self.block(step) * BLOCK
        column = lax.div(start, jnp.int32(self.sizes.page))
        offset = start - column * self.sizes.page
        column = jnp.minimum(jnp.maximum(column, 0), self.sizes.columns - 1)
        return self.table[self.request * self.sizes.columns + column], offset

    def start(self, step, page, offset) -> None:
        """Starts the copies of a step's keys and values (and scales), if there is such a step."""

        def copy():
            sizes, base = self.sizes, page * self.sizes.kv_heads + self.head
            slot = lax.rem(step, jnp.int32(_STAGES))
            tokens = pl.ds(base * sizes.page + offset, BLOCK)
            sources = [
                self.pages.at[tokens, pl.ds(half * sizes.width, sizes.width)] for half in range(2)
            ]
            if sizes.quantised:
                lines = pl.ds(base * len(SCALE_ROWS), len(SCALE_ROWS))
                sources.append(self.scales.at[lines, pl.ds(offset, BLOCK)])
            for source, memory in zip(sources, self.ring, strict=True):
                plgpu.copy_gmem_to_smem(source, memory.at[slot], self.ready.at[slot])

        pl.when(step < self.count)(copy)


def _kernel(sizes: Sizes, q_ref, table_ref, plan_ref, pages_ref, *rest):
    """One part of a request's keys, for one kv head."""
    rest = list(rest)
    scales_ref = rest.pop(0) if sizes.quantised else None
    out_ref, lse_ref, q_memory, (ring, out_memory), wide, lse_memory, q_ready, ready = rest
    split, head, request = (lax.axis_index(name) for name in ("split", "head", "request"))
    row = (request * sizes.splits + split) * FIELDS
    first, count, tail, masked, start, end, window = (plan_ref[row + i] for i in range(FIELDS))
    copies = _Copies(
        *(sizes, table_ref, pages_ref, scales_ref, ring, ready),
        *(request, head, first, count, tail),
    )
    at = (request * sizes.kv_heads + head) * sizes.rows
    plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(at, ROWS)], q_memory, q_ready)
    for step in range(_STAGES):
        copies.start(jnp.int32(step), *copies.locate(jnp.int32(step)))
    plgpu.barrier_wait(q_ready)
    q_sum = _row_sums(q_memory) if sizes.quantised else None

    def body(cut, step, carry):
        ahead, carry = carry
        slot = lax.rem(step, jnp.int32(_STAGES))
        plgpu.barrier_wait(ready.at[slot])
        slots = None
        if cut:
            slots = _Slots(copies.block(step) * BLOCK, start, end, window)
        memory = [x.at[slot] for x in ring]
        carry = _absorb(sizes, slots, q_memory, q_sum, memory, wide, carry)
        # Everything here has been read: the copy waits for all warps.
        copies.start(step + _STAGES, *ahead)
        # The page of the next copy is looked up now, so that the look-up is not waited for.
        return copies.locate(step + _STAGES + 1), carry

    carry = (
        mosaic.full((ROWS, sizes.width), 0.0, mosaic.MATRIX),
        mosaic.full((ROWS,), MASKED, mosaic.PER_ROW),
        mosaic.full((ROWS,), 0.0, mosaic.PER_ROW),
    )
    carry = (copies.locate(jnp.int32(_STAGES)), carry)
    carry = lax.fori_loop(0, masked, functools.partial(body, True), carry)
    _, carry = lax.fori_loop(masked, count, functools.partial(body, False), carry)
    out, top, total = carry
    some = total > 0
    out_memory[...] = out * mosaic.rows(jnp.where(some, 1.0 / total, 0.0), sizes.width)
    lse = top * (1 / LOG2E) + jnp.log(jnp.where(some, total, 1.0))
    lse_memory[...] = jnp.where(some, lse, MASKED)
    plgpu.commit_smem()
    part = (request * sizes.splits + split) * sizes.kv_heads + head
    result = pl.ds(part * sizes.rows, sizes.rows)
    plgpu.copy_smem_to_gmem(out_memory.at[pl.ds(0, sizes.rows)], out_ref.at[result])
    plgpu.copy_smem_to_gmem(lse_memory, lse_ref.at[pl.ds(part * ROWS, ROWS)])
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Slots:
    """A block that begins in slot s0, beside the queries of its request; int32 scalars."""

    s0: jax.Array
    start: jax.Array
    end: jax.Array
    window: jax.Array

    def seen(self, sizes: Sizes):
        """bool [64,64]: which row's query sees which token."""
        row = mosaic.iota((ROWS, BLOCK), 0)
        query = jnp.where(row >= sizes.groups, self.start + 1, self.start)
        for t in range(2, sizes.q_len):
            query = jnp.where(row >= t * sizes.groups, self.start + t, query)
        slot = mosaic.iota((ROWS, BLOCK), 1) + self.s0
        # Two one-sided bounds: ptxas of CUDA 13 has miscompiled a distance.
        return (slot <= jnp.minimum(query, self.end - 1)) & (slot > query - self.window)

    def written(self, width: int):
        """bool [64,width]: tokens of this request."""
        return mosaic.iota((ROWS, width), 0) + self.s0 < self.end


def _absorb(sizes: Sizes, slots, q_memory, q_sum, memory, wide, carry):
    """Takes a block of keys and values into (output, highest score, weight) of the online softmax.

    slots: None if every query sees every token.
    """
    out, highest, weight = carry
    k_memory, v_memory, *scales = memory
    if sizes.quantised:
        for codes, tile in zip(memory[:2], wide, strict=True):
            _widen(codes, tile)
        k_memory, v_memory = wide
        plgpu.commit_smem()
    elif slots is not None:
        # Slots nobody wrote may hold anything, and 0 · nan is nan. Codes are always finite.
        values = jnp.where(slots.written(sizes.width), mosaic.load(v_memory, mosaic.MATRIX), 0.0)
        v_memory[...] = values.astype(v_memory.dtype)
        plgpu.commit_smem()
    s = mosaic.product(q_memory, k_memory)
    seen = None if slots is None else slots.seen(sizes)
    factor = sizes.scale * LOG2E
    if sizes.quantised:
        k_scale, k_zero, v_scale, v_zero = (
            mosaic.load(scales[0].at[i], mosaic.PER_COLUMN) for i in range(4)
        )
        s = s - mosaic.rows(q_sum, BLOCK) * mosaic.columns(k_zero - _SIGN, ROWS)
        s = s * mosaic.columns(k_scale * factor, ROWS)
    else:
        s = s * factor
    if seen is not None:
        s = jnp.where(seen, s, MASKED)
    top = jnp.maximum(highest, s.max(axis=1))
    keep = jnp.exp2(highest - top)
    p = jnp.exp2(s - mosaic.rows(top, BLOCK))
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    weight = weight * keep + p.sum(axis=1)
    out = out * mosaic.rows(keep, sizes.width)
    if sizes.quantised:
        p = p * mosaic.columns(v_scale, ROWS)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        offset = p * mosaic.columns(v_zero - _SIGN, ROWS)
        if seen is not None:
            offset = jnp.where(seen, offset, 0.0)
        out = out - mosaic.rows(offset.sum(axis=1), sizes.width)
    return mosaic.accumulate(out, p.astype(q_memory.dtype), v_memory), top, weight


def _row_sums(ref):
    """Sums of the rows of a tile of bf16, float32 [64]."""
    return mosaic.load(ref, mosaic.MATRIX).astype(jnp.float32).sum(axis=1)


def _widen(codes_ref, wide_ref):
    """Codes uint8 [64,H] to codes − 128 in bf16."""
    width = codes_ref.shape[-1]
    # A thread holds 8 numbers side by side, a warp 256: reads of 8 bytes and writes of 16.
    rows = 256 // width
    tiling = plgpu.Tiling(((4 * rows, width), (rows, width), (8,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    codes = mosaic.load(codes_ref, layout) ^ jnp.uint8(128)
    # Not `bitcast_convert_type`, which Mosaic GPU takes for nothing to do, leaving them unsigned.
    wide_ref[...] = codes.astype(jnp.int8).astype(wide_ref.dtype)
