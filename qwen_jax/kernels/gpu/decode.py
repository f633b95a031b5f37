"""Decode attention over a paged cache on Hopper: split keys, tensor cores, pages by bulk copies.

A batch of one or eight has far fewer (request, kv head) pairs than the 132 multiprocessors, so
each request's keys are cut into parts, one thread block a part ("flash decoding"), and the parts'
outputs are merged by their log-sum-exp. A thread block is one warpgroup; two share a
multiprocessor, so that one computes while the other waits. Keys and values come in blocks of 64
tokens through a ring of buffers filled by the copy engine, which follows the page table a few
blocks ahead.

All query heads of a kv head, and all of a few query tokens, are the rows of one wgmma, which always
has 64. Unused rows are no bottleneck: at 64 rows, bf16 keys and values arriving at the full speed
of an H200's memory (4.8 TB/s) need 307 of its 990 TFLOP/s.

8-bit pages are widened to bf16 in shared memory as codes, which are exact; scale and zero are put
on scores and weights (see `kernels.tpu.decode`, which does the same).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cache import SCALE_ROWS, PagedCache
from qwen_jax.kernels.mask import MASKED
from qwen_jax.parallel import current_mesh

_ROWS = 64
"""M of a wgmma instruction."""
_BLOCK = 64
"""Tokens of a step: 32 KiB of bf16 keys and values at H = 128."""
_STAGES = 3
_SLOTS = 132 * 2
"""Thread blocks that run at once on an H100 or H200."""
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_LOG2E = math.log2(math.e)


def refusal(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Why this kernel can't serve a cache with `heads` query heads a kv head; None if it can."""
    del entries  # of any number
    device = current_mesh().abstract_device or jax.devices()[0]
    if not any(name in device.device_kind for name in _HOPPER):
        return f"a {device.device_kind}; the GPU kernel is made for Hopper (H100, H200)"
    if cache.head_dim not in (64, 128):
        return f"heads of {cache.head_dim}; the GPU kernel takes 64 or 128"
    if cache.pages.dtype not in (jnp.bfloat16, jnp.float16, jnp.uint8):
        return f"a cache in {cache.pages.dtype}; the GPU kernel takes bfloat16, float16 or uint8"
    if cache.page_size % _BLOCK:
        return f"pages of {cache.page_size} tokens; the GPU kernel takes multiples of {_BLOCK}"
    if q_len * heads > _ROWS:
        return f"{q_len} query tokens by {heads} heads a kv head; the GPU kernel takes {_ROWS}"
    return None


@dataclasses.dataclass(frozen=True)
class _Sizes:
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


def decode(q, pages, scales, page_table, lengths, start, window, *, scale, splits=None):
    """Contract: `kernels.paged._reference`.

    splits: parts each request's keys are cut into; by default what `choose_splits` says.
    """
    requests, q_len, heads, width = q.shape
    kv_heads, page = pages.shape[1:3]
    groups = heads // kv_heads
    if splits is None:
        splits = choose_splits(requests * kv_heads, page_table.shape[1] * page // _BLOCK)
    rows = -(-groups * q_len // 8) * 8
    sizes = _Sizes(
        *(kv_heads, groups, q_len, rows, width, page, page_table.shape[1], splits, scale),
        scales is not None,
    )
    compute = jnp.bfloat16 if scales is not None else pages.dtype
    # [R,T,K,G,H] -> [R,K,T·G,H], zeros below.
    q = q.reshape(requests, q_len, kv_heads, groups, width).swapaxes(1, 2).astype(compute)
    q = q.reshape(requests, kv_heads, q_len * groups, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, 0)))
    out, lse = _call(sizes, q, pages, scales, page_table, _plan(lengths, start, window, sizes))
    out, lse = _merge(out, lse)

    def heads_last(x):  # [R,K,rows,·] -> [R,T,N,·]
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out), heads_last(lse[..., None])[..., 0].swapaxes(1, 2)


def choose_splits(pairs: int, blocks: int) -> int:
    """Parts to cut each of `pairs` (request, kv head) pairs into, of at most `blocks` steps each.

    The fewest waves of thread blocks by steps of the longest part; starting a part and merging it
    counts as four steps.
    """

    def cost(splits):
        return -(-pairs * splits // _SLOTS) * (-(-blocks // splits) + 4)

    return min(range(1, max(1, min(blocks // 2, 128)) + 1), key=cost)


_FIELDS = 7


def _plan(lengths, start, window, sizes: _Sizes) -> jax.Array:
    """int32 [R·splits·_FIELDS]: what a thread block needs to know of its part.

    First block; number of blocks; how many of them at the end are cut by the queries' own slots or
    the request's end; how many in all need the mask, with those the window cuts; slot of the first
    query; slot after the last one seen; window.
    """
    end = jnp.minimum(lengths, start + sizes.q_len)
    low = jnp.maximum(start - window + 1, 0) // _BLOCK
    blocks = jnp.maximum((end + _BLOCK - 1) // _BLOCK - low, 0)
    each = (blocks + sizes.splits - 1) // sizes.splits
    done = jnp.arange(sizes.splits, dtype=jnp.int32) * each[:, None]
    count = jnp.clip(blocks[:, None] - done, 0, each[:, None])
    first = low[:, None] + done
    full_high = jnp.maximum(jnp.minimum(end, start + 1) // _BLOCK, 0)[:, None]
    full_low = (jnp.maximum(start + sizes.q_len - window, 0) + _BLOCK - 1) // _BLOCK
    tail = jnp.clip(first + count - jnp.maximum(full_high, first), 0, count)
    head = jnp.clip(full_low[:, None] - first, 0, count - tail)
    window = jnp.broadcast_to(window, start.shape)
    rows = (jnp.broadcast_to(x[:, None], count.shape) for x in (start, end, window))
    return jnp.stack([first, count, tail, tail + head, *rows], axis=-1).astype(jnp.int32).ravel()


def _merge(out, lse):
    """Parts to wholes: out float32 [R,splits,K,rows,H] and lse [R,splits,K,rows] over splits."""
    highest = lse.max(axis=1)
    weights = jnp.where(lse > MASKED / 2, jnp.exp(lse - highest[:, None]), 0.0)
    total = weights.sum(axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (weights[..., None] * out).sum(axis=1) / total[..., None]
    return out, jnp.where(some, highest + jnp.log(total), MASKED)


def _call(sizes: _Sizes, q, pages, scales, page_table, plan):
    requests, kv_heads, rows, width = q.shape
    splits, parts = sizes.splits, requests * sizes.splits * kv_heads
    dtype = q.dtype
    # A tile of 64 queries reads on into the next head's rows; these end it for the last.
    q = jnp.pad(q.reshape(-1, width), ((0, _ROWS - rows), (0, 0)))
    operands = [q, page_table.ravel(), plan, pages.reshape(-1, 2 * width)]
    ring = [_tiles((_STAGES, _BLOCK, width), pages.dtype) for _ in "kv"]
    extra = []
    if sizes.quantised:
        operands.append(scales.reshape(-1, sizes.page))
        ring.append(plgpu.SMEM((_STAGES, len(SCALE_ROWS), _BLOCK), jnp.float32))
        extra = [_tiles((_BLOCK, width), dtype) for _ in "kv"]
    out, lse = plgpu.kernel(
        functools.partial(_kernel, sizes),
        out_type=(
            jax.ShapeDtypeStruct((parts * rows, width), jnp.float32),
            jax.ShapeDtypeStruct((parts * _ROWS,), jnp.float32),
        ),
        scratch_types=[
            _tiles((_ROWS, width), dtype),
            # The result leaves through the memory that keys and values came in by.
            _share(ring, plgpu.SMEM((_ROWS, width), jnp.float32)),
            extra,
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(ring), num_barriers=_STAGES),
        ],
        grid=(splits, kv_heads, requests),
        grid_names=("split", "head", "request"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_decode",
    )(*operands)
    shape = (requests, splits, kv_heads)
    return out.reshape(*shape, rows, width), lse.reshape(*shape, _ROWS)[..., :rows]


def _tiles(shape, dtype):
    """Shared memory for wgmma operands: rows swizzled over 128 bytes, or all they have."""
    size = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, size // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(size)))


@dataclasses.dataclass(frozen=True)
class _Copies:
    """From a part's pages to the ring of buffers in shared memory.

    Attributes:
      first, count, tail: blocks of the part, see `_plan`.
      ring, ready: buffers for keys, values and scales, and the barriers that say they are filled.
    """

    sizes: _Sizes
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
        start = self.block(step) * _BLOCK
        column = lax.div(start, jnp.int32(self.sizes.page))
        offset = start - column * self.sizes.page
        column = jnp.minimum(jnp.maximum(column, 0), self.sizes.columns - 1)
        return self.table[self.request * self.sizes.columns + column], offset

    def start(self, step, page, offset) -> None:
        """Starts the copies of a step's keys and values (and scales), if there is such a step."""

        def copy():
            sizes, base = self.sizes, page * self.sizes.kv_heads + self.head
            slot = lax.rem(step, jnp.int32(_STAGES))
            tokens = pl.ds(base * sizes.page + offset, _BLOCK)
            sources = [
                self.pages.at[tokens, pl.ds(half * sizes.width, sizes.width)] for half in range(2)
            ]
            if sizes.quantised:
                lines = pl.ds(base * len(SCALE_ROWS), len(SCALE_ROWS))
                sources.append(self.scales.at[lines, pl.ds(offset, _BLOCK)])
            for source, memory in zip(sources, self.ring, strict=True):
                plgpu.copy_gmem_to_smem(source, memory.at[slot], self.ready.at[slot])

        pl.when(step < self.count)(copy)


def _kernel(sizes: _Sizes, q_ref, table_ref, plan_ref, pages_ref, *rest):
    """One part of a request's keys, for one kv head."""
    rest = list(rest)
    scales_ref = rest.pop(0) if sizes.quantised else None
    out_ref, lse_ref, q_memory, (ring, out_memory), wide, lse_memory, q_ready, ready = rest
    split, head, request = (lax.axis_index(name) for name in ("split", "head", "request"))
    row = (request * sizes.splits + split) * _FIELDS
    first, count, tail, masked, start, end, window = (plan_ref[row + i] for i in range(_FIELDS))
    copies = _Copies(
        *(sizes, table_ref, pages_ref, scales_ref, ring, ready),
        *(request, head, first, count, tail),
    )
    at = (request * sizes.kv_heads + head) * sizes.rows
    plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(at, _ROWS)], q_memory, q_ready)
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
            slots = _Slots(copies.block(step) * _BLOCK, start, end, window)
        memory = [x.at[slot] for x in ring]
        carry = _absorb(sizes, slots, q_memory, q_sum, memory, wide, carry)
        # Everything here has been read: the copy waits for all warps.
        copies.start(step + _STAGES, *ahead)
        # The page of the next copy is looked up now, so that the look-up is not waited for.
        return copies.locate(step + _STAGES + 1), carry

    carry = (
        _full((_ROWS, sizes.width), 0.0, _MATRIX),
        _full((_ROWS,), MASKED, _PER_ROW),
        _full((_ROWS,), 0.0, _PER_ROW),
    )
    carry = (copies.locate(jnp.int32(_STAGES)), carry)
    carry = lax.fori_loop(0, masked, functools.partial(body, True), carry)
    _, carry = lax.fori_loop(masked, count, functools.partial(body, False), carry)
    out, top, total = carry
    some = total > 0
    out_memory[...] = out * _rows(jnp.where(some, 1.0 / total, 0.0), sizes.width)
    lse = top * (1 / _LOG2E) + jnp.log(jnp.where(some, total, 1.0))
    lse_memory[...] = jnp.where(some, lse, MASKED)
    plgpu.commit_smem()
    part = (request * sizes.splits + split) * sizes.kv_heads + head
    result = pl.ds(part * sizes.rows, sizes.rows)
    plgpu.copy_smem_to_gmem(out_memory.at[pl.ds(0, sizes.rows)], out_ref.at[result])
    plgpu.copy_smem_to_gmem(lse_memory, lse_ref.at[pl.ds(part * _ROWS, _ROWS)])
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Slots:
    """A block that begins in slot s0, beside the queries of its request; int32 scalars."""

    s0: jax.Array
    start: jax.Array
    end: jax.Array
    window: jax.Array

    def seen(self, sizes: _Sizes):
        """bool [64,64]: which row's query sees which token."""
        row = _iota(0)
        query = jnp.where(row >= sizes.groups, self.start + 1, self.start)
        for t in range(2, sizes.q_len):
            query = jnp.where(row >= t * sizes.groups, self.start + t, query)
        slot = _iota(1) + self.s0
        # Two one-sided bounds: ptxas of CUDA 13 has miscompiled a distance.
        return (slot <= jnp.minimum(query, self.end - 1)) & (slot > query - self.window)

    def written(self, width: int):
        """bool [64,width]: tokens of this request."""
        return _iota(0, width) + self.s0 < self.end


def _absorb(sizes: _Sizes, slots, q_memory, q_sum, memory, wide, carry):
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
        values = jnp.where(slots.written(sizes.width), _load(v_memory, _MATRIX), 0.0)
        v_memory[...] = values.astype(v_memory.dtype)
        plgpu.commit_smem()
    s = _product(q_memory, k_memory)
    seen = None if slots is None else slots.seen(sizes)
    factor = sizes.scale * _LOG2E
    if sizes.quantised:
        k_scale, k_zero, v_scale, v_zero = (_load(scales[0].at[i], _PER_COLUMN) for i in range(4))
        s = (s - _rows(q_sum, _BLOCK) * _columns(k_zero - _SIGN)) * _columns(k_scale * factor)
    else:
        s = s * factor
    if seen is not None:
        s = jnp.where(seen, s, MASKED)
    top = jnp.maximum(highest, s.max(axis=1))
    keep = jnp.exp2(highest - top)
    p = jnp.exp2(s - _rows(top, _BLOCK))
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    weight = weight * keep + p.sum(axis=1)
    out = out * _rows(keep, sizes.width)
    if sizes.quantised:
        p = p * _columns(v_scale)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        offset = p * _columns(v_zero - _SIGN)
        if seen is not None:
            offset = jnp.where(seen, offset, 0.0)
        out = out - _rows(offset.sum(axis=1), sizes.width)
    return _accumulate(out, p.astype(q_memory.dtype), v_memory), top, weight


# What a CPU cannot interpret; a test puts plain products in its place.

_MATRIX = plgpu.Layout.WGMMA
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)
_PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_SIGN = 128.0
"""Codes are widened as signed bytes, code − 128: there is a fast way from those to bf16."""
_LOAD_TAKES_INDEX = (
    inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
)


def _share(*memory):
    """Shared memory used for one thing, then for another."""
    return plgpu.RefUnion(*memory)


def _load(ref, layout):
    """Shared memory to registers."""
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _iota(axis: int, columns: int = _BLOCK):
    """int32 [64,columns], positions along an axis."""
    return plgpu.broadcasted_iota(jnp.int32, (_ROWS, columns), axis, layout=_MATRIX)


def _rows(x, columns: int):
    """[64] -> [64,columns]."""
    return lax.broadcast_in_dim(x, (_ROWS, columns), [0])


def _columns(x):
    """[64] -> [64,64], each number down a column."""
    return lax.broadcast_in_dim(x, (_ROWS, _BLOCK), [1])


def _row_sums(ref):
    """Sums of the rows of a tile of bf16, float32 [64]."""
    return _load(ref, _MATRIX).astype(jnp.float32).sum(axis=1)


def _widen(codes_ref, wide_ref):
    """Codes uint8 [64,H] to codes − 128 in bf16."""
    width = codes_ref.shape[-1]
    # A thread holds 8 numbers side by side, a warp 256: reads of 8 bytes and writes of 16.
    rows = 256 // width
    tiling = plgpu.Tiling(((4 * rows, width), (rows, width), (8,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    codes = _load(codes_ref, layout) ^ jnp.uint8(128)
    # Not `bitcast_convert_type`, which Mosaic GPU takes for nothing to do, leaving them unsigned.
    wide_ref[...] = codes.astype(jnp.int8).astype(wide_ref.dtype)


def _product(a_ref, b_ref):
    """a·bᵀ in float32, both in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(compute, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def _accumulate(total, a, b_ref):
    """total + a·b: a in registers, b in shared memory."""

    def compute(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)

    return pl.run_state(compute)(plgpu.ACC.init(total))
