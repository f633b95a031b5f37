"""Flash-attention forward kernel for TPUs: output and log-sum-exp of one block of queries per step.

The softmax is online (FlashAttention, arXiv:2205.14135), to base 2, in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.mask import MASKED, Mask
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
from qwen_jax.kernels.tpu.mosaic import LANES, LOG2E, broadcast_lanes, dot_f32

VisibleFunction = Callable[[jax.Array | None, jax.Array | None, tuple[int, ...]], jax.Array]
"""Takes (query ids, key ids, shape of the scores) and returns which scores are visible, bool."""


def _visible(
    layout: FlashLayout,
    offset: jax.Array | int,
    window: jax.Array | int | None,
    keys_left: jax.Array | int | None,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
    shape: tuple[int, ...],
) -> jax.Array:
    """Returns which scores of a block are visible, bool [queries, keys].

    Args:
      layout: the layout of the call.
      offset: slot of the block's first query less that of its first key.
      window: slots that a query sees, its own included; None: all.
      keys_left: keys of the sequence from the block's first key on; None on the diagonal.
      q_ids: segment id of each query, int32 [queries, LANES], equal in all lanes; None: no
        segments.
      k_ids: segment id of each key, int32 [1, keys]; None: no segments.
      shape: (queries, keys).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    col = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    distance = col - row
    visible = distance <= offset
    if window is not None:
        visible &= distance > offset - window
    if not layout.has_diagonal and layout.padded_k_len != layout.k_len:
        assert keys_left is not None
        visible &= col < keys_left
    if layout.has_segments:
        assert q_ids is not None
        visible &= broadcast_lanes(q_ids, shape[1]) == k_ids
    return visible


@dataclasses.dataclass(frozen=True)
class _ForwardRefs:
    """References of the forward kernel, and the steps of the online softmax on them.

    Shapes: Q block_q queries, C keys of a chunk, H padded head dimension.

    Attributes:
      q: queries [Q, H].
      k: keys [C, H].
      v: values [C, H].
      out: output [Q, H].
      lse: log-sum-exp, float32 [1, Q], natural logarithm.
      q_scaled: scratch [Q, H], queries times scale · log2(e).
      row_max: scratch float32 [Q, LANES], largest score so far, equal in all lanes.
      row_sum: scratch float32 [Q, LANES], sum of weights so far, a part of it in each lane.
      acc: scratch float32 [Q, H], unnormalised output so far.
      q_ids: segment ids of the queries, int32 [1, Q]; None without segments.
      k_ids: segment ids of the keys, int32 [1, C]; None without segments.
      q_id_lanes: scratch int32 [Q, LANES], `q_ids` in every lane; None without segments.
    """

    q: Ref
    k: Ref
    v: Ref
    out: Ref
    lse: Ref
    q_scaled: Ref
    row_max: Ref
    row_sum: Ref
    acc: Ref
    q_ids: Ref | None = None
    k_ids: Ref | None = None
    q_id_lanes: Ref | None = None

    def initialise(self, scale: float) -> None:
        """Clears the accumulators and writes scaled queries and their ids to scratch."""
        scaled = self.q[...].astype(jnp.float32) * (scale * LOG2E)
        self.q_scaled[...] = scaled.astype(self.q.dtype)
        self.row_max[...] = jnp.full_like(self.row_max, MASKED)
        self.row_sum[...] = jnp.zeros_like(self.row_sum)
        self.acc[...] = jnp.zeros_like(self.acc)
        if self.q_id_lanes is not None:
            assert self.q_ids is not None
            ids = jnp.broadcast_to(self.q_ids[...], self.q_id_lanes.shape[::-1])
            self.q_id_lanes[...] = ids.T

    def attend(
        self, rows: slice, keys: slice | pl.Slice, visible: VisibleFunction | None = None
    ) -> None:
        """Adds a block of keys and values to the online softmax of some queries.

        Args:
          rows: the queries, within the block.
          keys: the keys, within the chunk.
          visible: which pairs are visible; None: all.
        """
        k, v = self.k[keys], self.v[keys]
        s = dot_f32(self.q_scaled[rows], k, (1, 1))
        if visible is not None:
            q_ids = k_ids = None
            if self.q_id_lanes is not None:
                assert self.k_ids is not None
                q_ids, k_ids = self.q_id_lanes[rows], self.k_ids[:, keys]
            s = jnp.where(visible(q_ids, k_ids, s.shape), s, MASKED_SCORE)
        old_max = self.row_max[rows]
        new_max = jnp.maximum(old_max, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - broadcast_lanes(new_max, s.shape[1]))
        rescale = jnp.exp2(old_max - new_max)
        self.row_max[rows] = new_max
        lane_sums = sum(p[:, x : x + LANES] for x in range(0, p.shape[1], LANES))
        self.row_sum[rows] = self.row_sum[rows] * rescale + lane_sums
        product = dot_f32(p.astype(v.dtype), v)
        self.acc[rows] = self.acc[rows] * broadcast_lanes(rescale, v.shape[1]) + product

    def write_results(self) -> None:
        """Writes output and log-sum-exp; 0 and `MASKED` for queries without visible keys."""
        sums = self.row_sum[...].sum(axis=1, keepdims=True)
        some = sums > 0
        sums = jnp.where(some, sums, 1.0)
        self.out[...] = (self.acc[...] / sums).astype(self.out.dtype)
        lse = (self.row_max[...] + jnp.log2(sums)) * (1 / LOG2E)
        self.lse[...] = jnp.where(some, lse, MASKED).T[:1]


def _forward_kernel(
    *,
    layout: FlashLayout,
    scale: float,
    key_ranges: Ref | None = None,
    slot_scalars: Ref | None = None,
    **named_refs: Ref,
) -> None:
    """Kernel body: updates the online softmax of one block of queries with one chunk of keys.

    One head per grid step. The accumulators are initialised at the first chunk; output and
    log-sum-exp are written at the last.

    Args:
      layout: the layout of the call.
      scale: factor on q·k.
      key_ranges: see `flash_blocks.key_ranges`.
      slot_scalars: see `flash_blocks.scalar_operands`.
      **named_refs: the fields of `_ForwardRefs`.
    """
    refs = _ForwardRefs(**named_refs)
    sizes = layout.sizes
    chunk = pl.program_id(3) if layout.num_chunks > 1 else 0
    step = GridStep(layout, pl.program_id(0), pl.program_id(2), chunk, key_ranges, slot_scalars)

    def attend_block(block, masked):
        """Attends to one key block of the chunk before the diagonal."""
        first = pl.multiple_of(block * sizes.block_k, sizes.block_k)
        keys = pl.ds(first, sizes.block_k)
        if not masked:
            return refs.attend(slice(None), keys)
        key = first + step.chunk * layout.chunk
        bounds = (layout, step.first_slot() - key, step.window(), layout.k_len - key)
        refs.attend(slice(None), keys, functools.partial(_visible, *bounds))

    def attend_diagonal():
        """Attends to the block on the diagonal by rows of squares, up to the diagonal each."""
        first = step.q_block * sizes.block_q - step.chunk * layout.chunk
        first = pl.multiple_of(first, sizes.block_q)
        for row in range(0, sizes.block_q, sizes.diagonal_block):
            bounds = (layout, row, step.window(), None)
            rows = slice(row, row + sizes.diagonal_block)
            keys = pl.ds(first, row + sizes.diagonal_block)
            refs.attend(rows, keys, functools.partial(_visible, *bounds))

    when_chunked(layout, chunk == 0, functools.partial(refs.initialise, scale))
    loop_over_blocks(step, attend_block)
    if layout.has_diagonal:
        when_chunked(layout, step.chunk_has_diagonal(), attend_diagonal)
    when_chunked(layout, chunk == layout.num_chunks - 1, refs.write_results)


def _chunk_to_load(
    layout: FlashLayout, row: jax.Array, q_block: jax.Array, chunk: jax.Array, scalars: tuple
) -> jax.Array | int:
    """Returns the chunk of keys to hold in VMEM during a grid step.

    The grid step's own chunk if it has visible keys, else the nearest that has: a chunk without
    work is never loaded.

    Args:
      layout: the layout of the call.
      row: batch row.
      q_block: block of queries.
      chunk: chunk of the grid step.
      scalars: references to the scalar operands.
    """
    if layout.num_chunks == 1:
        return 0
    sizes, per_chunk = layout.sizes, layout.blocks_per_chunk
    index = (row * layout.num_q_blocks + q_block) * 4
    first = jax.lax.div(scalars[0][index], per_chunk) if layout.has_key_ranges else 0
    if layout.has_diagonal:
        last = jax.lax.div(q_block * sizes.block_q, layout.chunk)
    else:
        end = -(-layout.k_len // sizes.block_k) - scalars[0][index + 3]
        last = jax.lax.div(jnp.maximum(end - 1, 0), per_chunk)
    return jnp.clip(chunk, jnp.minimum(first, last), last)


def _block_specs(
    layout: FlashLayout, groups: int, width: int
) -> tuple[dict[str, pl.BlockSpec], dict[str, pl.BlockSpec]]:
    """Returns the blocks of inputs and outputs for a grid (row, head, query block, key chunk).

    Args:
      layout: the layout of the call.
      groups: query heads per kv head.
      width: padded head dimension.

    Returns:
      (specs of the inputs, specs of the outputs) by parameter name.
    """
    block_q = layout.sizes.block_q

    def key_index(b, n, i, c, *scalars):
        """Returns the index of the chunk of keys and values."""
        return b, jax.lax.div(n, groups), _chunk_to_load(layout, b, i, c, scalars), 0

    def key_id_index(b, n, i, c, *scalars):
        """Returns the index of the chunk of the keys' segment ids."""
        return b, 0, _chunk_to_load(layout, b, i, c, scalars)

    queries = pl.BlockSpec((None, None, block_q, width), lambda b, n, i, c, *_: (b, n, i, 0))
    keys = pl.BlockSpec((None, None, layout.chunk, width), key_index)
    lse = pl.BlockSpec((None, None, 1, block_q), lambda b, n, i, c, *_: (b, n, 0, i))
    inputs = {"q": queries, "k": keys, "v": keys}
    if layout.has_segments:
        inputs["q_ids"] = pl.BlockSpec((None, 1, block_q), lambda b, n, i, c, *_: (b, 0, i))
        inputs["k_ids"] = pl.BlockSpec((None, 1, layout.chunk), key_id_index)
    return inputs, {"out": queries, "lse": lse}


def _scratch_types(layout: FlashLayout, width: int, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns the scratch memory of the kernel by parameter name; width: padded head dimension."""
    block_q = layout.sizes.block_q
    types = {
        "q_scaled": pltpu.VMEM((block_q, width), dtype),
        "row_max": pltpu.VMEM((block_q, LANES), jnp.float32),
        "row_sum": pltpu.VMEM((block_q, LANES), jnp.float32),
        "acc": pltpu.VMEM((block_q, width), jnp.float32),
    }
    if layout.has_segments:
        types["q_id_lanes"] = pltpu.VMEM((block_q, LANES), jnp.int32)
    return types


def flash_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    *,
    config: FlashConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention and its log-sum-exp: the contract of `FlashKernel.forward`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), bfloat16 or float32.
      k: keys [B, S, K, H] (S keys, K kv heads), q's dtype.
      v: values [B, S, K, H], q's dtype.
      mask: which keys a query sees.
      scale: factor on q·k.
      config: settings for the chip.
      interpret: run Pallas' interpreter instead of compiling.

    Returns:
      (out [B, T, N, H] in q's dtype, lse float32 [B, N, T], natural logarithm).
    """
    batch, q_len, heads, head_dim = q.shape
    k_len, kv_heads = k.shape[1:3]
    width = padded_width(head_dim)
    layout = make_flash_layout(q_len, k_len, width, q.dtype.itemsize, mask, config.forward)
    scalars = scalar_operands(mask, layout, batch)
    in_specs, out_specs = _block_specs(layout, heads // kv_heads, width)
    scratch = _scratch_types(layout, width, q.dtype)
    operands = {
        "q": heads_first(q, layout.padded_q_len),
        "k": heads_first(k, layout.padded_k_len),
        "v": heads_first(v, layout.padded_k_len),
    }
    if layout.has_segments:
        operands["q_ids"], operands["k_ids"] = segment_rows(mask, layout)
    pairs = batch * heads * layout.num_pairs()
    body = functools.partial(_forward_kernel, layout=layout, scale=scale)
    out, lse = pl.pallas_call(
        bind_by_name(body, [*scalars, *operands, *out_specs, *scratch]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, layout.num_q_blocks, layout.num_chunks),
            in_specs=[in_specs[name] for name in operands],
            out_specs=list(out_specs.values()),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, layout.padded_q_len, width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, layout.padded_q_len), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            # K and V, two buffers each.
            vmem_limit_bytes=layout.vmem_limit(4 * width * q.dtype.itemsize, config.vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * width,
            bytes_accessed=2 * (q.nbytes + k.nbytes) + batch * heads * q_len * 4,
            transcendentals=pairs,
        ),
        interpret=interpret,
        name="flash_forward",
    )(*scalars.values(), *operands.values())
    return out[:, :, :q_len, :head_dim].swapaxes(1, 2), lse[:, :, 0, :q_len]
