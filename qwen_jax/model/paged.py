"""The network over a paged cache: prompts, packed side by side, and one token for each request.

The cache is only read while the layers run; what they computed is written afterwards, all layers at
once. Written inside the scan over layers, the compiler would copy it (`kernels.paged`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels import PagedCache, append, attention, paged_attention
from qwen_jax.kernels.cache import as_stored, read_pages
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
    past_pages: jax.Array,
    past_segments: jax.Array,
    config: ModelConfig,
    options: ForwardOptions,
    ntk_alpha: jax.Array | None,
) -> tuple[jax.Array, PagedCache]:
    """Runs chunks of prompts, packed one after the other, and writes them into their pages.

    What a prompt has in the cache already is whole pages, and its chunk begins on a page border of
    the packed tokens too; the rest of its last page is padding. With sliding windows in the model,
    at most one prompt has a past, its chunk comes first and its past ends at the end of
    `past_pages`: windows are measured along the row of past and new tokens.

    Args:
      tokens, positions: int32 [T]; positions count from the beginning of each prompt.
      segments: int32 [T], which prompt a token belongs to, ascending from 1; 0 is padding.
      cache: all layers.
      new_pages: int32 [T/page], where each page of new tokens is written; those to be written come
        first, and ids from the number of pages on mean nowhere.
      past_pages, past_segments: int32 [M], pages that prompts have already, and whose (0: no
        one's); prompts ascend, and a prompt's pages are in their order.
      ntk_alpha: float32 [T,W] (`rope.ntk_alphas` of each token's prompt), or None.

    Returns:
      ([T,D] after the final norm, the cache with the tokens in it).
    """
    size = cache.page_size
    past = past_pages.shape[0] * size
    k_segments = jnp.concatenate([jnp.repeat(past_segments, size), segments])

    def attend(q, k, v, window, layer, key):
        del key
        k, v = as_stored(k, cache), as_stored(v, cache)
        keys, values = k, v
        if past:
            old_k, old_v = read_pages(cache, layer, past_pages, k.dtype)
            keys, values = (jnp.concatenate(x, axis=1) for x in ((old_k, k), (old_v, v)))
        out = attention(
            *(q, keys, values),
            q_segments=segments[None],
            k_segments=k_segments[None],
            q_start=jnp.full((1,), past, jnp.int32) if past else None,
            window=window,
            implementation=options.attention,
        )
        return out, (k, v)

    x, (k, v) = network(
        *(params, tokens[None], positions[None], config, options, attend),
        per_layer=jnp.arange(config.n_layers),
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
    """Runs the newest token of each request and writes it into its page.

    Args:
      tokens: int32 [R], not in the cache yet.
      cache: all layers.
      page_table: int32 [R, pages a request]; lengths: int32 [R], tokens of each in the cache.
      alive: bool [R]; of the others nothing is written, and their result means nothing.
      ntk_alpha: float32 [R,W] (`rope.ntk_alphas` of each request's prompt), or None.

    Returns:
      ([R,D] after the final norm, the cache with the tokens in it).
    """
    lengths = jnp.where(alive, lengths, 0)

    def attend(q, k, v, window, layer, key):
        del key
        k, v = as_stored(k, cache), as_stored(v, cache)
        how = {"layer": layer, "window": window, "k_new": k, "v_new": v}
        return paged_attention(q, cache, page_table, lengths, **how)[0], (k, v)

    x, (k, v) = network(
        *(params, tokens[:, None], lengths[:, None], config, options, attend),
        per_layer=jnp.arange(config.n_layers),
        ntk_alpha=None if ntk_alpha is None else ntk_alpha[:, None],
        logn=config.logn,
    )
    # What is written must follow from what the last layer read. Otherwise the compiler may put the
    # write before that read, and a copy of the whole cache between them. So a row that diverged
    # writes nothing.
    ok = alive & jnp.isfinite(x[:, 0]).all(axis=-1)
    return x[:, 0], append(cache, k, v, page_table, lengths, ok.astype(jnp.int32))
