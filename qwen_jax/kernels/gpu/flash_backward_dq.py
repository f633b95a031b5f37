"""Flash-attention backward kernel for dq: 128 queries of one head per work item, reproducible.

Used beside `flash_backward` without dq where results have to be bitwise reproducible: the two
kernels compute seven products instead of the five of one kernel, and in exchange no gradient is
summed in global memory: one warpgroup sums it in registers, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_pipeline import (
    COMPUTE_WARPGROUPS,
    TILE_ROWS,
    WARPGROUP_ROWS,
    CopyRing,
    PipelineConfig,
    WorkItem,
    apply_mask,
    launch_kernel,
    load_row_bounds,
    persistent_loop,
    run_warp_specialised,
)
from qwen_jax.kernels.gpu.flash_schedule import RowMask, WorkQueue, base2_scale
from qwen_jax.kernels.refs import Ref


def dq_config(head_dim: int) -> PipelineConfig:
    """Returns the pipeline (blocks of keys) for a head dimension of 64 or 128."""
    return PipelineConfig(128, 2) if head_dim == 128 else PipelineConfig(128, 3)


def flash_backward_dq(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    row_mask: RowMask,
    table: jax.Array,
    *,
    queue: WorkQueue,
    scale: float,
    config: PipelineConfig,
    dtype: DTypeLike,
) -> jax.Array:
    """Computes the gradient of padded queries.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), T a multiple of 128.
      k: keys [B, S, K, H] (S keys, K kv heads), S a multiple of `config.block`.
      v: values [B, S, K, H].
      d_out: gradient of the output, [B, T, N, H] in q's dtype.
      lse: log-sum-exp of the scores, float32 [B, N, T], logarithm to base 2.
      delta: Σ_H out·d_out less the gradient of lse, float32 [B, N, T].
      row_mask: mask with queries as rows (`query_row_mask`).
      table: tiles of queries in order of work.
      queue: order of the work items (tile, query head).
      scale: factor on q·k.
      config: keys per step and steps in flight.
      dtype: of the result.

    Returns:
      dq [B, T, N, H] in `dtype`.
    """
    heads, head_dim = q.shape[2:]
    ctas = min(mosaic.num_ctas(), queue.items)

    def body(**refs: Any) -> None:
        kernel = _BackwardDqKernel(
            **refs,
            queue=queue,
            config=config,
            scale=scale,
            q_heads_per_kv_head=heads // k.shape[2],
            ctas=ctas,
        )
        run_warp_specialised(kernel)

    tile = mosaic.smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, head_dim), q.dtype)
    blocks = mosaic.smem_tile((config.stages, config.block, head_dim), q.dtype)
    results = launch_kernel(
        "flash_backward_dq",
        body,
        inputs={
            "q": q,
            "k": k,
            "v": v,
            "d_out": d_out,
            "lse": lse,
            "delta": delta,
            "table": table,
            "row_mask": row_mask,
        },
        outputs={"dq": jax.ShapeDtypeStruct(q.shape, dtype)},
        scratch={
            "q_smem": tile,
            "d_out_smem": tile,
            "k_smem": blocks,
            "v_smem": blocks,
            "q_filled": plgpu.Barrier(num_arrivals=2 * COMPUTE_WARPGROUPS),
            "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "k_ring": CopyRing.scratch(config.stages),
            "v_ring": CopyRing.scratch(config.stages),
        },
        ctas=ctas,
    )
    return results["dq"]


@dataclasses.dataclass(frozen=True)
class _BackwardDqKernel:
    """Body of the kernel for dq; arrays are references.

    Shapes: B batch, T queries, N query heads, S keys, K kv heads, H head dimension.

    Attributes:
      q: queries in global memory, [B, T, N, H].
      k: keys in global memory, [B, S, K, H].
      v: values in global memory, [B, S, K, H].
      d_out: gradient of the output in global memory, [B, T, N, H].
      lse: log-sum-exp to base 2 in global memory, float32 [B, N, T].
      delta: Σ_H out·d_out in global memory, float32 [B, N, T].
      table: tiles of queries in order of work (`make_tile_table`), in global memory.
      row_mask: mask with queries as rows, in global memory.
      dq: result in global memory, [B, T, N, H].
      q_smem: queries of an item in shared memory, [warpgroups, 64, H].
      d_out_smem: gradient of the output of an item in shared memory, [warpgroups, 64, H].
      k_smem: keys of the steps in flight, [stages, block, H].
      v_smem: values of the steps in flight, [stages, block, H].
      q_filled: barrier completed when an item's q and d_out have arrived.
      q_free: barrier completed when both warpgroups have finished with an item's q and d_out.
      k_ring: barriers of `k_smem`.
      v_ring: barriers of `v_smem`.
      queue: order of the work items.
      config: keys per step and steps in flight.
      scale: factor on q·k.
      q_heads_per_kv_head: N / K.
      ctas: number of CTAs.
    """

    q: Ref
    k: Ref
    v: Ref
    d_out: Ref
    lse: Ref
    delta: Ref
    table: Ref
    row_mask: RowMask
    dq: Ref
    q_smem: Ref
    d_out_smem: Ref
    k_smem: Ref
    v_smem: Ref
    q_filled: Ref
    q_free: Ref
    k_ring: CopyRing
    v_ring: CopyRing
    queue: WorkQueue
    config: PipelineConfig
    scale: float
    q_heads_per_kv_head: int
    ctas: int

    def load(self) -> None:
        """Copies q and d_out of each work item, then its keys and values step by step."""
        block = self.config.block

        def load_item(n, item: WorkItem, done):
            batch, tile, head, schedule = item.batch, item.tile, item.head, item.schedule
            kv_head = lax.div(head, jnp.int32(self.q_heads_per_kv_head))
            pl.when(n > 0)(lambda: plgpu.barrier_wait(self.q_free))
            for warpgroup in range(COMPUTE_WARPGROUPS):
                queries = pl.ds(tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for source, buffers in ((self.q, self.q_smem), (self.d_out, self.d_out_smem)):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, queries, head], buffers.at[warpgroup], self.q_filled
                    )

            def load_step(step, done):
                keys = pl.ds(schedule.block(step) * block, block)
                self.k_ring.start_copies(done, (self.k.at[batch, keys, kv_head], self.k_smem))
                self.v_ring.start_copies(done, (self.v.at[batch, keys, kv_head], self.v_smem))
                return done + 1

            return lax.fori_loop(0, schedule.steps, load_step, done)

        done = persistent_loop(self.queue, self.ctas, self.table, load_item, prefetch=True)
        plgpu.barrier_wait(self.q_free)
        self.k_ring.drain(done)
        self.v_ring.drain(done)

    def compute(self) -> None:
        """Computes and writes dq of this warpgroup's 64 queries of each work item."""
        compute_item = functools.partial(self._compute_item, lax.axis_index("wg"))
        persistent_loop(self.queue, self.ctas, self.table, compute_item, prefetch=False)

    def _compute_item(
        self, warpgroup: jax.Array, n: jax.Array, item: WorkItem, done: jax.Array
    ) -> jax.Array:
        """Computes and writes dq of 64 queries of a work item.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          n: unused; number of the item, as `persistent_loop` passes it.
          item: the work item.
          done: steps of the CTA's earlier items.

        Returns:
          `done` plus the steps of this item.
        """
        del n
        batch, schedule = item.batch, item.schedule
        first = item.tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS
        queries = pl.ds(first, WARPGROUP_ROWS)
        lse = mosaic.load(self.lse.at[batch, item.head, queries], mosaic.PER_ROW)
        delta = mosaic.load(self.delta.at[batch, item.head, queries], mosaic.PER_ROW)
        bounds = load_row_bounds(self.row_mask, batch, first)
        plgpu.barrier_wait(self.q_filled)

        def compute_step(masked, step, dq):
            block = schedule.masked_block(step) if masked else schedule.full_block(step)
            start = block * self.config.block
            mask = None
            if masked:
                mask = functools.partial(apply_mask, self.row_mask, bounds, batch, start)
            return self._compute_step(warpgroup, done + step, mask, lse, delta, dq)

        dq = mosaic.full((WARPGROUP_ROWS, self.q.shape[-1]), 0.0, mosaic.MATRIX)
        masked_step, full_step = (functools.partial(compute_step, x) for x in (True, False))
        dq = lax.fori_loop(0, schedule.masked_steps, masked_step, dq)
        dq = lax.fori_loop(schedule.masked_steps, schedule.steps, full_step, dq)
        plgpu.barrier_arrive(self.q_free)
        self.dq[batch, queries, item.head] = (dq * self.scale).astype(self.dq.dtype)
        return done + schedule.steps

    def _compute_step(
        self,
        warpgroup: jax.Array,
        step: jax.Array,
        mask: Callable[[jax.Array], jax.Array] | None,
        lse: jax.Array,
        delta: jax.Array,
        dq: jax.Array,
    ) -> jax.Array:
        """Adds the contribution of one block of keys to dq of 64 queries.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          step: number of the step, counted over all items of the CTA.
          mask: takes scores [64 queries, keys] and returns them with -inf where masked; None where
            all are visible.
          lse: log-sum-exp of the 64 queries to base 2, float32 [64].
          delta: Σ out·d_out of the 64 queries, float32 [64].
          dq: sum so far, float32 [64, head_dim], in registers; still without the scale.

        Returns:
          dq with this block added.
        """
        slot, block = self.k_ring.slot(step), self.config.block
        keys = self.k_smem.at[slot]

        def softmax(scores):
            if mask is not None:
                scores = mask(scores)
            return jnp.exp2(scores * base2_scale(self.scale) - mosaic.broadcast_rows(lse, block))

        self.k_ring.wait_filled(step)
        self.v_ring.wait_filled(step)
        p, dp = mosaic.scores_and_dp(
            q_ref=self.q_smem.at[warpgroup],
            k_ref=keys,
            d_out_ref=self.d_out_smem.at[warpgroup],
            v_ref=self.v_smem.at[slot],
            softmax=softmax,
        )
        self.v_ring.release(step)
        ds = (p * (dp - mosaic.broadcast_rows(delta, block))).astype(self.q.dtype)
        dq = mosaic.matmul_accumulate(dq, ds, keys)
        self.k_ring.release(step)
        return dq
