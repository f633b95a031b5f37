"""The forward kernel: output and log-sum-exp of 128 queries an item.

FlashAttention-3 (arXiv:2407.08608), §3.1 and 3.2. A warpgroup gives the tensor cores a step's
scores and the output of the step before together, and takes exponentials while they compute the
latter; the two warpgroups take turns, so that the tensor cores have the other's products meanwhile.
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
from qwen_jax.kernels.mask import MASKED


def forward_blocks(head_dim: int) -> Blocks:
    """Fills shared memory: 192 KiB of tiles at head_dim 128, 160 KiB at 64."""
    return Blocks(128, 2) if head_dim == 128 else Blocks(128, 4)


def forward(q, k, v, rows: Rows, table, queue: Queue, scale: float, blocks: Blocks):
    """(out like q, lse float32 [B,N,T]); lengths multiples of `TILE` and of the block of keys.

    table: every tile with at least one step, see `plan.at_least_one_step`.
    """
    batch, q_len, heads, width = q.shape
    ctas = min(mosaic.ctas(), queue.items)
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
        run(unit)

    tile = mosaic.tile_memory((WARPGROUPS, ROWS, width), q.dtype)
    stages = mosaic.tile_memory((blocks.stages, blocks.block, width), q.dtype)
    once = plgpu.Barrier(num_arrivals=WARPGROUPS)
    out_type = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
    )
    scratch = [
        (tile, stages, stages, tile, plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)),
        (
            (once, once),
            *(stream_barriers(blocks.stages) for _ in "kv"),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ),
    ]
    return launch("flash_forward", body, out_type, scratch, ctas)(*operands)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The kernel's body; arrays are references.

    Attributes:
      memory: shared memory for (q, k, v, out, lse).
      q_barriers: (ready, consumed).
      turns: one barrier a warpgroup, where the other says that it has issued its products.
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
    turns: jax.Array
    queue: Queue
    blocks: Blocks
    scale: float
    groups: int
    ctas: int

    def load(self) -> None:
        """The warpgroup that loads: queries of an item, then keys and values step by step.

        Keys go a step ahead of values, in the order in which buffers become free.
        """
        q_memory, k_memory, v_memory = self.memory[:3]
        q_ready, q_consumed = self.q_barriers

        def one(n, item: Item, done):
            batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
            kv_head = lax.div(head, jnp.int32(self.groups))

            def put(stream, source, memory, t):
                block = pl.ds(steps.block(t) * self.blocks.block, self.blocks.block)
                stream.put(done + t, (source.at[batch, block, kv_head], memory))

            pl.when(n > 0)(lambda: plgpu.barrier_wait(q_consumed))
            for group in range(WARPGROUPS):
                queries = pl.ds(tile * TILE + group * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    self.q.at[batch, queries, head], q_memory.at[group], q_ready
                )
            put(self.keys, self.k, k_memory, jnp.int32(0))

            def step(t, _):
                pl.when(t + 1 < steps.steps)(lambda: put(self.keys, self.k, k_memory, t + 1))
                put(self.values, self.v, v_memory, t)

            lax.fori_loop(0, steps.steps, step, None)
            return done + steps.steps

        done = for_my_items(self.queue, self.ctas, self.table, one, ahead=True)
        plgpu.barrier_wait(q_consumed)
        self.keys.drain(done)
        self.values.drain(done)

    def compute(self) -> None:
        """A warpgroup that computes, from queries in shared memory to the output."""
        group = lax.axis_index("wg")
        # The first warpgroup has the first turn, and takes note of the last one given to it.
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(self.turns.at[0]))
        for_my_items(
            self.queue, self.ctas, self.table, functools.partial(self._item, group), ahead=True
        )
        pl.when(group == 0)(lambda: plgpu.barrier_wait(self.turns.at[0]))
        plgpu.wait_smem_to_gmem(0)

    def _item(self, group, _, item: Item, done):
        q_ready, q_consumed = self.q_barriers
        batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
        start = tile * TILE + group * ROWS
        bounds = load_bounds(self.rows, batch, start)
        q, k_memory, v_memory = self.memory[0].at[group], *self.memory[1:3]

        def masked(t, scores):
            # A row's maximum starts finite, so what is never seen weighs exactly 0.
            first = steps.block(t) * self.blocks.block
            return hide(self.rows, bounds, batch, first, scores)

        def next_keys(t):
            pl.when(t < steps.steps)(lambda: self.keys.wait(done + t))

        space = mosaic.full((ROWS, self.blocks.block), 0.0, mosaic.MATRIX)

        def step(mask, t, carry):
            total, highest, weight, p = carry
            now, before = done + t, done + t - 1

            def consume(scores):
                self.keys.release(now)
                return self._softmax(mask(t, scores), highest, weight)

            self.values.wait(before)
            plgpu.barrier_wait(self.turns.at[group])
            total, keep, highest, weight, p = mosaic.product_beside(
                *(total, p, v_memory.at[self.values.slot(before)]),
                *(q, k_memory.at[self.keys.slot(now)]),
                lambda: plgpu.barrier_arrive(self.turns.at[1 - group]),
                *(consume, lambda: next_keys(t + 1), (weight, highest, weight, space)),
            )
            self.values.release(before)
            total = total * mosaic.rows(keep, total.shape[1])
            return total, highest, weight, p.astype(self.q.dtype)

        plgpu.barrier_wait(q_ready)
        self.keys.wait(done)
        scores = mosaic.product(q, k_memory.at[self.keys.slot(done)])
        self.keys.release(done)
        next_keys(jnp.int32(1))
        nothing = (mosaic.full((ROWS,), x, mosaic.PER_ROW) for x in (MASKED, 0.0))
        _, highest, weight, p = self._softmax(masked(jnp.int32(0), scores), *nothing)
        total = mosaic.full((ROWS, q.shape[1]), 0.0, mosaic.MATRIX)
        carry = (total, highest, weight, p.astype(self.q.dtype))
        full = jnp.maximum(steps.masked, 1)
        carry = lax.fori_loop(1, full, functools.partial(step, masked), carry)
        whole = functools.partial(step, lambda t, scores: scores)
        total, highest, weight, p = lax.fori_loop(full, steps.steps, whole, carry)
        plgpu.barrier_arrive(q_consumed)
        last = done + steps.steps - 1
        self.values.wait(last)
        total = mosaic.accumulate(total, p, v_memory.at[self.values.slot(last)])
        self.values.release(last)
        self._write(group, batch, head, start, total, highest, weight)
        return done + steps.steps

    def _softmax(self, scores, highest, weight):
        """(factor for what was summed so far, highest score, weight, weights p), float32."""
        factor = fold_scale(self.scale)
        new = jnp.maximum(highest, scores.max(axis=1) * factor)
        keep = jnp.exp2(highest - new)
        p = jnp.exp2(scores * factor - mosaic.rows(new, scores.shape[1]))
        return keep, new, weight * keep + p.sum(axis=1), p

    def _write(self, group, batch, head, start, total, highest, weight) -> None:
        out_memory, lse_memory = self.memory[3].at[group], self.memory[4].at[group]
        some = weight > 0
        total *= mosaic.rows(jnp.where(some, 1.0 / weight, 0.0), total.shape[1])
        lse = jnp.where(some, highest * math.log(2.0) + jnp.log(weight), MASKED)
        # The previous item's results have left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_memory[...] = total.astype(self.out.dtype)
        lse_memory[...] = lse
        plgpu.commit_smem()
        queries = pl.ds(start, ROWS)
        plgpu.copy_smem_to_gmem(out_memory, self.out.at[batch, queries, head])
        plgpu.copy_smem_to_gmem(lse_memory, self.lse.at[batch, head, queries])
