"""dq of 128 queries an item, where results have to be the same each time.

Beside `backward` without dq: seven products instead of the five of both in one, and in exchange no
gradient is summed in memory: one warpgroup sums it in registers, in the same order each time.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.flash_pipeline import (
    ROWS,
    TILE,
    WARPGROUPS,
    Blocks,
    Item,
    Stream,
    for_my_items,
    hide,
    launch,
    load_bounds,
    run,
    stream_barriers,
)
from qwen_jax.kernels.gpu.flash_schedule import Queue, Rows, fold_scale


def queries_blocks(head_dim: int) -> Blocks:
    """Keys a step of the kernel for dq."""
    return Blocks(128, 2) if head_dim == 128 else Blocks(128, 3)


def backward_queries(q, k, v, d_out, lse, delta, rows: Rows, table, queue, scale, blocks, dtype):
    """dq [B,T,N,H] in `dtype`; lse, delta: float32 [B,N,T], lse to base 2."""
    heads, width = q.shape[2:]
    ctas = min(mosaic.ctas(), queue.items)
    operands, tree = jax.tree.flatten((q, k, v, d_out, lse, delta, table, rows))

    def body(*refs):
        *inputs, dq_ref, memory, barriers = refs
        run(
            _Queries(
                *jax.tree.unflatten(tree, inputs),
                *(dq_ref, memory, barriers[0]),
                *(Stream(*x, blocks.stages) for x in barriers[1:]),
                *(queue, blocks, scale, heads // k.shape[2], ctas),
            )
        )

    tile = mosaic.tile_memory((WARPGROUPS, ROWS, width), q.dtype)
    stages = mosaic.tile_memory((blocks.stages, blocks.block, width), q.dtype)
    once = (
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    scratch = [
        (tile, tile, stages, stages),
        (once, *(stream_barriers(blocks.stages) for _ in "kv")),
    ]
    out = jax.ShapeDtypeStruct(q.shape, dtype)
    (dq,) = launch("flash_backward_queries", body, (out,), scratch, ctas)(*operands)
    return dq


@dataclasses.dataclass(frozen=True)
class _Queries:
    """Body of the kernel for dq; arrays are references.

    Attributes:
      memory: shared memory for (q, d_out, k, v).
      q_barriers: (ready, consumed) for an item's q and d_out.
      groups: query heads a kv head.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    table: jax.Array
    rows: Rows
    dq: jax.Array
    memory: tuple
    q_barriers: tuple
    keys: Stream
    values: Stream
    queue: Queue
    blocks: Blocks
    scale: float
    groups: int
    ctas: int

    def load(self) -> None:
        """The warpgroup that loads: q and d_out of an item, then keys and values step by step."""
        q_memory, o_memory, k_memory, v_memory = self.memory
        ready, consumed = self.q_barriers

        def one(n, item: Item, done):
            batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
            kv_head = lax.div(head, jnp.int32(self.groups))
            pl.when(n > 0)(lambda: plgpu.barrier_wait(consumed))
            for group in range(WARPGROUPS):
                queries = pl.ds(tile * TILE + group * ROWS, ROWS)
                for source, memory in ((self.q, q_memory), (self.d_out, o_memory)):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, queries, head], memory.at[group], ready
                    )

            def step(t, done):
                block = pl.ds(steps.block(t) * self.blocks.block, self.blocks.block)
                self.keys.put(done, (self.k.at[batch, block, kv_head], k_memory))
                self.values.put(done, (self.v.at[batch, block, kv_head], v_memory))
                return done + 1

            return lax.fori_loop(0, steps.steps, step, done)

        done = for_my_items(self.queue, self.ctas, self.table, one, ahead=True)
        plgpu.barrier_wait(consumed)
        self.keys.drain(done)
        self.values.drain(done)

    def compute(self) -> None:
        """A warpgroup that computes, on 64 queries of the item."""
        group = lax.axis_index("wg")
        for_my_items(
            self.queue, self.ctas, self.table, functools.partial(self._item, group), ahead=False
        )

    def _item(self, group, _, item: Item, done):
        ready, consumed = self.q_barriers
        batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
        first = tile * TILE + group * ROWS
        numbers = (batch, head, pl.ds(first, ROWS))
        lse = mosaic.load(self.lse.at[numbers], mosaic.PER_ROW)
        delta = mosaic.load(self.delta.at[numbers], mosaic.PER_ROW)
        bounds = load_bounds(self.rows, batch, first)
        plgpu.barrier_wait(ready)

        def step(masked, t, dq):
            block = steps.masked_block(t) if masked else steps.full_block(t)
            start = block * self.blocks.block
            mask = functools.partial(hide, self.rows, bounds, batch, start) if masked else None
            return self._step(group, done + t, mask, lse, delta, dq)

        dq = mosaic.full((ROWS, self.q.shape[-1]), 0.0, mosaic.MATRIX)
        dq = lax.fori_loop(0, steps.masked, functools.partial(step, True), dq)
        dq = lax.fori_loop(steps.masked, steps.steps, functools.partial(step, False), dq)
        plgpu.barrier_arrive(consumed)
        self.dq[batch, pl.ds(first, ROWS), head] = (dq * self.scale).astype(self.dq.dtype)
        return done + steps.steps

    def _step(self, group, step, mask, lse, delta, dq):
        q_memory, o_memory, k_memory, v_memory = self.memory
        slot, size = self.keys.slot(step), self.blocks.block
        keys, values = k_memory.at[slot], v_memory.at[slot]

        def weights(scores):
            if mask is not None:
                scores = mask(scores)
            return jnp.exp2(scores * fold_scale(self.scale) - mosaic.rows(lse, size))

        self.keys.wait(step)
        self.values.wait(step)
        p, d_p = mosaic.two_products(q_memory.at[group], keys, o_memory.at[group], values, weights)
        self.values.release(step)
        d_scores = (p * (d_p - mosaic.rows(delta, size))).astype(self.q.dtype)
        dq = mosaic.accumulate(dq, d_scores, keys)
        self.keys.release(step)
        return dq
