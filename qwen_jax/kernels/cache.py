"""A paged KV cache: pages anywhere in memory, found through a table; bf16, or 8 bits a number.

Layout, one array for all layers: `[L, P, K, page, 2H]`, a token's key and value side by side.

- A kv head's tokens of a page lie together, so one copy of a page is one long contiguous read, keys
  and values at once, and tensor parallelism splits K.
- Side by side, heads of 64 fill a TPU's 128 lanes; alone they would be padded to twice their size
  in memory and traffic. Heads of 128 are cut apart at a lane border, which costs nothing.
- Layers stay stacked. A kernel reads its pages straight out of the whole array; handed one layer's
  slice inside a scan, the compiler would first copy that layer's cache.

Scales of the 8-bit form: float32 `[L, P, K, 4, page]`, rows `SCALE_ROWS`, tokens along the lanes:
they multiply scores and weights [queries, tokens] as they are, never keys or values.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel import on_mesh, spec

PAGE_SIZE = 128
"""Tokens a page by default: on TPU the scales of an 8-bit page then fill whole lanes."""

SCALE_ROWS = ("k_scale", "k_zero", "v_scale", "v_zero")
"""Rows of `PagedCache.scales`."""

AXES = (None, "batch", "kv_heads", None, None)
"""Logical axes of pages and of scales."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys (after RoPE) and values of all requests, in pages.

    Which page holds what is the caller's: a `page_table` int32 [R, pages a request] whose entry
    (r, i) is the page of slots i·page … of request r, and `lengths` int32 [R]. Pages may lie in any
    order and be shared; entries past a request's length are never read.

    On a mesh the pages are split over the batch axes as the requests are, and ids count within a
    device's own part; kv heads are split over `tensor`.

    Attributes:
      pages: [L,P,K,page,2H], bf16 or another float dtype, or uint8; key first, then value.
      scales: float32 [L,P,K,4,page] with rows `SCALE_ROWS`, for uint8 pages; otherwise None.
    """

    pages: jax.Array
    scales: jax.Array | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.pages.shape[3]

    @property
    def head_dim(self) -> int:
        """H, the width of a key, and of a value."""
        return self.pages.shape[4] // 2

    @property
    def quantised(self) -> bool:
        """Whether the pages are 8-bit."""
        return self.scales is not None

    def token_bytes(self) -> int:
        """Bytes one token takes in one layer, keys, values and scales of all kv heads."""
        kv_heads, width = self.pages.shape[2], self.pages.shape[4]
        scales = 4 * len(SCALE_ROWS) if self.quantised else 0
        return kv_heads * (width * self.pages.dtype.itemsize + scales)


def init_paged_cache(
    layers: int,
    pages: int,
    kv_heads: int,
    head_dim: int,
    *,
    page_size: int = PAGE_SIZE,
    dtype=jnp.bfloat16,
) -> PagedCache:
    """An empty cache; dtype uint8 makes the 8-bit form. On a mesh, `pages` counts all devices'.

    Raises:
      UserError: a size below 1, or a dtype that is neither float nor uint8.
    """
    sizes = {"layers": layers, "pages": pages, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, size in (sizes | {"page_size": page_size}).items():
        if size < 1:
            raise UserError(f"A paged cache needs {name} of at least 1, not {size}.")
    dtype = jnp.dtype(dtype)
    quantised = dtype == jnp.uint8
    if not quantised and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"A paged cache holds a float dtype or uint8, not {dtype}.")
    lead = (layers, pages, kv_heads)
    out = {"out_sharding": spec(*AXES)} if on_mesh() else {}
    scales = None
    if quantised:
        scales = jnp.zeros((*lead, len(SCALE_ROWS), page_size), jnp.float32, **out)
    return PagedCache(jnp.zeros((*lead, page_size, 2 * head_dim), dtype, **out), scales)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., H] -> (codes uint8 [..., H], scale float32 [...], zero float32 [...]).

    The release's form (`use_cache_quantization` in its modelling code): asymmetric, scale =
    (max − min) / 255, zero = −min / scale (a float), codes = x / scale + zero clamped to 0 … 255
    and cut off to whole numbers, so an error is below one scale and towards min. Max and min are
    taken over one head of one token, as the release does in each decoding step; on a prompt it
    takes them over all its tokens, which is coarser. A vector of equal numbers has scale 1.

    A thousandth of a code is added before the cut: the largest number stands exactly on a border,
    and would fall to either side of it with the last bit of the products before.
    """
    x = x.astype(jnp.float32)
    low, high = x.min(axis=-1), x.max(axis=-1)
    scale = jnp.where(high > low, (high - low) / 255, 1.0)
    zero = -low / scale
    codes = jnp.clip(x / scale[..., None] + zero[..., None] + 1e-3, 0, 255).astype(jnp.uint8)
    return codes, scale, zero


def dequantise(codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """scale · (codes − zero), float32; shapes as `quantise` returns them."""
    return scale[..., None] * (codes.astype(jnp.float32) - zero[..., None])


def as_stored(x: jax.Array, cache: PagedCache) -> jax.Array:
    """Keys or values x [..., H] as they will be read back from this cache, in x's dtype.

    Attention that uses them before they are written then sees what later attention will see, and
    the result doesn't depend on where a prompt was cut.
    """
    if cache.quantised:
        return dequantise(*quantise(x)).astype(x.dtype)
    return x.astype(cache.pages.dtype).astype(x.dtype)


def read_pages(cache: PagedCache, layer: jax.Array, ids: jax.Array, dtype) -> tuple:
    """Keys and values of some pages of one layer, in a row: [1, M·page, K, H] each.

    Args:
      cache: all layers.
      layer: int32 scalar, may be traced.
      ids: int32 [M], pages in the order wanted.
      dtype: of the result.
    """

    def local(cache, layer, ids):
        def take(x):  # [L,P,K,...] -> [K,M,...]
            flat = x.reshape(-1, *x.shape[2:])
            # Page by page: for a gather, the TPU compiler first copies the whole cache.
            one = functools.partial(jax.lax.dynamic_index_in_dim, flat, keepdims=False)
            return jax.lax.map(one, layer * x.shape[1] + ids).swapaxes(0, 1)

        tokens, width = take(cache.pages), cache.head_dim
        k, v = tokens[..., :width], tokens[..., width:]  # [K,M,page,H]
        if cache.quantised:
            k_scale, k_zero, v_scale, v_zero = jnp.moveaxis(take(cache.scales), 2, 0)
            k, v = dequantise(k, k_scale, k_zero), dequantise(v, v_scale, v_zero)
        kv_heads = tokens.shape[0]
        return tuple(x.reshape(1, kv_heads, -1, width).swapaxes(1, 2).astype(dtype) for x in (k, v))

    layer = jnp.int32(layer)
    if not on_mesh():
        return local(cache, layer, ids)
    out = spec(None, None, "kv_heads", None)
    in_specs = (spec(*AXES), jax.P(), jax.P())
    shard_map = jax.shard_map(local, in_specs=in_specs, out_specs=(out, out), check_vma=False)
    return shard_map(cache, layer, ids)
