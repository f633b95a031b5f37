"""Paged KV cache in a float dtype or 8 bits: pages at any position, found through a page table.

Layout, one array for all layers: `[L, P, K, page, 2H]` (L layers, P pages, K kv heads, `page`
tokens per page, head dimension H), with the key and value of a token side by side.

- The tokens of a page are contiguous per kv head, so a page is copied in one long read, keys and
  values together, and tensor parallelism splits K.
- Side by side, heads of 64 fill the 128 lanes of a TPU; alone they would be padded to twice their
  size in memory and traffic. Heads of 128 are separated at a lane boundary, which costs nothing.
- Layers stay stacked. A kernel reads its pages directly from the complete array; if it got one
  layer's slice inside a scan, the compiler would copy that layer's cache first.

Scales of an 8-bit cache: float32 `[L, P, K, 4, page]` with rows `SCALE_ROWS` and tokens along the
lanes, so that they multiply scores and weights [queries, tokens] directly, never keys or values.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel import on_mesh, spec

PAGE_SIZE = 128
"""Default number of tokens per page: on TPU the scales of an 8-bit page then fill all lanes."""

SCALE_ROWS = ("k_scale", "k_zero", "v_scale", "v_zero")
"""Rows of `PagedCache.scales`."""

AXES = (None, "batch", "kv_heads", None, None)
"""Logical axes of pages and of scales."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys (after RoPE) and values of all requests, in pages.

    Shapes: L layers, P pages, K kv heads, `page` tokens per page, head dimension H, R requests.

    The caller decides which page has which tokens and passes a `page_table`, int32 [R, pages per
    request], whose entry (r, i) is the page of tokens i·page to (i+1)·page − 1 of request r, and
    `lengths`, int32 [R]. Pages may be in any order and may be shared; entries beyond a request's
    length are never read.

    On a mesh, pages are sharded over the batch axes as requests are, page ids are local to each
    device's shard, and kv heads are sharded over `tensor`.

    Attributes:
      pages: keys and values, concatenated on the last axis, [L, P, K, page, 2H]; a float dtype, or
        uint8 codes (see `quantise`).
      scales: scales and zeros of uint8 pages, float32 [L, P, K, 4, page] with rows `SCALE_ROWS`;
        None for a float dtype.
    """

    pages: jax.Array
    scales: jax.Array | None = None

    @property
    def page_size(self) -> int:
        """Returns the number of tokens per page."""
        return self.pages.shape[3]

    @property
    def head_dim(self) -> int:
        """Returns H, the dimension of a key and of a value."""
        return self.pages.shape[4] // 2

    @property
    def quantised(self) -> bool:
        """Returns whether the pages are 8-bit."""
        return self.scales is not None

    def token_bytes(self) -> int:
        """Returns the bytes of one token in one layer: keys, values and scales of all kv heads."""
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
    """Returns an empty cache.

    Args:
      layers: number of layers.
      pages: number of pages; on a mesh, of all devices together.
      kv_heads: number of kv heads.
      head_dim: dimension of a head.
      page_size: tokens per page.
      dtype: a float dtype, or uint8 for an 8-bit cache.

    Raises:
      UserError: a size is below 1, or the dtype is neither float nor uint8.
    """
    sizes = {"layers": layers, "pages": pages, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, size in (sizes | {"page_size": page_size}).items():
        if size < 1:
            raise UserError(f"{name} of a paged cache is {size}; it must be at least 1.")
    dtype = jnp.dtype(dtype)
    quantised = dtype == jnp.uint8
    if not quantised and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"The dtype of a paged cache is {dtype}; it must be a float dtype or uint8."
        )
    lead = (layers, pages, kv_heads)
    out = {"out_sharding": spec(*AXES)} if on_mesh() else {}
    scales = None
    if quantised:
        scales = jnp.zeros((*lead, len(SCALE_ROWS), page_size), jnp.float32, **out)
    return PagedCache(jnp.zeros((*lead, page_size, 2 * head_dim), dtype, **out), scales)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises vectors to 8 bits.

    The form of the released models (`use_cache_quantization` in their code): asymmetric, scale =
    (max − min) / 255, zero = −min / scale (a float), codes = x / scale + zero clamped to 0 … 255
    and truncated, so that an error is below one scale and towards min. Max and min are over one
    head of one token, as in the released code's decoding; for a prompt that code uses all tokens,
    which is coarser. A vector of equal numbers has scale 1.

    A thousandth of a code is added before truncation: the largest number is exactly at a boundary,
    and would otherwise be truncated up or down depending on the last bit of preceding products.

    Args:
      x: vectors [..., H].

    Returns:
      (codes uint8 [..., H], scale float32 [...], zero float32 [...]).
    """
    x = x.astype(jnp.float32)
    low, high = x.min(axis=-1), x.max(axis=-1)
    scale = jnp.where(high > low, (high - low) / 255, 1.0)
    zero = -low / scale
    codes = jnp.clip(x / scale[..., None] + zero[..., None] + 1e-3, 0, 255).astype(jnp.uint8)
    return codes, scale, zero


def dequantise(codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns scale · (codes − zero) in float32, with shapes as `quantise` returns them."""
    return scale[..., None] * (codes.astype(jnp.float32) - zero[..., None])


def round_trip(x: jax.Array, cache: PagedCache) -> jax.Array:
    """Returns keys or values as they would be read back from this cache, in x's dtype.

    If attention uses them before they are written, it thus computes with the same numbers as later
    attention, and results do not depend on how a prompt is divided into chunks.

    Args:
      x: keys or values [..., H].
      cache: cache that they are written to later.
    """
    if cache.quantised:
        return dequantise(*quantise(x)).astype(x.dtype)
    return x.astype(cache.pages.dtype).astype(x.dtype)


def read_pages(cache: PagedCache, layer: jax.Array, ids: jax.Array, dtype) -> tuple:
    """Reads keys and values of some pages of one layer.

    Args:
      cache: the cache.
      layer: index of the layer, int32 scalar; may be traced.
      ids: pages in the wanted order, int32 [M].
      dtype: dtype of the result.

    Returns:
      (keys, values), [1, M·page, K, H] each.
    """

    def read_local(cache, layer, ids):
        """Reads the pages of one device's kv heads."""

        def read_ids(x):  # [L,P,K,...] -> [K,M,...]
            """Returns pages `ids` of [L, P, K, …] as [K, M, …]."""
            flat = x.reshape(-1, *x.shape[2:])
            # One page at a time: for a gather, the TPU compiler would copy the entire cache.
            read_page = functools.partial(jax.lax.dynamic_index_in_dim, flat, keepdims=False)
            return jax.lax.map(read_page, layer * x.shape[1] + ids).swapaxes(0, 1)

        tokens, width = read_ids(cache.pages), cache.head_dim
        k, v = tokens[..., :width], tokens[..., width:]  # [K,M,page,H]
        if cache.quantised:
            k_scale, k_zero, v_scale, v_zero = jnp.moveaxis(read_ids(cache.scales), 2, 0)
            k, v = dequantise(k, k_scale, k_zero), dequantise(v, v_scale, v_zero)
        kv_heads = tokens.shape[0]
        return tuple(x.reshape(1, kv_heads, -1, width).swapaxes(1, 2).astype(dtype) for x in (k, v))

    layer = jnp.int32(layer)
    if not on_mesh():
        return read_local(cache, layer, ids)
    out = spec(None, None, "kv_heads", None)
    in_specs = (spec(*AXES), jax.P(), jax.P())
    shard_map = jax.shard_map(read_local, in_specs=in_specs, out_specs=(out, out), check_vma=False)
    return shard_map(cache, layer, ids)
