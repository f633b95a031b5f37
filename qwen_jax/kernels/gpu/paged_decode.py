"""Decode attention over a paged cache on Hopper: split keys, tensor cores, pages by bulk copies.

A batch of one or eight has far fewer (request, kv head) pairs than the 132 multiprocessors, so
each request's keys are cut into parts, one thread block a part ("flash decoding"; `decode_kernel`),
and the parts' outputs are merged by their log-sum-exp.

All query heads of a kv head, and all of a few query tokens, are the rows of one wgmma, which always
has 64. Unused rows are no bottleneck: at 64 rows, bf16 keys and values arriving at the full speed
of an H200's memory (4.8 TB/s) need 307 of its 990 TFLOP/s.

8-bit pages are widened to bf16 in shared memory as codes, which are exact; scale and zero are put
on scores and weights (see `kernels.tpu.decode`, which does the same).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cache import PagedCache
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.paged_decode_kernel import BLOCK, ROWS, Sizes, launch
from qwen_jax.kernels.mask import MASKED
from qwen_jax.parallel import current_mesh


def refusal(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Why this kernel can't serve a cache with `heads` query heads a kv head; None if it can."""
    del entries  # of any number
    device = current_mesh().abstract_device or jax.devices()[0]
    if not mosaic.is_hopper(device.device_kind):
        return f"a {device.device_kind}; the GPU kernel is made for Hopper (H100, H200)"
    if cache.head_dim not in (64, 128):
        return f"heads of {cache.head_dim}; the GPU kernel takes 64 or 128"
    if cache.pages.dtype not in (jnp.bfloat16, jnp.float16, jnp.uint8):
        return f"a cache in {cache.pages.dtype}; the GPU kernel takes bfloat16, float16 or uint8"
    if cache.page_size % BLOCK:
        return f"pages of {cache.page_size} tokens; the GPU kernel takes multiples of {BLOCK}"
    if q_len * heads > ROWS:
        return f"{q_len} query tokens by {heads} heads a kv head; the GPU kernel takes {ROWS}"
    return None


def decode(q, pages, scales, page_table, lengths, start, window, *, scale, splits=None):
    """Contract: `kernels.paged._reference`.

    splits: parts each request's keys are cut into; by default what `choose_splits` says.
    """
    requests, q_len, heads, width = q.shape
    kv_heads, page = pages.shape[1:3]
    groups = heads // kv_heads
    if splits is None:
        splits = choose_splits(requests * kv_heads, page_table.shape[1] * page // BLOCK)
    rows = -(-groups * q_len // 8) * 8
    sizes = Sizes(
        *(kv_heads, groups, q_len, rows, width, page, page_table.shape[1], splits, scale),
        scales is not None,
    )
    compute = jnp.bfloat16 if scales is not None else pages.dtype
    # [R,T,K,G,H] -> [R,K,T·G,H], zeros below.
    q = q.reshape(requests, q_len, kv_heads, groups, width).swapaxes(1, 2).astype(compute)
    q = q.reshape(requests, kv_heads, q_len * groups, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, 0)))
    out, lse = launch(sizes, q, pages, scales, page_table, _plan(lengths, start, window, sizes))
    out, lse = _merge(out, lse)

    def heads_last(x):  # [R,K,rows,·] -> [R,T,N,·]
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out), heads_last(lse[..., None])[..., 0].swapaxes(1, 2)


def choose_splits(pairs: int, blocks: int) -> int:
    """Parts to cut each of `pairs` (request, kv head) pairs into, of at most `blocks` steps each.

    The fewest waves of thread blocks by steps of the longest part; starting a part and merging it
    counts as four steps.
    """
    return mosaic.fewest_waves(pairs, blocks, 128)


def _plan(lengths, start, window, sizes: Sizes) -> jax.Array:
    """int32 [R·splits·FIELDS]: what a thread block needs to know of its part.

    First block; number of blocks; how many of them at the end are cut by the queries' own slots or
    the request's end; how many in all need the mask, with those the window cuts; slot of the first
    query; slot after the last one seen; window.
    """
    end = jnp.minimum(lengths, start + sizes.q_len)
    low = jnp.maximum(start - window + 1, 0) // BLOCK
    blocks = jnp.maximum((end + BLOCK - 1) // BLOCK - low, 0)
    each = (blocks + sizes.splits - 1) // sizes.splits
    done = jnp.arange(sizes.splits, dtype=jnp.int32) * each[:, None]
    count = jnp.clip(blocks[:, None] - done, 0, each[:, None])
    first = low[:, None] + done
    full_high = jnp.maximum(jnp.minimum(end, start + 1) // BLOCK, 0)[:, None]
    full_low = (jnp.maximum(start + sizes.q_len - window, 0) + BLOCK - 1) // BLOCK
    tail = jnp.clip(first + count - jnp.maximum(full_high, first), 0, count)
    head = jnp.clip(full_low[:, None] - first, 0, count - tail)
    window = jnp.broadcast_to(window, start.shape)
    rows = (jnp.broadcast_to(x[:, None], count.shape) for x in (start, end, window))
    return jnp.stack([first, count, tail, tail + head, *rows], axis=-1).astype(jnp.int32).ravel()


def _merge(out, lse):
    """Parts to wholes: out float32 [R,splits,K,rows,H] and lse [R,splits,K,rows] over splits."""
    highest = lse.max(axis=1)
    weights = jnp.where(lse > MASKED / 2, jnp.exp(lse - highest[:, None]), 0.0)
    total = weights.sum(axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (weights[..., None] * out).sum(axis=1) / total[..., None]
    return out, jnp.where(some, highest + jnp.log(total), MASKED)
