"""`paged_attention(...)` and `append(...)`: decoding over a paged cache, dispatched out loud."""

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
"""Most query tokens a request for the kernels: one, or a few when a draft is verified."""

_MODULES = {
    "pallas_tpu": "qwen_jax.kernels.tpu.paged_decode",
    "pallas_gpu": "qwen_jax.kernels.gpu.paged_decode",
}
_BLOCK = 128
"""Tokens of each request that the plain form looks at in one go."""

_NO_WINDOW = 2**30
"""A window that no cache fills, so that one kernel serves layers with and without."""


def choose_paged_attention(
    requested: str, cache: PagedCache, *, q_len: int, heads: int, entries: int
) -> str:
    """Resolves `auto` and refuses what can't run; logs each choice once.

    q_len query tokens a request, `heads` query heads a kv head, `entries` of a device's page table.

    Raises:
      UserError: unknown name, a kernel on another platform than its own, or a request that the
        kernel can't serve, with the reason.
    """

    def refusal(module):
        return module.unsupported_reason(cache, q_len=q_len, heads=heads, entries=entries)

    return choose_implementation("paged attention", requested, platform()[0], _MODULES, refusal)


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
    """Causal grouped-query attention of a few new tokens over one layer of a paged cache.

    Two ways to use it. Without `k_new`, the new tokens are in the cache already: the last query
    stands in the last slot, `lengths` − 1. With it, they are not: query t stands in slot lengths
    + t, and the new keys are merged in by their log-sum-exp. The cache is then only read inside a
    scan over layers, and all layers are written at once afterwards (`append`); written inside, the
    compiler would copy it.

    Args:
      q: [R,T,N,H], T new tokens of each of R requests (1, or a few when a draft is verified);
        N a multiple of the cache's K.
      cache: all layers.
      page_table: int32 [R, pages a request]; lengths: int32 [R], tokens of each in the cache.
      layer: which layer, 0-based; may be traced.
      k_new, v_new: [R,T,K,H], keys and values of the new tokens, both or neither. They are taken
        as they are, also beside an 8-bit cache.
      window: a query sees at most this many slots, its own included; None: all. May be traced.
      scale: factor on q·k, 1/√H by default.
      implementation: one of `selection.IMPLEMENTATIONS`.

    Returns:
      (out [R,T,N,H] in q's dtype, lse float32 [R,N,T], natural log). A query that sees no key has
      out 0 and lse `MASKED`: an idle request has length 0.

    Raises:
      UserError: shapes that don't fit, or as `choose_paged_attention`.
    """
    _check(q, cache, page_table, lengths, k_new, v_new)
    chosen = choose_paged_attention(
        *(implementation, cache),
        q_len=q.shape[1],
        heads=q.shape[2] // cache.pages.shape[2],
        entries=page_table.size // (batch_devices(current_mesh()) if on_mesh() else 1),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = jnp.int32(_NO_WINDOW if window is None else window)
    local = functools.partial(_local, scale=scale, chosen=chosen)
    operands = (q, cache, page_table, lengths, jnp.int32(layer), window, k_new, v_new)
    if not on_mesh():
        return local(*operands)
    queries, rows = spec("batch", None, "heads", None), spec("batch")
    new = spec("batch", None, "kv_heads", None)
    in_specs = (queries, spec(*AXES), spec("batch", None), rows, jax.P(), jax.P(), new, new)
    out_specs = (queries, spec("batch", "heads", None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def _check(q, cache, page_table, lengths, k_new, v_new) -> None:
    requests, q_len, heads, width = q.shape
    kv_heads = cache.pages.shape[2]
    if width != cache.head_dim:
        raise UserError(
            f"Queries have heads of {width} and the cache's have {cache.head_dim}; they must agree."
        )
    if heads % kv_heads:
        raise UserError(
            f"{heads} query heads can't share the cache's {kv_heads} kv heads evenly; make the "
            "number of query heads a multiple of it."
        )
    if page_table.shape[0] != requests or lengths.shape != (requests,):
        raise UserError(
            f"A page table {page_table.shape} and lengths {lengths.shape} don't describe "
            f"{requests} requests; give one row and one length for each."
        )
    if (k_new is None) != (v_new is None):
        raise UserError("k_new and v_new go together; give both or neither.")
    if k_new is not None and k_new.shape != (requests, q_len, kv_heads, width):
        raise UserError(
            f"New keys are {k_new.shape}; for these queries and this cache they must be "
            f"{(requests, q_len, kv_heads, width)}."
        )


def _local(q, cache, page_table, lengths, layer, window, k_new, v_new, *, scale, chosen):
    """One device's part: the kernel over the cache, then the new tokens merged in."""
    layers, pages = cache.pages.shape[:2]
    # Layers and pages as one axis: a kernel sees pages only, and their ids say the layer.
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


def _softmax(scores, seen, values):
    """(out float32 [R,T,N,H], lse float32 [R,N,T]); scores, seen [R,K,G,T,S], values [R,S,K,H]."""
    scores = jnp.where(seen, scores, MASKED)
    highest = scores.max(axis=-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(scores - highest), 0.0)
    total = p.sum(axis=-1, keepdims=True)
    some = total > 0
    lse = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), MASKED)[..., 0]
    p = p / jnp.where(some, total, 1.0)
    out = jnp.einsum("RKGTS,RSKH->RTKGH", p, values, preferred_element_type=jnp.float32)
    requests, kv_heads, groups, q_len = lse.shape
    heads = kv_heads * groups
    return out.reshape(requests, q_len, heads, -1), lse.reshape(requests, heads, q_len)


def _scores(q, k, scale):
    """float32 [R,K,G,T,S] from q [R,T,N,H] and k [R,S,K,H]."""
    requests, q_len, _, width = q.shape
    q = q.reshape(requests, q_len, k.shape[2], -1, width).astype(jnp.float32)
    return jnp.einsum("RTKGH,RSKH->RKGTS", q, k, preferred_element_type=jnp.float32) * scale


def _new_tokens(q, k_new, v_new, window, scale):
    """Attention of the new tokens among themselves, as `decode` returns it."""
    steps = jnp.arange(q.shape[1])
    distance = steps[:, None] - steps
    seen = (distance >= 0) & (distance < window)
    scores = _scores(q, k_new.astype(jnp.float32), scale)
    return _softmax(scores, seen, v_new.astype(jnp.float32))


def _reference(q, pages, scales, page_table, lengths, start, window, *, scale):
    """What every kernel is judged by, in plain jnp: some pages of every request at a time.

    Nothing is collected past the longest request or before the earliest window. The contract of a
    kernel, on device-local arrays:

    Args:
      q: [R,T,N,H].
      pages: [P,K,page,2H]; scales: float32 [P,K,4,page] for uint8 pages, else None.
      page_table: int32 [R, pages a request]; entries past a request's length are arbitrary.
      lengths: int32 [R], tokens in the cache.
      start: int32 [R], slot of the first query; negative for an idle request.
      window: int32 scalar.
      scale: factor on q·k.

    Returns:
      (out float32 [R,T,N,H], lse float32 [R,N,T]); 0 and `MASKED` where no key is seen.
    """
    requests, q_len, heads, width = q.shape
    _, kv_heads, page, _ = pages.shape
    columns = max(1, min(page_table.shape[1], _BLOCK // page))
    size = columns * page
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % columns)))
    table = jnp.clip(table, 0, pages.shape[0] - 1)
    # [R,K,G·T,2H] with zeros where the value lies: keys and values are never cut apart.
    q = q.reshape(requests, q_len, kv_heads, -1, width).astype(jnp.float32) * scale
    q = jnp.moveaxis(q, 1, 3).reshape(requests, kv_heads, -1, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width)))
    groups = heads // kv_heads
    q_slots = start[:, None] + jnp.arange(q_len)

    def block(i, state):
        highest, total, out = state
        slots = i * size + jnp.arange(size)
        # Slots nobody wrote hold whatever was there: never let it into a product.
        written = slots < lengths[:, None]  # [R,S]
        distance = q_slots[:, :, None] - slots
        seen = (distance >= 0) & (distance < window) & written[:, None]  # [R,T,S]
        seen = jnp.tile(seen, (1, groups, 1))[:, None]  # [R,1,G·T,S]
        ids = jax.lax.dynamic_slice_in_dim(table, i * columns, columns, axis=1)
        tokens = jnp.where(written[:, None, :, None], _collect(pages, scales, ids), 0.0)
        scores = jnp.einsum("RKMH,RKSH->RKMS", q, tokens, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(highest, scores.max(axis=-1))
        p = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
        shrink = jnp.exp(highest - new)
        added = jnp.einsum("RKMS,RKSH->RKMH", p, tokens, preferred_element_type=jnp.float32)
        return new, total * shrink + p.sum(axis=-1), out * shrink[..., None] + added

    earliest = jnp.where(lengths > 0, start - window + 1, lengths.max()).min()
    blocks = jnp.maximum(earliest, 0) // size, (lengths.max() + size - 1) // size
    zeros = jnp.zeros(q.shape[:3])
    state = jnp.full_like(zeros, MASKED), zeros, jnp.zeros(q.shape)
    highest, total, out = jax.lax.fori_loop(*blocks, block, state)
    some = total > 0
    lse = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), MASKED)
    out = out[..., width:] / jnp.where(some, total, 1.0)[..., None]
    out = out.reshape(requests, heads, q_len, width).swapaxes(1, 2)
    return out, lse.reshape(requests, heads, q_len)


def _collect(pages, scales, ids):
    """Tokens of pages ids int32 [R,C], key and value side by side: float32 [R,K,C·page,2H].

    Each page of each head is one long piece of memory, and comes to lie beside its successor.
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
    """Writes new tokens of all layers into their pages; donate the cache to do it in place.

    On TPU a kernel writes (`kernels.tpu.append`) where the cache suits it, because the compiler may
    copy the whole cache for the scatter that is used elsewhere.

    Args:
      cache: to write into.
      k_new, v_new: [L,R,T,K,H]; token t of request r goes to slot lengths[r] + t.
      page_table: int32 [R, pages a request], with a page of its own for every slot written.
      lengths: int32 [R], tokens in the cache before.
      counts: int32 [R], how many of the T tokens are real (None: all). 0 leaves a request alone.

    Returns:
      the cache with the tokens in it. Slots past the end of the page table are dropped.
    """
    if counts is None:
        counts = jnp.full_like(lengths, k_new.shape[2])
    write = _scatter
    if platform()[0] == "tpu":
        kernel = importlib.import_module("qwen_jax.kernels.tpu.paged_append")
        refusal = kernel.unsupported_reason(cache)
        write = _scatter if refusal else kernel.paged_append
        log_choice(
            "paged attention",
            "auto",
            "append by " + ("scatter" if refusal else "kernel"),
            refusal or "on tpu",
        )

    def local(cache, k_new, v_new, page_table, lengths, counts):
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
        return local(*operands)
    new, rows = spec(None, "batch", None, "kv_heads", None), spec("batch")
    in_specs = (spec(*AXES), new, new, spec("batch", None), rows, rows)
    with jax.named_scope("paged_append"):
        return jax.shard_map(local, in_specs=in_specs, out_specs=spec(*AXES), check_vma=False)(
            *operands
        )


def _scatter(cache, tokens, scales, page_table, lengths, counts) -> PagedCache:
    """tokens [L,R,T,K,2H] in the pages' dtype, scales [L,R,T,K,4] or None, into their slots."""
    steps = jnp.arange(tokens.shape[2], dtype=jnp.int32)
    slots = lengths[:, None] + steps
    ids = jnp.take_along_axis(page_table, slots // cache.page_size, axis=1, mode="clip")
    # Ids past the last page are dropped.
    ids = jnp.where(steps < counts[:, None], ids, cache.pages.shape[1]).reshape(-1)
    offsets = (slots % cache.page_size).reshape(-1)

    def put(into, new):
        layers, requests, steps, kv_heads, width = new.shape
        new = new.reshape(layers, requests * steps, kv_heads, width).swapaxes(0, 1)
        return into.at[:, ids, :, offsets].set(new, mode="drop")

    pages = put(cache.pages, tokens)
    if scales is None:
        return PagedCache(pages)
    return PagedCache(pages, put(cache.scales.swapaxes(3, 4), scales).swapaxes(3, 4))
