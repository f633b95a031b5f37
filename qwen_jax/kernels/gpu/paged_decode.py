"""Decode attention over a paged KV cache on Hopper GPUs: split keys, plan the splits, merge them.

A batch of one or eight requests has far fewer (request, kv head) pairs than the GPU's 132
multiprocessors, so the keys of each request are split, one CTA (thread block) per split ("flash
decoding"; the kernel is in `paged_decode_kernel`), and the outputs of the splits are merged by
their log-sum-exp.

The query heads of a kv head, for all of a few query tokens, are the rows of one wgmma, which always
has 64. Unused rows are no bottleneck: at 64 rows, bf16 keys and values that arrive at the full
memory bandwidth of an H200 (4.8 TB/s) need 307 of its 990 TFLOP/s.

8-bit pages are widened to bf16 in shared memory as codes, which is exact; scale and zero are
applied to scores and weights, as in `kernels.tpu.paged_decode`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cache import PagedCache
from qwen_jax.kernels.gpu import mosaic
from qwen_jax.kernels.gpu.paged_decode_kernel import BLOCK, ROWS, DecodeShape, launch
from qwen_jax.kernels.mask import MASKED
from qwen_jax.parallel import current_mesh

_MAX_SPLITS = 128


def unsupported_reason(cache: PagedCache, *, q_len: int, heads: int, entries: int) -> str | None:
    """Returns one clause saying why this kernel cannot serve a cache, or None if it can.

    Args:
      cache: the paged cache.
      q_len: query tokens per request.
      heads: query heads per kv head.
      entries: entries of the device's page table; any number is accepted.
    """
    del entries
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


def paged_decode(
    q: jax.Array,
    pages: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    lengths: jax.Array,
    start: jax.Array,
    window: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of a few query tokens per request over one layer of a paged cache.

    Args:
      q: [R, T, N, H] (requests, query tokens per request, query heads, head dimension).
      pages: [pages, K, page size, 2H] (K kv heads), key and value of a token side by side; bf16,
        float16 or uint8 codes.
      scales: float32 [pages, K, 4, page size], (key scale, key zero, value scale, value zero) of
        8-bit pages; None otherwise.
      page_table: int32 [R, pages per request].
      lengths: int32 [R], tokens of each request in the cache.
      start: int32 [R], slot of the first query; negative for an idle request.
      window: int32 scalar; a query sees at most this many slots, its own included.
      scale: factor on q·k.
      splits: into how many parts each request's keys are split; None: `choose_splits`.

    Returns:
      (out float32 [R, T, N, H], lse float32 [R, N, T], natural logarithm); 0 and `MASKED` for a
      query that sees no key.
    """
    requests, q_len, heads, head_dim = q.shape
    kv_heads, page_size = pages.shape[1:3]
    groups = heads // kv_heads
    if splits is None:
        splits = choose_splits(requests * kv_heads, page_table.shape[1] * page_size // BLOCK)
    rows = -(-groups * q_len // 8) * 8
    shape = DecodeShape(
        kv_heads=kv_heads,
        groups=groups,
        q_len=q_len,
        rows=rows,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_request=page_table.shape[1],
        splits=splits,
        scale=scale,
        quantised=scales is not None,
    )
    compute_dtype = jnp.bfloat16 if scales is not None else pages.dtype
    # [R, T, K, groups, H] -> [R, K, T·groups, H], padded with zeros to [R, K, rows, H].
    q = q.reshape(requests, q_len, kv_heads, groups, head_dim).swapaxes(1, 2)
    q = q.astype(compute_dtype).reshape(requests, kv_heads, q_len * groups, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - q_len * groups), (0, 0)))
    plan = _split_plan(lengths, start, window, shape)
    out, lse = _merge_splits(*launch(shape, q, pages, scales, page_table, plan))

    def heads_last(x):  # [R, K, rows, ·] -> [R, T, N, ·]
        x = x[:, :, : q_len * groups].reshape(requests, kv_heads, q_len, groups, -1)
        return x.swapaxes(1, 2).reshape(requests, q_len, heads, -1)

    return heads_last(out), heads_last(lse[..., None])[..., 0].swapaxes(1, 2)


def choose_splits(pairs: int, blocks: int) -> int:
    """Returns into how many parts to split each request's keys so that the GPU is well occupied.

    Args:
      pairs: number of (request, kv head) pairs.
      blocks: largest number of blocks of 64 tokens that a request can have.
    """
    return mosaic.splits_for_fewest_waves(pairs, blocks, _MAX_SPLITS)


def _split_plan(
    lengths: jax.Array, start: jax.Array, window: jax.Array | int, shape: DecodeShape
) -> jax.Array:
    """Returns which blocks of tokens each split of each request covers.

    Args:
      lengths: int32 [requests], tokens in the cache.
      start: int32 [requests], slot of the first query.
      window: slots that a query sees, its own included.
      shape: sizes of the call.

    Returns:
      int32 [requests · splits · 7], the `PLAN_FIELDS` of each split.
    """
    end = jnp.minimum(lengths, start + shape.q_len)
    low = jnp.maximum(start - window + 1, 0) // BLOCK
    blocks = jnp.maximum((end + BLOCK - 1) // BLOCK - low, 0)
    per_split = (blocks + shape.splits - 1) // shape.splits
    before = jnp.arange(shape.splits, dtype=jnp.int32) * per_split[:, None]
    count = jnp.clip(blocks[:, None] - before, 0, per_split[:, None])
    first = low[:, None] + before
    full_high = jnp.maximum(jnp.minimum(end, start + 1) // BLOCK, 0)[:, None]
    full_low = (jnp.maximum(start + shape.q_len - window, 0) + BLOCK - 1) // BLOCK
    tail = jnp.clip(first + count - jnp.maximum(full_high, first), 0, count)
    head = jnp.clip(full_low[:, None] - first, 0, count - tail)
    window = jnp.broadcast_to(window, start.shape)
    per_request = (jnp.broadcast_to(x[:, None], count.shape) for x in (start, end, window))
    plan = jnp.stack([first, count, tail, tail + head, *per_request], axis=-1)
    return plan.astype(jnp.int32).ravel()


def _merge_splits(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges attention over the splits of each request's keys.

    Args:
      out: float32 [R, splits, K, rows, H] (requests, splits, kv heads, query rows of a kv head,
        head dimension).
      lse: float32 [R, splits, K, rows], `MASKED` where a split has no visible key.

    Returns:
      (out [R, K, rows, H], lse [R, K, rows]) over all keys; 0 and `MASKED` where none is visible.
    """
    highest = lse.max(axis=1)
    weights = jnp.where(lse > MASKED / 2, jnp.exp(lse - highest[:, None]), 0.0)
    total = weights.sum(axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (weights[..., None] * out).sum(axis=1) / total[..., None]
    return out, jnp.where(some, highest + jnp.log(total), MASKED)
