"""Forward pass of attention on TPU."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import MASKED, Mask
from qwen_jax.kernels.tpu import flash_blocks as lay
from qwen_jax.kernels.tpu.block_sizes import LANES, Chip
from qwen_jax.kernels.tpu.flash_blocks import UNSEEN, Layout, Step

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


@dataclasses.dataclass(frozen=True)
class _Refs:
    """What the kernel reads and writes. Shapes: Q is block_q, C the chunk of keys.

    Attributes:
      q [Q,H], k [C,H], v [C,H]; q_ids int32 [1,Q], k_ids int32 [1,C] or None.
      out [Q,H], lse float32 [1,Q].
      q_scaled [Q,H]: q times the scale, in bits.
      highest, total: float32 [Q,LANES], the maximum so far in every lane and the sum of weights by
        lane. acc: float32 [Q,H].
      ids: int32 [Q,LANES], the queries' ids in every lane, or None.
    """

    q: object
    k: object
    v: object
    q_ids: object
    k_ids: object
    out: object
    lse: object
    q_scaled: object
    highest: object
    total: object
    acc: object
    ids: object

    def start(self, scale: float):
        """Empties the accumulators and prepares the queries."""
        scaled = self.q[...].astype(jnp.float32) * (scale * LOG2E)
        self.q_scaled[...] = scaled.astype(self.q.dtype)
        self.highest[...] = jnp.full_like(self.highest, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)
        if self.ids is not None:
            self.ids[...] = jnp.broadcast_to(self.q_ids[...], self.ids.shape[::-1]).T

    def update(self, rows, keys, seen_from=None):
        """Softmax update of these rows and keys; seen_from: (q_ids, k_ids, shape) -> mask."""
        k, v = self.k[keys], self.v[keys]
        s = dot(self.q_scaled[rows], k, (1, 1))
        if seen_from is not None:
            packed = self.ids is not None
            ids = (self.ids[rows], self.k_ids[:, keys]) if packed else (None, None)
            s = jnp.where(seen_from(*ids, s.shape), s, UNSEEN)
        old = self.highest[rows]
        new = jnp.maximum(old, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - across(new, s.shape[1]))
        keep = jnp.exp2(old - new)
        self.highest[rows] = new
        lanes = sum(p[:, x : x + LANES] for x in range(0, p.shape[1], LANES))
        self.total[rows] = self.total[rows] * keep + lanes
        product = dot(p.astype(v.dtype), v, (1, 0))
        self.acc[rows] = self.acc[rows] * across(keep, v.shape[1]) + product

    def finish(self):
        """Writes out and lse."""
        sums = self.total[...].sum(axis=1, keepdims=True)
        some = sums > 0
        sums = jnp.where(some, sums, 1.0)
        self.out[...] = (self.acc[...] / sums).astype(self.out.dtype)
        lse = (self.highest[...] + jnp.log2(sums)) * (1 / LOG2E)
        self.lse[...] = jnp.where(some, lse, MASKED).T[:1]


def _kernel(*refs, layout: Layout, scale: float):
    refs = list(refs)
    ranges = refs.pop(0) if layout.limited else None
    slots = refs.pop(0) if layout.traced_start or layout.traced_window else None
    if not layout.segments:
        refs = [*refs[:3], None, None, *refs[3:], None]
    at = _Refs(*refs)
    tiles = layout.tiles
    c = pl.program_id(3) if layout.chunks > 1 else 0
    step = Step(layout, pl.program_id(0), pl.program_id(2), c, ranges, slots)

    def block(j, masked):
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return at.update(slice(None), keys)
        key = first + step.c * layout.chunk
        seen = (layout, step.start() - key, step.window(), layout.k_len - key)
        at.update(slice(None), keys, functools.partial(_seen, *seen))

    def diagonal():
        first = step.i * tiles.block_q - step.c * layout.chunk
        first = pl.multiple_of(first, tiles.block_q)
        for row in range(0, tiles.block_q, tiles.diagonal):
            seen = (layout, row, step.window(), None)
            rows, keys = slice(row, row + tiles.diagonal), pl.ds(first, row + tiles.diagonal)
            at.update(rows, keys, functools.partial(_seen, *seen))

    lay.when_chunk(layout, c == 0, functools.partial(at.start, scale))
    lay.loop(step, block)
    if layout.diagonal:
        lay.when_chunk(layout, step.on_diagonal(), diagonal)
    lay.when_chunk(layout, c == layout.chunks - 1, at.finish)


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


def _chunk_with_work(layout: Layout, b, i, c, refs):
    """Number of the chunk to hold in step c: one that has work, so that no other is ever loaded."""
    if layout.chunks == 1:
        return 0
    tiles, n = layout.tiles, layout.chunk_blocks
    at = (b * layout.q_blocks + i) * 4
    first = jax.lax.div(refs[0][at], n) if layout.limited else 0
    if layout.diagonal:
        last = jax.lax.div(i * tiles.block_q, layout.chunk)
    else:
        end = -(-layout.k_len // tiles.block_k) - refs[0][at + 3]
        last = jax.lax.div(jnp.maximum(end - 1, 0), n)
    return jnp.clip(c, jnp.minimum(first, last), last)


def _specs(layout: Layout, groups: int, width: int):
    """(in_specs, out_specs) for a grid over rows, heads, blocks of queries, chunks of keys."""
    tiles = layout.tiles

    def keys(b, n, i, c, *refs):
        return b, jax.lax.div(n, groups), _chunk_with_work(layout, b, i, c, refs), 0

    q = pl.BlockSpec((None, None, tiles.block_q, width), lambda b, n, i, c, *_: (b, n, i, 0))
    k = pl.BlockSpec((None, None, layout.chunk, width), keys)
    lse = pl.BlockSpec((None, None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, n, 0, i))
    in_specs = [q, k, k]
    if layout.segments:
        in_specs += [
            pl.BlockSpec((None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, 0, i)),
            pl.BlockSpec(
                (None, 1, layout.chunk),
                lambda b, n, i, c, *refs: (b, 0, _chunk_with_work(layout, b, i, c, refs)),
            ),
        ]
    return in_specs, [q, lse]


def _scratch(layout: Layout, width: int, dtype):
    block_q = layout.tiles.block_q
    lanes = (block_q, LANES)
    ids = [pltpu.VMEM(lanes, jnp.int32)] if layout.segments else []
    wide = [pltpu.VMEM((block_q, width), x) for x in (dtype, jnp.float32)]
    return [wide[0], *[pltpu.VMEM(lanes, jnp.float32)] * 2, wide[1], *ids]


def flash_forward(q, k, v, mask: Mask, scale: float, *, chip: Chip, interpret=False):
    """Contract: `flash.FlashKernel.forward`."""
    batch, q_len, heads, head_dim = q.shape
    k_len, kv_heads = k.shape[1:3]
    width = padded_width(head_dim)
    layout = lay.make_layout(q_len, k_len, width, q.dtype.itemsize, mask, chip.forward)
    prefetched = scalars(mask, layout, batch)
    in_specs, out_specs = _specs(layout, heads // kv_heads, width)
    operands = [heads_first(q, layout.rows), *(heads_first(x, layout.columns) for x in (k, v))]
    if layout.segments:
        operands += segment_rows(mask, layout)
    pairs = batch * heads * layout.pairs()
    out, lse = pl.pallas_call(
        functools.partial(_kernel, layout=layout, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, layout.q_blocks, layout.chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=_scratch(layout, width, q.dtype),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, layout.rows, width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, layout.rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            # K and V, two buffers each.
            vmem_limit_bytes=layout.vmem(4 * width * q.dtype.itemsize, chip.vmem),
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
