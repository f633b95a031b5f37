"""`paged_attention` and `append`: attention over, and writes to, a paged KV cache.

Both select an implementation for the platform and shapes, and log the choice once.
"""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.kernels.cache import AXES, PagedCache, quantise
from qwen_jax.kernels.flash import merge
from qwen_jax.kernels.mask import MASKED
from qwen_jax.kernels.selection import choose_implementation, log_choice
from qwen_jax.parallel import batch_devices, current_mesh, on_mesh, platform, spec

MAX_QUERIES = 8
"""Largest number of query tokens per request in kernels: 1, or a few to verify a draft."""

_MODULES = {
    "pallas_tpu": "qwen_jax.kernels.tpu.paged_decode",
    "pallas_gpu": "qwen_jax.kernels.gpu.paged_decode",
}
_BLOCK = 128
"""Tokens of each request that the reference processes at a time."""

_NO_WINDOW = 2**30
"""A window larger than any cache, so that one kernel handles layers with and without a window."""


def choose_paged_attention(
    requested: str, cache: PagedCache, *, q_len: int, heads: int, entries: int
) -> str:
    """Returns the implementation to use, resolving "auto"; logs each choice once.

    Args:
      requested: one of `selection.IMPLEMENTATIONS`.
      cache: the cache.
      q_len: query tokens per request.
      heads: query heads per kv head.
      entries: entries of a device's page table.

    Raises:
      UserError: the name is unknown, the kernel is for another platform, or it does not support
        this call; the message has the reason.
    """

    def unsupported_reason(module):
        """Returns why a kernel's module does not support this call, or None."""
        return module.unsupported_reason(cache, q_len=q_len, heads=heads, entries=entries)

    return choose_implementation(
        "paged attention", requested, platform()[0], _MODULES, unsupported_reason
    )


def paged_attention(
    q: jax.Array,
    cache: PagedCache,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array | int = 0,
    k_new: jax.Array | None = None,
    v_new: jax.Array | None = None,
    window: jax.Array | int | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Computes causal grouped-query attention of a few new tokens over one layer of a paged cache.

    There are two modes. Without `k_new`, the new tokens are already in the cache, and the last
    query is in the last slot, `lengths` − 1. With `k_new` they are not: query t is in slot lengths
    + t, and the new keys are merged by their log-sum-exp. The cache is then only read inside a scan
    over layers, and all layers are written at once afterwards (`append`); if written inside the
    scan, it would be copied by the compiler.

    Args:
      q: queries of T new tokens of each of R requests, [R, T, N, H]; N query heads, a multiple of
        the cache's K kv heads.
      cache: the cache, with all layers.
      page_table: int32 [R, pages per request].
      lengths: tokens of each request in the cache, int32 [R].
      layer: index of the layer; may be traced.
      k_new: keys of the new tokens [R, T, K, H], or None. They are used unquantised, also with an
        8-bit cache.
      v_new: values of the new tokens [R, T, K, H]; given if and only if `k_new` is.
      window: number of slots that a query sees, its own included; None: all. May be traced.
      scale: factor on q·k; default 1/√H.
      implementation: one of `selection.IMPLEMENTATIONS`.

    Returns:
      (output [R, T, N, H] in q's dtype, log-sum-exp float32 [R, N, T], natural logarithm). A query
      that sees no key has output 0 and log-sum-exp `MASKED`: an idle request has length 0.

    Raises:
      UserError: shapes do not match, or as `choose_paged_attention`.
    """
    _check(q, cache, page_table, lengths, k_new, v_new)
    chosen = choose_paged_attention(
        implementation,
        cache,
        q_len=q.shape[1],
        heads=q.shape[2] // cache.pages.shape[2],
        entries=page_table.size // (batch_devices(current_mesh()) if on_mesh() else 1),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = jnp.int32(_NO_WINDOW if window is None else window)
    on_device = functools.partial(_attend_local, scale=scale, chosen=chosen)
    operands = (q, cache, page_table, lengths, jnp.int32(layer), window, k_new, v_new)
    if not on_mesh():
        return on_device(*operands)
    queries, rows = spec("batch", None, "heads", None), spec("batch")
    new = spec("batch", None, "kv_heads", None)
    in_specs = (queries, spec(*AXES), spec("batch", None), rows, jax.P(), jax.P(), new, new)
    out_specs = (queries, spec("batch", "heads", None))
    return jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        *operands
    )


def _check(q, cache, page_table, lengths, k_new, v_new) -> None:
    """Checks that the shapes of `paged_attention`'s arguments match.

    Raises:
      UserError: they do not.
    """
    requests, q_len, heads, width = q.shape
    kv_heads = cache.pages.shape[2]
    if width != cache.head_dim:
        raise UserError(
            f"The head dimension is {width} in queries and {cache.head_dim} in the cache; they "
            "must be equal."
        )
    if heads % kv_heads:
        raise UserError(
            f"{heads} query heads cannot share the cache's {kv_heads} kv heads evenly; use a "
            "multiple of that number."
        )
    if page_table.shape[0] != requests or lengths.shape != (requests,):
        raise UserError(
            f"A page table {page_table.shape} and lengths {lengths.shape} don't describe "
            f"{requests} requests; give one row and one length for each."
        )
    if (k_new is None) != (v_new is None):
        raise UserError("k_new and v_new must be given together; give both or neither.")
    if k_new is not None and k_new.shape != (requests, q_len, kv_heads, width):
        raise UserError(
            f"New keys are {k_new.shape}; for these queries and this cache they must be "
            f"{(requests, q_len, kv_heads, width)}."
        )


def _attend_local(q, cache, page_table, lengths, layer, window, k_new, v_new, *, scale, chosen):
    """Computes one device's part of `paged_attention`: cached tokens, then new ones merged in."""
    layers, pages = cache.pages.shape[:2]
    # Layers and pages become one axis, so that page ids include the layer.
    flat = (layers * pages, *cache.pages.shape[2:])
    scales = None
    if cache.quantised:
        scales = cache.scales.reshape(layers * pages, *cache.scales.shape[2:])
    table = page_table + layer * pages
    start = lengths if k_new is not None else lengths - q.shape[1]
    kernel = _reference
    if chosen != "reference":
        kernel = importlib.import_module(_MODULES[chosen]).paged_decode
    with jax.named_scope("paged_attention"):
        operands = (q, cache.pages.reshape(flat), scales, table, lengths, start, window)
        out, lse = kernel(*operands, scale=scale)
        if k_new is not None:
            out, lse = merge(out, lse, *_new_tokens(q, k_new, v_new, window, scale))
    return out.astype(q.dtype), lse


def _softmax(scores, visible, values):
    """Computes softmax-weighted values and log-sum-exp.

    Args:
      scores: [R, K, G, T, S] (G query heads per kv head, S keys).
      visible: whether a query sees a key, bool [R, K, G, T, S] or broadcastable.
      values: [R, S, K, H].

    Returns:
      (output float32 [R, T, N, H], log-sum-exp float32 [R, N, T]).
    """
    scores = jnp.where(visible, scores, MASKED)
    row_max = scores.max(axis=-1, keepdims=True)
    p = jnp.where(visible, jnp.exp(scores - row_max), 0.0)
    total = p.sum(axis=-1, keepdims=True)
    some = total > 0
    lse = jnp.where(some, row_max + jnp.log(jnp.where(some, total, 1.0)), MASKED)[..., 0]
    p = p / jnp.where(some, total, 1.0)
    out = jnp.einsum("RKGTS,RSKH->RTKGH", p, values, preferred_element_type=jnp.float32)
    requests, kv_heads, groups, q_len = lse.shape
    heads = kv_heads * groups
    return out.reshape(requests, q_len, heads, -1), lse.reshape(requests, heads, q_len)


def _scores(q, k, scale):
    """Returns q·k · scale as float32 [R, K, G, T, S].

    Args:
      q: [R, T, N, H], N = K·G query heads.
      k: keys [R, S, K, H].
      scale: factor.
    """
    requests, q_len, _, width = q.shape
    q = q.reshape(requests, q_len, k.shape[2], -1, width).astype(jnp.float32)
    return jnp.einsum("RTKGH,RSKH->RKGTS", q, k, preferred_element_type=jnp.float32) * scale


def _new_tokens(q, k_new, v_new, window, scale):
    """Computes attention of the new tokens among themselves.

    Returns:
      (output, log-sum-exp) as `paged_attention` returns them, in float32.
    """
    steps = jnp.arange(q.shape[1])
    distance = steps[:, None] - steps
    visible = (distance >= 0) & (distance < window)
    scores = _scores(q, k_new.astype(jnp.float32), scale)
    return _softmax(scores, visible, v_new.astype(jnp.float32))


def _reference(q, pages, scales, page_table, lengths, start, window, *, scale):
    """Attends to cached tokens in plain jnp; the reference and contract of all kernels.

    Args:
      q: queries [R, T, N, H].
      pages: [P, K, page, 2H].
      scales: float32 [P, K, 4, page] for uint8 pages, else None.
      page_table: int32 [R, pages per request]; entries beyond a request's length are arbitrary.
      lengths: tokens of each request in the cache, int32 [R].
      start: slot of the first query of each request, int32 [R]; negative for an idle request.
      window: number of slots that a query sees, int32 scalar.
      scale: factor on q·k.

    Returns:
      (output float32 [R, T, N, H], log-sum-exp float32 [R, N, T]); 0 and `MASKED` where no key is
      visible.
    """
    requests, q_len, heads, width = q.shape
    _, kv_heads, page, _ = pages.shape
    columns = max(1, min(page_table.shape[1], _BLOCK // page))
    size = columns * page
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % columns)))
    table = jnp.clip(table, 0, pages.shape[0] - 1)
    # [R,K,G·T,2H] with zeros in place of the value: keys and values are never separated.
    q = q.reshape(requests, q_len, kv_heads, -1, width).astype(jnp.float32) * scale
    q = jnp.moveaxis(q, 1, 3).reshape(requests, kv_heads, -1, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width)))
    groups = heads // kv_heads
    q_slots = start[:, None] + jnp.arange(q_len)

    def block(i, state):
        """Updates the running softmax with one block of `columns` pages per request."""
        row_max, total, out = state
        slots = i * size + jnp.arange(size)
        # Slots that were never written may have any content, which must not enter a product.
        written = slots < lengths[:, None]  # [R,S]
        distance = q_slots[:, :, None] - slots
        visible = (distance >= 0) & (distance < window) & written[:, None]  # [R,T,S]
        visible = jnp.tile(visible, (1, groups, 1))[:, None]  # [R,1,G·T,S]
        ids = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        tokens = jnp.where(written[:, None, :, None], _collect(pages, scales, ids), 0.0)
        scores = jnp.einsum("RKMH,RKSH->RKMS", q, tokens, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, scores, MASKED)
        new = jnp.maximum(row_max, scores.max(axis=-1))
        p = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
        shrink = jnp.exp(row_max - new)
        block_out = jnp.einsum("RKMS,RKSH->RKMH", p, tokens, preferred_element_type=jnp.float32)
        return new, total * shrink + p.sum(axis=-1), out * shrink[..., None] + block_out

    earliest = jnp.where(lengths > 0, start - window + 1, lengths.max()).min()
    blocks = jnp.maximum(earliest, 0) // size, (lengths.max() + size - 1) // size
    zeros = jnp.zeros(q.shape[:3])
    state = jnp.full_like(zeros, MASKED), zeros, jnp.zeros(q.shape)
    row_max, total, out = jax.lax.fori_loop(*blocks, block, state)
    some = total > 0
    lse = jnp.where(some, row_max + jnp.log(jnp.where(some, total, 1.0)), MASKED)
    out = out[..., width:] / jnp.where(some, total, 1.0)[..., None]
    out = out.reshape(requests, heads, q_len, width).swapaxes(1, 2)
    return out, lse.reshape(requests, heads, q_len)


def _collect(pages, scales, ids):
    """Gathers the tokens of some pages, key and value side by side, dequantised.

    Each page of each head is one contiguous copy.

    Args:
      pages: [P, K, page, 2H].
      scales: float32 [P, K, 4, page] or None.
      ids: page ids, int32 [R, C].

    Returns:
      float32 [R, K, C·page, 2H].
    """
    requests, columns = ids.shape
    _, kv_heads, page, width = pages.shape
    at = ids[:, None, :], jnp.arange(kv_heads)[None, :, None]
    tokens = pages.at[at].get(mode="promise_in_bounds").astype(jnp.float32)
    if scales is not None:
        k_scale, k_zero, v_scale, v_zero = jnp.moveaxis(
            scales.at[at].get(mode="promise_in_bounds"), 3, 0
        )
        # As `dequantise`, for key and value side by side.
        sides = [(k_scale, k_zero), (v_scale, v_zero)]
        factor, zero = (jnp.stack(x, axis=-1) for x in zip(*sides, strict=True))
        tokens = tokens.reshape(*tokens.shape[:-1], 2, width // 2)
        tokens = factor[..., None] * (tokens - zero[..., None])
    return tokens.reshape(requests, kv_heads, columns * page, width)


def append(
    cache: PagedCache,
    k_new: jax.Array,
    v_new: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    counts: jax.Array | None = None,
) -> PagedCache:
    """Writes new tokens of all layers into their pages; donate the cache to update it in place.

    On TPU, a kernel writes (`kernels.tpu.paged_append`) if it supports the cache, since the
    compiler may copy the entire cache for the scatter that is used otherwise.

    Args:
      cache: cache to write to.
      k_new: keys [L, R, T, K, H] of L layers, R requests, T tokens, K kv heads; token t of request
        r is written to slot lengths[r] + t.
      v_new: values [L, R, T, K, H].
      page_table: int32 [R, pages per request], with an unshared page for every slot that is
        written.
      lengths: tokens of each request in the cache before, int32 [R].
      counts: how many of the T tokens of each request to write, int32 [R]; None: all.

    Returns:
      The cache with the tokens. Tokens beyond the end of the page table are dropped.
    """
    if counts is None:
        counts = jnp.full_like(lengths, k_new.shape[2])
    write = _scatter
    if platform()[0] == "tpu":
        kernel = importlib.import_module("qwen_jax.kernels.tpu.paged_append")
        unsupported_reason = kernel.unsupported_reason(cache)
        write = _scatter if unsupported_reason else kernel.paged_append
        log_choice(
            "paged attention",
            "auto",
            "append by " + ("scatter" if unsupported_reason else "kernel"),
            unsupported_reason or "on tpu",
        )

    def on_device(cache, k_new, v_new, page_table, lengths, counts):
        """Writes one device's tokens."""
        counts = jnp.minimum(counts, page_table.shape[1] * cache.page_size - lengths)
        if not cache.quantised:
            tokens = jnp.concatenate([k_new, v_new], axis=-1).astype(cache.pages.dtype)
            return write(cache, tokens, None, page_table, lengths, counts)
        (k_codes, *k_scales), (v_codes, *v_scales) = quantise(k_new), quantise(v_new)
        tokens = jnp.concatenate([k_codes, v_codes], axis=-1)
        scales = jnp.stack([*k_scales, *v_scales], axis=-1)
        return write(cache, tokens, scales, page_table, lengths, counts)

    operands = (cache, k_new, v_new, page_table, lengths, counts)
    if not on_mesh():
        return on_device(*operands)
    new, rows = spec(None, "batch", None, "kv_heads", None), spec("batch")
    in_specs = (spec(*AXES), new, new, spec("batch", None), rows, rows)
    with jax.named_scope("paged_append"):
        return jax.shard_map(on_device, in_specs=in_specs, out_specs=spec(*AXES), check_vma=False)(
            *operands
        )


def _scatter(cache, tokens, scales, page_table, lengths, counts) -> PagedCache:
    """Writes tokens into their slots by a scatter.

    Args:
      cache: cache to write to.
      tokens: keys and values side by side in the pages' dtype, [L, R, T, K, 2H].
      scales: float32 [L, R, T, K, 4] for an 8-bit cache, else None.
      page_table: int32 [R, pages per request].
      lengths: tokens of each request in the cache before, int32 [R].
      counts: how many of the T tokens to write, int32 [R].
    """
    steps = jnp.arange(tokens.shape[2], dtype=jnp.int32)
    slots = lengths[:, None] + steps
    ids = jnp.take_along_axis(page_table, slots // cache.page_size, axis=1, mode="clip")
    # Ids past the last page are dropped.
    ids = jnp.where(steps < counts[:, None], ids, cache.pages.shape[1]).reshape(-1)
    offsets = (slots % cache.page_size).reshape(-1)

    def scatter(into, new):
        """Writes [L, R, T, K, ·] into pages whose axis 3 is the token."""
        layers, requests, steps, kv_heads, width = new.shape
        new = new.reshape(layers, requests * steps, kv_heads, width).swapaxes(0, 1)
        return into.at[:, ids, :, offsets].set(new, mode="drop")

    pages = scatter(cache.pages, tokens)
    if scales is None:
        return PagedCache(pages)
    return PagedCache(pages, scatter(cache.scales.swapaxes(3, 4), scales).swapaxes(3, 4))
