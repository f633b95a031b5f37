"""Flash attention in plain jnp: O(T) memory, no work on masked blocks. The fallback on CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cpu_matmul import matmul_f32
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.mask import MASKED, Mask, key_bounds, visible

CHUNK = 128
"""Queries and keys a block; 128² scores of 32 heads and rows are 2 MiB in float32, about a core's
cache."""


def _heads_first(x: jax.Array, repeat: int = 1) -> jax.Array:
    """[B,S,K,H] -> [B,K·repeat,S,H], each kv head once for every query head that reads it.

    Grouped, five-dimensional products run at little more than half the speed on CPU.
    """
    x = x.swapaxes(1, 2)
    return x if repeat == 1 else jnp.repeat(x, repeat, axis=1)


def _pad(x: jax.Array | None, axis: int, length: int) -> jax.Array | None:
    if x is None or x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


class _Blocks:
    """The operands cut into blocks, and which blocks of keys each block of queries needs."""

    def __init__(self, q, k, v, mask: Mask, chunk: int):
        self.q_len, self.k_len = q.shape[1], k.shape[1]
        self.groups = q.shape[2] // k.shape[2]
        self.chunk_q, self.chunk_k = min(chunk, self.q_len), min(chunk, self.k_len)
        self.n_q, self.n_k = -(-self.q_len // self.chunk_q), -(-self.k_len // self.chunk_k)
        self.rows, self.columns = self.n_q * self.chunk_q, self.n_k * self.chunk_k
        self.q = _pad(_heads_first(q), 2, self.rows)
        self.k, self.v = (_pad(_heads_first(x, self.groups), 2, self.columns) for x in (k, v))
        self.q_segments = _pad(mask.q_segments, 1, self.rows)
        self.k_segments = _pad(mask.k_segments, 1, self.columns)
        self.start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
        self.window = mask.any_window()
        low, high = key_bounds(mask, self.q_len, self.k_len, self.chunk_q, self.chunk_k)
        # One loop serves all rows of the batch: from the first block any of them needs to the last.
        some = high > 0
        self.low = jnp.where(some, low, self.n_k).min(axis=0)
        self.high = high.max(axis=0)

    def queries(self, x, i, axis=2):
        return jax.lax.dynamic_slice_in_dim(x, i * self.chunk_q, self.chunk_q, axis)

    def keys(self, x, j, axis=2):
        return jax.lax.dynamic_slice_in_dim(x, j * self.chunk_k, self.chunk_k, axis)

    def seen(self, i, j) -> jax.Array:
        """Mask of block (i, j), bool [B or 1,1,chunk_q,chunk_k]."""
        local_q = i * self.chunk_q + jnp.arange(self.chunk_q, dtype=jnp.int32)
        k_slots = j * self.chunk_k + jnp.arange(self.chunk_k, dtype=jnp.int32)
        segments = (None, None)
        if self.q_segments is not None:
            segments = (self.queries(self.q_segments, i, 1), self.keys(self.k_segments, j, 1))
        q_slots = self.start[:, None] + local_q
        mask = visible(q_slots, k_slots[None], *segments, self.window)
        return (mask & (k_slots < self.k_len))[:, None]

    def scores(self, i, j, scale) -> tuple[jax.Array, jax.Array]:
        """(scores float32 [B,N,chunk_q,chunk_k], mask)."""
        q, k = self.queries(self.q, i), self.keys(self.k, j)
        s = matmul_f32("BNTH,BNSH->BNTS", q, k) * scale
        return s, self.seen(i, j)


def _forward(q, k, v, mask: Mask, scale: float, chunk: int):
    blocks = _Blocks(q, k, v, mask, chunk)
    batch, heads, _, width = blocks.q.shape

    def query_block(i):
        def key_block(j, carry):
            out, highest, total = carry
            s, seen = blocks.scores(i, j, scale)
            new = jnp.maximum(highest, jnp.where(seen, s, MASKED).max(axis=-1))
            p = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
            keep = jnp.exp(highest - new)
            v_block = blocks.keys(blocks.v, j)
            product = matmul_f32("BNTS,BNSH->BNTH", p.astype(v.dtype), v_block)
            return out * keep[..., None] + product, new, total * keep + p.sum(axis=-1)

        rows = (batch, heads, blocks.chunk_q)
        carry = (
            jnp.zeros((*rows, width), jnp.float32),
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        out, highest, total = jax.lax.fori_loop(blocks.low[i], blocks.high[i], key_block, carry)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return out / total[..., None], jnp.where(some, highest + jnp.log(total), MASKED)

    out, lse = jax.lax.map(query_block, jnp.arange(blocks.n_q))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, blocks.rows, width)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, blocks.rows)
    return out[:, :, : blocks.q_len].swapaxes(1, 2).astype(q.dtype), lse[:, :, : blocks.q_len]


def _backward(q, k, v, mask, scale, lse, d_out, delta, grad_dtype, chunk: int):
    blocks = _Blocks(q, k, v, mask, chunk)
    d_out = _pad(_heads_first(d_out), 2, blocks.rows)
    lse, delta = (_pad(x, 2, blocks.rows) for x in (lse, delta))

    def query_block(i, carry):
        q_i, d_out_i = blocks.queries(blocks.q, i), blocks.queries(d_out, i)
        lse_i, delta_i = (blocks.queries(x, i)[..., None] for x in (lse, delta))

        def key_block(j, carry):
            dq_i, dk, dv = carry
            s, seen = blocks.scores(i, j, scale)
            p = jnp.where(seen, jnp.exp(s - lse_i), 0.0)
            dp = matmul_f32("BNTH,BNSH->BNTS", d_out_i, blocks.keys(blocks.v, j))
            ds = (p * (dp - delta_i) * scale).astype(q.dtype)
            dq_i += matmul_f32("BNTS,BNSH->BNTH", ds, blocks.keys(blocks.k, j))
            dk = _add(dk, matmul_f32("BNTS,BNTH->BNSH", ds, q_i), j * blocks.chunk_k)
            dv_j = matmul_f32("BNTS,BNTH->BNSH", p.astype(q.dtype), d_out_i)
            return dq_i, dk, _add(dv, dv_j, j * blocks.chunk_k)

        dq, dk, dv = carry
        start = (jnp.zeros(q_i.shape, jnp.float32), dk, dv)
        dq_i, dk, dv = jax.lax.fori_loop(blocks.low[i], blocks.high[i], key_block, start)
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * blocks.chunk_q, 2), dk, dv

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (blocks.q, blocks.k, blocks.v))
    dq, dk, dv = jax.lax.fori_loop(0, blocks.n_q, query_block, tuple(zeros))

    def shape(x, like):  # [B,N,rows,H] -> [B,S,K,H], summed over the heads of a group
        batch, length, heads, width = like.shape
        x = x.reshape(batch, heads, -1, x.shape[2], width).sum(axis=2)
        return x[:, :, :length].swapaxes(1, 2).astype(grad_dtype or like.dtype)

    return shape(dq, q), shape(dk, k), shape(dv, v)


def _add(total, part, start):
    """total[:, :, start:start+n] += part."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)


def chunked_kernel() -> FlashKernel:
    """The kernel, with blocks of `CHUNK` queries and keys. Contract: `flash.FlashKernel`."""
    return _kernel(CHUNK)


@functools.cache
def _kernel(chunk: int) -> FlashKernel:
    return FlashKernel(
        "chunked",
        functools.partial(_forward, chunk=chunk),
        functools.partial(_backward, chunk=chunk),
    )
