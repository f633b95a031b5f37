"""Flash attention on TPU: backward pass.

One kernel computes dq, dk and dv with five products per block. Scores are kept transposed, keys ×
queries: log-sum-exp and delta are then rows along the lanes, and dv = pᵀ·d_out and dk = dsᵀ·q need
no transposes. A grid step is a block of queries, whose dq accumulates in VMEM; dk and dv of the
chunk of keys accumulate in VMEM over blocks of queries and over the heads of a group, so the sum
over the group stays on the chip.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.tpu import flash_blocks as tiling
from qwen_jax.kernels.tpu.block_sizes import LANES, ChipTiles
from qwen_jax.kernels.tpu.flash_blocks import UNSEEN, FlashLayout, GridStep
from qwen_jax.kernels.tpu.flash_forward import (
    LOG2E,
    broadcast_lanes,
    dot,
    heads_first,
    padded_width,
    scalars,
    segment_rows,
)


def _visible(layout: FlashLayout, offset, window, remaining, q_ids, k_ids, shape):
    """Returns the mask of a block, bool [keys, queries]: the transpose of the forward pass's.

    Args:
      layout: layout of the call.
      offset: slot of the first query minus slot of the first key.
      window: number of slots that a query sees, or None.
      remaining: keys of the array from the block's first key on.
      q_ids: segment ids of the queries, int32 [1, queries], or None.
      k_ids: segment ids of the keys, int32 [1, keys], or None.
      shape: (keys, queries).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = row - col
    visible = distance <= offset
    if window is not None:
        visible &= distance > offset - window
    if not layout.diagonal and layout.columns != layout.k_len:
        visible &= row < remaining
    if layout.segments:
        turned = jnp.broadcast_to(k_ids, (LANES, shape[0])).T
        visible &= broadcast_lanes(turned, shape[1]) == q_ids
    return visible


@dataclasses.dataclass(frozen=True)
class BackwardRefs:
    """References of the backward kernel; Q is block_q, C the keys of a chunk, H the head dimension.

    Attributes:
      q: queries [Q, H].
      k: keys [C, H].
      v: values [C, H].
      lse: log-sum-exp, float32 [1, Q].
      d_out: gradient of the output [Q, H].
      delta: sum of d_out · out per query, float32 [1, Q].
      q_ids: segment ids, int32 [1, Q], or None.
      k_ids: segment ids, int32 [1, C], or None.
      previous_dq: gradient of the queries from the chunks before, float32 [Q, H], or None.
      dq_out: gradient of the queries [Q, H].
      dk_out: gradient of the keys [C, H].
      dv_out: gradient of the values [C, H].
      q_scaled: queries times the scale and log2(e), [Q, H].
      dq: accumulator, float32 [H, Q].
      dk: accumulator, float32 [C, H].
      dv: accumulator, float32 [C, H].
    """

    q: Any
    k: Any
    v: Any
    lse: Any
    d_out: Any
    delta: Any
    q_ids: Any
    k_ids: Any
    previous_dq: Any
    dq_out: Any
    dk_out: Any
    dv_out: Any
    q_scaled: Any
    dq: Any
    dk: Any
    dv: Any

    def update(self, cols, keys, mask_of=None):
        """Adds the contributions of some queries and keys to all three gradients.

        Args:
          cols: slice of queries.
          keys: slice of keys.
          mask_of: (q_ids, k_ids, shape) -> mask, or None if all keys are visible.
        """
        k, v, d_out = self.k[keys], self.v[keys], self.d_out[cols]
        s = dot(k, self.q_scaled[cols], (1, 1))
        if mask_of is not None:
            packed = self.q_ids is not None
            ids = (self.q_ids[:, cols], self.k_ids[:, keys]) if packed else (None, None)
            s = jnp.where(mask_of(*ids, s.shape), s, UNSEEN)
        p = jnp.exp2(s - self.lse[:, cols] * LOG2E)
        self.dv[keys] += dot(p.astype(d_out.dtype), d_out, (1, 0))
        dp = dot(v, d_out, (1, 1))
        ds = (p * (dp - self.delta[:, cols])).astype(k.dtype)
        self.dk[keys] += dot(ds, self.q[cols], (1, 0))
        self.dq[:, cols] += dot(k, ds, (0, 0))


def _kernel(*all_refs, layout: FlashLayout, scale: float, chunk: int, first_block: int):
    """Computes the gradients between one block of queries and one chunk of keys, for one head.

    dq of the block is written each time; dk and dv of the chunk accumulate over blocks of queries
    and heads of a group, and are written at the end.

    Args:
      *all_refs: scalar references as `scalars` orders them, then those of `BackwardRefs`, in the
        order of its fields, without those that are None.
      layout: layout of the call.
      scale: factor on q·k.
      chunk: number of the chunk.
      first_block: number of the first block of queries of the grid.
    """
    rest = list(all_refs)
    ranges = rest.pop(0) if layout.limited else None
    slots = rest.pop(0) if layout.traced_start or layout.traced_window else None
    q, k, v, lse, d_out, delta, *rest = rest
    q_ids, k_ids = (rest.pop(0), rest.pop(0)) if layout.segments else (None, None)
    previous_dq = rest.pop(0) if chunk else None
    dq_out, dk_out, dv_out, q_scaled, dq_sum, dk_sum, dv_sum = rest
    refs = BackwardRefs(
        q=q,
        k=k,
        v=v,
        lse=lse,
        d_out=d_out,
        delta=delta,
        q_ids=q_ids,
        k_ids=k_ids,
        previous_dq=previous_dq,
        dq_out=dq_out,
        dk_out=dk_out,
        dv_out=dv_out,
        q_scaled=q_scaled,
        dq=dq_sum,
        dk=dk_sum,
        dv=dv_sum,
    )
    tiles = layout.tiles
    group, n = pl.program_id(2), pl.program_id(3)
    step = GridStep(layout, pl.program_id(0), n + first_block, chunk, ranges, slots)

    @pl.when((group == 0) & (n == 0))
    def _():
        refs.dk[...] = jnp.zeros_like(refs.dk)
        refs.dv[...] = jnp.zeros_like(refs.dv)

    refs.q_scaled[...] = (refs.q[...].astype(jnp.float32) * (scale * LOG2E)).astype(refs.q.dtype)
    refs.dq[...] = jnp.zeros_like(refs.dq)

    def block(j, masked):
        """Processes key block j of the chunk."""
        first = pl.multiple_of(j * tiles.block_k, tiles.block_k)
        keys = pl.ds(first, tiles.block_k)
        if not masked:
            return refs.update(slice(None), keys)
        key = first + chunk * layout.chunk
        visible = (layout, step.start() - key, step.window(), layout.k_len - key)
        refs.update(slice(None), keys, functools.partial(_visible, *visible))

    def diagonal():
        """Processes the block on the diagonal in strips, without keys above the diagonal."""
        start = step.i * tiles.block_q - chunk * layout.chunk
        for key in range(0, tiles.block_q, tiles.diagonal):
            keys = pl.ds(pl.multiple_of(start + key, tiles.diagonal), tiles.diagonal)
            visible = (layout, 0, step.window(), None)
            refs.update(slice(key, None), keys, functools.partial(_visible, *visible))

    tiling.for_each_key_block(step, block)
    if layout.diagonal:
        tiling.when_chunked(layout, step.on_diagonal(), diagonal)
    dq = refs.dq[...].T * scale
    if previous_dq is not None:
        dq += previous_dq[...]
    refs.dq_out[...] = dq.astype(refs.dq_out.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (n == pl.num_programs(3) - 1))
    def _():
        refs.dk_out[...] = (refs.dk[...] * scale).astype(refs.dk_out.dtype)
        refs.dv_out[...] = refs.dv[...].astype(refs.dv_out.dtype)


def _specs(layout: FlashLayout, groups: int, width: int, chunk: int, first_block: int):
    """Returns (spec of q, in_specs, spec of dk) for a grid over rows, kv heads, groups, q blocks.

    Args:
      layout: layout of the call.
      groups: query heads per kv head.
      width: padded head dimension.
      chunk: number of the chunk of keys.
      first_block: number of the first block of queries of the grid.
    """
    tiles = layout.tiles

    def queries(b, n, g, i, *_):
        """Returns the block index of arrays [B, N, T, H]."""
        return b, n * groups + g, i + first_block, 0

    def rows(b, n, g, i, *_):
        """Returns the block index of arrays [B, N, 1, T]."""
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


def _chunk_gradients(
    operands, prefetched, layout: FlashLayout, scale, chunk, dq, dtypes, chip, interpret
):
    """Computes the gradients that one chunk of keys contributes.

    Args:
      operands: q, k, v, lse, d_out, delta and segment ids, padded.
      prefetched: scalar operands.
      layout: layout of the call.
      scale: factor on q·k.
      chunk: number of the chunk.
      dq: sum of dq over the chunks before, or None.
      dtypes: dtypes of dq, dk, dv.
      chip: block sizes.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      [dq including this chunk, dk of the chunk, dv of the chunk].
    """
    q, k = operands[:2]
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # Causal from slot 0: blocks of queries previous_dq the chunk have no work in it.
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
    q,
    k,
    v,
    mask: Mask,
    scale: float,
    lse,
    d_out,
    delta,
    grad_dtype,
    *,
    chip: ChipTiles,
    interpret=False,
):
    """Computes the gradients of attention; the contract is `flash.FlashKernel.backward`.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H].
      v: values [B, S, K, H].
      mask: the mask.
      scale: factor on q·k.
      lse: log-sum-exp of the forward pass, float32 [B, N, T].
      d_out: gradient of the output [B, T, N, H].
      delta: sum of d_out · out per query, float32 [B, N, T].
      grad_dtype: dtype of the gradients; None: those of q, k, v.
      chip: block sizes.
      interpret: whether to run in Pallas' interpreter.

    Returns:
      (dq, dk, dv), shaped as q, k, v.
    """
    batch, q_len, _, head_dim = q.shape
    k_len = k.shape[1]
    layout = tiling.make_flash_layout(
        q_len, k_len, padded_width(head_dim), q.dtype.itemsize, mask, chip.backward
    )
    prefetched = scalars(mask, layout, batch)

    def row(x, fill):
        """Pads [B, N, T] to complete blocks with `fill`, as [B, N, 1, rows]."""
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
    dq: Any = None
    parts = []
    for chunk in range(layout.chunks):
        dq, *part = _chunk_gradients(
            operands, prefetched, layout, scale, chunk, dq, dtypes, chip, interpret
        )
        parts.append(part)
    dk, dv = (jnp.concatenate(x, axis=2)[:, :, :k_len, :head_dim] for x in zip(*parts, strict=True))
    dq = dq[:, :, :q_len, :head_dim].astype(dtypes[0])
    return tuple(x.swapaxes(1, 2) for x in (dq, dk, dv))
