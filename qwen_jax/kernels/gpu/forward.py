"""The forward kernel: two compute warpgroups of 64 queries each, one that only moves data.

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
from qwen_jax.kernels.gpu.plan import FIELDS, Queue, Rows, fold_scale
from qwen_jax.kernels.mask import MASKED

WARPGROUPS = 2
"""Warpgroups that compute; one more loads."""
ROWS = 64
"""Queries (or keys, for their gradients) of a warpgroup: the M of a wgmma instruction."""
TILE = WARPGROUPS * ROWS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keys a step, and how many steps are in flight."""

    block: int
    stages: int


def forward_blocks(head_dim: int) -> Blocks:
    """Fill shared memory: 160 KiB of tiles at head_dim 128, 128 KiB at 64."""
    return Blocks(128, 2) if head_dim == 128 else Blocks(128, 4)


@dataclasses.dataclass(frozen=True)
class Step:
    """Which block the t-th step of an item takes: masked ones first, the last of them first."""

    low: jax.Array
    full_low: jax.Array
    full_high: jax.Array
    high: jax.Array

    @property
    def masked(self):
        """Number of steps that need the mask."""
        return self.full_low - self.low + self.high - self.full_high

    @property
    def steps(self):
        """Number of steps."""
        return self.high - self.low

    def masked_block(self, t):
        """Block of step t < masked."""
        end = self.high - self.full_high
        return jnp.where(t < end, self.high - 1 - t, self.full_low - 1 - (t - end))

    def full_block(self, t):
        """Block of step t >= masked."""
        return self.full_high - 1 - (t - self.masked)

    def block(self, t):
        """Block of step t."""
        return jnp.where(t < self.masked, self.masked_block(t), self.full_block(t))


def read_tile(table_ref, row) -> tuple[jax.Array, jax.Array, Step]:
    """(row of the batch, tile, steps) of a row of the table."""
    batch, tile, *ranges = (table_ref[row, i] for i in range(len(FIELDS)))
    return batch, tile, Step(*ranges)


def my_items(queue: Queue, ctas: int, body) -> jax.Array:
    """Folds body(item, carry) over the items of this CTA, with an int32 carry that starts at 0."""
    cta = lax.axis_index("cta")
    mine = lax.div(jnp.int32(queue.items + ctas - 1) - cta, jnp.int32(ctas))
    return lax.fori_loop(0, mine, lambda n, carry: body(cta + n * ctas, carry), jnp.int32(0))


def of_batch(array_ref, batch):
    """Row of the batch in an array that may have one row for all."""
    return array_ref.at[0 if array_ref.shape[0] == 1 else batch]


@dataclasses.dataclass(frozen=True)
class RowBounds:
    """The rows of the mask that a warpgroup's 64 queries have, in registers."""

    high: jax.Array
    low: jax.Array | None
    q_ids: jax.Array | None


def load_bounds(rows: Rows, batch, start, layout, size: int = ROWS) -> RowBounds:
    """Bounds of `size` queries from `start` on. rows: references."""
    each = (rows.high, rows.low, rows.q_ids)
    slots = pl.ds(start, size)
    return RowBounds(
        *(None if x is None else ops.load(of_batch(x, batch).at[slots], layout) for x in each)
    )


def _seen(bounds: RowBounds, k_ids, base, shape) -> jax.Array:
    """Mask of a block of keys that starts at `base`, bool [queries, keys].

    Two one-sided bounds: compilers have got the absolute difference wrong.
    """
    slots = ops.iota(shape, 1)
    seen = slots < ops.rows(bounds.high - base, shape[1])
    if bounds.low is not None:
        seen &= slots >= ops.rows(bounds.low - base, shape[1])
    if k_ids is not None:
        seen &= ops.rows(bounds.q_ids, shape[1]) == ops.columns(k_ids, shape[0])
    return seen


def forward(q, k, v, rows: Rows, table, queue: Queue, scale: float, blocks: Blocks):
    """(out like q, lse float32 [B,N,T]); lengths multiples of `TILE` and of the block of keys."""
    batch, q_len, heads, width = q.shape
    ctas = min(ops.ctas(), queue.items)
    inputs = (q, k, v, table, rows)
    out_type = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32),
    )
    leaves, tree = jax.tree.flatten(inputs)

    def body(*refs):
        *operands, out_ref, lse_ref, memory, barriers = refs
        unit = _Forward(
            *jax.tree.unflatten(tree, operands), out_ref, lse_ref, memory, barriers,
            queue=queue, blocks=blocks, scale=scale, groups=heads // k.shape[2], ctas=ctas,
        )
        compute = lax.axis_index("wg") < WARPGROUPS
        pl.when(compute)(unit.compute)
        pl.when(jnp.logical_not(compute))(unit.load)

    tile = ops.tile_memory((WARPGROUPS, ROWS, width), q.dtype)
    stages = ops.tile_memory((blocks.stages, blocks.block, width), q.dtype)
    ready = plgpu.Barrier(num_barriers=blocks.stages)
    consumed = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            (tile, tile, stages, stages, plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)),
            (
                plgpu.Barrier(num_arrivals=WARPGROUPS),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
                *(ready, consumed, ready, consumed),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
            ),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=ops.PARAMS,
        kernel_name="flash_forward",
    )(*leaves)


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The kernel's body. Arrays are references; `memory` and `barriers` are this CTA's own."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: jax.Array
    rows: Rows
    out: jax.Array
    lse: jax.Array
    memory: tuple
    barriers: tuple
    queue: Queue
    blocks: Blocks
    scale: float
    groups: int
    ctas: int

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.blocks.stages))

    def load(self) -> None:
        """The warpgroup that loads: queries of an item, then keys and values step by step."""
        plgpu.set_max_registers(40, action="decrease")
        q_memory, _, k_memory, v_memory, _ = self.memory
        q_ready, q_consumed, k_ready, k_consumed, v_ready, v_consumed, _ = self.barriers

        def item(n, done):
            row, head = self.queue.locate(n)
            batch, tile, steps = read_tile(self.table, row)
            kv_head = lax.div(head, jnp.int32(self.groups))
            pl.when(n >= self.ctas)(lambda: plgpu.barrier_wait(q_consumed))
            for group in range(WARPGROUPS):
                queries = pl.ds(tile * TILE + group * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(
                    self.q.at[batch, queries, head], q_memory.at[group], q_ready
                )

            def step(t, done):
                keys = pl.ds(steps.block(t) * self.blocks.block, self.blocks.block)
                slot = self._slot(done)
                for source, memory, ready, consumed in (
                    (self.k, k_memory, k_ready, k_consumed),
                    (self.v, v_memory, v_ready, v_consumed),
                ):
                    pl.when(done >= self.blocks.stages)(
                        functools.partial(plgpu.barrier_wait, consumed.at[slot])
                    )
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, keys, kv_head], memory.at[slot], ready.at[slot]
                    )
                return done + 1

            return lax.fori_loop(0, steps.steps, step, done)

        done = my_items(self.queue, self.ctas, item)
        # Every phase of a barrier is waited for, the last ones too.
        plgpu.barrier_wait(q_consumed)
        for slot in range(self.blocks.stages):
            for consumed in (k_consumed, v_consumed):
                pl.when(done > slot)(functools.partial(plgpu.barrier_wait, consumed.at[slot]))

    def compute(self) -> None:
        """A warpgroup that computes, from queries in shared memory to the output."""
        plgpu.set_max_registers(232, action="increase")
        group = lax.axis_index("wg")
        # The second warpgroup starts half a step later.
        pl.when(group == 1)(self._turn)
        my_items(self.queue, self.ctas, functools.partial(self._item, group))
        pl.when(group == 0)(self._turn)
        plgpu.wait_smem_to_gmem(0)

    def _turn(self) -> None:
        plgpu.barrier_arrive(self.barriers[-1])
        plgpu.barrier_wait(self.barriers[-1])

    def _item(self, group, n, done):
        q_ready, q_consumed = self.barriers[:2]
        row, head = self.queue.locate(n)
        batch, tile, steps = read_tile(self.table, row)
        start = tile * TILE + group * ROWS
        bounds = load_bounds(self.rows, batch, start, ops.PER_ROW)
        plgpu.barrier_wait(q_ready)

        step = functools.partial(self._step, group, bounds, batch, done, steps.steps - 1)
        carry = (
            ops.full((ROWS, self.q.shape[-1]), 0.0, ops.MATRIX),
            ops.full((ROWS,), MASKED, ops.PER_ROW),
            ops.full((ROWS,), 0.0, ops.PER_ROW),
        )
        carry = lax.fori_loop(
            0, steps.masked, lambda t, c: step(t, steps.masked_block(t), True, c), carry
        )
        carry = lax.fori_loop(
            steps.masked, steps.steps, lambda t, c: step(t, steps.full_block(t), False, c), carry
        )
        pl.when(steps.steps == 0)(lambda: plgpu.barrier_arrive(q_consumed))
        self._write(group, batch, head, start, *carry)
        return done + steps.steps

    def _step(self, group, bounds, batch, done, last, t, block, masked, carry):
        total, highest, weight = carry
        q_memory, _, k_memory, v_memory, _ = self.memory
        _, q_consumed, k_ready, k_consumed, v_ready, v_consumed, turn = self.barriers
        slot = self._slot(done + t)
        size = self.blocks.block
        k_ids = None
        if masked and bounds.q_ids is not None:
            keys = of_batch(self.rows.k_ids, batch).at[pl.ds(block * size, size)]
            k_ids = ops.load(keys, ops.PER_COLUMN)

        plgpu.barrier_wait(k_ready.at[slot])
        scores = ops.product(q_memory.at[group], k_memory.at[slot], self._turn)
        plgpu.barrier_arrive(k_consumed.at[slot])
        # At once: the first warpgroup may need its next queries before the second gets its turn.
        pl.when(t == last)(lambda: plgpu.barrier_arrive(q_consumed))
        if masked:
            seen = _seen(bounds, k_ids, block * size, scores.shape)
            # Where nothing is seen yet `highest` stays finite, so the weight is exactly 0.
            scores = jnp.where(seen, scores, -jnp.inf)

        factor = fold_scale(self.scale)
        new = jnp.maximum(highest, scores.max(axis=1) * factor)
        keep = jnp.exp2(highest - new)
        p = jnp.exp2(scores * factor - ops.rows(new, size))
        total *= ops.rows(keep, total.shape[1])
        weight = weight * keep + p.sum(axis=1)
        p = p.astype(self.q.dtype)
        total, weight, new, p = lax.optimization_barrier((total, weight, new, p))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)
        total = ops.accumulate(total, p, v_memory.at[slot])
        plgpu.barrier_arrive(v_consumed.at[slot])
        return total, new, weight

    def _write(self, group, batch, head, start, total, highest, weight) -> None:
        out_memory, lse_memory = self.memory[1].at[group], self.memory[4].at[group]
        some = weight > 0
        inverse = jnp.where(some, 1.0 / weight, 0.0)
        total *= ops.rows(inverse, total.shape[1])
        lse = jnp.where(some, highest * math.log(2.0) + jnp.log(weight), MASKED)
        # The previous item's output has left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_memory[...] = total.astype(self.out.dtype)
        lse_memory[...] = lse
        plgpu.commit_smem()
        queries = pl.ds(start, ROWS)
        plgpu.copy_smem_to_gmem(out_memory, self.out.at[batch, queries, head])
        plgpu.copy_smem_to_gmem(lse_memory, self.lse.at[batch, head, queries])
