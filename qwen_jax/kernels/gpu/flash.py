"""Flash attention on Hopper GPUs as a `FlashKernel`: padding, scheduling and kernel launches."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.errors import UserError
from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.gpu import flash_backward, flash_backward_dq, flash_forward, mosaic
from qwen_jax.kernels.gpu.flash_pipeline import TILE_ROWS
from qwen_jax.kernels.gpu.flash_schedule import (
    LOG2E,
    RowMask,
    ensure_one_step,
    key_row_mask,
    make_tile_table,
    make_work_queue,
    query_row_mask,
)
from qwen_jax.kernels.mask import Mask

_L2_BYTES = 32 * 2**20
"""Bytes of operands that concurrent work items share: most of the 50 MiB L2 of an H100 or H200."""


def unsupported_reason(*, head_dim: int, dtype: DTypeLike, device_kind: str) -> str | None:
    """Returns one clause saying why the kernel cannot serve a request, or None if it can.

    Args:
      head_dim: dimension of a head.
      dtype: of queries, keys and values.
      device_kind: kind of the device as jax spells it, such as "NVIDIA H200".
    """
    if not mosaic.is_hopper(device_kind):
        return f"it is written for Hopper GPUs (H100, H200), not for {device_kind!r}"
    if head_dim not in (64, 128):
        return f"it has head dimensions 64 and 128, not {head_dim}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    return None


def _check_operands(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    """Checks dtypes, head dimension and scale, and raises UserError if the kernel cannot run."""
    reason = unsupported_reason(head_dim=q.shape[-1], dtype=q.dtype, device_kind="H100")
    if reason is None and (k.dtype != q.dtype or v.dtype != q.dtype):
        reason = f"it takes one dtype, not {q.dtype.name}, {k.dtype.name} and {v.dtype.name}"
    if reason is None and not scale > 0:
        reason = f"the scale has to be positive, not {scale}"
    if reason is not None:
        raise UserError(
            f"attention implementation 'pallas_gpu' can't run this: {reason}; choose 'chunked'"
        )


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Pads an axis with zeros at its end up to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return x if x.shape[axis] == length else jnp.pad(x, widths)


def _round_up(length: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Computes attention and its log-sum-exp: the contract of `FlashKernel.forward`.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), bfloat16 or float16.
      k: keys [B, S, K, H] (S keys, K kv heads), q's dtype.
      v: values [B, S, K, H], q's dtype.
      mask: which keys a query sees.
      scale: positive factor on q·k.

    Returns:
      (out [B, T, N, H] in q's dtype, lse float32 [B, N, T], natural logarithm).

    Raises:
      UserError: the kernel cannot run on these operands (`unsupported_reason`).
    """
    _check_operands(q, k, v, scale)
    (batch, q_len, heads, head_dim), (k_len, kv_heads) = q.shape, k.shape[1:3]
    config = flash_forward.forward_config(head_dim)
    q_padded, k_padded = _round_up(q_len, TILE_ROWS), _round_up(k_len, config.block)
    row_mask = query_row_mask(mask, q_len, k_len, q_padded - q_len, k_padded - k_len)
    queue = make_work_queue(
        batch=batch,
        tiles=q_padded // TILE_ROWS,
        heads=heads,
        heads_per_operand=heads // kv_heads,
        bytes_per_row=(k.nbytes + v.nbytes) // batch,
        l2_bytes=_L2_BYTES,
    )
    table = make_tile_table(
        mask,
        row_mask,
        lengths=(q_len, k_len),
        block_sizes=(TILE_ROWS, config.block),
        batch=batch,
        tiles_are_keys=False,
        queue=queue,
    )
    table = ensure_one_step(table)
    out, lse = flash_forward.flash_forward(
        _pad(q, 1, q_padded),
        _pad(k, 1, k_padded),
        _pad(v, 1, k_padded),
        row_mask,
        table,
        queue=queue,
        scale=scale,
        config=config,
    )
    return out[:, :q_len], lse[:, :, :q_len]


def _splits_per_kv_head(batch: int, tiles: int, kv_heads: int, groups: int) -> int:
    """Returns into how many work items the query heads of a kv head are divided.

    The smallest divisor of `groups` that gives at least two items per CTA, or `groups`.

    Args:
      batch: batch rows.
      tiles: tiles of keys per batch row.
      kv_heads: kv heads.
      groups: query heads per kv head.
    """
    wanted = 2 * mosaic.num_ctas()
    for splits in range(1, groups + 1):
        if groups % splits == 0 and batch * tiles * kv_heads * splits >= wanted:
            return splits
    return groups


def _reproducible() -> bool:
    """Returns whether XLA_FLAGS ask for bitwise reproducible operations."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of q, k and v: the contract of `FlashKernel.backward`.

    One kernel computes all three; with reproducible results requested (`_reproducible`), one
    computes dk and dv and another dq.

    Args:
      q: [B, T, N, H] (batch, queries, query heads, head dimension), bfloat16 or float16.
      k: keys [B, S, K, H] (S keys, K kv heads), q's dtype.
      v: values [B, S, K, H], q's dtype.
      mask: which keys a query sees.
      scale: positive factor on q·k.
      lse: log-sum-exp of the scores, float32 [B, N, T], natural logarithm.
      d_out: gradient of the output, [B, T, N, H].
      delta: Σ_H out·d_out less the gradient of lse, float32 [B, N, T].
      grad_dtype: dtype of the results; None: the dtypes of q, k and v.

    Returns:
      (dq [B, T, N, H], dk [B, S, K, H], dv [B, S, K, H]).

    Raises:
      UserError: the kernel cannot run on these operands (`unsupported_reason`).
    """
    _check_operands(q, k, v, scale)
    lengths = q_len, k_len = q.shape[1], k.shape[1]
    q_padded, k_padded = _round_up(q_len, TILE_ROWS), _round_up(k_len, TILE_ROWS)
    row_mask = query_row_mask(mask, q_len, k_len, q_padded - q_len, k_padded - k_len)
    operands = {
        "q": _pad(q, 1, q_padded),
        "k": _pad(k, 1, k_padded),
        "v": _pad(v, 1, k_padded),
        "d_out": _pad(d_out.astype(q.dtype), 1, q_padded),
        "lse": _pad(lse * LOG2E, 2, q_padded),
        "delta": _pad(delta, 2, q_padded),
    }
    dk, dv, dq = _dk_dv(
        operands,
        mask,
        row_mask,
        lengths=lengths,
        scale=scale,
        dtype=grad_dtype or k.dtype,
        q_bytes=q.nbytes,
        with_dq=not _reproducible(),
    )
    q_dtype = grad_dtype or q.dtype
    if dq is not None:
        dq = (dq * scale).astype(q_dtype)
    else:
        dq = _dq(
            operands,
            mask,
            row_mask,
            lengths=lengths,
            scale=scale,
            dtype=q_dtype,
            k_bytes=k.nbytes,
        )
    return dq[:, :q_len], dk[:, :k_len], dv[:, :k_len]


def _dk_dv(
    operands: dict[str, jax.Array],
    mask: Mask,
    row_mask: RowMask,
    *,
    lengths: tuple[int, int],
    scale: float,
    dtype: DTypeLike,
    q_bytes: int,
    with_dq: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes the gradients of padded keys and values, and of the queries if `with_dq`.

    Args:
      operands: padded arrays by name: q and d_out [B, T, N, H] (batch, queries, query heads, head
        dimension), k and v [B, S, K, H] (S keys, K kv heads), lse (to base 2) and delta [B, N, T].
      mask: the attention mask.
      row_mask: the same mask with queries as rows (`query_row_mask`).
      lengths: numbers of (queries, keys) without padding.
      scale: factor on q·k.
      dtype: of dk and dv.
      q_bytes: bytes of q without padding.
      with_dq: also compute dq.

    Returns:
      (dk, dv, dq): dk and dv [B, S, K, H] in `dtype`; dq float32 [B, T, N, H], still to be
      multiplied by the scale, or None.
    """
    batch, q_padded, heads, head_dim = operands["q"].shape
    k_padded, kv_heads = operands["k"].shape[1:3]
    q_len, k_len = lengths
    tiles = k_padded // TILE_ROWS
    splits = _splits_per_kv_head(batch, tiles, kv_heads, heads // kv_heads)
    queue = make_work_queue(
        batch=batch,
        tiles=tiles,
        heads=kv_heads * splits,
        heads_per_operand=1,
        bytes_per_row=(4 if with_dq else 2) * q_bytes // batch,
        l2_bytes=_L2_BYTES,
    )
    config = flash_backward.backward_config(head_dim, with_dq)
    table = make_tile_table(
        mask,
        row_mask,
        lengths=lengths,
        block_sizes=(config.block, TILE_ROWS),
        batch=batch,
        tiles_are_keys=True,
        queue=queue,
    )
    dk, dv, dq = flash_backward.flash_backward(
        **operands,
        row_mask=key_row_mask(mask, q_len, k_len, q_padded - q_len, k_padded - k_len),
        table=table,
        queue=queue,
        scale=scale,
        dtype=dtype if splits == 1 else jnp.float32,
        with_dq=with_dq,
    )
    if splits > 1:
        shape = (batch, k_padded, kv_heads, splits, head_dim)
        dk, dv = (x.reshape(shape).sum(axis=3).astype(dtype) for x in (dk, dv))
    return dk, dv, dq


def _dq(
    operands: dict[str, jax.Array],
    mask: Mask,
    row_mask: RowMask,
    *,
    lengths: tuple[int, int],
    scale: float,
    dtype: DTypeLike,
    k_bytes: int,
) -> jax.Array:
    """Computes the gradient of padded queries with a kernel of its own.

    Args:
      operands: padded arrays by name: q and d_out [B, T, N, H] (batch, queries, query heads, head
        dimension), k and v [B, S, K, H] (S keys, K kv heads), lse (to base 2) and delta [B, N, T].
      mask: the attention mask.
      row_mask: the same mask with queries as rows (`query_row_mask`).
      lengths: numbers of (queries, keys) without padding.
      scale: factor on q·k.
      dtype: of the result.
      k_bytes: bytes of k without padding.

    Returns:
      dq [B, T, N, H] in `dtype`.
    """
    batch, q_padded, heads, head_dim = operands["q"].shape
    kv_heads = operands["k"].shape[2]
    config = flash_backward_dq.dq_config(head_dim)
    queue = make_work_queue(
        batch=batch,
        tiles=q_padded // TILE_ROWS,
        heads=heads,
        heads_per_operand=heads // kv_heads,
        bytes_per_row=2 * k_bytes // batch,
        l2_bytes=_L2_BYTES,
    )
    table = make_tile_table(
        mask,
        row_mask,
        lengths=lengths,
        block_sizes=(TILE_ROWS, config.block),
        batch=batch,
        tiles_are_keys=False,
        queue=queue,
    )
    return flash_backward_dq.flash_backward_dq(
        **operands,
        row_mask=row_mask,
        table=table,
        queue=queue,
        scale=scale,
        config=config,
        dtype=dtype,
    )


KERNEL = FlashKernel("pallas_gpu", _forward, _backward)
"""Attention on Hopper GPUs, as `dispatch` calls it."""
