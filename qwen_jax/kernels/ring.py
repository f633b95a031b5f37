"""Ring attention: exact attention over a sequence that is sharded over devices.

Keys and values circulate around the `context` axis; each device attends to the shard it holds while
the next one is in transfer, and merges results by their log-sum-exp (Liu et al., arXiv:2310.01889).
In zigzag order (`parallel.zigzag`), every step consists of two half-by-half blocks that are fully
visible, on every device; the first step is the causal block of the device's own keys. The backward
pass sends the float32 gradients of keys and values along with them, so that each returns complete
to its device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.flash import NORMALIZER, OUTPUT, FlashKernel, merge, row_delta
from qwen_jax.kernels.mask import MASKED, Mask
from qwen_jax.parallel.zigzag import AXIS


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, kernel: FlashKernel
) -> jax.Array:
    """Computes attention of this device's queries to all keys of the ring; call inside `shard_map`.

    Args:
      q: local queries [b, t, N, H] in zigzag order: for device i of C, chunks i and 2C−1−i of t/2
        tokens each.
      k: local keys [b, t, K, H].
      v: local values [b, t, K, H].
      mask: segments and window; q_start must be None.
      scale: factor on q·k.
      kernel: attention kernels that process each block, as in `flash.flash_attention`.

    Returns:
      [b, t, N, H] in q's dtype.
    """
    return _forward(q, k, v, mask, scale, kernel)[0]


class _Ring:
    """Position of this device in the ring, and operations on its two chunks.

    Attributes:
      size: number of devices C.
      index: index of this device.
      half: tokens per chunk.
      rows: rows of the batch.
      mask: the mask of the call.
    """

    def __init__(self, q, mask: Mask):
        self.size = jax.lax.axis_size(AXIS)
        self.index = jax.lax.axis_index(AXIS).astype(jnp.int32)
        self.half = q.shape[1] // 2
        self.rows = q.shape[0]
        self.mask = mask

    def split_halves(self, x, axis=1):
        """Returns the two chunks of a local array; (None, None) for None."""
        return (None, None) if x is None else jnp.split(x, 2, axis=axis)

    def send(self, tree):
        """Sends arrays to the next device of the ring and returns those of the previous one."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)

    def block_mask(self, q_segments, k_segments, distance) -> Mask:
        """Returns the mask of a chunk of queries against a chunk of keys.

        Args:
          q_segments: segment ids of the queries, or None.
          k_segments: segment ids of the keys, or None.
          distance: how many chunks the queries are after the keys; 0: the same chunk.
        """
        start = None
        if not (isinstance(distance, int) and distance == 0):
            start = jnp.broadcast_to(jnp.asarray(distance * self.half, jnp.int32), (self.rows,))
        mask = self.mask
        return Mask(start, q_segments, k_segments, mask.layer_window, mask.window)

    def chunk(self, half, device):
        """Returns the number in the sequence of the first (0) or second (1) chunk of a device."""
        return device if half == 0 else 2 * self.size - 1 - device


def _local_blocks(ring: _Ring):
    """Returns (query half, key half, distance in chunks) of each block of the first step."""
    gap = ring.chunk(1, ring.index) - ring.index
    return [(0, 0, 0), (1, 1, 0), (1, 0, gap)]


def _select(condition, pair):
    """Returns the first of two arrays if `condition`, else the second; None for (None, None)."""
    return None if pair[0] is None else jnp.where(condition, pair[0], pair[1])


def _forward(q, k, v, mask, scale, kernel):
    """Computes `ring_attention` and the residuals for its backward pass.

    Returns:
      (output [b, t, N, H], residuals).
    """
    ring = _Ring(q, mask)
    queries = ring.split_halves(q)
    q_ids = ring.split_halves(mask.q_segments)

    def block(q_half, ids, keys, half_ids, distance):
        """Attends to one chunk of keys: returns output (float32) and log-sum-exp."""
        out, lse = kernel.forward(q_half, *keys, ring.block_mask(ids, half_ids, distance), scale)
        return out.astype(jnp.float32), lse

    def step(r, current, totals):
        """Merges attention to the keys of device i − r into the totals of both query halves.

        The blocks are (query half 1, key half 0), and (0, 0) or (1, 1).
        """
        keys, values, k_ids = (ring.split_halves(x) for x in current)
        source = (ring.index - r) % ring.size
        earlier = source < ring.index
        own, other = ring.chunk(1, ring.index), ring.chunk(1, source)
        cross_half = block(queries[1], q_ids[1], (keys[0], values[0]), k_ids[0], own - source)
        distance = jnp.where(earlier, ring.index - source, own - other)
        same_half = block(
            _select(earlier, queries),
            _select(earlier, q_ids),
            (_select(earlier, keys), _select(earlier, values)),
            _select(earlier, k_ids),
            distance,
        )
        empty = (jnp.zeros_like(same_half[0]), jnp.full_like(same_half[1], MASKED))
        first = (_select(earlier, pair) for pair in zip(same_half, empty, strict=True))
        second = (_select(earlier, pair) for pair in zip(empty, same_half, strict=True))
        totals = merge(*totals[0], *first), merge(*merge(*totals[1], *cross_half), *second)
        return totals

    current = (k, v, mask.k_segments)
    incoming = ring.send(current)
    totals: list[Any] = [None, None]
    parts = [ring.split_halves(x) for x in current]
    for q_half, k_half, distance in _local_blocks(ring):
        kv = (parts[0][k_half], parts[1][k_half])
        part = block(queries[q_half], q_ids[q_half], kv, parts[2][k_half], distance)
        totals[q_half] = part if totals[q_half] is None else merge(*totals[q_half], *part)
    (first, second) = _circulate(ring, step, incoming, tuple(totals))
    out = jnp.concatenate([first[0], second[0]], axis=1).astype(q.dtype)
    lse = jnp.concatenate([first[1], second[1]], axis=2)
    out, lse = checkpoint_name(out, OUTPUT), checkpoint_name(lse, NORMALIZER)
    return out, (q, k, v, mask, out, lse)


def _circulate(ring: _Ring, step, current, carry):
    """Runs steps 1 … C−1, each of which computes on current keys while sending them on.

    Args:
      ring: position in the ring.
      step: (r, keys, carry) -> carry.
      current: keys, values and segment ids of the previous device.
      carry: initial carry.
    """

    def body(r, state):
        """Runs step r while its keys are sent on."""
        current, carry = state
        incoming = ring.send(current)
        carry = step(r, current, carry)
        # The exchange must have both ends inside the step, or the scheduler may run all exchanges
        # before any kernel.
        return jax.lax.optimization_barrier((incoming, carry))

    if ring.size > 2:
        current, carry = jax.lax.fori_loop(1, ring.size - 1, body, (current, carry))
    return step(ring.size - 1, current, carry)


def _backward(scale, kernel, residuals, d_out):
    """Computes the gradients of `ring_attention`.

    Args:
      scale: factor on q·k.
      kernel: attention kernels of each block.
      residuals: as `_forward` returns them.
      d_out: gradient of the output [b, t, N, H].

    Returns:
      Gradients of q, k, v, and None for the mask.
    """
    q, k, v, mask, out, lse = residuals
    ring = _Ring(q, mask)
    delta = ring.split_halves(row_delta(out, d_out), axis=2)
    queries, d_outs = ring.split_halves(q), ring.split_halves(d_out.astype(q.dtype))
    lses, q_ids = ring.split_halves(lse, axis=2), ring.split_halves(mask.q_segments)

    def block(query, keys, half_ids, distance):
        """Computes (dq, dk, dv) of one block, float32."""
        q_half, d_out_half, lse_half, delta_half, ids = query
        mask = ring.block_mask(ids, half_ids, distance)
        return kernel.backward(
            q_half, *keys, mask, scale, lse_half, d_out_half, delta_half, jnp.float32
        )

    query_halves = [(queries[h], d_outs[h], lses[h], delta[h], q_ids[h]) for h in (0, 1)]

    def step(r, current, dq):
        """Adds to dq, and returns the gradients of the keys and values of device i − r."""
        keys, values, k_ids = (ring.split_halves(x) for x in current)
        source = (ring.index - r) % ring.size
        earlier = source < ring.index
        own, other = ring.chunk(1, ring.index), ring.chunk(1, source)
        cross_half = block(query_halves[1], (keys[0], values[0]), k_ids[0], own - source)
        distance = jnp.where(earlier, ring.index - source, own - other)
        near_query = tuple(_select(earlier, pair) for pair in zip(*query_halves, strict=True))
        near_keys = (_select(earlier, keys), _select(earlier, values))
        same_half = block(near_query, near_keys, _select(earlier, k_ids), distance)
        dq += _place_gradients(earlier, same_half[0], cross_half[0], cross_half_first=False)
        pairs = zip(same_half[1:], cross_half[1:], strict=True)
        return dq, tuple(_place_gradients(earlier, *pair, cross_half_first=True) for pair in pairs)

    keys, values, k_ids = (ring.split_halves(x) for x in (k, v, mask.k_segments))
    totals = {"dq": [0.0, 0.0], "dk": [0.0, 0.0], "dv": [0.0, 0.0]}
    incoming = ring.send((k, v, mask.k_segments))
    for q_half, k_half, distance in _local_blocks(ring):
        parts = block(query_halves[q_half], (keys[k_half], values[k_half]), k_ids[k_half], distance)
        for name, half, part in zip(totals, (q_half, k_half, k_half), parts, strict=True):
            totals[name][half] += part
    dq, dk, dv = (jnp.concatenate(x, axis=1) for x in totals.values())
    dq, dk, dv = _circulate_with_gradients(ring, step, incoming, dq, (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _place_gradients(earlier, same_half, cross_half, *, cross_half_first: bool):
    """Adds the gradients of the two blocks of a step to the halves they belong to.

    Args:
      earlier: whether the keys come from a device with a lower index than this one.
      same_half: gradient of q, k or v from the block of equal halves: (0, 0) if `earlier`, else (1,
        1); [b, t/2, heads, H].
      cross_half: gradient of the same array from the block of query half 1 and key half 0, shaped
        like `same_half`.
      cross_half_first: True for dk and dv, where `cross_half` is added to half 0; False for dq,
        where it is added to half 1.

    Returns:
      [b, t, heads, H]: the gradients of both halves, concatenated; zero where no block contributes.
    """
    zero = jnp.zeros_like(same_half)
    same_half = (jnp.where(earlier, same_half, zero), jnp.where(earlier, zero, same_half))
    split_halves = (
        (same_half[0] + cross_half, same_half[1])
        if cross_half_first
        else (same_half[0], same_half[1] + cross_half)
    )
    return jnp.concatenate(split_halves, axis=1)


def _circulate_with_gradients(ring: _Ring, step, current, dq, gradients):
    """Runs the steps as `_circulate`; gradients of keys and values follow one exchange behind.

    Step r adds to the gradients only at its end, so they may arrive while it computes. The last
    exchange returns them to their device.
    """

    def receive_and_add(r, current, dq, gradients):
        """Runs step r and adds its gradients to those that arrive."""
        arriving = ring.send(gradients)
        dq, added = step(r, current, dq)
        return dq, jax.tree.map(jnp.add, arriving, added)

    def body(r, state):
        """Runs step r while keys and gradients are sent on."""
        current, dq, gradients = state
        incoming = ring.send(current)
        dq, gradients = receive_and_add(r, current, dq, gradients)
        return jax.lax.optimization_barrier((incoming, dq, gradients))

    if ring.size > 2:
        current, dq, gradients = jax.lax.fori_loop(1, ring.size - 1, body, (current, dq, gradients))
    dq, gradients = receive_and_add(ring.size - 1, current, dq, gradients)
    return dq, *ring.send(gradients)


ring_attention.defvjp(_forward, _backward)
