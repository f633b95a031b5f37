"""Paged caches at random, and what attention over them is, in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels.cache import PagedCache
from qwen_jax.kernels.mask import MASKED

NO_WINDOW = 2**30


def release_quantise(x):
    """The release's formula in numpy float32: codes, scale, zero over the last axis."""
    x = np.asarray(x, np.float32)
    low, high = x.min(-1), x.max(-1)
    scale = (high - low) / np.float32(255)
    zero = -low / scale
    codes = np.clip(x / scale[..., None] + zero[..., None], 0, 255).astype(np.uint8)
    return codes, scale, zero


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache of one layer, and queries; k and v float64 [R,S,K,H] are what lies in it."""

    q: np.ndarray
    cache: PagedCache
    table: np.ndarray
    lengths: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def flat(self):
        """(pages, scales, table, lengths) as a kernel takes them."""
        scales = None if self.cache.scales is None else self.cache.scales[0]
        return self.cache.pages[0], scales, jnp.asarray(self.table), jnp.asarray(self.lengths)

    def expected(self, *, merged=False, window=None):
        """(out, lse); merged: the queries come after the cache, not at its end."""
        start = self.lengths if merged else self.lengths - self.q.shape[1]
        return by_loops(self.q, self.k, self.v, start, self.lengths, window)


def make_case(
    lengths,
    *,
    dtype=jnp.bfloat16,
    kv_heads=2,
    groups=4,
    width=128,
    q_len=1,
    page=32,
    columns=4,
    layers=1,
    layer=0,
) -> Case:
    """Pages in random order; every slot that no request has holds nan, or random codes."""
    rng = np.random.default_rng(len(lengths) + width + q_len)
    requests = len(lengths)
    count = requests * columns + 3
    table = rng.permutation(count)[: requests * columns].reshape(requests, columns)
    # A page two requests share, where both have it whole.
    if requests > 2 and lengths[1] >= page and lengths[2] >= page:
        table[2, 0] = table[1, 0]
    k, v = rng.normal(size=(2, requests, columns * page, kv_heads, width))
    if requests > 2 and table[2, 0] == table[1, 0]:
        k[2, :page], v[2, :page] = k[1, :page], v[1, :page]
    quantised = jnp.dtype(dtype) == jnp.uint8
    pages = np.full((count, kv_heads, page, 2 * width), np.nan)
    scales = np.full((count, kv_heads, 4, page), np.nan, np.float32)
    if quantised:
        pages = rng.integers(0, 256, pages.shape).astype(np.uint8)
        parts = [release_quantise(x) for x in (k, v)]
        k, v = (s[..., None].astype(np.float64) * (c - z[..., None]) for c, s, z in parts)
        tokens = np.concatenate([parts[0][0], parts[1][0]], axis=-1)
        numbers = np.stack([parts[0][1], parts[0][2], parts[1][1], parts[1][2]], axis=-1)
    else:
        k, v = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (k, v))
        tokens = np.concatenate([k, v], axis=-1)
    for r, length in enumerate(lengths):
        for slot in range(length):
            at = table[r, slot // page], slice(None)
            pages[*at, slot % page] = tokens[r, slot]
            if quantised:
                scales[*at, :, slot % page] = numbers[r, slot]
        # Entries past the end are anything.
        table[r, -(-length // page) :] = 10**6
    q = rng.normal(size=(requests, q_len, kv_heads * groups, width))
    q = np.asarray(jnp.asarray(q, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16))

    def stack(x):
        others = [jnp.zeros_like(x)] * layers
        return jnp.stack([*others[:layer], x, *others[layer + 1 :]])

    pages = stack(jnp.asarray(pages, dtype))
    cache = PagedCache(pages, stack(jnp.asarray(scales)) if quantised else None)
    return Case(q, cache, table.astype(np.int32), np.array(lengths, np.int32), k, v)


def by_loops(q, k, v, start, lengths, window):
    """Float64, one query at a time: (out [R,T,N,H], lse [R,N,T])."""
    q = np.asarray(q, np.float64)
    requests, q_len, heads, width = q.shape
    out, lse = np.zeros(q.shape), np.full((requests, heads, q_len), MASKED)
    for r in range(requests):
        for t in range(q_len):
            slot = start[r] + t
            low = 0 if window is None else max(0, slot - window + 1)
            seen = slice(low, max(low, min(slot + 1, lengths[r])))
            for n in range(heads if seen.stop > seen.start else 0):
                kv = n // (heads // k.shape[2])
                scores = k[r, seen, kv] @ q[r, t, n] / np.sqrt(width)
                top = scores.max()
                weights = np.exp(scores - top)
                out[r, t, n] = weights @ v[r, seen, kv] / weights.sum()
                lse[r, n, t] = top + np.log(weights.sum())
    return out, lse


def check(got, expected, tolerance):
    """Compares (out, lse); the log-sum-exp, made before weights are rounded, more closely."""
    for x, y, bound in zip(got, expected, (tolerance, 1e-5), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=bound, atol=bound)
