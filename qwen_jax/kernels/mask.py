"""Which keys a query sees, and which blocks of them a kernel can leave out.

One description for every implementation: causal by slot, segments, window. Everything here is local
to one device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Large enough that exp underflows to 0 in float32, small enough that differences stay finite. Also
# the log-sum-exp of a query that sees no key.
MASKED = -1e30

_NO_ID = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Query t of row b stands in slot q_start[b] + t and sees keys in slots up to its own.

    Attributes:
      q_start: int32 [B], or None for 0 everywhere (known when compiling).
      q_segments: int32 [B,T], k_segments: int32 [B,S], both or neither: a query sees keys of its
        own segment only, and segment 0 (padding) is never seen. Ids may come in any order; blocks
        are left out tightly when they ascend, as packed rows do.
      layer_window: int32 scalar, a window that differs from layer to layer of a scan.
      window: the same, known when compiling. A query sees at most this many slots, its own
        included. At most one of the two is given.
    """

    q_start: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    layer_window: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def any_window(self) -> jax.Array | int | None:
        """The window, wherever it is given."""
        return self.window if self.layer_window is None else self.layer_window


def make_mask(q_start, q_segments, k_segments, window) -> Mask:
    """A `Mask` from the arguments of `dispatch.attention`; sorts the window by when it is known."""
    known = window is None or isinstance(window, int)
    return Mask(
        *(q_start, q_segments, k_segments),
        layer_window=None if known else window,
        window=window if known else None,
    )


def visible(
    q_slots: jax.Array,
    k_slots: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    window: jax.Array | int | None,
) -> jax.Array:
    """The mask itself, bool [B or 1,T,S], from slots [B or 1,T] and [B or 1,S]."""
    distance = q_slots[:, :, None] - k_slots[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None:
        mask &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments > 0)[:, None, :]
    return mask


def _blocks(x: jax.Array, block: int, fill: int) -> jax.Array:
    """[B,T] -> [B,⌈T/block⌉,block]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)
    return x.reshape(x.shape[0], -1, block)


def _id_ranges(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest id in each block, padding left out: int32 [B,n] each."""
    ids = _blocks(segments, block, 0)
    return jnp.where(ids > 0, ids, _NO_ID).min(axis=-1), ids.max(axis=-1)


def live_blocks(mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
    """Whether any query of a block may see any key of a block: bool [B or 1, nq, nk].

    Never false where something is seen; true for nothing but a few blocks more when ids of segments
    don't ascend.
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
        q_low, q_high = (x[:, :, None] for x in _id_ranges(mask.q_segments, block_q))
        k_low, k_high = (x[:, None, :] for x in _id_ranges(mask.k_segments, block_k))
        live &= (q_low <= k_high) & (k_low <= q_high)
    return live


def full_blocks(mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
    """Whether every query of a block sees every key of a block: bool [B or 1, nq, nk].

    Such a block needs no mask. A block of keys that reaches past k_len is never full; queries past
    q_len are nobody's and don't count.
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
        # The border's id is repeated past q_len; past k_len nothing is full anyway.
        pad = ((0, 0), (0, -q_len % block_q))
        q_ids = jnp.pad(mask.q_segments, pad, mode="edge").reshape(-1, nq, block_q)
        k_ids = _blocks(mask.k_segments, block_k, 0)
        q_id = q_ids.min(axis=-1)[:, :, None]
        k_id = k_ids.min(axis=-1)[:, None, :]
        full &= (q_id == q_ids.max(axis=-1)[:, :, None]) & (k_id == k_ids.max(axis=-1)[:, None, :])
        full &= (q_id == k_id) & (k_id > 0)
    return full


def key_bounds(
    mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys it needs, [low, high): int32 [B or 1, nq] each.

    (0, 0) where there are none.
    """
    return _bounds(live_blocks(mask, q_len, k_len, block_q, block_k))


def query_bounds(
    mask: Mask, q_len: int, k_len: int, block_q: int, block_k: int
) -> tuple[jax.Array, jax.Array]:
    """For each block of keys the blocks of queries that need it: int32 [B or 1, nk] each."""
    return _bounds(live_blocks(mask, q_len, k_len, block_q, block_k).swapaxes(1, 2))


def _bounds(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = live.shape[-1]
    some = live.any(axis=-1)
    low = jnp.argmax(live, axis=-1).astype(jnp.int32)
    high = n - jnp.argmax(live[..., ::-1], axis=-1).astype(jnp.int32)
    return jnp.where(some, low, 0), jnp.where(some, high, 0)
