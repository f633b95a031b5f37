"""Flash-attention forward kernel: output and log-sum-exp of 128 queries of one head per work item.

FlashAttention-3 (arXiv:2407.08608), §3.1 and 3.2. A warpgroup issues the scores of one block and
the output product of the block before together, and computes the softmax of the former while the
tensor cores compute the latter. The two computing warpgroups take turns to issue, so that the
tensor cores have the other warpgroup's products meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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
from qwen_jax.kernels.mask import MASKED
from qwen_jax.kernels.refs import Ref


def forward_config(head_dim: int) -> PipelineConfig:
    """Returns the pipeline for a head dimension of 64 or 128.

    It fills shared memory: 192 KiB of tiles at head_dim 128, 160 KiB at 64.
    """
    return PipelineConfig(128, 2) if head_dim == 128 else PipelineConfig(128, 4)


def flash_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row_mask: RowMask,
    table: jax.Array,
    *,
    queue: WorkQueue,
    scale: float,
    config: PipelineConfig,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of padded operands.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), T a multiple of 128.
      k: keys [B, S, K, H] (S keys, K kv heads) in q's dtype, S a multiple of `config.block`.
      v: values [B, S, K, H] in q's dtype.
      row_mask: mask with queries as rows.
      table: tiles in order of work, each with at least one step (`ensure_one_step`).
      queue: order of the work items (tile, query head).
      scale: factor on q·k.
      config: keys per step and steps in flight.

    Returns:
      (out [B, T, N, H] in q's dtype, lse float32 [B, N, T], natural logarithm). Where a query sees
      no key, out is 0 and lse `MASKED`.
    """
    batch, q_len, heads, head_dim = q.shape
    ctas = min(mosaic.num_ctas(), queue.items)

    def body(**refs: Ref) -> None:
        kernel = _ForwardKernel(
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
        "flash_forward",
        body,
        inputs={"q": q, "k": k, "v": v, "table": table, "row_mask": row_mask},
        outputs={
            "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
            "lse": jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
        },
        scratch={
            "q_smem": tile,
            "k_smem": blocks,
            "v_smem": blocks,
            "out_smem": tile,
            "lse_smem": plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
            "q_filled": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "k_ring": CopyRing.scratch(config.stages),
            "v_ring": CopyRing.scratch(config.stages),
            "turns": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        },
        ctas=ctas,
    )
    return results["out"], results["lse"]


@dataclasses.dataclass(frozen=True)
class _ForwardKernel:
    """Body of the forward kernel; arrays are references.

    Shapes: B batch, T queries, N query heads, S keys, K kv heads, H head dimension.

    Attributes:
      q: queries in global memory, [B, T, N, H].
      k: keys in global memory, [B, S, K, H].
      v: values in global memory, [B, S, K, H].
      table: tiles of queries in order of work (`make_tile_table`), in global memory.
      row_mask: mask with queries as rows, in global memory.
      out: result in global memory, [B, T, N, H].
      lse: log-sum-exp in global memory, float32 [B, N, T].
      q_smem: queries of an item in shared memory, [warpgroups, 64, H].
      k_smem: keys of the steps in flight, [stages, block, H].
      v_smem: values of the steps in flight, [stages, block, H].
      out_smem: outputs on their way to global memory, [warpgroups, 64, H].
      lse_smem: log-sum-exp on its way to global memory, float32 [warpgroups, 64].
      q_filled: barrier completed when an item's queries have arrived.
      q_free: barrier completed when both warpgroups have finished with an item's queries.
      k_ring: barriers of `k_smem`.
      v_ring: barriers of `v_smem`.
      turns: barriers [warpgroups]; warpgroup i may issue products once turns[i] completes, which
        the other signals after issuing its own.
      queue: order of the work items.
      config: keys per step and steps in flight.
      scale: factor on q·k.
      q_heads_per_kv_head: N / K.
      ctas: number of CTAs.
    """

    q: Ref
    k: Ref
    v: Ref
    table: Ref
    row_mask: RowMask
    out: Ref
    lse: Ref
    q_smem: Ref
    k_smem: Ref
    v_smem: Ref
    out_smem: Ref
    lse_smem: Ref
    q_filled: Ref
    q_free: Ref
    k_ring: CopyRing
    v_ring: CopyRing
    turns: Ref
    queue: WorkQueue
    config: PipelineConfig
    scale: float
    q_heads_per_kv_head: int
    ctas: int

    def load(self) -> None:
        """Copies the queries of each work item, then its keys and values step by step.

        Keys are one step ahead of values, which is the order in which buffers become free.
        """

        def load_item(n, item: WorkItem, done):
            batch, tile, head, schedule = item.batch, item.tile, item.head, item.schedule
            kv_head = lax.div(head, jnp.int32(self.q_heads_per_kv_head))

            def copy_block(ring: CopyRing, source, buffers, step):
                rows = pl.ds(schedule.block(step) * self.config.block, self.config.block)
                ring.start_copies(done + step, (source.at[batch, rows, kv_head], buffers))

            pl.when(n > 0)(lambda: plgpu.barrier_wait(self.q_free))
            for warpgroup in range(COMPUTE_WARPGROUPS):
                queries = pl.ds(tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(
                    self.q.at[batch, queries, head], self.q_smem.at[warpgroup], self.q_filled
                )
            copy_block(self.k_ring, self.k, self.k_smem, jnp.int32(0))

            def load_step(step, _):
                pl.when(step + 1 < schedule.steps)(
                    lambda: copy_block(self.k_ring, self.k, self.k_smem, step + 1)
                )
                copy_block(self.v_ring, self.v, self.v_smem, step)

            lax.fori_loop(0, schedule.steps, load_step, None)
            return done + schedule.steps

        done = persistent_loop(self.queue, self.ctas, self.table, load_item, prefetch=True)
        plgpu.barrier_wait(self.q_free)
        self.k_ring.drain(done)
        self.v_ring.drain(done)

    def compute(self) -> None:
        """Computes and writes the results of this warpgroup's 64 queries of each work item."""
        warpgroup = lax.axis_index("wg")
        # The first warpgroup has the first turn, and consumes the last signal sent to it.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(self.turns.at[0]))
        compute_item = functools.partial(self._compute_item, warpgroup)
        persistent_loop(self.queue, self.ctas, self.table, compute_item, prefetch=True)
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(self.turns.at[0]))
        plgpu.wait_smem_to_gmem(0)

    def _compute_item(
        self, warpgroup: jax.Array, n: jax.Array, item: WorkItem, done: jax.Array
    ) -> jax.Array:
        """Computes and writes output and log-sum-exp of 64 queries of a work item.

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
        start = item.tile * TILE_ROWS + warpgroup * WARPGROUP_ROWS
        bounds = load_row_bounds(self.row_mask, batch, start)
        q = self.q_smem.at[warpgroup]

        def masked(step, scores):
            # A row's running maximum starts finite, so masked scores get a weight of exactly 0.
            first = schedule.block(step) * self.config.block
            return apply_mask(self.row_mask, bounds, batch, first, scores)

        def wait_for_keys(step):
            pl.when(step < schedule.steps)(lambda: self.k_ring.wait_filled(done + step))

        p_template = mosaic.full((WARPGROUP_ROWS, self.config.block), 0.0, mosaic.MATRIX)

        def compute_step(mask, step, carry):
            acc, row_max, row_sum, p = carry
            this, previous = done + step, done + step - 1

            def softmax(scores):
                self.k_ring.release(this)
                return self._online_softmax(mask(step, scores), row_max, row_sum)

            self.v_ring.wait_filled(previous)
            plgpu.barrier_wait(self.turns.at[warpgroup])
            acc, rescale, row_max, row_sum, p = mosaic.output_matmul_with_softmax(
                acc,
                p,
                self.v_smem.at[self.v_ring.slot(previous)],
                q,
                self.k_smem.at[self.k_ring.slot(this)],
                on_issued=lambda: plgpu.barrier_arrive(self.turns.at[1 - warpgroup]),
                softmax=softmax,
                after_softmax=lambda: wait_for_keys(step + 1),
                softmax_templates=(row_sum, row_max, row_sum, p_template),
            )
            self.v_ring.release(previous)
            acc = acc * mosaic.broadcast_rows(rescale, acc.shape[1])
            return acc, row_max, row_sum, p.astype(self.q.dtype)

        plgpu.barrier_wait(self.q_filled)
        self.k_ring.wait_filled(done)
        scores = mosaic.matmul_transposed(q, self.k_smem.at[self.k_ring.slot(done)])
        self.k_ring.release(done)
        wait_for_keys(jnp.int32(1))
        scores = masked(jnp.int32(0), scores)
        row_max, row_sum = (
            mosaic.full((WARPGROUP_ROWS,), x, mosaic.PER_ROW) for x in (MASKED, 0.0)
        )
        _, row_max, row_sum, p = self._online_softmax(scores, row_max, row_sum)
        acc = mosaic.full((WARPGROUP_ROWS, q.shape[1]), 0.0, mosaic.MATRIX)
        carry = (acc, row_max, row_sum, p.astype(self.q.dtype))
        first_full = jnp.maximum(schedule.masked_steps, 1)
        carry = lax.fori_loop(1, first_full, functools.partial(compute_step, masked), carry)
        unmasked = functools.partial(compute_step, lambda step, scores: scores)
        carry = lax.fori_loop(first_full, schedule.steps, unmasked, carry)
        acc, row_max, row_sum, p = carry
        plgpu.barrier_arrive(self.q_free)
        last = done + schedule.steps - 1
        self.v_ring.wait_filled(last)
        acc = mosaic.matmul_accumulate(acc, p, self.v_smem.at[self.v_ring.slot(last)])
        self.v_ring.release(last)
        self._write_results(warpgroup, item, start, acc, row_max, row_sum)
        return done + schedule.steps

    def _online_softmax(
        self, scores: jax.Array, row_max: jax.Array, row_sum: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Adds a block of scores to the running softmax statistics of 64 queries.

        Args:
          scores: q·k with -inf where masked, float32 [64, keys].
          row_max: running maximum of the scores as exponents of 2, float32 [64].
          row_sum: running sum of the weights relative to `row_max`, float32 [64].

        Returns:
          (factor [64] by which earlier sums and outputs have to be multiplied, new row_max, new
          row_sum, weights [64, keys]), float32.
        """
        factor = base2_scale(self.scale)
        new_max = jnp.maximum(row_max, scores.max(axis=1) * factor)
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(scores * factor - mosaic.broadcast_rows(new_max, scores.shape[1]))
        return rescale, new_max, row_sum * rescale + p.sum(axis=1), p

    def _write_results(
        self,
        warpgroup: jax.Array,
        item: WorkItem,
        start: jax.Array,
        acc: jax.Array,
        row_max: jax.Array,
        row_sum: jax.Array,
    ) -> None:
        """Normalises 64 queries' outputs and copies them and their log-sum-exp to global memory.

        Args:
          warpgroup: index of this warpgroup, 0 or 1.
          item: the work item.
          start: first query of the warpgroup.
          acc: unnormalised output, float32 [64, head_dim].
          row_max: maximum of the scores as exponents of 2, float32 [64].
          row_sum: sum of the weights, float32 [64].
        """
        out_smem, lse_smem = self.out_smem.at[warpgroup], self.lse_smem.at[warpgroup]
        some = row_sum > 0
        acc *= mosaic.broadcast_rows(jnp.where(some, 1.0 / row_sum, 0.0), acc.shape[1])
        lse = jnp.where(some, row_max * math.log(2.0) + jnp.log(row_sum), MASKED)
        # The previous item's results have to leave shared memory first.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = acc.astype(self.out.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        queries = pl.ds(start, WARPGROUP_ROWS)
        plgpu.copy_smem_to_gmem(out_smem, self.out.at[item.batch, queries, item.head])
        plgpu.copy_smem_to_gmem(lse_smem, self.lse.at[item.batch, item.head, queries])
