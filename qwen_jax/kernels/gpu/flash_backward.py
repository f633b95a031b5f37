"""Flash-attention backward kernel: dk and dv of 128 keys per work item and, optionally, dq.

Follows FlashAttention-3 (arXiv:2407.08608, appendix B.1): scores are held transposed, [keys,
queries], so the products for dv and dk read their left operand from registers. For dq the two
computing warpgroups, with 64 of the keys each, store ds side by side in shared memory; each
multiplies half of dq's tile by all 128 keys, and the copy engine adds the result to dq in global
memory. The order of those additions differs from run to run, and so do dq's last bits. Without dq
(`flash_backward_dq` computes it then) the results are bitwise reproducible.

p are the attention weights, ds the gradient of the scores, d_out that of the output.
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

_DQ_TILE = 64
"""Rows and columns of the part of dq's tile that one warpgroup computes."""


def backward_config(head_dim: int, with_dq: bool) -> PipelineConfig:
    """Returns the pipeline (blocks of queries) for a head dimension of 64 or 128.

    At head_dim 128 with dq it takes 224 of the 227 KiB of shared memory.
    """
    if head_dim == 128:
        return PipelineConfig(64, 3)
    return PipelineConfig(128, 2 if with_dq else 3)


def sync_warpgroups(barrier: Ref) -> None:
    """Waits until both computing warpgroups have arrived at `barrier`."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def flash_backward(
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
    dtype: DTypeLike,
    with_dq: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes the gradients of padded keys and values, and of the queries if `with_dq`.

    The N query heads are divided evenly among the heads of the queue, so a kv head may be split
    over several of them; the caller then sums their dk and dv.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), T a multiple of the block.
      k: keys [B, S, K, H] (S keys, K kv heads), S a multiple of 128.
      v: values [B, S, K, H].
      d_out: gradient of the output, [B, T, N, H] in q's dtype.
      lse: log-sum-exp of the scores, float32 [B, N, T], logarithm to base 2.
      delta: Σ_H out·d_out less the gradient of lse, float32 [B, N, T].
      row_mask: mask with keys as rows (`key_row_mask`).
      table: tiles of keys in order of work.
      queue: order of the work items (tile, head); its heads are a multiple of K and divide N.
      scale: factor on q·k.
      dtype: of dk and dv.
      with_dq: also compute dq.

    Returns:
      (dk, dv, dq): dk and dv [B, S, heads of the queue, H]; dq float32 [B, T, N, H], still to be
      multiplied by the scale, or None.
    """
    head_dim = q.shape[3]
    config = backward_config(head_dim, with_dq)
    batch, k_len, kv_heads, _ = k.shape
    queue_heads = queue.heads * queue.head_sections
    ctas = min(mosaic.num_ctas(), queue.items)
    dq = None
    if with_dq:
        dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32), memory_space=plgpu.GMEM)

    def body(**refs: Any) -> None:
        kernel = _BackwardKernel(
            **refs,
            queue=queue,
            config=config,
            scale=scale,
            q_heads_per_item=q.shape[2] // queue_heads,
            items_per_kv_head=queue_heads // kv_heads,
            ctas=ctas,
        )
        run_warp_specialised(kernel)

    tile = mosaic.smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, head_dim), k.dtype)
    blocks = mosaic.smem_tile((config.stages, config.block, head_dim), k.dtype)
    statistics = plgpu.SMEM((config.stages, config.block), jnp.float32)
    ds_smem = dq_smem = ds_barrier = None
    if with_dq:
        ds_smem = mosaic.smem_tile((2, COMPUTE_WARPGROUPS, WARPGROUP_ROWS, config.block), q.dtype)
        dq_smem = mosaic.smem_tile((COMPUTE_WARPGROUPS, _DQ_TILE, _DQ_TILE), jnp.float32)
        ds_barrier = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS)
    out = jax.ShapeDtypeStruct((batch, k_len, queue_heads, head_dim), dtype)
    results = launch_kernel(
        "flash_backward" if with_dq else "flash_backward_dkdv",
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
            "dq": dq,
        },
        outputs={"dk": out, "dv": out},
        scratch={
            "k_smem": tile,
            "v_smem": tile,
            "q_smem": blocks,
            "d_out_smem": blocks,
            "lse_smem": statistics,
            "delta_smem": statistics,
            "ds_smem": ds_smem,
            "dq_smem": dq_smem,
            "kv_filled": plgpu.Barrier(num_arrivals=2 * COMPUTE_WARPGROUPS),
            "kv_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "q_ring": CopyRing.scratch(config.stages, copies_per_step=2),
            "d_out_ring": CopyRing.scratch(config.stages, copies_per_step=2),
            "ds_barrier": ds_barrier,
        },
        ctas=ctas,
    )
    return results["dk"], results["dv"], None if dq is None else jax.freeze(dq)


@dataclasses.dataclass(frozen=True)
class _BackwardKernel:
    """Body of the backward kernel; arrays are references.

    Shapes: B batch, T queries, N query heads, S keys, K kv heads, H head dimension.

    Attributes:
      q: queries in global memory, [B, T, N, H].
      k: keys in global memory, [B, S, K, H].
      v: values in global memory, [B, S, K, H].
      d_out: gradient of the output in global memory, [B, T, N, H].
      lse: log-sum-exp to base 2 in global memory, float32 [B, N, T].
      delta: Σ_H out·d_out in global memory, float32 [B, N, T].
      table: tiles of keys in order of work (`make_tile_table`), in global memory.
      row_mask: mask with keys as rows, in global memory.
      dq: gradient of q in global memory, float32 [B, T, N, H], added to; None if not wanted.
      dk: gradient of k in global memory, [B, S, heads of the queue, H].
      dv: gradient of v in global memory, [B, S, heads of the queue, H].
      k_smem: keys of an item in shared memory, [warpgroups, 64, H].
      v_smem: values of an item in shared memory, [warpgroups, 64, H].
      q_smem: queries of the steps in flight, [stages, block, H].
      d_out_smem: gradient of the output of the steps in flight, [stages, block, H].
      lse_smem: lse of the steps in flight, float32 [stages, block].
      delta_smem: delta of the steps in flight, float32 [stages, block].
      ds_smem: ds of two steps, [2, warpgroups, 64 keys, block]; None without dq.
      dq_smem: parts of dq on their way to global memory, float32 [warpgroups, 64, 64]; None
        without dq.
      kv_filled: barrier completed when an item's keys and values have arrived.
      kv_free: barrier completed when both warpgroups have finished with an item's keys and values.
      q_ring: barriers of q_smem and lse_smem.
      d_out_ring: barriers of d_out_smem and delta_smem.
      ds_barrier: completed when both warpgroups have stored their ds; None without dq.
      queue: order of the work items.
      config: queries per step and steps in flight.
      scale: factor on q·k.
      q_heads_per_item: query heads over which an item sums dk and dv.
      items_per_kv_head: heads of the queue that share a kv head.
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
    dq: Ref | None
    dk: Ref
    dv: Ref
    k_smem: Ref
    v_smem: Ref
    q_smem: Ref
    d_out_smem: Ref
    lse_smem: Ref
    delta_smem: Ref
    ds_smem: Ref | None
    dq_smem: Ref | None
    kv_filled: Ref
    kv_free: Ref
    q_ring: CopyRing
    d_out_ring: CopyRing
    ds_barrier: Ref | None
    queue: WorkQueue
    config: PipelineConfig
    scale: float
    q_heads_per_item: int
    items_per_kv_head: int
    ctas: int

    def load(self) -> None:
        """Copies the keys and values of each work item, then its blocks of queries one by one."""
        block = self.config.block

        def load_item(n, item: WorkItem, done):
            batch, tile, schedule = item.batch, item.tile, item.schedule
            kv_head = lax.div(item.head, jnp.int32(self.items_per_kv_head))
            pl.when(n > 0)(lambda: plgpu.barrier_wait(self.kv_free))
            for warpgroup in range(COMPUTE_WARPGROUPS):
                keys = pl.ds(tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                for source, buffers in ((self.k, self.k_smem), (self.v, self.v_smem)):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, keys, kv_head], buffers.at[warpgroup], self.kv_filled
                    )

            def load_step(head, step, done):
                queries = pl.ds(schedule.block(step) * block, block)
                self.q_ring.start_copies(
                    done,
                    (self.q.at[batch, queries, head], self.q_smem),
                    (self.lse.at[batch, head, queries], self.lse_smem),
                )
                self.d_out_ring.start_copies(
                    done,
                    (self.d_out.at[batch, queries, head], self.d_out_smem),
                    (self.delta.at[batch, head, queries], self.delta_smem),
                )
                return done + 1

            def load_head(h, done):
                head = item.head * self.q_heads_per_item + h
                step = functools.partial(load_step, head)
                return lax.fori_loop(0, schedule.steps, step, done)

            return lax.fori_loop(0, self.q_heads_per_item, load_head, done)

        done = persistent_loop(self.queue, self.ctas, self.table, load_item, prefetch=True)
        plgpu.barrier_wait(self.kv_free)
        self.q_ring.drain(done)
        self.d_out_ring.drain(done)

    def compute(self) -> None:
        """Computes and writes the gradients of this warpgroup's 64 keys of each work item."""
        compute_item = functools.partial(self._compute_item, lax.axis_index("wg"))
        persistent_loop(self.queue, self.ctas, self.table, compute_item, prefetch=False)

    def _compute_item(
        self, warpgroup: jax.Array, n: jax.Array, item: WorkItem, done: jax.Array
    ) -> jax.Array:
        """Computes and writes dk and dv of 64 keys of a work item, and adds its part of dq.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          n: unused; number of the item, as `persistent_loop` passes it.
          item: the work item.
          done: steps of the CTA's earlier items, over all their query heads.

        Returns:
          `done` plus the steps of this item.
        """
        del n
        batch, schedule = item.batch, item.schedule
        first = item.tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS
        bounds = load_row_bounds(self.row_mask, batch, first)
        plgpu.barrier_wait(self.kv_filled)

        def compute_step(h, step, gradients):
            start = schedule.block(step) * self.config.block

            def mask(scores):
                masked = functools.partial(apply_mask, self.row_mask, bounds, batch, start)
                # One loop with a branch: the addresses of two loops do not fit in the registers.
                return lax.cond(step < schedule.masked_steps, masked, lambda scores: scores, scores)

            block = (batch, start, item.head * self.q_heads_per_item + h)
            total_step = done + h * schedule.steps + step
            return self._compute_step(warpgroup, total_step, mask, block, gradients)

        def compute_head(h, gradients):
            return lax.fori_loop(0, schedule.steps, functools.partial(compute_step, h), gradients)

        zero = mosaic.full((WARPGROUP_ROWS, self.k.shape[-1]), 0.0, mosaic.MATRIX)
        dk, dv = lax.fori_loop(0, self.q_heads_per_item, compute_head, (zero, zero))
        plgpu.barrier_arrive(self.kv_free)
        if self.dq is not None:
            plgpu.wait_smem_to_gmem(0)
        keys = (batch, pl.ds(first, WARPGROUP_ROWS), item.head)
        self.dk[keys] = (dk * self.scale).astype(self.dk.dtype)
        self.dv[keys] = dv.astype(self.dv.dtype)
        return done + self.q_heads_per_item * schedule.steps

    def _compute_step(
        self,
        warpgroup: jax.Array,
        step: jax.Array,
        mask: Callable[[jax.Array], jax.Array],
        block: tuple[jax.Array, jax.Array, jax.Array],
        gradients: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Adds the contribution of one block of queries to the gradients of 64 keys.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          step: number of the step, counted over all items of the CTA.
          mask: takes scores [64 keys, queries] and returns them with -inf where masked.
          block: (batch row, first query, query head).
          gradients: (dk, dv) so far, float32 [64, head_dim] each, in registers.

        Returns:
          (dk, dv) with this block added.
        """
        dk, dv = gradients
        slot = self.q_ring.slot(step)

        def softmax(scores):
            scores = mask(scores)
            lse = mosaic.load(self.lse_smem.at[slot], mosaic.PER_COLUMN)
            lse = mosaic.broadcast_columns(lse, WARPGROUP_ROWS)
            return jnp.exp2(scores * base2_scale(self.scale) - lse)

        def score_gradient(p, dp):
            delta = mosaic.load(self.delta_smem.at[slot], mosaic.PER_COLUMN)
            delta = mosaic.broadcast_columns(delta, WARPGROUP_ROWS)
            return (p * (dp - delta)).astype(self.q.dtype)

        self.q_ring.wait_filled(step)
        self.d_out_ring.wait_filled(step)
        accumulate: Callable[..., tuple[jax.Array, jax.Array]] = mosaic.accumulate_dk_dv
        if self.dq is not None:
            accumulate = functools.partial(
                mosaic.accumulate_dk_dv_dq, **self._dq_callbacks(warpgroup, step, block)
            )
        dk, dv = accumulate(
            dk,
            dv,
            self.k_smem.at[warpgroup],
            self.v_smem.at[warpgroup],
            self.q_smem.at[slot],
            self.d_out_smem.at[slot],
            softmax,
            score_gradient,
        )
        if self.dq is None:
            # lse and delta are read as plain memory, which the copy engine overwrites next. With
            # dq, `store_ds` issues the fence.
            plgpu.commit_smem()
        self.q_ring.release(step)
        self.d_out_ring.release(step)
        return dk, dv

    def _dq_callbacks(
        self,
        warpgroup: jax.Array,
        step: jax.Array,
        block: tuple[jax.Array, jax.Array, jax.Array],
    ) -> dict[str, Any]:
        """Returns the keyword arguments of `mosaic.accumulate_dk_dv_dq` that concern dq.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          step: number of the step, counted over all items of the CTA.
          block: (batch row, first query, query head).
        """
        assert self.dq is not None and self.ds_smem is not None and self.dq_smem is not None
        dq, dq_smem = self.dq, self.dq_smem
        batch, start, head = block
        # Two buffers in turn: a warpgroup that is at the next step has finished with this step's.
        ds_smem = self.ds_smem.at[lax.rem(step, jnp.int32(2))]
        own, whole = pl.ds(warpgroup * _DQ_TILE, _DQ_TILE), pl.ds(0, _DQ_TILE)
        # Half of the columns, or of the rows where the queries of a step are twice as many.
        rows, columns = (whole, own) if self.q.shape[3] == 2 * _DQ_TILE else (own, whole)

        def store_ds(ds):
            ds_smem.at[warpgroup][...] = ds
            plgpu.commit_smem()
            sync_warpgroups(self.ds_barrier)

        def store_dq(dq_part):
            # The previous part has to leave shared memory first.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_smem.at[warpgroup][...] = dq_part
            plgpu.commit_smem()
            queries = pl.ds(start + rows.start, _DQ_TILE)
            mosaic.add_to_gmem(dq_smem.at[warpgroup], dq.at[batch, queries, head, columns])

        return {
            "store_ds": store_ds,
            "dq_operands": [
                (ds_smem.at[half, :, rows], self.k_smem.at[half, :, columns])
                for half in range(COMPUTE_WARPGROUPS)
            ],
            "store_dq": store_dq,
        }
