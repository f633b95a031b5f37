"""Attention mask (causal by slot, segments, window) and the blocks of it that kernels can skip.

All implementations use this one definition. All arrays are local to one device. Shapes: B batch
rows, T queries, S keys; a slot is the position of a token in its sequence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a masked pair, and log-sum-exp of a query without visible keys.

Large enough that exp underflows to 0 in float32, small enough that differences stay finite.
"""

_NO_ID = 2**31 - 1
"""Segment id larger than any real one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Attention mask: query t of batch row b has slot q_start[b] + t and sees keys up to that slot.

    Segments and a window restrict what is visible further. Shapes: B batch rows, T queries, S keys.

    Attributes:
      q_start: slot of the first query among the keys, int32 [B]; None: 0, known at compile time.
      q_segments: segment id of each query, int32 [B, T], or None. A query sees only keys of its own
        segment; segment 0 is padding and never visible. Ids may be in any order, but blocks are
        skipped tightly only where ids ascend, as they do in packed rows.
      k_segments: segment id of each key, int32 [B, S]; None exactly if `q_segments` is.
      layer_window: window as an int32 scalar array, for windows that differ between the layers of a
        scan; None if `window` is given or there is no window.
      window: window known at compile time: a query sees at most this many slots, its own included;
        None: no window, or `layer_window` is given.
    """

    q_start: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    layer_window: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def any_window(self) -> jax.Array | int | None:
        """Returns the window, static or traced, or None if there is none."""
        return self.window if self.layer_window is None else self.layer_window


def make_mask(
    q_start: jax.Array | None,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
) -> Mask:
    """Returns a `Mask` from the arguments of `dispatch.attention` of the same names.

    An int window becomes the static `Mask.window`, an array becomes `Mask.layer_window`.
    """
    static, traced = (window, None) if window is None or isinstance(window, int) else (None, window)
    return Mask(
        q_start=q_start,
        q_segments=q_segments,
        k_segments=k_segments,
        layer_window=traced,
        window=static,
    )


def visible(
    q_slots: jax.Array,
    k_slots: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
) -> jax.Array:
    """Returns which keys each query may attend to: bool [B or 1, T, S] (batch, queries, keys).

    Args:
      q_slots: slot of each query, int32 [B or 1, T]; it sees keys in slots up to its own.
      k_slots: slot of each key, int32 [B or 1, S].
      q_segments: segment id of each query, int32 [B, T], or None. A query sees only keys of its own
        segment, and segment 0 is never visible.
      k_segments: segment id of each key, int32 [B, S]; None exactly if `q_segments` is.
      window: a query sees at most this many slots, its own included; None: all.
    """
    distance = q_slots[:, :, None] - k_slots[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None:
        assert k_segments is not None
        mask &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return mask


def _split_into_blocks(x: jax.Array, block: int, fill: int) -> jax.Array:
    """Splits [B, T] into blocks along T: [B, ⌈T/block⌉, block], the last one padded with `fill`."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
    return x.reshape(x.shape[0], -1, block)


def _id_ranges(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest segment id in each block, ignoring padding.

    Args:
      segments: int32 [B, T], segment id of each token; 0 is padding.
      block: tokens per block.

    Returns:
      (smallest, largest), int32 [B, ⌈T/block⌉] each. A block of padding only has a smallest id
      above every real id and a largest id of 0.
    """
    ids = _split_into_blocks(segments, block, 0)
    return jnp.where(ids > 0, ids, _NO_ID).min(axis=-1), ids.max(axis=-1)


def live_blocks(mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
    """Returns which pairs of blocks may contain a visible pair of query and key.

    Never False for a pair of blocks with a visible pair. If segment ids ascend the result is tight;
    otherwise it may be True for some pairs of blocks that are masked completely.

    Args:
      mask: the attention mask.
      q_len: number of queries, T.
      k_len: number of keys, S.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      bool [B or 1, ⌈T/block_q⌉, ⌈S/block_k⌉] (batch rows, query blocks, key blocks).
    """
    nq, nk = -(-q_len // block_q), -(-k_len // block_k)
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    first_q = start[:, None] + jnp.arange(nq, dtype=jnp.int32) * block_q
    last_q = jnp.minimum(first_q + block_q, start[:, None] + q_len) - 1
    first_k = jnp.arange(nk, dtype=jnp.int32) * block_k
    last_k = jnp.minimum(first_k + block_k, k_len) - 1
    live = first_k <= last_q[:, :, None]
    window = mask.any_window()
    if window is not None:
        live &= first_q[:, :, None] - last_k < window
    if mask.q_segments is not None:
        assert mask.k_segments is not None
        q_low, q_high = (x[:, :, None] for x in _id_ranges(mask.q_segments, block_q))
        k_low, k_high = (x[:, None, :] for x in _id_ranges(mask.k_segments, block_k))
        live &= (q_low <= k_high) & (k_low <= q_high)
    return live


def full_blocks(mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
    """Returns which pairs of blocks are visible completely, so that a kernel can skip the mask.

    A key block that extends past `k_len` is never full; queries past `q_len` are ignored.

    Args:
      mask: the attention mask.
      q_len: number of queries, T.
      k_len: number of keys, S.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      bool [B or 1, ⌈T/block_q⌉, ⌈S/block_k⌉] (batch rows, query blocks, key blocks).
    """
    nq, nk = -(-q_len // block_q), -(-k_len // block_k)
    start = jnp.zeros((1,), jnp.int32) if mask.q_start is None else mask.q_start
    first_q = start[:, None] + jnp.arange(nq, dtype=jnp.int32) * block_q
    last_q = jnp.minimum(first_q + block_q, start[:, None] + q_len) - 1
    first_k = jnp.arange(nk, dtype=jnp.int32) * block_k
    last_k = first_k + block_k - 1
    full = (last_k <= first_q[:, :, None]) & (last_k < k_len)
    window = mask.any_window()
    if window is not None:
        full &= last_q[:, :, None] - first_k < window
    if mask.q_segments is not None:
        assert mask.k_segments is not None
        # Padding queries repeat the last id, so they do not matter; blocks past k_len are not full.
        pad = ((0, 0), (0, -q_len % block_q))
        q_ids = jnp.pad(mask.q_segments, pad, mode="edge").reshape(-1, nq, block_q)
        k_ids = _split_into_blocks(mask.k_segments, block_k, 0)
        q_id = q_ids.min(axis=-1)[:, :, None]
        k_id = k_ids.min(axis=-1)[:, None, :]
        full &= (q_id == q_ids.max(axis=-1)[:, :, None]) & (k_id == k_ids.max(axis=-1)[:, None, :])
        full &= (q_id == k_id) & (k_id > 0)
    return full


def key_bounds(
    mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns for each block of queries the range of key blocks that it needs.

    Args:
      mask: the attention mask.
      q_len: number of queries, T.
      k_len: number of keys, S.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      (low, high), int32 [B or 1, ⌈T/block_q⌉] each: key blocks low to high - 1; (0, 0) where none
      is needed.
    """
    return _true_range(live_blocks(mask, q_len, k_len, block_q, block_k))


def query_bounds(
    mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns for each block of keys the range of query blocks that need it.

    Args:
      mask: the attention mask.
      q_len: number of queries, T.
      k_len: number of keys, S.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      (low, high), int32 [B or 1, ⌈S/block_k⌉] each: query blocks low to high - 1; (0, 0) where no
      query block needs the keys.
    """
    return _true_range(live_blocks(mask, q_len, k_len, block_q, block_k).swapaxes(1, 2))


def _true_range(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest range along the last axis that contains all True elements.

    Args:
      live: bool [..., n].

    Returns:
      (first True index, last True index + 1), int32 [...] each; (0, 0) where all are False.
    """
    n = live.shape[-1]
    some = live.any(axis=-1)
    low = jnp.argmax(live, axis=-1).astype(jnp.int32)
    high = n - jnp.argmax(live[..., ::-1], axis=-1).astype(jnp.int32)
    return jnp.where(some, low, 0), jnp.where(some, high, 0)
