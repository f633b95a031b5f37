"""Backward pass of attention on TPU: dq, dk and dv from one kernel, five products a block.

Scores are held transposed, keys × queries: then log-sum-exp and delta are rows that lie ready in
lanes, and dv = pᵀ·d_out, dk = dsᵀ·q come without turning anything. A grid step is a block of
queries, its dq accumulates in VMEM; dk and dv of the whole chunk of keys accumulate in VMEM over
blocks of queries and over the heads of a group, so the sum over the group never leaves the chip.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu import flash_blocks as lay
from qwen_jax.kernels.tpu.block_sizes import LANES, Chip
from qwen_jax.kernels.tpu.flash_blocks import UNSEEN, Layout, Step
from qwen_jax.kernels.tpu.flash_forward import (
    LOG2E,
    across,
    dot,
    heads_first,
    padded_width,
    scalars,
    segment_rows,
)


def _seen(layout: Layout, ahead, window, left, q_ids, k_ids, shape):
    """Mask of keys × queries; the transpose of the forward pass's."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = row - col
    seen = distance <= ahead
    if window is not None:
        seen &= distance > ahead - window
    if not layout.diagonal and layout.columns != layout.k_len:
        seen &= row < left
    if layout.segments:
        turned = jnp.broadcast_to(k_ids, (LANES, shape[0])).T
        seen &= across(turned, shape[1]) == q_ids
    return seen


@dataclasses.dataclass(frozen=True)
class _Refs:
    """What the kernel reads and writes. Shapes: Q is block_q, C the chunk of keys.

    Attributes:
      q [Q,H], k [C,H], v [C,H], lse float32 [1,Q], d_out [Q,H], delta float32 [1,Q].
      q_ids int32 [1,Q], k_ids int32 [1,C] or None.
      before: float32 [Q,H], dq from the chunks before, or None.
      dq_out [Q,H], dk_out [C,H], dv_out [C,H].
      q_scaled [Q,H]: q times the scale, in bits.
      dq: float32 [H,Q]; dk, dv: float32 [C,H]; the accumulators.
    """

    q: object
    k: object
    v: object
    lse: object
    d_out: object
    delta: object
    q_ids: object
    k_ids: object
    before: object
    dq_out: object
    dk_out: object
    dv_out: object
    q_scaled: object
    dq: object
    dk: object
    dv: object

    def update(self, cols, keys, seen_from=None):
        """Adds what these queries (cols) and these keys give to all three gradients."""
        k, v, d_out = self.k[keys], self.v[keys], self.d_out[cols]
        s = dot(k, self.q_scaled[cols], (1, 1))
        if seen_from is not None:
            packed = self.q_ids is not None
            ids = (self.q_ids[:, cols], self.k_ids[:, keys]) if packed else (None, None)
            s = jnp.where(seen_from(*ids, s.shape), s, UNSEEN)
        p = jnp.exp2(s - self.lse[:, cols] * LOG2E)
        self.dv[keys] += dot(p.astype(d_out.dtype), d_out, (1, 0))
        dp = dot(v, d_out, (1, 1))
        ds = (p * (dp - self.delta[:, cols])).astype(k.dtype)
        self.dk[keys] += dot(ds, self.q[cols], (1, 0))
        self.dq[:, cols] += dot(k, ds, (0, 0))


def _kernel(*refs, layout: Layout, scale: float, chunk: int, first_block: int):
    refs = list(refs)
    ranges = refs.pop(0) if layout.limited else None
    slots = refs.pop(0) if layout.traced_start or layout.traced_window else None
    operands, refs = refs[:6], refs[6:]
    ids = (refs.pop(0), refs.pop(0)) if layout.segments else (None, None)
    before = refs.pop(0) if chunk else None
    at = _Refs(*operands, *ids, before, *refs)
    tiles = layout.tiles
    group, n = pl.program_id(2), pl.program_id(3)
    step = Step(layout, pl.program_id(0), n + first_block, chunk, ranges, slots)

    @pl.when((group == 0) & (n == 0))
    def _():
        at.dk[...] = jnp.zeros_like(at.dk)
        at.dv[...] = jnp.zeros_like(at.dv)

    at.q_scaled[...] = (at.q[...].astype(jnp.float32) * (scale * LOG2E)).astype(at.q.dtype)
    at.dq[...] = jnp.zeros_like(at.dq)

    def block(j, masked):
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return at.update(slice(None), keys)
        key = first + chunk * layout.chunk
        seen = (layout, step.start() - key, step.window(), layout.k_len - key)
        at.update(slice(None), keys, functools.partial(_seen, *seen))

    def diagonal():
        start = step.i * tiles.block_q - chunk * layout.chunk
        for key in range(0, tiles.block_q, tiles.diagonal):
            keys = pl.ds(pl.multiple_of(start + key, tiles.diagonal), tiles.diagonal)
            seen = (layout, 0, step.window(), None)
            at.update(slice(key, None), keys, functools.partial(_seen, *seen))

    lay.loop(step, block)
    if layout.diagonal:
        lay.when_chunk(layout, step.on_diagonal(), diagonal)
    dq = at.dq[...].T * scale
    if before is not None:
        dq += before[...]
    at.dq_out[...] = dq.astype(at.dq_out.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (n == pl.num_programs(3) - 1))
    def _():
        at.dk_out[...] = (at.dk[...] * scale).astype(at.dk_out.dtype)
        at.dv_out[...] = at.dv[...].astype(at.dv_out.dtype)


def _specs(layout: Layout, groups: int, width: int, chunk: int, first_block: int):
    """(spec of q, in_specs, spec of dk) for a grid over rows, kv heads, their groups, q blocks."""
    tiles = layout.tiles

    def queries(b, n, g, i, *_):
        return b, n * groups + g, i + first_block, 0

    def rows(b, n, g, i, *_):
        return b, n * groups + g, 0, i + first_block

    q = pl.BlockSpec((None, None, tiles.block_q, width), queries)
    row = pl.BlockSpec((None, None, 1, tiles.block_q), rows)
    k = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, chunk, 0))
    in_specs = [q, k, k, row, q, row]
    if layout.segments:
        in_specs += [
            pl.BlockSpec((None, 1, tiles.block_q), lambda b, n, g, i, *_: (b, 0, i + first_block)),
            pl.BlockSpec((None, 1, layout.chunk), lambda b, *_: (b, 0, chunk)),
        ]
    gradient = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, 0, 0))
    return q, in_specs, gradient


def _chunk(operands, prefetched, layout: Layout, scale, chunk, dq, dtypes, chip, interpret):
    """(dq so far, dk, dv) for one chunk of keys; dq: the sum over the chunks before, or None."""
    q, k = operands[:2]
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # Causal from slot 0: blocks of queries before the chunk have no work in it.
    block_q = layout.tiles.block_q
    first_block = chunk * layout.chunk // block_q if layout.diagonal else 0
    q_spec, in_specs, grad_spec = _specs(layout, groups, width, chunk, first_block)
    aliases = {}
    if chunk:
        aliases = {len(prefetched) + len(operands): 0}
        in_specs.append(q_spec)
        operands = [*operands, dq]
    pairs = batch * heads * layout.pairs() // layout.chunks
    gradient = (batch, kv_heads, layout.chunk, width)
    # K, V and their gradients in two buffers each, and the float32 sums of the gradients.
    item, grad_item = k.dtype.itemsize, jnp.dtype(dtypes[1]).itemsize
    return pl.pallas_call(
        functools.partial(
            _kernel, layout=layout, scale=scale, chunk=chunk, first_block=first_block
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, kv_heads, groups, layout.q_blocks - first_block),
            in_specs=in_specs,
            out_specs=[q_spec, grad_spec, grad_spec],
            scratch_shapes=[
                pltpu.VMEM((block_q, width), q.dtype),
                pltpu.VMEM((width, block_q), jnp.float32),
                *[pltpu.VMEM((layout.chunk, width), jnp.float32)] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtypes[0] if layout.chunks == 1 else jnp.float32),
            jax.ShapeDtypeStruct(gradient, dtypes[1]),
            jax.ShapeDtypeStruct(gradient, dtypes[2]),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=layout.vmem(width * (4 * item + 8 + 4 * grad_item), chip.vmem),
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * width,
            bytes_accessed=3 * q.nbytes + 4 * k.nbytes // layout.chunks,
            transcendentals=pairs,
        ),
        interpret=interpret,
        name="attention_backward",
    )(*prefetched, *operands)


def flash_backward(
    q, k, v, mask: Mask, scale: float, lse, d_out, delta, grad_dtype, *, chip: Chip, interpret=False
):
    """Contract: `flash.FlashKernel.backward`."""
    batch, q_len, _, head_dim = q.shape
    k_len = k.shape[1]
    layout = lay.make_layout(
        q_len, k_len, padded_width(head_dim), q.dtype.itemsize, mask, chip.backward
    )
    prefetched = scalars(mask, layout, batch)

    def row(x, fill):
        past = layout.rows - q_len
        return jnp.pad(x, ((0, 0), (0, 0), (0, past)), constant_values=fill)[:, :, None]

    operands = [
        heads_first(q, layout.rows),
        *(heads_first(x, layout.columns) for x in (k, v)),
        row(lse, -UNSEEN),  # so that queries past T have weight 0
        heads_first(d_out, layout.rows),
        row(delta, 0),
    ]
    if layout.segments:
        operands += segment_rows(mask, layout)
    dtypes = [grad_dtype or x.dtype for x in (q, k, v)]
    dq, parts = None, []
    for chunk in range(layout.chunks):
        dq, *part = _chunk(operands, prefetched, layout, scale, chunk, dq, dtypes, chip, interpret)
        parts.append(part)
    dk, dv = (jnp.concatenate(x, axis=2)[:, :, :k_len, :head_dim] for x in zip(*parts, strict=True))
    dq = dq[:, :, :q_len, :head_dim].astype(dtypes[0])
    return tuple(x.swapaxes(1, 2) for x in (dq, dk, dv))
