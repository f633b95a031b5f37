"""`KERNEL`: attention on Hopper GPUs as a `flash.FlashKernel`."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.gpu import flash_backward, flash_backward_dq, flash_forward, mosaic
from qwen_jax.kernels.gpu.flash_pipeline import TILE
from qwen_jax.kernels.gpu.flash_schedule import (
    LOG2E,
    at_least_one_step,
    key_rows,
    make_queue,
    make_table,
    query_rows,
)
from qwen_jax.kernels.mask import Mask

_STREAMED = 32 * 2**20
"""Bytes of keys and values in use at a time: most of the 50 MiB L2 cache of an H100 or H200."""


def why_not(*, head_dim: int, dtype, device_kind: str) -> str | None:
    """One clause that says why the kernel can't serve a request, or None if it can."""
    if not mosaic.is_hopper(device_kind):
        return f"it is written for Hopper GPUs (H100, H200), not for {device_kind!r}"
    if head_dim not in (64, 128):
        return f"it has head dimensions 64 and 128, not {head_dim}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    return None


def _check(q, k, v, scale) -> None:
    reason = why_not(head_dim=q.shape[-1], dtype=q.dtype, device_kind="H100")
    if reason is None and (k.dtype != q.dtype or v.dtype != q.dtype):
        reason = f"it takes one dtype, not {q.dtype.name}, {k.dtype.name} and {v.dtype.name}"
    if reason is None and not scale > 0:
        reason = f"the scale has to be positive, not {scale}"
    if reason is not None:
        raise UserError(
            f"attention implementation 'pallas_gpu' can't run this: {reason}; choose 'chunked'"
        )


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return x if x.shape[axis] == length else jnp.pad(x, widths)


def _up(length: int, block: int) -> int:
    return -(-length // block) * block


def _forward(q, k, v, mask: Mask, scale: float):
    _check(q, k, v, scale)
    (batch, q_len, heads, width), (k_len, kv_heads) = q.shape, k.shape[1:3]
    blocks = flash_forward.forward_blocks(width)
    rows_, columns = _up(q_len, TILE), _up(k_len, blocks.block)
    rows = query_rows(mask, q_len, k_len, rows_ - q_len, columns - k_len)
    queue = make_queue(
        batch, rows_ // TILE, heads, heads // kv_heads, (k.nbytes + v.nbytes) // batch, _STREAMED
    )
    sizes = (TILE, blocks.block)
    table = make_table(mask, rows, (q_len, k_len), sizes, batch, keys=False, queue=queue)
    table = at_least_one_step(table)
    q, k, v = _pad(q, 1, rows_), _pad(k, 1, columns), _pad(v, 1, columns)
    out, lse = flash_forward.forward(q, k, v, rows, table, queue, scale, blocks)
    return out[:, :q_len], lse[:, :, :q_len]


def _parts(batch: int, tiles: int, kv_heads: int, groups: int) -> int:
    """Into how many items the query heads of a kv head are dealt: enough for two items a CTA."""
    wanted = 2 * mosaic.ctas()
    for parts in range(1, groups + 1):
        if groups % parts == 0 and batch * tiles * kv_heads * parts >= wanted:
            return parts
    return groups


def _reproducible() -> bool:
    """Whether XLA has been told to give the same results each time."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)


def _backward(q, k, v, mask: Mask, scale, lse, d_out, delta, grad_dtype):
    _check(q, k, v, scale)
    (batch, q_len, heads, width), (k_len, kv_heads) = q.shape, k.shape[1:3]
    rows_, columns = _up(q_len, TILE), _up(k_len, TILE)
    lengths = (q_len, k_len, rows_ - q_len, columns - k_len)
    rows = query_rows(mask, *lengths)
    groups = heads // kv_heads
    operands = (
        *(_pad(q, 1, rows_), _pad(k, 1, columns), _pad(v, 1, columns)),
        *(_pad(d_out.astype(q.dtype), 1, rows_), _pad(lse * LOG2E, 2, rows_)),
        _pad(delta, 2, rows_),
    )
    with_dq = not _reproducible()

    parts = _parts(batch, columns // TILE, kv_heads, groups)
    bytes_ = (4 if with_dq else 2) * q.nbytes // batch
    queue = make_queue(batch, columns // TILE, kv_heads * parts, 1, bytes_, _STREAMED)
    sizes = (flash_backward.keys_blocks(width, with_dq).block, TILE)
    table = make_table(mask, rows, (q_len, k_len), sizes, batch, keys=True, queue=queue)
    k_dtype = grad_dtype or k.dtype
    partial = k_dtype if parts == 1 else jnp.float32
    transposed = key_rows(mask, *lengths)
    dk, dv, dq = flash_backward.backward(
        *operands, transposed, table, queue, scale, partial, with_dq=with_dq
    )
    if parts > 1:
        shape = (batch, columns, kv_heads, parts, width)
        dk, dv = (x.reshape(shape).sum(axis=3).astype(k_dtype) for x in (dk, dv))

    q_dtype = grad_dtype or q.dtype
    if with_dq:
        dq = (dq * scale).astype(q_dtype)
    else:
        by_queries = flash_backward_dq.queries_blocks(width)
        queue = make_queue(batch, rows_ // TILE, heads, groups, 2 * k.nbytes // batch, _STREAMED)
        sizes = (TILE, by_queries.block)
        table = make_table(mask, rows, (q_len, k_len), sizes, batch, keys=False, queue=queue)
        dq = flash_backward_dq.backward_queries(
            *operands, rows, table, queue, scale, by_queries, q_dtype
        )
    return dq[:, :q_len], dk[:, :k_len], dv[:, :k_len]


KERNEL = FlashKernel("pallas_gpu", _forward, _backward)
