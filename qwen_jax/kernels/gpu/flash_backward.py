"""The backward kernel: dk and dv of 128 keys an item and, added up in memory, dq of the queries.

FlashAttention-3's order (arXiv:2407.08608, appendix B.1): scores are held transposed, [keys,
queries], so dv and dk take theirs from registers. For dq the two warpgroups, each with 64 of the
keys, lay ds side by side in shared memory; each multiplies half of dq's tile by all 128 keys, and
the copy engine adds it to dq in memory. That sum's order differs from run to run, and so do dq's
last bits; without dq (`backward_queries` makes it then) they are the same each time.
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

_HALF = 64
"""Rows and columns of the part of dq's tile that a warpgroup makes."""


def keys_blocks(head_dim: int, with_dq: bool) -> Blocks:
    """Queries a step. At head_dim 128 with dq, 224 of 227 KiB of shared memory."""
    if head_dim == 128:
        return Blocks(64, 3)
    return Blocks(128, 2 if with_dq else 3)


def meet(barrier) -> None:
    """Until both warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def backward(q, k, v, d_out, lse, delta, rows: Rows, table, queue, scale, dtype, *, with_dq: bool):
    """(dk, dv, dq): dk and dv [B, S, heads of the queue, H] in `dtype`.

    lse, delta: float32 [B,N,T], lse to base 2. One head of the queue stands for a kv head, or for a
    part of the query heads that share it; then the parts are to be summed. dq: float32 [B,T,N,H],
    yet to be multiplied by the scale, or None.
    """
    blocks = keys_blocks(q.shape[3], with_dq)
    batch, k_len, kv_heads, width = k.shape
    parts = queue.heads * queue.head_sections
    ctas = min(mosaic.ctas(), queue.items)
    dq = None
    if with_dq:
        dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32), memory_space=plgpu.GMEM)
    operands, tree = jax.tree.flatten((q, k, v, d_out, lse, delta, table, rows, dq))

    def body(*refs):
        *inputs, dk_ref, dv_ref, memory, shared, barriers = refs
        run(
            _Keys(
                *jax.tree.unflatten(tree, inputs),
                *(dk_ref, dv_ref, memory, shared, barriers[0]),
                *(Stream(*x, blocks.stages) for x in barriers[1:3]),
                barriers[3] if with_dq else None,
                *(queue, blocks, scale, q.shape[2] // parts, parts // kv_heads, ctas),
            )
        )

    tile = mosaic.tile_memory((WARPGROUPS, ROWS, width), k.dtype)
    stages = mosaic.tile_memory((blocks.stages, blocks.block, width), k.dtype)
    numbers = plgpu.SMEM((blocks.stages, blocks.block), jnp.float32)
    once = (
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    )
    streams = tuple(stream_barriers(blocks.stages, 2) for _ in "qo")
    scratch = [(tile, tile, stages, stages, numbers, numbers), (), (once, *streams)]
    if with_dq:
        ds = mosaic.tile_memory((2, WARPGROUPS, ROWS, blocks.block), q.dtype)
        scratch[1] = (ds, mosaic.tile_memory((WARPGROUPS, _HALF, _HALF), jnp.float32))
        scratch[2] += (plgpu.Barrier(num_arrivals=WARPGROUPS),)
    out = jax.ShapeDtypeStruct((batch, k_len, parts, width), dtype)
    name = "flash_backward" if with_dq else "flash_backward_keys"
    dk, dv = launch(name, body, (out, out), scratch, ctas)(*operands)
    return dk, dv, jax.freeze(dq) if with_dq else None


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The kernel's body; arrays are references.

    Attributes:
      dq: float32, added to; None where it is not wanted.
      memory: shared memory for (k, v, q, d_out, lse, delta).
      shared: shared memory for (ds of two steps, parts of dq), or ().
      k_barriers: (ready, consumed) for an item's keys and values.
      q_stream, o_stream: q with lse, d_out with delta.
      together: where the warpgroups meet once each has laid down its ds; None without dq.
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
    dq: jax.Array | None
    dk: jax.Array
    dv: jax.Array
    memory: tuple
    shared: tuple
    k_barriers: tuple
    q_stream: Stream
    o_stream: Stream
    together: jax.Array | None
    queue: Queue
    blocks: Blocks
    scale: float
    heads: int
    parts: int
    ctas: int

    def load(self) -> None:
        """The warpgroup that loads: keys and values of an item, then queries step by step."""
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

        def step(h, t, carry):
            block = steps.block(t)
            start = block * self.blocks.block

            def mask(scores):
                hidden = functools.partial(hide, self.rows, bounds, batch, start)
                # One loop with a branch: two loops' addresses do not fit in the registers.
                return lax.cond(t < steps.masked, hidden, lambda scores: scores, scores)

            place = (batch, start, part * self.heads + h)
            return self._step(group, done + h * steps.steps + t, mask, place, carry)

        def of_head(h, carry):
            return lax.fori_loop(0, steps.steps, functools.partial(step, h), carry)

        zero = mosaic.full((ROWS, self.k.shape[-1]), 0.0, mosaic.MATRIX)
        dk, dv = lax.fori_loop(0, self.heads, of_head, (zero, zero))
        plgpu.barrier_arrive(consumed)
        if self.dq is not None:
            plgpu.wait_smem_to_gmem(0)
        keys = (batch, pl.ds(first, ROWS), part)
        self.dk[keys] = (dk * self.scale).astype(self.dk.dtype)
        self.dv[keys] = dv.astype(self.dv.dtype)
        return done + self.heads * steps.steps

    def _step(self, group, step, mask, place, carry):
        dk, dv = carry
        k_memory, v_memory, q_memory, o_memory, lse_memory, delta_memory = self.memory
        slot = self.q_stream.slot(step)
        q, d_out = q_memory.at[slot], o_memory.at[slot]

        def weights(scores):
            scores = mask(scores)
            lse = mosaic.load(lse_memory.at[slot], mosaic.PER_COLUMN)
            return jnp.exp2(scores * fold_scale(self.scale) - mosaic.columns(lse, ROWS))

        def gradient(p, dp):
            delta = mosaic.load(delta_memory.at[slot], mosaic.PER_COLUMN)
            return (p * (dp - mosaic.columns(delta, ROWS))).astype(self.q.dtype)

        self.q_stream.wait(step)
        self.o_stream.wait(step)
        operands = (dk, dv, k_memory.at[group], v_memory.at[group], q, d_out, weights, gradient)
        if self.dq is not None:
            dk, dv = mosaic.all_gradients(*operands, *self._for_dq(group, step, place))
        else:
            dk, dv = mosaic.key_gradients(*operands)
            # lse and delta were read as plain memory, and the copy engine writes there next; with
            # dq, `share` has seen to it.
            plgpu.commit_smem()
        self.q_stream.release(step)
        self.o_stream.release(step)
        return dk, dv

    def _for_dq(self, group, step, place):
        """(share, factors, deliver) of `ops.all_gradients`; place: (batch, first query, head)."""
        batch, start, head = place
        ds_memory, dq_memory = self.shared
        # The next step's ds goes elsewhere: who is there has finished with this step's.
        ds_memory, mine = ds_memory.at[lax.rem(step, jnp.int32(2))], pl.ds(group * _HALF, _HALF)
        all_ = pl.ds(0, _HALF)
        # Half of the columns, or of the rows where the queries of a step are twice as many.
        rows, columns = (all_, mine) if self.q.shape[3] == 2 * _HALF else (mine, all_)

        def share(ds):
            ds_memory.at[group][...] = ds
            plgpu.commit_smem()
            meet(self.together)

        factors = [
            (ds_memory.at[half, :, rows], self.memory[0].at[half, :, columns])
            for half in range(WARPGROUPS)
        ]

        def deliver(dq):
            # What was delivered before has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_memory.at[group][...] = dq
            plgpu.commit_smem()
            queries = pl.ds(start + rows.start, _HALF)
            mosaic.add_to_memory(dq_memory.at[group], self.dq.at[batch, queries, head, columns])

        return share, factors, deliver
