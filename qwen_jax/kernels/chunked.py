"""Flash attention in plain jnp: O(T) memory, masked blocks skipped. Runs on any platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.kernels.cpu_matmul import matmul_f32
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.mask import MASKED, Mask, key_bounds, visible

CHUNK = 128
"""Queries and keys per block. The scores of a 128 × 128 block for 32 heads and batch rows are 2 MiB
in float32, about the cache of a CPU core."""


def _heads_first(x: jax.Array, repeat: int = 1) -> jax.Array:
    """Transposes [B, S, K, H] to [B, K·repeat, S, H], repeating each kv head `repeat` times.

    B batch rows, S tokens, K kv heads, H head dimension. Repeating kv heads for the query heads
    that read them avoids grouped, five-dimensional products, which run at little more than half the
    speed on CPUs.
    """
    x = x.swapaxes(1, 2)
    return x if repeat == 1 else jnp.repeat(x, repeat, axis=1)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Pads an axis with zeros at its end up to `length`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


class _BlockedOperands:
    """Queries, keys, values and mask padded to whole blocks, with access to single blocks.

    Attributes:
      q_len: number of queries, T.
      k_len: number of keys, S.
      groups: query heads per kv head.
      chunk_q: queries per block.
      chunk_k: keys per block.
      n_q: number of query blocks.
      n_k: number of key blocks.
      rows: padded number of queries, n_q · chunk_q.
      columns: padded number of keys, n_k · chunk_k.
      q: queries [B, N, rows, H] (batch, query heads, padded queries, head dimension).
      k: keys [B, N, columns, H], each kv head repeated for the query heads that read it.
      v: values, same shape as k.
      q_segments: segment ids of the queries, int32 [B, rows], or None.
      k_segments: segment ids of the keys, int32 [B, columns], or None.
      start: slot of the first query, int32 [B or 1].
      window: number of slots a query sees, static or traced, or None.
      low: first key block that each query block needs, int32 [n_q].
      high: last key block that each query block needs, plus one, int32 [n_q].
    """

    def __init__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, chunk: int):
        """Pads and transposes the operands.

        Args:
          q: [B, T, N, H] (batch, queries, query heads, head dimension).
          k: keys [B, S, K, H] (S keys, K kv heads).
          v: values [B, S, K, H].
          mask: which keys a query sees.
          chunk: queries and keys per block.
        """
        self.q_len, self.k_len = q.shape[1], k.shape[1]
        self.groups = q.shape[2] // k.shape[2]
        self.chunk_q, self.chunk_k = min(chunk, self.q_len), min(chunk, self.k_len)
        self.n_q, self.n_k = -(-self.q_len // self.chunk_q), -(-self.k_len // self.chunk_k)
        self.rows, self.columns = self.n_q * self.chunk_q, self.n_k * self.chunk_k
        self.q = _pad(_heads_first(q), 2, self.rows)
        self.k, self.v = (_pad(_heads_first(x, self.groups), 2, self.columns) for x in (k, v))
        self.q_segments, self.k_segments = mask.q_segments, mask.k_segments
        if self.q_segments is not None:
            self.q_segments = _pad(self.q_segments, 1, self.rows)
        if self.k_segments is not None:
            self.k_segments = _pad(self.k_segments, 1, self.columns)
        self.start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
        self.window = mask.any_window()
        low, high = key_bounds(mask, self.q_len, self.k_len, self.chunk_q, self.chunk_k)
        # One loop serves all batch rows: from the first block that any row needs to the last.
        nonempty = high > 0
        self.low = jnp.where(nonempty, low, self.n_k).min(axis=0)
        self.high = high.max(axis=0)

    def query_block(self, x: jax.Array, i: jax.Array, axis: int = 2) -> jax.Array:
        """Returns query block i of an array whose `axis` runs over the padded queries."""
        return jax.lax.dynamic_slice_in_dim(x, i * self.chunk_q, self.chunk_q, axis)

    def key_block(self, x: jax.Array, j: jax.Array, axis: int = 2) -> jax.Array:
        """Returns key block j of an array whose `axis` runs over the padded keys."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.chunk_k, self.chunk_k, axis)

    def visible(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Returns the mask of query block i and key block j: bool [B or 1, 1, chunk_q, chunk_k]."""
        local_q = i * self.chunk_q + jnp.arange(self.chunk_q, dtype=jnp.int32)
        k_slots = j * self.chunk_k + jnp.arange(self.chunk_k, dtype=jnp.int32)
        q_ids = k_ids = None
        if self.q_segments is not None:
            assert self.k_segments is not None
            q_ids = self.query_block(self.q_segments, i, 1)
            k_ids = self.key_block(self.k_segments, j, 1)
        q_slots = self.start[:, None] + local_q
        mask = visible(q_slots, k_slots[None], q_ids, k_ids, self.window)
        return (mask & (k_slots < self.k_len))[:, None]

    def scores(self, i: jax.Array, j: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
        """Computes the scores of query block i and key block j, times `scale`.

        Returns:
          (scores float32 [B, N, chunk_q, chunk_k], mask bool [B or 1, 1, chunk_q, chunk_k]); masked
          pairs have scores too.
        """
        q, k = self.query_block(self.q, i), self.key_block(self.k, j)
        s = matmul_f32("BNTH,BNSH->BNTS", q, k) * scale
        return s, self.visible(i, j)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Computes attention and its log-sum-exp: the contract of `FlashKernel.forward`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: which keys a query sees.
      scale: factor on q·k.
      chunk: queries and keys per block.

    Returns:
      (out [B, T, N, H] in q's dtype, lse float32 [B, N, T]).
    """
    blocks = _BlockedOperands(q, k, v, mask, chunk)
    batch, heads, _, width = blocks.q.shape

    def attend_query_block(i):
        def add_key_block(j, carry):
            out, highest, total = carry
            s, seen = blocks.scores(i, j, scale)
            new = jnp.maximum(highest, jnp.where(seen, s, MASKED).max(axis=-1))
            p = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
            keep = jnp.exp(highest - new)
            v_block = blocks.key_block(blocks.v, j)
            product = matmul_f32("BNTS,BNSH->BNTH", p.astype(v.dtype), v_block)
            return out * keep[..., None] + product, new, total * keep + p.sum(axis=-1)

        rows = (batch, heads, blocks.chunk_q)
        carry = (
            jnp.zeros((*rows, width), jnp.float32),
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        out, highest, total = jax.lax.fori_loop(blocks.low[i], blocks.high[i], add_key_block, carry)
        has_keys = total > 0
        total = jnp.where(has_keys, total, 1.0)
        return out / total[..., None], jnp.where(has_keys, highest + jnp.log(total), MASKED)

    out, lse = jax.lax.map(attend_query_block, jnp.arange(blocks.n_q))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, blocks.rows, width)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, blocks.rows)
    return out[:, :, : blocks.q_len].swapaxes(1, 2).astype(q.dtype), lse[:, :, : blocks.q_len]


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    lse: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
    grad_dtype: DTypeLike | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of q, k and v: the contract of `FlashKernel.backward`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension).
      k: keys [B, S, K, H] (S keys, K kv heads).
      v: values [B, S, K, H].
      mask: which keys a query sees.
      scale: factor on q·k.
      lse: log-sum-exp of the scores, float32 [B, N, T].
      d_out: gradient of the output, [B, T, N, H].
      delta: Σ_H out·d_out less the gradient of lse, float32 [B, N, T].
      grad_dtype: dtype of the results; None: the dtypes of q, k and v.
      chunk: queries and keys per block.

    Returns:
      (dq [B, T, N, H], dk [B, S, K, H], dv [B, S, K, H]).
    """
    blocks = _BlockedOperands(q, k, v, mask, chunk)
    d_out = _pad(_heads_first(d_out), 2, blocks.rows)
    lse, delta = (_pad(x, 2, blocks.rows) for x in (lse, delta))

    def query_block_gradients(i, carry):
        q_i, d_out_i = blocks.query_block(blocks.q, i), blocks.query_block(d_out, i)
        lse_i, delta_i = (blocks.query_block(x, i)[..., None] for x in (lse, delta))

        def add_key_block(j, carry):
            dq_i, dk, dv = carry
            s, seen = blocks.scores(i, j, scale)
            p = jnp.where(seen, jnp.exp(s - lse_i), 0.0)
            dp = matmul_f32("BNTH,BNSH->BNTS", d_out_i, blocks.key_block(blocks.v, j))
            ds = (p * (dp - delta_i) * scale).astype(q.dtype)
            dq_i += matmul_f32("BNTS,BNSH->BNTH", ds, blocks.key_block(blocks.k, j))
            dk_j = matmul_f32("BNTS,BNTH->BNSH", ds, q_i)
            dk = _add_to_slice(dk, dk_j, j * blocks.chunk_k)
            dv_j = matmul_f32("BNTS,BNTH->BNSH", p.astype(q.dtype), d_out_i)
            return dq_i, dk, _add_to_slice(dv, dv_j, j * blocks.chunk_k)

        dq, dk, dv = carry
        start = (jnp.zeros(q_i.shape, jnp.float32), dk, dv)
        dq_i, dk, dv = jax.lax.fori_loop(blocks.low[i], blocks.high[i], add_key_block, start)
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * blocks.chunk_q, 2), dk, dv

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (blocks.q, blocks.k, blocks.v))
    dq, dk, dv = jax.lax.fori_loop(0, blocks.n_q, query_block_gradients, tuple(zeros))

    def unpad(x, like):  # [B,N,rows,H] -> [B,S,K,H], summed over the query heads of a kv head
        batch, length, heads, width = like.shape
        x = x.reshape(batch, heads, -1, x.shape[2], width).sum(axis=2)
        return x[:, :, :length].swapaxes(1, 2).astype(grad_dtype or like.dtype)

    return unpad(dq, q), unpad(dk, k), unpad(dv, v)


def _add_to_slice(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Returns `total` with `part` [·, ·, n, ·] added to total[:, :, start:start + n]."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)


def chunked_kernel() -> FlashKernel:
    """Returns flash attention in plain jnp, with blocks of `CHUNK` queries and keys."""
    return _kernel(CHUNK)


@functools.cache
def _kernel(chunk: int) -> FlashKernel:
    """Returns flash attention in plain jnp, with blocks of `chunk` queries and keys.

    Cached, so that equal block sizes give the same object and jax does not retrace.
    """
    return FlashKernel(
        "chunked",
        functools.partial(_forward, chunk=chunk),
        functools.partial(_backward, chunk=chunk),
    )
