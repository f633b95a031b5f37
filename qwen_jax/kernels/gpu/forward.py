"""The forward kernel: output and log-sum-exp of 128 queries an item.

FlashAttention-3 (arXiv:2407.08608), §3.1: while one compute warpgroup has the tensor cores, the
other has the exponentials; a barrier makes them take turns.
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

from qwen_jax.kernels.gpu import ops
from qwen_jax.kernels.gpu.plan import Queue, Rows, fold_scale
from qwen_jax.kernels.gpu.tiles import (
    ROWS,
    TILE,
    WARPGROUPS,
    Blocks,
    Item,
    Stream,
    for_my_items,
    hide,
    load_bounds,
    stream_barriers,
)
from qwen_jax.kernels.mask import MASKED


def forward_blocks(head_dim: int) -> Blocks:
    """Fills shared memory: 192 KiB of tiles at head_dim 128, 160 KiB at 64."""
    return Blocks(128, 2) if head_dim == 128 else Blocks(128, 4)


def forward(q, k, v, rows: Rows, table, queue: Queue, scale: float, blocks: Blocks):
    """(out like q, lse float32 [B,N,T]); lengths multiples of `TILE` and of the block of keys."""
    batch, q_len, heads, width = q.shape
    ctas = min(ops.ctas(), queue.items)
    operands, tree = jax.tree.flatten((q, k, v, table, rows))

    def body(*refs):
        *inputs, out_ref, lse_ref, memory, barriers = refs
        unit = _Forward(
            *jax.tree.unflatten(tree, inputs),
            *(out_ref, lse_ref, memory),
            *(
                barriers[0],
                Stream(*barriers[1], blocks.stages),
                Stream(*barriers[2], blocks.stages),
            ),
            *(barriers[3], queue, blocks, scale, heads // k.shape[2], ctas),
        )
        computes = lax.axis_index("wg") < WARPGROUPS
        pl.when(computes)(unit.compute)
        pl.when(jnp.logical_not(computes))(unit.load)

    tile = ops.tile_memory((WARPGROUPS, ROWS, width), q.dtype)
    stages = ops.tile_memory((blocks.stages, blocks.block, width), q.dtype)
    once = plgpu.Barrier(num_arrivals=WARPGROUPS)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
        ),
        scratch_types=[
            (tile, stages, stages, tile, plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)),
            ((once, once), *(stream_barriers(blocks.stages) for _ in "kv"), once),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=ops.PARAMS,
        kernel_name="flash_forward",
    )(*operands)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The kernel's body; arrays are references.

    Attributes:
      memory: shared memory for (q, k, v, out, lse).
      q_barriers: (ready, consumed).
      turn: whoever has arrived here may use the tensor cores.
      groups: query heads a kv head.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: jax.Array
    rows: Rows
    out: jax.Array
    lse: jax.Array
    memory: tuple
    q_barriers: tuple
    keys: Stream
    values: Stream
    turn: jax.Array
    queue: Queue
    blocks: Blocks
    scale: float
    groups: int
    ctas: int

    def load(self) -> None:
        """The warpgroup that loads: queries of an item, then keys and values step by step."""
        plgpu.set_max_registers(24, action="decrease")
        q_memory, k_memory, v_memory = self.memory[:3]
        q_ready, q_consumed = self.q_barriers

        def one(n, item: Item, done):
            batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
            kv_head = lax.div(head, jnp.int32(self.groups))
            pl.when(n > 0)(lambda: plgpu.barrier_wait(q_consumed))
            for group in range(WARPGROUPS):
                queries = pl.ds(tile * TILE + group * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    self.q.at[batch, queries, head], q_memory.at[group], q_ready
                )

            def step(t, done):
                block = pl.ds(steps.block(t) * self.blocks.block, self.blocks.block)
                self.keys.put(done, (self.k.at[batch, block, kv_head], k_memory))
                self.values.put(done, (self.v.at[batch, block, kv_head], v_memory))
                return done + 1

            return lax.fori_loop(0, steps.steps, step, done)

        done = for_my_items(self.queue, self.ctas, self.table, one, ahead=True)
        plgpu.barrier_wait(q_consumed)
        self.keys.drain(done)
        self.values.drain(done)

    def compute(self) -> None:
        """A warpgroup that computes, from queries in shared memory to the output."""
        plgpu.set_max_registers(240, action="increase")
        group = lax.axis_index("wg")
        # The second warpgroup starts half a step later.
        pl.when(group == 1)(self._take_turn)
        for_my_items(
            self.queue, self.ctas, self.table, functools.partial(self._item, group), ahead=True
        )
        pl.when(group == 0)(self._take_turn)
        plgpu.wait_smem_to_gmem(0)

    def _take_turn(self) -> None:
        plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(self.turn)

    def _item(self, group, _, item: Item, done):
        q_ready, q_consumed = self.q_barriers
        batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
        start = tile * TILE + group * ROWS
        bounds = load_bounds(self.rows, batch, start)
        plgpu.barrier_wait(q_ready)

        def step(masked, t, carry):
            block = steps.masked_block(t) if masked else steps.full_block(t)
            scores = self._scores(group, done + t, t == steps.steps - 1)
            if masked:
                # A row's maximum starts finite, so what is never seen weighs exactly 0.
                first = block * self.blocks.block
                scores = hide(self.rows, bounds, batch, first, scores)
            return self._absorb(done + t, scores, carry)

        carry = (
            ops.full((ROWS, self.q.shape[-1]), 0.0, ops.MATRIX),
            ops.full((ROWS,), MASKED, ops.PER_ROW),
            ops.full((ROWS,), 0.0, ops.PER_ROW),
        )
        carry = lax.fori_loop(0, steps.masked, functools.partial(step, True), carry)
        carry = lax.fori_loop(steps.masked, steps.steps, functools.partial(step, False), carry)
        pl.when(steps.steps == 0)(lambda: plgpu.barrier_arrive(q_consumed))
        self._write(group, batch, head, start, *carry)
        return done + steps.steps

    def _scores(self, group, step, last) -> jax.Array:
        """q·kᵀ of a step, float32 [64, keys]; hands the tensor cores over."""
        q_memory, k_memory = self.memory[:2]
        self.keys.wait(step)
        keys = k_memory.at[self.keys.slot(step)]
        scores = ops.product(q_memory.at[group], keys, self._take_turn)
        self.keys.release(step)
        # Not at the item's end: the first warpgroup needs its next queries to give the second its
        # last turn.
        pl.when(last)(lambda: plgpu.barrier_arrive(self.q_barriers[1]))
        return scores

    def _absorb(self, step, scores, carry):
        """Online softmax: a step's scores and values into (total, highest score, weight)."""
        total, highest, weight = carry
        factor = fold_scale(self.scale)
        new = jnp.maximum(highest, scores.max(axis=1) * factor)
        keep = jnp.exp2(highest - new)
        p = jnp.exp2(scores * factor - ops.rows(new, scores.shape[1]))
        total *= ops.rows(keep, total.shape[1])
        weight = weight * keep + p.sum(axis=1)
        p = p.astype(self.q.dtype)
        total, weight, new, p = lax.optimization_barrier((total, weight, new, p))
        plgpu.barrier_arrive(self.turn)
        self.values.wait(step)
        plgpu.barrier_wait(self.turn)
        total = ops.accumulate(total, p, self.memory[2].at[self.values.slot(step)])
        self.values.release(step)
        return total, new, weight

    def _write(self, group, batch, head, start, total, highest, weight) -> None:
        out_memory, lse_memory = self.memory[3].at[group], self.memory[4].at[group]
        some = weight > 0
        total *= ops.rows(jnp.where(some, 1.0 / weight, 0.0), total.shape[1])
        lse = jnp.where(some, highest * math.log(2.0) + jnp.log(weight), MASKED)
        # The previous item's results have left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_memory[...] = total.astype(self.out.dtype)
        lse_memory[...] = lse
        plgpu.commit_smem()
        queries = pl.ds(start, ROWS)
        plgpu.copy_smem_to_gmem(out_memory, self.out.at[batch, queries, head])
        plgpu.copy_smem_to_gmem(lse_memory, self.lse.at[batch, head, queries])
