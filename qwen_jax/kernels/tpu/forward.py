"""Forward pass of attention on TPU."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import MASKED, Mask
from qwen_jax.kernels.tpu import layout as lay
from qwen_jax.kernels.tpu.layout import UNSEEN, Layout, Step
from qwen_jax.kernels.tpu.tiles import LANES, Chip

LOG2E = math.log2(math.e)


def across(x: jax.Array, width: int) -> jax.Array:
    """[R,LANES] with the same number in every lane -> [R,width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def precision(dtype):
    """Float32 operands are multiplied as float32, not as one bfloat16 product."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a, b, contract):
    """Product with float32 accumulation; contract: the contracted axis of each."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def _seen(layout: Layout, ahead, window, left, q_ids, k_ids, shape):
    """Mask of queries × keys. ahead: slots the first query stands past the first key.

    left: keys of the array from the first key on.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = col - row
    seen = distance <= ahead
    if window is not None:
        seen &= distance > ahead - window
    if not layout.diagonal and layout.columns != layout.k_len:
        seen &= col < left
    if layout.segments:
        seen &= across(q_ids, shape[1]) == k_ids
    return seen


def _kernel(*refs, layout: Layout, scale: float):
    refs = list(refs)
    ranges = refs.pop(0) if layout.limited else None
    slots = refs.pop(0) if layout.traced_start or layout.traced_window else None
    q_ref, k_ref, v_ref = (refs.pop(0) for _ in range(3))
    q_ids_ref, k_ids_ref = (refs.pop(0), refs.pop(0)) if layout.segments else (None, None)
    out_ref, lse_ref, q_scaled, highest, total, acc = (refs.pop(0) for _ in range(6))
    ids = refs.pop(0) if layout.segments else None
    tiles = layout.tiles
    width = q_ref.shape[-1]
    c = pl.program_id(3) if layout.chunks > 1 else 0
    step = Step(layout, pl.program_id(0), pl.program_id(2), c, ranges, slots)

    def start():
        q_scaled[...] = (q_ref[...].astype(jnp.float32) * (scale * LOG2E)).astype(q_ref.dtype)
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        if layout.segments:
            ids[...] = jnp.broadcast_to(q_ids_ref[...], (LANES, tiles.block_q)).T

    def update(rows, keys, seen_from=None):
        """Softmax update of these rows with these keys; seen_from: how a mask is made."""
        k, v = k_ref[keys], v_ref[keys]
        s = dot(q_scaled[rows], k, (1, 1))
        if seen_from is not None:
            s = jnp.where(seen_from(s.shape), s, UNSEEN)
        old = highest[rows]
        new = jnp.maximum(old, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - across(new, s.shape[1]))
        keep = jnp.exp2(old - new)
        highest[rows] = new
        lanes = sum(p[:, x : x + LANES] for x in range(0, p.shape[1], LANES))
        total[rows] = total[rows] * keep + lanes
        acc[rows] = acc[rows] * across(keep, width) + dot(p.astype(v.dtype), v, (1, 0))

    everything = slice(None)

    def block(j, masked):
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return update(everything, keys)
        key = first + step.c * layout.chunk
        q_ids, k_ids = (ids[...], k_ids_ref[:, keys]) if layout.segments else (None, None)
        seen = functools.partial(
            _seen, layout, step.start() - key, step.window(), layout.k_len - key, q_ids, k_ids
        )
        update(everything, keys, seen)

    def diagonal():
        first = step.i * tiles.block_q - step.c * layout.chunk
        for row in range(0, tiles.block_q, tiles.diagonal):
            rows = slice(row, row + tiles.diagonal)
            n = row + tiles.diagonal
            keys = pl.ds(pl.multiple_of(first, tiles.block_q), n)
            q_ids, k_ids = (ids[rows], k_ids_ref[:, keys]) if layout.segments else (None, None)
            update(
                rows,
                keys,
                functools.partial(_seen, layout, row, step.window(), None, q_ids, k_ids),
            )

    def finish():
        sums = total[...].sum(axis=1, keepdims=True)
        some = sums > 0
        sums = jnp.where(some, sums, 1.0)
        out_ref[...] = (acc[...] / sums).astype(out_ref.dtype)
        lse = (highest[...] + jnp.log2(sums)) * (1 / LOG2E)
        lse_ref[...] = jnp.where(some, lse, MASKED).T[:1]

    lay.when_chunk(layout, c == 0, start)
    low, full_low, full_high, high = step.loops()
    jax.lax.fori_loop(full_low, full_high, lambda j, _: block(j, False), None)
    if layout.limited:
        jax.lax.fori_loop(low, full_low, lambda j, _: block(j, True), None)
        jax.lax.fori_loop(full_high, high, lambda j, _: block(j, True), None)
    if layout.diagonal:
        lay.when_chunk(layout, step.on_diagonal(), diagonal)
    lay.when_chunk(layout, c == layout.chunks - 1, finish)


def padded_width(width: int) -> int:
    """Head width the kernels compute with: 64 or a multiple of the lanes."""
    return 64 if width <= 64 else lay.round_up(width, LANES)


def heads_first(x: jax.Array, length: int) -> jax.Array:
    """[B,S,K,H] -> [B,K,length,padded_width(H)], zeros past S and H."""
    x = x.swapaxes(1, 2)
    past = (length - x.shape[2], padded_width(x.shape[3]) - x.shape[3])
    return jnp.pad(x, ((0, 0), (0, 0), (0, past[0]), (0, past[1])))


def segment_rows(mask: Mask, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Ids as int32 [B,1,rows] and [B,1,columns], such that equal means visible."""
    q = jnp.where(mask.q_segments > 0, mask.q_segments, -1)
    k = jnp.maximum(mask.k_segments, 0)
    q = jnp.pad(q, ((0, 0), (0, layout.rows - layout.q_len)), constant_values=-1)
    k = jnp.pad(k, ((0, 0), (0, layout.columns - layout.k_len)))
    return q[:, None], k[:, None]


def scalars(mask: Mask, layout: Layout, batch: int) -> list[jax.Array]:
    """The scalar-prefetch operands, in the order in which the kernels take them."""
    out = [lay.key_ranges(mask, layout, batch)] if layout.limited else []
    slots = [mask.q_start.astype(jnp.int32)] if layout.traced_start else []
    if layout.traced_window:
        slots.append(jnp.reshape(mask.layer_window, (1,)).astype(jnp.int32))
    return out + ([jnp.concatenate(slots)] if slots else [])


def forward(q, k, v, mask: Mask, scale: float, *, chip: Chip, interpret=False):
    """Contract: `flash.FlashKernel.forward`."""
    batch, q_len, heads, head_dim = q.shape
    k_len, kv_heads = k.shape[1:3]
    width = padded_width(head_dim)
    groups = heads // kv_heads
    layout = lay.make_layout(q_len, k_len, width, q.dtype.itemsize, mask, chip.forward)
    tiles = layout.tiles
    prefetched = scalars(mask, layout, batch)

    def queries(b, n, i, c, *_):
        return b, n, i, 0

    def chunk(b, i, c, refs):
        """The chunk to hold: one that has work for block i, so that no other is ever loaded."""
        if layout.chunks == 1:
            return 0
        n = layout.chunk_blocks
        if layout.diagonal:
            last = jax.lax.div(i * tiles.block_q, layout.chunk)
        else:
            last = layout.chunks - 1
        first = 0
        if layout.limited:
            at = (b * layout.q_blocks + i) * 4
            first = jax.lax.div(refs[0][at], n)
            if not layout.diagonal:
                end = -(-layout.k_len // tiles.block_k) - refs[0][at + 3]
                last = jax.lax.div(jnp.maximum(end - 1, 0), n)
        return jnp.clip(c, jnp.minimum(first, last), last)

    def keys(b, n, i, c, *refs):
        return b, jax.lax.div(n, groups), chunk(b, i, c, refs), 0

    in_specs = [
        pl.BlockSpec((None, None, tiles.block_q, width), queries),
        pl.BlockSpec((None, None, layout.chunk, width), keys),
        pl.BlockSpec((None, None, layout.chunk, width), keys),
    ]
    operands = [heads_first(q, layout.rows), *(heads_first(x, layout.columns) for x in (k, v))]
    if layout.segments:
        in_specs += [
            pl.BlockSpec((None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, 0, i)),
            pl.BlockSpec(
                (None, 1, layout.chunk),
                lambda b, n, i, c, *refs: (b, 0, chunk(b, i, c, refs)),
            ),
        ]
        operands += segment_rows(mask, layout)
    pairs = batch * heads * layout.pairs()
    scratch = [
        pltpu.VMEM((tiles.block_q, width), q.dtype),
        pltpu.VMEM((tiles.block_q, LANES), jnp.float32),
        pltpu.VMEM((tiles.block_q, LANES), jnp.float32),
        pltpu.VMEM((tiles.block_q, width), jnp.float32),
    ]
    if layout.segments:
        scratch.append(pltpu.VMEM((tiles.block_q, LANES), jnp.int32))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, layout=layout, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, layout.q_blocks, layout.chunks),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((None, None, tiles.block_q, width), queries),
                pl.BlockSpec((None, None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, n, 0, i)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, layout.rows, width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, layout.rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chip.vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * width,
            bytes_accessed=2 * (q.nbytes + k.nbytes) + batch * heads * q_len * 4,
            transcendentals=pairs,
        ),
        interpret=interpret,
        name="attention_forward",
    )(*prefetched, *operands)
    return out[:, :, :q_len, :head_dim].swapaxes(1, 2), lse[:, :, 0, :q_len]
