"""Loss of one chunk of tokens and its gradients, against the columns that a device holds.

Two forms of the same three products. `whole` forms all the chunk's logits at once, which large
matrix units like. `tiled` goes through the columns twice, a tile at a time: everything that is done
to a logit is done while it lies in the cache, which CPUs need. Between the passes it keeps each
exponential, in the compute dtype, and never multiplies again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.products import accumulated, laid_out
from qwen_jax.train.vocab_split import VocabSplit

TILE = 1024
"""Columns of a tile in `tiled`: its float32 logits of 2,048 tokens are 8 MiB, within a CPU's last
cache."""

_NEVER = -1e30  # logit of a column that stands for no token


class _Settled(NamedTuple):
    """What is known of a chunk once all devices have merged their columns; float32 [C]."""

    sums: tuple[jax.Array, jax.Array]  # scalars: Σ objective, Σ nll
    highest: jax.Array  # logit
    softmax_scale: jax.Array  # d objective/d logit = softmax_scale·exp(logit − highest) …
    at_target: jax.Array  # … but this at the target


def _settle(own_highest, own_total, own_target, weights, z_loss, split: VocabSplit) -> _Settled:
    highest, total, target_logit = split.merge(own_highest, own_total, own_target)
    lse = jnp.log(total) + highest
    nll = lse - target_logit
    objective = nll + z_loss * jnp.square(lse)
    # d nll/d logits = softmax − onehot;  d lse²/d logits = 2·lse·softmax
    slope = weights * (1.0 + 2.0 * z_loss * lse)
    sums = (jnp.sum(weights * objective), jnp.sum(weights * nll))
    return _Settled(sums, highest, slope / total, slope * jnp.exp(-nll) - weights)


def _own(targets, split: VocabSplit):
    """(each target among this device's columns, −1 where it is elsewhere; how many are real)."""
    first, real = split.first_column()
    local = targets - first
    return jnp.where((local >= 0) & (local < real), local, -1), real


def whole(h, kernel, d_kernel, targets, weights, z_loss: float, split: VocabSplit):
    """All logits of the chunk at once.

    Args:
      h: [C,D] in the compute dtype. kernel: [D,columns] of this device, in the compute dtype.
      d_kernel: its gradient so far, float32 [D,columns]; None: make no gradients.
      targets: int32 [C], vocabulary indices. weights: float32 [C].

    Returns:
      ((Σ objective, Σ nll), d_h float32 [C,D] of these columns or None, d_kernel).
    """
    own, real = _own(targets, split)
    columns = jnp.arange(kernel.shape[-1], dtype=jnp.int32)
    logits = accumulated("CD,DV->CV", h, kernel)
    if split.padding:
        logits = jnp.where(columns < real, logits, _NEVER)
    is_target = own[:, None] == columns
    own_highest = logits.max(axis=-1)
    exp = jnp.exp(logits - own_highest[:, None])
    target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    settled = _settle(own_highest, exp.sum(axis=-1), target_logit, weights, z_loss, split)
    if d_kernel is None:
        return settled.sums, None, None
    scale = settled.softmax_scale * jnp.exp(own_highest - settled.highest)
    d_logits = exp * scale[:, None] - jnp.where(is_target, weights[:, None], 0.0)
    # Made once and read twice: fused into both products, the exponentials are taken per tile.
    d_logits = jax.lax.optimization_barrier(d_logits.astype(h.dtype))
    d_h = accumulated("CV,DV->CD", d_logits, kernel)
    return settled.sums, d_h, d_kernel + accumulated("CD,CV->DV", h, d_logits)


def tiled(h, kernel, d_kernel, targets, weights, z_loss: float, split: VocabSplit):
    """As `whole`, `TILE` columns at a time; the kernel may be float32, tiles of it are cast."""
    own, real = _own(targets, split)
    width = kernel.shape[-1]
    tile = min(TILE, width)

    def columns(i):
        """(first column of tile i, its kernel [D,tile], which columns no other tile has [tile])."""
        start = jnp.minimum(i * tile, width - tile)  # the last one overlaps the one before it
        index = start + jnp.arange(tile, dtype=jnp.int32)
        part = jax.lax.dynamic_slice_in_dim(kernel, start, tile, 1).astype(h.dtype)
        return start, part, (index >= i * tile) & (index < real)

    def forward(carry, i):
        highest, total, target_logit = carry
        start, part, counts = columns(i)
        logits = jnp.where(counts, accumulated("CD,DV->CV", h, part), _NEVER)
        new = jnp.maximum(highest, logits.max(axis=-1))
        exp = jnp.exp(logits - new[:, None])
        here = (own >= i * tile) & (own < start + tile)
        place = jnp.where(here, own - start, 0)[:, None]
        logit = jnp.take_along_axis(logits, place, axis=1)[:, 0]
        target_logit = jnp.where(here, logit, target_logit)
        total = total * jnp.exp(highest - new) + exp.sum(axis=-1)
        kept = None if d_kernel is None else (exp.astype(h.dtype), new)
        return (new, total, target_logit), kept

    tiles = jnp.arange(-(-width // tile), dtype=jnp.int32)
    zero = jnp.zeros(targets.shape, jnp.float32)
    stats, kept = jax.lax.scan(forward, (zero + _NEVER, zero, zero), tiles)
    settled = _settle(*stats, weights, z_loss, split)
    if d_kernel is None:
        return settled.sums, None, None
    across = laid_out(h, "CD", "DC")

    def backward(carry, scanned):
        d_h, d_kernel = carry
        i, (exp, highest) = scanned
        start, part, counts = columns(i)
        scale = settled.softmax_scale * jnp.exp(highest - settled.highest)
        index = start + jnp.arange(tile, dtype=jnp.int32)
        is_target = (own[:, None] == index) & counts
        d_logits = jnp.where(is_target, settled.at_target[:, None], exp * scale[:, None])
        d_logits = jax.lax.optimization_barrier(d_logits.astype(h.dtype))
        d_h += accumulated("CV,DV->CD", d_logits, part)
        old = jax.lax.dynamic_slice_in_dim(d_kernel, start, tile, 1)
        new = old + accumulated("DC,CV->DV", across, d_logits)
        return (d_h, jax.lax.dynamic_update_slice_in_dim(d_kernel, new, start, 1)), None

    start = (jnp.zeros(h.shape, jnp.float32), d_kernel)
    (d_h, d_kernel), _ = jax.lax.scan(backward, start, (tiles, kept))
    return settled.sums, d_h, d_kernel


FORMS = {"cpu": tiled}
"""The form of each platform where it is not `whole`."""
