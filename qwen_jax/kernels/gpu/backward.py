"""The backward kernels: one for dk and dv of 128 keys an item, one for dq of 128 queries.

Two kernels, seven products instead of five, and in exchange no atomics: every gradient is summed by
one warpgroup in registers, in the same order each time. The keys' kernel holds its scores
transposed, [keys, queries], so both of its gradients take them from registers.
"""

from __future__ import annotations

import dataclasses
import functools

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


def keys_blocks(head_dim: int) -> Blocks:
    """Queries a step of the kernel for dk and dv."""
    return Blocks(64, 3) if head_dim == 128 else Blocks(128, 3)


def queries_blocks(head_dim: int) -> Blocks:
    """Keys a step of the kernel for dq."""
    return Blocks(128, 2) if head_dim == 128 else Blocks(128, 3)


def _launch(name: str, body, operands, out_type, scratch, ctas: int):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=ops.PARAMS,
        kernel_name=name,
    )(*operands)


def _run(unit) -> None:
    computes = lax.axis_index("wg") < WARPGROUPS
    pl.when(computes)(unit.compute)
    pl.when(jnp.logical_not(computes))(unit.load)


def backward_keys(q, k, v, d_out, lse, delta, rows: Rows, table, queue, scale, blocks, dtype):
    """(dk, dv), each [B, S, heads of the queue, H] in `dtype`.

    lse, delta: float32 [B,N,T], lse to base 2. One head of the queue stands for a kv head, or for a
    part of the query heads that share it; then the parts are to be summed.
    """
    batch, k_len, kv_heads, width = k.shape
    parts = queue.heads * queue.head_sections
    ctas = min(ops.ctas(), queue.items)
    operands, tree = jax.tree.flatten((q, k, v, d_out, lse, delta, table, rows))

    def body(*refs):
        *inputs, dk_ref, dv_ref, memory, barriers = refs
        _run(
            _Keys(
                *jax.tree.unflatten(tree, inputs),
                *(dk_ref, dv_ref, memory, barriers[0]),
                *(Stream(*x, blocks.stages) for x in barriers[1:]),
                *(queue, blocks, scale, q.shape[2] // parts, parts // kv_heads, ctas),
            )
        )

    tile = ops.tile_memory((WARPGROUPS, ROWS, width), k.dtype)
    stages = ops.tile_memory((blocks.stages, blocks.block, width), k.dtype)
    numbers = plgpu.SMEM((blocks.stages, blocks.block), jnp.float32)
    once = (
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    scratch = [
        (tile, tile, stages, stages, numbers, numbers),
        (once, *(stream_barriers(blocks.stages, 2) for _ in "qo")),
    ]
    out = jax.ShapeDtypeStruct((batch, k_len, parts, width), dtype)
    return _launch("flash_backward_keys", body, operands, (out, out), scratch, ctas)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Body of the kernel for dk and dv; arrays are references.

    Attributes:
      memory: shared memory for (k, v, q, d_out, lse, delta).
      k_barriers: (ready, consumed) for an item's keys and values.
      q_stream, o_stream: q with lse, d_out with delta.
      heads: query heads an item sums over. parts: items that share a kv head.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array
    table: jax.Array
    rows: Rows
    dk: jax.Array
    dv: jax.Array
    memory: tuple
    k_barriers: tuple
    q_stream: Stream
    o_stream: Stream
    queue: Queue
    blocks: Blocks
    scale: float
    heads: int
    parts: int
    ctas: int

    def load(self) -> None:
        """The warpgroup that loads: keys and values of an item, then queries step by step."""
        plgpu.set_max_registers(24, action="decrease")
        k_memory, v_memory, q_memory, o_memory, lse_memory, delta_memory = self.memory
        ready, consumed = self.k_barriers
        size = self.blocks.block

        def one(n, item: Item, done):
            batch, tile, part, steps = item.batch, item.tile, item.head, item.steps
            kv_head = lax.div(part, jnp.int32(self.parts))
            pl.when(n > 0)(lambda: plgpu.barrier_wait(consumed))
            for group in range(WARPGROUPS):
                keys = pl.ds(tile * TILE + group * ROWS, ROWS)
                for source, memory in ((self.k, k_memory), (self.v, v_memory)):
                    plgpu.copy_gmem_to_smem(
                        source.at[batch, keys, kv_head], memory.at[group], ready
                    )

            def step(head, t, done):
                queries = pl.ds(steps.block(t) * size, size)
                at, numbers = (batch, queries, head), (batch, head, queries)
                self.q_stream.put(
                    done, (self.q.at[at], q_memory), (self.lse.at[numbers], lse_memory)
                )
                self.o_stream.put(
                    done, (self.d_out.at[at], o_memory), (self.delta.at[numbers], delta_memory)
                )
                return done + 1

            def of_head(h, done):
                head = part * self.heads + h
                return lax.fori_loop(0, steps.steps, functools.partial(step, head), done)

            return lax.fori_loop(0, self.heads, of_head, done)

        done = for_my_items(self.queue, self.ctas, self.table, one, ahead=True)
        plgpu.barrier_wait(consumed)
        self.q_stream.drain(done)
        self.o_stream.drain(done)

    def compute(self) -> None:
        """A warpgroup that computes, on 64 keys of the item."""
        plgpu.set_max_registers(240, action="increase")
        group = lax.axis_index("wg")
        for_my_items(
            self.queue, self.ctas, self.table, functools.partial(self._item, group), ahead=False
        )

    def _item(self, group, _, item: Item, done):
        ready, consumed = self.k_barriers
        batch, tile, part, steps = item.batch, item.tile, item.head, item.steps
        first = tile * TILE + group * ROWS
        bounds = load_bounds(self.rows, batch, first)
        plgpu.barrier_wait(ready)

        def step(head_done, masked, t, carry):
            block = steps.masked_block(t) if masked else steps.full_block(t)
            start = block * self.blocks.block
            mask = functools.partial(hide, self.rows, bounds, batch, start) if masked else None
            return self._step(group, head_done + t, mask, carry)

        def of_head(h, carry):
            run = functools.partial(step, done + h * steps.steps)
            carry = lax.fori_loop(0, steps.masked, functools.partial(run, True), carry)
            return lax.fori_loop(steps.masked, steps.steps, functools.partial(run, False), carry)

        zero = ops.full((ROWS, self.k.shape[-1]), 0.0, ops.MATRIX)
        dk, dv = lax.fori_loop(0, self.heads, of_head, (zero, zero))
        plgpu.barrier_arrive(consumed)
        keys = (batch, pl.ds(first, ROWS), part)
        self.dk[keys] = (dk * self.scale).astype(self.dk.dtype)
        self.dv[keys] = dv.astype(self.dv.dtype)
        return done + self.heads * steps.steps

    def _step(self, group, step, mask, carry):
        dk, dv = carry
        k_memory, v_memory, q_memory, o_memory, lse_memory, delta_memory = self.memory
        slot = self.q_stream.slot(step)
        q, d_out = q_memory.at[slot], o_memory.at[slot]

        def weights(scores):
            if mask is not None:
                scores = mask(scores)
            lse = ops.load(lse_memory.at[slot], ops.PER_COLUMN)
            return jnp.exp2(scores * fold_scale(self.scale) - ops.columns(lse, ROWS))

        def gradient(p, dp):
            delta = ops.load(delta_memory.at[slot], ops.PER_COLUMN)
            return p * (dp - ops.columns(delta, ROWS))

        self.q_stream.wait(step)
        self.o_stream.wait(step)
        dk, dv = ops.key_gradients(
            *(dk, dv, k_memory.at[group], v_memory.at[group], q, d_out),
            *(weights, gradient, self.q.dtype),
        )
        # lse and delta were read as plain memory, and the copy engine writes there next.
        plgpu.commit_smem()
        self.q_stream.release(step)
        self.o_stream.release(step)
        return dk, dv


def backward_queries(q, k, v, d_out, lse, delta, rows: Rows, table, queue, scale, blocks, dtype):
    """dq [B,T,N,H] in `dtype`; lse, delta: float32 [B,N,T], lse to base 2."""
    heads, width = q.shape[2:]
    ctas = min(ops.ctas(), queue.items)
    operands, tree = jax.tree.flatten((q, k, v, d_out, lse, delta, table, rows))

    def body(*refs):
        *inputs, dq_ref, memory, barriers = refs
        _run(
            _Queries(
                *jax.tree.unflatten(tree, inputs),
                *(dq_ref, memory, barriers[0]),
                *(Stream(*x, blocks.stages) for x in barriers[1:]),
                *(queue, blocks, scale, heads // k.shape[2], ctas),
            )
        )

    tile = ops.tile_memory((WARPGROUPS, ROWS, width), q.dtype)
    stages = ops.tile_memory((blocks.stages, blocks.block, width), q.dtype)
    once = (
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    scratch = [
        (tile, tile, stages, stages),
        (once, *(stream_barriers(blocks.stages) for _ in "kv")),
    ]
    out = jax.ShapeDtypeStruct(q.shape, dtype)
    (dq,) = _launch("flash_backward_queries", body, operands, (out,), scratch, ctas)
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
        plgpu.set_max_registers(24, action="decrease")
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
        plgpu.set_max_registers(240, action="increase")
        group = lax.axis_index("wg")
        for_my_items(
            self.queue, self.ctas, self.table, functools.partial(self._item, group), ahead=False
        )

    def _item(self, group, _, item: Item, done):
        ready, consumed = self.q_barriers
        batch, tile, head, steps = item.batch, item.tile, item.head, item.steps
        first = tile * TILE + group * ROWS
        numbers = (batch, head, pl.ds(first, ROWS))
        lse = ops.load(self.lse.at[numbers], ops.PER_ROW)
        delta = ops.load(self.delta.at[numbers], ops.PER_ROW)
        bounds = load_bounds(self.rows, batch, first)
        plgpu.barrier_wait(ready)

        def step(masked, t, dq):
            block = steps.masked_block(t) if masked else steps.full_block(t)
            start = block * self.blocks.block
            mask = functools.partial(hide, self.rows, bounds, batch, start) if masked else None
            return self._step(group, done + t, mask, lse, delta, dq)

        dq = ops.full((ROWS, self.q.shape[-1]), 0.0, ops.MATRIX)
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
            return jnp.exp2(scores * fold_scale(self.scale) - ops.rows(lse, size))

        self.keys.wait(step)
        self.values.wait(step)
        p, d_p = ops.two_products(q_memory.at[group], keys, o_memory.at[group], values, weights)
        self.values.release(step)
        d_scores = (p * (d_p - ops.rows(delta, size))).astype(self.q.dtype)
        dq = ops.accumulate(dq, d_scores, keys)
        self.keys.release(step)
        return dq
