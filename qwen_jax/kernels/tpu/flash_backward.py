"""Flash-attention backward kernel for TPUs: dq, dk and dv in one kernel, five products per block.

Scores are held transposed, [keys, queries]: log-sum-exp and delta are then rows with queries along
the lanes, and dv = pᵀ·d_out and dk = dsᵀ·q need no transposition. A grid step is one block of
queries, whose dq accumulates in VMEM. dk and dv of the whole chunk of keys accumulate in VMEM over
blocks of queries and over the query heads of a kv head, so that sum never leaves the chip.

p are the attention weights, ds the gradient of the scores, d_out that of the output.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.refs import Ref, bind_by_name
from qwen_jax.kernels.tpu.block_sizes import FlashConfig
from qwen_jax.kernels.tpu.flash_blocks import (
    MASKED_SCORE,
    FlashLayout,
    GridStep,
    heads_first,
    loop_over_blocks,
    make_flash_layout,
    padded_width,
    scalar_operands,
    segment_rows,
    when_chunked,
)
from qwen_jax.kernels.tpu.flash_forward import VisibleFunction
from qwen_jax.kernels.tpu.mosaic import LANES, LOG2E, broadcast_lanes, dot_f32


def _visible_transposed(
    layout: FlashLayout,
    offset: jax.Array | int,
    window: jax.Array | int | None,
    keys_left: jax.Array | int | None,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    shape: tuple[int, ...],
) -> jax.Array:
    """Returns which scores of a block are visible, bool [keys, queries].

    Args:
      layout: the layout of the call.
      offset: slot of the block's first query less that of its first key.
      window: slots that a query sees, its own included; None: all.
      keys_left: keys of the sequence from the block's first key on; None on the diagonal.
      q_ids: segment id of each query, int32 [1, queries]; None: no segments.
      k_ids: segment id of each key, int32 [1, keys]; None: no segments.
      shape: (keys, queries).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = row - col
    visible = distance <= offset
    if window is not None:
        visible &= distance > offset - window
    if not layout.has_diagonal and layout.padded_k_len != layout.k_len:
        assert keys_left is not None
        visible &= row < keys_left
    if layout.has_segments:
        assert k_ids is not None
        key_rows = jnp.broadcast_to(k_ids, (LANES, shape[0])).T
        visible &= broadcast_lanes(key_rows, shape[1]) == q_ids
    return visible


@dataclasses.dataclass(frozen=True)
class _BackwardRefs:
    """References of the backward kernel, and the computation of one block on them.

    Shapes: Q block_q queries, C keys of a chunk, H padded head dimension.

    Attributes:
      q: queries [Q, H].
      k: keys [C, H].
      v: values [C, H].
      lse: log-sum-exp, float32 [1, Q], natural logarithm.
      d_out: gradient of the output [Q, H].
      delta: Σ_H out·d_out less the gradient of lse, float32 [1, Q].
      dq: gradient of the queries [Q, H], written.
      dk: gradient of the keys [C, H], written.
      dv: gradient of the values [C, H], written.
      q_scaled: scratch [Q, H], queries times scale · log2(e).
      dq_acc: scratch float32 [H, Q], dq so far, transposed and without the scale.
      dk_acc: scratch float32 [C, H], dk so far, without the scale.
      dv_acc: scratch float32 [C, H], dv so far.
      q_ids: segment ids of the queries, int32 [1, Q]; None without segments.
      k_ids: segment ids of the keys, int32 [1, C]; None without segments.
      dq_earlier: dq of earlier chunks of keys, float32 [Q, H]; None for the first chunk.
    """

    q: Ref
    k: Ref
    v: Ref
    lse: Ref
    d_out: Ref
    delta: Ref
    dq: Ref
    dk: Ref
    dv: Ref
    q_scaled: Ref
    dq_acc: Ref
    dk_acc: Ref
    dv_acc: Ref
    q_ids: Ref | None = None
    k_ids: Ref | None = None
    dq_earlier: Ref | None = None

    def accumulate(
        self, queries: slice, keys: slice | pl.Slice, visible: VisibleFunction | None = None
    ) -> None:
        """Adds the contribution of some pairs of queries and keys to all three gradients.

        Args:
          queries: the queries, within the block.
          keys: the keys, within the chunk.
          visible: which pairs are visible, bool [keys, queries]; None: all.
        """
        k, v, d_out = self.k[keys], self.v[keys], self.d_out[queries]
        s = dot_f32(k, self.q_scaled[queries], (1, 1))
        if visible is not None:
            q_ids = k_ids = None
            if self.q_ids is not None:
                assert self.k_ids is not None
                q_ids, k_ids = self.q_ids[:, queries], self.k_ids[:, keys]
            s = jnp.where(visible(q_ids, k_ids, s.shape), s, MASKED_SCORE)
        p = jnp.exp2(s - self.lse[:, queries] * LOG2E)
        self.dv_acc[keys] += dot_f32(p.astype(d_out.dtype), d_out)
        dp = dot_f32(v, d_out, (1, 1))
        ds = (p * (dp - self.delta[:, queries])).astype(k.dtype)
        self.dk_acc[keys] += dot_f32(ds, self.q[queries])
        self.dq_acc[:, queries] += dot_f32(k, ds, (0, 0))


def _backward_kernel(
    *,
    layout: FlashLayout,
    scale: float,
    chunk: int,
    first_block: int,
    key_ranges: Ref | None = None,
    slot_scalars: Ref | None = None,
    **named_refs: Ref,
) -> None:
    """Kernel body: computes gradients from one block of queries of one head and one chunk of keys.

    dq of the block is written in every step. dk and dv of the chunk accumulate over blocks of
    queries and over the query heads of a kv head, and are written at the end.

    Args:
      layout: the layout of the call.
      scale: factor on q·k.
      chunk: index of the chunk of keys.
      first_block: block of queries of the grid's first step.
      key_ranges: see `flash_blocks.key_ranges`.
      slot_scalars: see `flash_blocks.scalar_operands`.
      **named_refs: the fields of `_BackwardRefs`.
    """
    refs = _BackwardRefs(**named_refs)
    sizes = layout.sizes
    group, n = pl.program_id(2), pl.program_id(3)
    step = GridStep(layout, pl.program_id(0), n + first_block, chunk, key_ranges, slot_scalars)

    @pl.when((group == 0) & (n == 0))
    def clear_key_gradients():
        refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
        refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)

    refs.q_scaled[...] = (refs.q[...].astype(jnp.float32) * (scale * LOG2E)).astype(refs.q.dtype)
    refs.dq_acc[...] = jnp.zeros_like(refs.dq_acc)

    def accumulate_block(block, masked):
        """Adds the contribution of one key block of the chunk before the diagonal."""
        first = pl.multiple_of(block * sizes.block_k, sizes.block_k)
        keys = pl.ds(first, sizes.block_k)
        if not masked:
            return refs.accumulate(slice(None), keys)
        key = first + chunk * layout.chunk
        bounds = (layout, step.first_slot() - key, step.window(), layout.k_len - key)
        refs.accumulate(slice(None), keys, functools.partial(_visible_transposed, *bounds))

    def accumulate_diagonal():
        """Adds the contribution of the keys of the queries' own slots."""
        start = step.q_block * sizes.block_q - chunk * layout.chunk
        for key in range(0, sizes.block_q, sizes.diagonal_block):
            keys = pl.ds(pl.multiple_of(start + key, sizes.diagonal_block), sizes.diagonal_block)
            bounds = (layout, 0, step.window(), None)
            refs.accumulate(slice(key, None), keys, functools.partial(_visible_transposed, *bounds))

    loop_over_blocks(step, accumulate_block)
    if layout.has_diagonal:
        when_chunked(layout, step.chunk_has_diagonal(), accumulate_diagonal)
    dq = refs.dq_acc[...].T * scale
    if refs.dq_earlier is not None:
        dq += refs.dq_earlier[...]
    refs.dq[...] = dq.astype(refs.dq.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (n == pl.num_programs(3) - 1))
    def write_key_gradients():
        refs.dk[...] = (refs.dk_acc[...] * scale).astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_acc[...].astype(refs.dv.dtype)


def _block_specs(
    layout: FlashLayout, groups: int, width: int, chunk: int, first_block: int
) -> dict[str, pl.BlockSpec]:
    """Returns blocks by parameter name, for a grid (row, kv head, head of its group, query block).

    Args:
      layout: the layout of the call.
      groups: query heads per kv head.
      width: padded head dimension.
      chunk: index of the chunk of keys.
      first_block: block of queries of the grid's first step.
    """
    block_q = layout.sizes.block_q

    def query_index(b, n, g, i, *_):
        """Returns the index of a block of queries."""
        return b, n * groups + g, i + first_block, 0

    def statistics_index(b, n, g, i, *_):
        """Returns the index of a block of lse or delta."""
        return b, n * groups + g, 0, i + first_block

    queries = pl.BlockSpec((None, None, block_q, width), query_index)
    statistics = pl.BlockSpec((None, None, 1, block_q), statistics_index)
    keys = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, chunk, 0))
    key_gradient = pl.BlockSpec((None, None, layout.chunk, width), lambda b, n, *_: (b, n, 0, 0))
    return {
        "q": queries,
        "k": keys,
        "v": keys,
        "lse": statistics,
        "d_out": queries,
        "delta": statistics,
        "q_ids": pl.BlockSpec((None, 1, block_q), lambda b, n, g, i, *_: (b, 0, i + first_block)),
        "k_ids": pl.BlockSpec((None, 1, layout.chunk), lambda b, *_: (b, 0, chunk)),
        "dq_earlier": queries,
        "dq": queries,
        "dk": key_gradient,
        "dv": key_gradient,
    }


def _chunk_backward(
    operands: dict[str, jax.Array],
    scalars: dict[str, jax.Array],
    dq_earlier: jax.Array | None,
    *,
    layout: FlashLayout,
    scale: float,
    chunk: int,
    grad_dtypes: dict[str, DTypeLike],
    config: FlashConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients from one chunk of keys.

    Shapes: B batch rows, N query heads, K kv heads, T and S padded numbers of queries and keys, C
    keys of a chunk, H padded head dimension.

    Args:
      operands: arrays by parameter name: q and d_out [B, N, T, H], k and v [B, K, S, H], lse and
        delta [B, N, 1, T] and, with segments, q_ids and k_ids (`segment_rows`).
      scalars: the scalar operands (`scalar_operands`).
      dq_earlier: dq of the earlier chunks, float32 [B, N, T, H]; None for the first chunk.
      layout: the layout of the call.
      scale: factor on q·k.
      chunk: index of the chunk.
      grad_dtypes: dtypes of "dq", "dk" and "dv".
      config: settings for the chip.
      interpret: run Pallas' interpreter instead of compiling.

    Returns:
      (dq [B, N, T, H] of this and all earlier chunks, float32 unless there is a single chunk; dk
      and dv [B, K, C, H]).
    """
    q, k = operands["q"], operands["k"]
    batch, heads, _, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # Causal from slot 0: blocks of queries before the chunk do not see it.
    block_q = layout.sizes.block_q
    first_block = chunk * layout.chunk // block_q if layout.has_diagonal else 0
    specs = _block_specs(layout, groups, width, chunk, first_block)
    aliases = {}
    if dq_earlier is not None:
        aliases = {len(scalars) + len(operands): 0}
        operands = operands | {"dq_earlier": dq_earlier}
    outputs = {
        "dq": jax.ShapeDtypeStruct(
            q.shape, grad_dtypes["dq"] if layout.num_chunks == 1 else jnp.float32
        ),
        "dk": jax.ShapeDtypeStruct((batch, kv_heads, layout.chunk, width), grad_dtypes["dk"]),
        "dv": jax.ShapeDtypeStruct((batch, kv_heads, layout.chunk, width), grad_dtypes["dv"]),
    }
    scratch = {
        "q_scaled": pltpu.VMEM((block_q, width), q.dtype),
        "dq_acc": pltpu.VMEM((width, block_q), jnp.float32),
        "dk_acc": pltpu.VMEM((layout.chunk, width), jnp.float32),
        "dv_acc": pltpu.VMEM((layout.chunk, width), jnp.float32),
    }
    pairs = batch * heads * layout.num_pairs() // layout.num_chunks
    # K, V and their gradients in two buffers each, and the float32 sums of the gradients.
    item, grad_item = k.dtype.itemsize, jnp.dtype(grad_dtypes["dk"]).itemsize
    body = functools.partial(
        _backward_kernel, layout=layout, scale=scale, chunk=chunk, first_block=first_block
    )
    dq, dk, dv = pl.pallas_call(
        bind_by_name(body, [*scalars, *operands, *outputs, *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, kv_heads, groups, layout.num_q_blocks - first_block),
            in_specs=[specs[name] for name in operands],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=layout.vmem_limit(
                width * (4 * item + 8 + 4 * grad_item), config.vmem_bytes
            ),
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * pairs * width,
            bytes_accessed=3 * q.nbytes + 4 * k.nbytes // layout.num_chunks,
            transcendentals=pairs,
        ),
        interpret=interpret,
        name="flash_backward",
    )(*scalars.values(), *operands.values())
    return dq, dk, dv


def flash_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    lse: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
    grad_dtype: DTypeLike | None,
    *,
    config: FlashConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of q, k and v: the contract of `FlashKernel.backward`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), bfloat16 or float32.
      k: keys [B, S, K, H] (S keys, K kv heads), q's dtype.
      v: values [B, S, K, H], q's dtype.
      mask: which keys a query sees.
      scale: factor on q·k.
      lse: log-sum-exp of the scores, float32 [B, N, T], natural logarithm.
      d_out: gradient of the output, [B, T, N, H] in q's dtype.
      delta: Σ_H out·d_out less the gradient of lse, float32 [B, N, T].
      grad_dtype: dtype of the results; None: the dtypes of q, k and v.
      config: settings for the chip.
      interpret: run Pallas' interpreter instead of compiling.

    Returns:
      (dq [B, T, N, H], dk [B, S, K, H], dv [B, S, K, H]).
    """
    batch, q_len, _, head_dim = q.shape
    k_len = k.shape[1]
    width = padded_width(head_dim)
    layout = make_flash_layout(q_len, k_len, width, q.dtype.itemsize, mask, config.backward)
    scalars = scalar_operands(mask, layout, batch)

    def pad_statistics(x: jax.Array, fill: float) -> jax.Array:
        """Pads [B, N, T] to [B, N, 1, padded T]."""
        padding = layout.padded_q_len - q_len
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)[:, :, None]

    operands = {
        "q": heads_first(q, layout.padded_q_len),
        "k": heads_first(k, layout.padded_k_len),
        "v": heads_first(v, layout.padded_k_len),
        # A log-sum-exp so large that padding queries get weights of 0.
        "lse": pad_statistics(lse, -MASKED_SCORE),
        "d_out": heads_first(d_out, layout.padded_q_len),
        "delta": pad_statistics(delta, 0),
    }
    if layout.has_segments:
        operands["q_ids"], operands["k_ids"] = segment_rows(mask, layout)
    grad_dtypes = {"dq": grad_dtype or q.dtype, "dk": grad_dtype or k.dtype}
    grad_dtypes["dv"] = grad_dtype or v.dtype
    dq, dks, dvs = None, [], []
    for chunk in range(layout.num_chunks):
        dq, dk, dv = _chunk_backward(
            operands,
            scalars,
            dq,
            layout=layout,
            scale=scale,
            chunk=chunk,
            grad_dtypes=grad_dtypes,
            config=config,
            interpret=interpret,
        )
        dks.append(dk)
        dvs.append(dv)
    assert dq is not None
    dk, dv = (jnp.concatenate(x, axis=2)[:, :, :k_len, :head_dim] for x in (dks, dvs))
    dq = dq[:, :, :q_len, :head_dim].astype(grad_dtypes["dq"])
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
