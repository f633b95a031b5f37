"""`KERNEL`: attention on Hopper GPUs as a `flash.FlashKernel`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.flash import FlashKernel
from qwen_jax.kernels.gpu.forward import TILE, forward, forward_blocks
from qwen_jax.kernels.gpu.plan import make_queue, make_rows, make_table
from qwen_jax.kernels.mask import Mask

_L2 = 32 * 2**20


def _pad(x, axis, by):
    if not by:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, by)
    return jnp.pad(x, widths)


def _forward(q, k, v, mask: Mask, scale: float):
    batch, q_len, heads, width = q.shape
    k_len, kv_heads = k.shape[1:3]
    blocks = forward_blocks(width)
    q_pad, k_pad = -q_len % TILE, -k_len % blocks.block
    rows = make_rows(mask, q_len, k_len, q_pad, k_pad)
    row_bytes = 2 * k.nbytes // batch
    queue = make_queue(batch, (q_len + q_pad) // TILE, heads, heads // kv_heads, row_bytes, _L2)
    sizes = (TILE, blocks.block)
    table = make_table(mask, rows, (q_len, k_len), sizes, batch, keys=False, queue=queue)
    q, k, v = _pad(q, 1, q_pad), _pad(k, 1, k_pad), _pad(v, 1, k_pad)
    out, lse = forward(q, k, v, rows, table, queue, scale, blocks)
    return out[:, :q_len], lse[:, :, :q_len]


KERNEL = FlashKernel("pallas_gpu", _forward, None)
