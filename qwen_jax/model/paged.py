"""The network over a paged KV cache: packed prompt chunks, and one new token per request.

The cache is only read while the layers run; all layers' new keys and values are written afterwards
at once. Written inside the scan over layers, the compiler would copy the cache (`kernels.paged`).

Letters in shapes: T token slots, M cached pages, R requests, D hidden size, W distinct windows of
the model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import PagedCache, append, attention, paged_attention
from qwen_jax.kernels.cache import read_pages, round_trip
from qwen_jax.model.attend import LayerContext
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.options import ForwardOptions
from qwen_jax.model.transformer import Params, network


def prefill(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    cache: PagedCache,
    new_pages: jax.Array,
    cached_pages: jax.Array,
    cached_segments: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    ntk_alpha: jax.Array | None,
) -> tuple[jax.Array, PagedCache]:
    """Computes chunks of prompts, packed one after the other, and writes them to their pages.

    The part of a prompt that is in the cache consists of full pages, and its chunk begins at a page
    boundary of the packed tokens; the rest of its last page is padding. With sliding windows in the
    model, at most one prompt may have cached pages; its chunk is the first, and its cached pages
    end at the end of `cached_pages`: windows are measured along the row of cached and new tokens.

    Args:
      params: weights of `config`.
      tokens: int32 [T], token ids.
      positions: int32 [T], positions from the beginning of each prompt.
      segments: int32 [T], number of the prompt of each token, ascending from 1; 0 is padding.
      cache: keys and values of all layers.
      new_pages: int32 [T / page size], page to which each page of new tokens is written, those to
        be written first; ids ≥ the number of pages are dropped.
      cached_pages: int32 [M], pages that prompts have in the cache; prompts ascending, a prompt's
        pages in sequence order.
      cached_segments: int32 [M], number of the prompt of each cached page; 0 for none.
      config: the model.
      options: dtype and attention implementation.
      ntk_alpha: float32 [T, W] (`rope.ntk_alphas` of each token's prompt), or None.

    Returns:
      (hidden states after the final norm [T, D], the cache with the new tokens).
    """
    size = cache.page_size
    past = cached_pages.shape[0] * size
    k_segments = jnp.concatenate([jnp.repeat(cached_segments, size), segments])

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        k, v = round_trip(k, cache), round_trip(v, cache)
        keys, values = k, v
        if past:
            old_k, old_v = read_pages(cache, layer.state, cached_pages, k.dtype)
            keys = jnp.concatenate((old_k, k), axis=1)
            values = jnp.concatenate((old_v, v), axis=1)
        out = attention(
            q,
            keys,
            values,
            q_segments=segments[None],
            k_segments=k_segments[None],
            q_start=jnp.full((1,), past, jnp.int32) if past else None,
            window=layer.window,
            implementation=options.attention,
        )
        return out, (k, v)

    x, (k, v) = network(
        params,
        tokens[None],
        positions[None],
        config,
        options,
        attend,
        layer_state=jnp.arange(config.n_layers),
        ntk_alpha=None if ntk_alpha is None else ntk_alpha[None],
        logn=config.logn,
    )
    written = (new_pages < cache.pages.shape[1]).sum(dtype=jnp.int32)[None] * size
    cache = append(cache, k, v, new_pages[None], jnp.zeros_like(written), written)
    return x[0], cache


def decode(
    params: Params,
    tokens: jax.Array,
    cache: PagedCache,
    page_table: jax.Array,
    lengths: jax.Array,
    alive: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    ntk_alpha: jax.Array | None,
) -> tuple[jax.Array, PagedCache]:
    """Computes the newest token of each request and writes it to its page.

    Args:
      params: weights of `config`.
      tokens: int32 [R], the newest tokens, not in the cache yet.
      cache: keys and values of all layers.
      page_table: int32 [R, pages per request].
      lengths: int32 [R], tokens of each request in the cache.
      alive: bool [R]; nothing is written for other rows, and their result is undefined.
      config: the model.
      options: dtype and attention implementation.
      ntk_alpha: float32 [R, W] (`rope.ntk_alphas` of each request's prompt), or None.

    Returns:
      (hidden states after the final norm [R, D], the cache with the tokens).
    """
    lengths = jnp.where(alive, lengths, 0)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        k, v = round_trip(k, cache), round_trip(v, cache)
        how = {"layer": layer.state, "window": layer.window, "k_new": k, "v_new": v}
        return paged_attention(q, cache, page_table, lengths, **how)[0], (k, v)

    x, (k, v) = network(
        params,
        tokens[:, None],
        lengths[:, None],
        config,
        options,
        attend,
        layer_state=jnp.arange(config.n_layers),
        ntk_alpha=None if ntk_alpha is None else ntk_alpha[:, None],
        logn=config.logn,
    )
    # The write must depend on what the last layer read. Otherwise the compiler may schedule it
    # before that read, with a copy of the whole cache in between. So a row with non-finite hidden
    # states writes nothing.
    ok = alive & jnp.isfinite(x[:, 0]).all(axis=-1)
    return x[:, 0], append(cache, k, v, page_table, lengths, ok.astype(jnp.int32))
