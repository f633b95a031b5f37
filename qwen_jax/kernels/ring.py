"""Ring attention: exact attention over a sequence that no device holds whole.

Keys and values travel around the `context` axis; each device attends to the part it holds while
the next one is on its way, and merges results by their log-sum-exp (Liu et al., arXiv:2310.01889).
In zigzag order (`parallel.zigzag`) every step is two half-by-half blocks that are seen in full, on
every device; the first step is the device's own diagonal. The backward pass sends gradients of keys
and values along with them, in float32, so each arrives home complete.
"""

from __future__ import annotations

import functools

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
    """Attention of this device's queries to all keys of the ring; call it inside `shard_map`.

    Args:
      q: [b,t,N,H] local, in zigzag order: chunks i and 2C−1−i of t/2 tokens each. k, v: [b,t,K,H].
      mask: segments and window; q_start must be None.
      scale, kernel: as in `flash.flash_attention`.

    Returns:
      [b,t,N,H] in q's dtype.
    """
    return _forward(q, k, v, mask, scale, kernel)[0]


class _Ring:
    """Who this device is, what it holds, and the two blocks of work of each step."""

    def __init__(self, q, mask: Mask):
        self.size = jax.lax.axis_size(AXIS)
        self.index = jax.lax.axis_index(AXIS).astype(jnp.int32)
        self.half = q.shape[1] // 2
        self.rows = q.shape[0]
        self.mask = mask

    def halves(self, x, axis=1):
        """The two chunks of a local array; (None, None) for None."""
        return (None, None) if x is None else jnp.split(x, 2, axis=axis)

    def send(self, tree):
        """To the next device of the ring."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)

    def block_mask(self, q_segments, k_segments, distance) -> Mask:
        """Mask of a chunk of queries `distance` chunks after the keys; 0 is the diagonal."""
        start = None
        if not (isinstance(distance, int) and distance == 0):
            start = jnp.broadcast_to(jnp.asarray(distance * self.half, jnp.int32), (self.rows,))
        mask = self.mask
        return Mask(start, q_segments, k_segments, mask.layer_window, mask.window)

    def chunk(self, half, device):
        """Number of the first (0) or second (1) chunk of a device."""
        return device if half == 0 else 2 * self.size - 1 - device


def _own_blocks(ring: _Ring):
    """(query half, key half, distance in chunks) of the first step."""
    gap = ring.chunk(1, ring.index) - ring.index
    return [(0, 0, 0), (1, 1, 0), (1, 0, gap)]


def _pick(condition, pair):
    """One of two arrays of the same shape; None for a pair of None."""
    return None if pair[0] is None else jnp.where(condition, pair[0], pair[1])


def _forward(q, k, v, mask, scale, kernel):
    ring = _Ring(q, mask)
    queries = ring.halves(q)
    q_ids = ring.halves(mask.q_segments)

    def block(q_half, ids, keys, half_ids, distance):
        out, lse = kernel.forward(*(q_half, *keys), ring.block_mask(ids, half_ids, distance), scale)
        return out.astype(jnp.float32), lse

    def step(r, held, totals):
        """Adds the keys of device i − r: (query 1, key 0), and (0, 0) or (1, 1)."""
        keys, values, k_ids = (ring.halves(x) for x in held)
        source = (ring.index - r) % ring.size
        earlier = source < ring.index
        own, other = ring.chunk(1, ring.index), ring.chunk(1, source)
        far = block(queries[1], q_ids[1], (keys[0], values[0]), k_ids[0], own - source)
        distance = jnp.where(earlier, ring.index - source, own - other)
        near = block(
            *(_pick(earlier, queries), _pick(earlier, q_ids)),
            (_pick(earlier, keys), _pick(earlier, values)),
            *(_pick(earlier, k_ids), distance),
        )
        nothing = (jnp.zeros_like(near[0]), jnp.full_like(near[1], MASKED))
        first = (_pick(earlier, pair) for pair in zip(near, nothing, strict=True))
        second = (_pick(earlier, pair) for pair in zip(nothing, near, strict=True))
        totals = merge(*totals[0], *first), merge(*merge(*totals[1], *far), *second)
        return totals

    held = (k, v, mask.k_segments)
    coming = ring.send(held)
    totals = [None, None]
    parts = [ring.halves(x) for x in held]
    for q_half, k_half, distance in _own_blocks(ring):
        kv = (parts[0][k_half], parts[1][k_half])
        part = block(queries[q_half], q_ids[q_half], kv, parts[2][k_half], distance)
        totals[q_half] = part if totals[q_half] is None else merge(*totals[q_half], *part)
    (first, second) = _around(ring, step, coming, tuple(totals))
    out = jnp.concatenate([first[0], second[0]], axis=1).astype(q.dtype)
    lse = jnp.concatenate([first[1], second[1]], axis=2)
    out, lse = checkpoint_name(out, OUTPUT), checkpoint_name(lse, NORMALIZER)
    return out, (q, k, v, mask, out, lse)


def _around(ring: _Ring, step, held, carry):
    """Steps 1 … C−1, each computing on what has arrived while sending it on."""

    def body(r, state):
        held, carry = state
        coming = ring.send(held)
        carry = step(r, held, carry)
        # The exchange must have both ends inside the step, or the scheduler may run all exchanges
        # before any kernel.
        return jax.lax.optimization_barrier((coming, carry))

    if ring.size > 2:
        held, carry = jax.lax.fori_loop(1, ring.size - 1, body, (held, carry))
    return step(ring.size - 1, held, carry)


def _backward(scale, kernel, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    ring = _Ring(q, mask)
    delta = ring.halves(row_delta(out, d_out), axis=2)
    queries, d_outs = ring.halves(q), ring.halves(d_out.astype(q.dtype))
    lses, q_ids = ring.halves(lse, axis=2), ring.halves(mask.q_segments)

    def block(query, keys, half_ids, distance):
        q_half, d_out_half, lse_half, delta_half, ids = query
        mask = ring.block_mask(ids, half_ids, distance)
        return kernel.backward(
            *(q_half, *keys), mask, scale, lse_half, d_out_half, delta_half, jnp.float32
        )

    of = [(queries[h], d_outs[h], lses[h], delta[h], q_ids[h]) for h in (0, 1)]

    def step(r, held, dq):
        """The total of dq, and gradients of the keys and values of device i − r."""
        keys, values, k_ids = (ring.halves(x) for x in held)
        source = (ring.index - r) % ring.size
        earlier = source < ring.index
        own, other = ring.chunk(1, ring.index), ring.chunk(1, source)
        far = block(of[1], (keys[0], values[0]), k_ids[0], own - source)
        distance = jnp.where(earlier, ring.index - source, own - other)
        near_query = tuple(_pick(earlier, pair) for pair in zip(*of, strict=True))
        near_keys = (_pick(earlier, keys), _pick(earlier, values))
        near = block(near_query, near_keys, _pick(earlier, k_ids), distance)
        dq += _place(earlier, near[0], far[0], far_first=False)
        pairs = zip(near[1:], far[1:], strict=True)
        return dq, tuple(_place(earlier, *pair, far_first=True) for pair in pairs)

    keys, values, k_ids = (ring.halves(x) for x in (k, v, mask.k_segments))
    totals = {"dq": [0.0, 0.0], "dk": [0.0, 0.0], "dv": [0.0, 0.0]}
    coming = ring.send((k, v, mask.k_segments))
    for q_half, k_half, distance in _own_blocks(ring):
        parts = block(of[q_half], (keys[k_half], values[k_half]), k_ids[k_half], distance)
        for name, half, part in zip(totals, (q_half, k_half, k_half), parts, strict=True):
            totals[name][half] += part
    dq, dk, dv = (jnp.concatenate(x, axis=1) for x in totals.values())
    dq, dk, dv = _around_with_gradients(ring, step, coming, dq, (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _place(earlier, near, far, *, far_first: bool):
    """Gradients of both halves from those of the two blocks of a step.

    The far block is query half 1 by key half 0; the near one is (0, 0) when the keys are `earlier`
    than this device's, else (1, 1).
    """
    zero = jnp.zeros_like(near)
    near = (jnp.where(earlier, near, zero), jnp.where(earlier, zero, near))
    halves = (near[0] + far, near[1]) if far_first else (near[0], near[1] + far)
    return jnp.concatenate(halves, axis=1)


def _around_with_gradients(ring: _Ring, step, held, dq, gradients):
    """As `_around`; gradients of keys and values follow them, one exchange behind.

    Step r only adds to the gradients at its end, so they may arrive while it computes. The last
    exchange brings them home.
    """

    def one(r, held, dq, gradients):
        arriving = ring.send(gradients)
        dq, added = step(r, held, dq)
        return dq, jax.tree.map(jnp.add, arriving, added)

    def body(r, state):
        held, dq, gradients = state
        coming = ring.send(held)
        dq, gradients = one(r, held, dq, gradients)
        return jax.lax.optimization_barrier((coming, dq, gradients))

    if ring.size > 2:
        held, dq, gradients = jax.lax.fori_loop(1, ring.size - 1, body, (held, dq, gradients))
    dq, gradients = one(ring.size - 1, held, dq, gradients)
    return dq, *ring.send(gradients)


ring_attention.defvjp(_forward, _backward)
