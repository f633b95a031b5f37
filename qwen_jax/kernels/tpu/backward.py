"""Backward pass of attention on TPU: dq, dk and dv from one kernel, five products a block.

Scores are held transposed, keys × queries: then log-sum-exp and delta are rows that lie ready in
lanes, and dv = pᵀ·d_out, dk = dsᵀ·q come without turning anything. A grid step is a block of
queries, its dq accumulates in VMEM; dk and dv of the whole chunk of keys accumulate in VMEM over
blocks of queries and over the heads of a group, so the sum over the group never leaves the chip.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu import layout as lay
from qwen_jax.kernels.tpu.forward import (
    LOG2E,
    across,
    dot,
    heads_first,
    padded_width,
    scalars,
    segment_rows,
)
from qwen_jax.kernels.tpu.layout import UNSEEN, Layout, Step
from qwen_jax.kernels.tpu.tiles import LANES, Chip


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


def _kernel(*refs, layout: Layout, scale: float, chunk: int, first_block: int):
    refs = list(refs)
    ranges = refs.pop(0) if layout.limited else None
    slots = refs.pop(0) if layout.traced_start or layout.traced_window else None
    q_ref, k_ref, v_ref, lse_ref, d_out_ref, delta_ref = (refs.pop(0) for _ in range(6))
    q_ids_ref, k_ids_ref = (refs.pop(0), refs.pop(0)) if layout.segments else (None, None)
    before = refs.pop(0) if chunk else None
    dq_ref, dk_ref, dv_ref, q_scaled, dq, dk, dv = refs
    tiles = layout.tiles
    i = pl.program_id(3) + first_block
    step = Step(layout, pl.program_id(0), i, chunk, ranges, slots)
    group, n = pl.program_id(2), pl.program_id(3)

    @pl.when((group == 0) & (n == 0))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    q_scaled[...] = (q_ref[...].astype(jnp.float32) * (scale * LOG2E)).astype(q_ref.dtype)
    dq[...] = jnp.zeros_like(dq)

    def update(cols, keys, seen_from=None):
        """Adds what these queries (cols) and these keys give to all three gradients."""
        k, v, d_out = k_ref[keys], v_ref[keys], d_out_ref[cols]
        s = dot(k, q_scaled[cols], (1, 1))
        if seen_from is not None:
            s = jnp.where(seen_from(s.shape), s, UNSEEN)
        p = jnp.exp2(s - lse_ref[:, cols] * LOG2E)
        dv[keys] += dot(p.astype(d_out.dtype), d_out, (1, 0))
        dp = dot(v, d_out, (1, 1))
        ds = (p * (dp - delta_ref[:, cols])).astype(k.dtype)
        dk[keys] += dot(ds, q_ref[cols], (1, 0))
        dq[:, cols] += dot(k, ds, (0, 0))

    def block(j, masked):
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return update(slice(None), keys)
        key = first + chunk * layout.chunk
        ids = (q_ids_ref[...], k_ids_ref[:, keys]) if layout.segments else (None, None)
        seen = (layout, step.start() - key, step.window(), layout.k_len - key, *ids)
        update(slice(None), keys, functools.partial(_seen, *seen))

    def diagonal():
        start = step.i * tiles.block_q - chunk * layout.chunk
        for key in range(0, tiles.block_q, tiles.diagonal):
            first = pl.multiple_of(start + key, tiles.diagonal)
            keys, cols = pl.ds(first, tiles.diagonal), slice(key, None)
            ids = (q_ids_ref[:, cols], k_ids_ref[:, keys]) if layout.segments else (None, None)
            seen = (layout, 0, step.window(), None, *ids)
            update(cols, keys, functools.partial(_seen, *seen))

    low, full_low, full_high, high = step.loops()
    jax.lax.fori_loop(full_low, full_high, lambda j, _: block(j, False), None)
    if layout.limited:
        jax.lax.fori_loop(low, full_low, lambda j, _: block(j, True), None)
        jax.lax.fori_loop(full_high, high, lambda j, _: block(j, True), None)
    if layout.diagonal:
        lay.when_chunk(layout, step.on_diagonal(), diagonal)
    result = dq[...].T * scale
    if before is not None:
        result += before[...]
    dq_ref[...] = result.astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (n == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _chunk(operands, prefetched, layout: Layout, scale, chunk, dq, dtypes, chip, interpret):
    """(dq so far, dk, dv) for one chunk of keys; dq: the sum over the chunks before, or None."""
    q, k = operands[:2]
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    tiles = layout.tiles
    # Causal from slot 0: blocks of queries before the chunk have no work in it.
    first_block = chunk * layout.chunk // tiles.block_q if layout.diagonal else 0

    def queries(b, n, g, i, *_):
        return b, n * groups + g, i + first_block, 0

    def rows(b, n, g, i, *_):
        return b, n * groups + g, 0, i + first_block

    q_spec = pl.BlockSpec((None, None, tiles.block_q, width), queries)
    row_spec = pl.BlockSpec((None, None, 1, tiles.block_q), rows)
    key_spec = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, chunk, 0))
    grad_spec = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, 0, 0))
    in_specs = [q_spec, key_spec, key_spec, row_spec, q_spec, row_spec]
    if layout.segments:
        in_specs += [
            pl.BlockSpec((None, 1, tiles.block_q), lambda b, n, g, i, *_: (b, 0, i + first_block)),
            pl.BlockSpec((None, 1, layout.chunk), lambda b, *_: (b, 0, chunk)),
        ]
    aliases = {}
    if chunk:
        aliases = {len(prefetched) + len(operands): 0}
        in_specs.append(q_spec)
        operands = [*operands, dq]
    pairs = batch * heads * layout.pairs() // layout.chunks
    gradient = (batch, kv_heads, layout.chunk, width)
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
                pltpu.VMEM((tiles.block_q, width), q.dtype),
                pltpu.VMEM((width, tiles.block_q), jnp.float32),
                pltpu.VMEM((layout.chunk, width), jnp.float32),
                pltpu.VMEM((layout.chunk, width), jnp.float32),
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
            vmem_limit_bytes=chip.vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * width,
            bytes_accessed=(3 * q.nbytes + 4 * k.nbytes // layout.chunks),
            transcendentals=pairs,
        ),
        interpret=interpret,
        name="attention_backward",
    )(*prefetched, *operands)


def backward(
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
