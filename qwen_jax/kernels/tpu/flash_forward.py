"""Flash attention on TPU: forward pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import MASKED, Mask
from qwen_jax.kernels.tpu import flash_blocks as tiling
from qwen_jax.kernels.tpu.block_sizes import LANES, ChipTiles
from qwen_jax.kernels.tpu.flash_blocks import UNSEEN, FlashLayout, GridStep

LOG2E = math.log2(math.e)


def broadcast_lanes(x: jax.Array, width: int) -> jax.Array:
    """Widens [R, LANES], whose lanes are all equal, to [R, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES), axis=1)


def precision(dtype):
    """Returns the precision of a product: float32 operands are not rounded to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a, b, contract):
    """Returns a product with float32 accumulation.

    Args:
      a: left operand, 2-D.
      b: right operand, 2-D.
      contract: contracted axis of each.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def _visible(layout: FlashLayout, offset, window, remaining, q_ids, k_ids, shape):
    """Returns the mask of a block, bool [queries, keys].

    Args:
      layout: layout of the call.
      offset: slot of the first query minus slot of the first key.
      window: number of slots that a query sees, or None.
      remaining: keys of the array from the block's first key on.
      q_ids: segment ids of the queries in every lane, int32 [queries, LANES], or None.
      k_ids: segment ids of the keys, int32 [1, keys], or None.
      shape: (queries, keys).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = col - row
    visible = distance <= offset
    if window is not None:
        visible &= distance > offset - window
    if not layout.diagonal and layout.columns != layout.k_len:
        visible &= col < remaining
    if layout.segments:
        visible &= broadcast_lanes(q_ids, shape[1]) == k_ids
    return visible


@dataclasses.dataclass(frozen=True)
class ForwardRefs:
    """References of the forward kernel; Q is block_q, C the keys of a chunk, H the head dimension.

    Attributes:
      q: queries [Q, H].
      k: keys [C, H].
      v: values [C, H].
      q_ids: segment ids, int32 [1, Q], or None.
      k_ids: segment ids, int32 [1, C], or None.
      out: output [Q, H].
      lse: log-sum-exp, float32 [1, Q].
      q_scaled: queries times the scale and log2(e), [Q, H].
      row_max: running maximum in every lane, float32 [Q, LANES].
      total: running sum of weights, one partial sum per lane, float32 [Q, LANES].
      acc: accumulated output, float32 [Q, H].
      ids: segment ids of the queries in every lane, int32 [Q, LANES], or None.
    """

    q: Any
    k: Any
    v: Any
    q_ids: Any
    k_ids: Any
    out: Any
    lse: Any
    q_scaled: Any
    row_max: Any
    total: Any
    acc: Any
    ids: Any

    def initialise(self, scale: float):
        """Resets the accumulators and scales the queries."""
        scaled = self.q[...].astype(jnp.float32) * (scale * LOG2E)
        self.q_scaled[...] = scaled.astype(self.q.dtype)
        self.row_max[...] = jnp.full_like(self.row_max, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)
        if self.ids is not None:
            self.ids[...] = jnp.broadcast_to(self.q_ids[...], self.ids.shape[::-1]).T

    def update(self, rows, keys, mask_of=None):
        """Updates the running softmax with some queries and keys.

        Args:
          rows: slice of queries.
          keys: slice of keys.
          mask_of: (q_ids, k_ids, shape) -> mask, or None if all keys are visible.
        """
        k, v = self.k[keys], self.v[keys]
        s = dot(self.q_scaled[rows], k, (1, 1))
        if mask_of is not None:
            packed = self.ids is not None
            ids = (self.ids[rows], self.k_ids[:, keys]) if packed else (None, None)
            s = jnp.where(mask_of(*ids, s.shape), s, UNSEEN)
        old = self.row_max[rows]
        new = jnp.maximum(old, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - broadcast_lanes(new, s.shape[1]))
        decay = jnp.exp2(old - new)
        self.row_max[rows] = new
        lanes = sum(p[:, x : x + LANES] for x in range(0, p.shape[1], LANES))
        self.total[rows] = self.total[rows] * decay + lanes
        product = dot(p.astype(v.dtype), v, (1, 0))
        self.acc[rows] = self.acc[rows] * broadcast_lanes(decay, v.shape[1]) + product

    def finish(self):
        """Writes output and log-sum-exp."""
        sums = self.total[...].sum(axis=1, keepdims=True)
        some = sums > 0
        sums = jnp.where(some, sums, 1.0)
        self.out[...] = (self.acc[...] / sums).astype(self.out.dtype)
        lse = (self.row_max[...] + jnp.log2(sums)) * (1 / LOG2E)
        self.lse[...] = jnp.where(some, lse, MASKED).T[:1]


def _kernel(*all_refs, layout: FlashLayout, scale: float):
    """Updates the online softmax of one block of queries with one chunk of keys, for one head.

    The accumulators are initialised at the first chunk; output and log-sum-exp are written at the
    last.

    Args:
      *all_refs: scalar references as `scalars` orders them, then those of `ForwardRefs`, in the
        order of its fields, without segment ids if there are none.
      layout: layout of the call.
      scale: factor on q·k.
    """
    rest = list(all_refs)
    ranges = rest.pop(0) if layout.limited else None
    slots = rest.pop(0) if layout.traced_start or layout.traced_window else None
    q, k, v, *rest = rest
    q_ids, k_ids = (rest.pop(0), rest.pop(0)) if layout.segments else (None, None)
    out, lse, q_scaled, row_max, total, acc, *rest = rest
    refs = ForwardRefs(
        q=q,
        k=k,
        v=v,
        q_ids=q_ids,
        k_ids=k_ids,
        out=out,
        lse=lse,
        q_scaled=q_scaled,
        row_max=row_max,
        total=total,
        acc=acc,
        ids=rest[0] if layout.segments else None,
    )
    tiles = layout.tiles
    c = pl.program_id(3) if layout.chunks > 1 else 0
    step = GridStep(layout, pl.program_id(0), pl.program_id(2), c, ranges, slots)

    def block(j, masked):
        """Processes key block j of the chunk."""
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return refs.update(slice(None), keys)
        key = first + step.c * layout.chunk
        visible = (layout, step.start() - key, step.window(), layout.k_len - key)
        refs.update(slice(None), keys, functools.partial(_visible, *visible))

    def diagonal():
        """Processes the block on the diagonal in squares, without those above the diagonal."""
        first = step.i * tiles.block_q - step.c * layout.chunk
        first = pl.multiple_of(first, tiles.block_q)
        for row in range(0, tiles.block_q, tiles.diagonal):
            visible = (layout, row, step.window(), None)
            rows, keys = slice(row, row + tiles.diagonal), pl.ds(first, row + tiles.diagonal)
            refs.update(rows, keys, functools.partial(_visible, *visible))

    tiling.when_chunked(layout, c == 0, functools.partial(refs.initialise, scale))
    tiling.for_each_key_block(step, block)
    if layout.diagonal:
        tiling.when_chunked(layout, step.on_diagonal(), diagonal)
    tiling.when_chunked(layout, c == layout.chunks - 1, refs.finish)


def padded_width(width: int) -> int:
    """Returns the head dimension that the kernels compute with: 64 or a multiple of the lanes."""
    return 64 if width <= 64 else tiling.round_up(width, LANES)


def heads_first(x: jax.Array, length: int) -> jax.Array:
    """Transposes [B, S, K, H] to [B, K, length, padded_width(H)], with zeros beyond S and H."""
    x = x.swapaxes(1, 2)
    past = (length - x.shape[2], padded_width(x.shape[3]) - x.shape[3])
    return jnp.pad(x, ((0, 0), (0, 0), (0, past[0]), (0, past[1])))


def segment_rows(mask: Mask, layout: FlashLayout) -> tuple[jax.Array, jax.Array]:
    """Returns segment ids, padded, such that equal ids mean visible.

    Returns:
      int32 [B, 1, rows] of queries and [B, 1, columns] of keys.
    """
    assert mask.q_segments is not None and mask.k_segments is not None
    q = jnp.where(mask.q_segments > 0, mask.q_segments, -1)
    k = jnp.maximum(mask.k_segments, 0)
    q = jnp.pad(q, ((0, 0), (0, layout.rows - layout.q_len)), constant_values=-1)
    k = jnp.pad(k, ((0, 0), (0, layout.columns - layout.k_len)))
    return q[:, None], k[:, None]


def scalars(mask: Mask, layout: FlashLayout, batch: int) -> list[jax.Array]:
    """Returns the scalar-prefetch operands in the order that the kernels expect."""
    out = [tiling.key_ranges(mask, layout, batch)] if layout.limited else []
    slots = []
    if layout.traced_start:
        assert mask.q_start is not None
        slots.append(mask.q_start.astype(jnp.int32))
    if layout.traced_window:
        assert mask.layer_window is not None
        slots.append(jnp.reshape(mask.layer_window, (1,)).astype(jnp.int32))
    return out + ([jnp.concatenate(slots)] if slots else [])


def _nearest_needed_chunk(layout: FlashLayout, b, i, c, refs):
    """Returns the chunk to hold in step c: the nearest one that the block of queries needs.

    Chunks without work are thus never copied.

    Args:
      layout: layout of the call.
      b: row of the batch.
      i: block of queries.
      c: step over chunks.
      refs: scalar references.
    """
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


def _specs(layout: FlashLayout, groups: int, width: int):
    """Returns (in_specs, out_specs) for a grid over rows, heads, blocks of queries, chunks of keys.

    Args:
      layout: layout of the call.
      groups: query heads per kv head.
      width: padded head dimension.
    """
    tiles = layout.tiles

    def keys(b, n, i, c, *refs):
        """Returns the block index of keys and values."""
        return b, jax.lax.div(n, groups), _nearest_needed_chunk(layout, b, i, c, refs), 0

    q = pl.BlockSpec((None, None, tiles.block_q, width), lambda b, n, i, c, *_: (b, n, i, 0))
    k = pl.BlockSpec((None, None, layout.chunk, width), keys)
    lse = pl.BlockSpec((None, None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, n, 0, i))
    in_specs = [q, k, k]
    if layout.segments:
        in_specs += [
            pl.BlockSpec((None, 1, tiles.block_q), lambda b, n, i, c, *_: (b, 0, i)),
            pl.BlockSpec(
                (None, 1, layout.chunk),
                lambda b, n, i, c, *refs: (b, 0, _nearest_needed_chunk(layout, b, i, c, refs)),
            ),
        ]
    return in_specs, [q, lse]


def _scratch(layout: FlashLayout, width: int, dtype):
    """Returns the scratch buffers of the kernel, in the order of `ForwardRefs`."""
    block_q = layout.tiles.block_q
    lanes = (block_q, LANES)
    ids = [pltpu.VMEM(lanes, jnp.int32)] if layout.segments else []
    wide = [pltpu.VMEM((block_q, width), x) for x in (dtype, jnp.float32)]
    return [wide[0], *[pltpu.VMEM(lanes, jnp.float32)] * 2, wide[1], *ids]


def flash_forward(q, k, v, mask: Mask, scale: float, *, chip: ChipTiles, interpret=False):
    """Computes attention and its log-sum-exp; the contract is `flash.FlashKernel.forward`.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H].
      v: values [B, S, K, H].
      mask: the mask.
      scale: factor on q·k.
      chip: block sizes.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      (output [B, T, N, H] in q's dtype, log-sum-exp float32 [B, N, T]).
    """
    batch, q_len, heads, head_dim = q.shape
    k_len, kv_heads = k.shape[1:3]
    width = padded_width(head_dim)
    layout = tiling.make_flash_layout(q_len, k_len, width, q.dtype.itemsize, mask, chip.forward)
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
